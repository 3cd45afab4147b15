"""The Triton kernels against float64 eager, next to the errors of PyTorch's own attention in the same dtype.

usage: check_triton.py [OUTPUT.json] [--device cuda] [--lengths 2048 1999] [--dtypes bfloat16 float16 float32]
                       [--levels 1 2 3 4] [--widths 64 128]
Prints a line a case, with the tensor that comes closest to its limit; ends with 1 when a case fails: an error above its
limit, a number that is not finite, or two runs that differ in a bit. The output and each gradient have an error, the root
mean square of the difference over that of the value; its limit is `FACTOR` times the larger error of the backends "eager"
and "lifted" in the same dtype, plus a floor for tensors that these get exactly.
"""

import argparse
import itertools

import torch

from hkt_hf.modeling.attention_hkt import hierarchical_attention


FACTOR = 2.0
FLOOR = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# The gradient of a level weight is one sum over all scores, of both signs: float32 loses more of it.
WEIGHT_FLOOR = 2e-5
BATCH, HEADS = 2, 2


def make_inputs(length, num_levels, width, device, batch_size=BATCH, num_heads=HEADS):
    """Float64 leaves: queries, keys, value, level weights, in one list."""
    lengths = [-(-length // 2**level) for level in range(num_levels)]
    leaves = [torch.randn(batch_size, num_heads, n, width, dtype=torch.float64) for n in [*lengths, *lengths, length]]
    leaves.append(torch.randn(num_heads, num_levels, dtype=torch.float64).softmax(-1))
    return [leaf.to(device) for leaf in leaves]


def attend(leaves, dtype, backend, **kwargs):
    """Output and gradients of the operator, inputs in `dtype` and level weights in at least float32."""
    weight_dtype = torch.promote_types(dtype, torch.float32)
    *features, weights = leaves
    leaves = [*(tensor.to(dtype) for tensor in features), weights.to(weight_dtype)]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    num_levels = len(leaves) // 2 - 1
    queries, keys, value, weights = leaves[:num_levels], leaves[num_levels:-2], leaves[-2], leaves[-1]
    output = hierarchical_attention(queries, keys, value, weights, backend=backend, **kwargs)
    return output_and_gradients(output, leaves)


def output_and_gradients(output, leaves):
    probe = torch.linspace(0, 50, output.numel(), dtype=torch.float64, device=output.device).sin().view_as(output)
    return [output.detach(), *torch.autograd.grad((output * probe.to(output.dtype)).sum(), leaves)]


def errors(actual, expected, smallest=1e-6):
    """The relative error of each tensor, root mean squares; `smallest` is the least to divide by."""
    return [
        ((tensor.double() - reference).norm() / reference.norm().clamp_min(smallest * reference.numel() ** 0.5)).item()
        for tensor, reference in zip(actual, expected, strict=True)
    ]


def floors(dtype, num_levels):
    """The least limit of the output's error and of each gradient's."""
    return [FLOOR[dtype]] * (2 * num_levels + 2) + [max(FLOOR[dtype], WEIGHT_FLOOR)]


def compare(leaves, dtype, smallest=1e-6, **kwargs):
    """Output and gradients of the kernels, their errors, PyTorch's errors, and the limits; each a list by tensor."""
    expected = attend(leaves, torch.float64, "eager", **kwargs)
    actual, eager, lifted = (attend(leaves, dtype, backend, **kwargs) for backend in ("triton", "eager", "lifted"))
    pytorch_errors = list(map(max, errors(eager, expected, smallest), errors(lifted, expected, smallest)))
    limits = [FACTOR * x + floor for x, floor in zip(pytorch_errors, floors(dtype, len(leaves) // 2 - 1), strict=True)]
    return actual, errors(actual, expected, smallest), pytorch_errors, limits


def make_mask(name, length, device):
    if name == "none":
        return None
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    if name == "right":
        mask[0, length // 3 :] = False
    elif name == "left":
        mask[0, : length // 2] = False
    elif name == "gaps":
        mask = torch.rand(BATCH, length) < 0.7
    return mask.to(device)


def check(dtype, num_levels, length, width, is_causal, padding, device):
    """One case: what it was, the errors, and whether it passed."""
    torch.manual_seed(length)
    leaves = [
        tensor if i == 2 * num_levels + 1 else tensor.to(dtype).double()
        for i, tensor in enumerate(make_inputs(length, num_levels, width, device))
    ]
    mask = make_mask(padding, length, device)
    kwargs = {"is_causal": is_causal, "key_padding_mask": mask}
    actual, triton_errors, pytorch_errors, limits = compare(leaves, dtype, **kwargs)
    same_bits = all(map(torch.equal, actual, attend(leaves, dtype, "triton", **kwargs)))
    names = ["output", *(f"query{i}" for i in range(num_levels)), *(f"key{i}" for i in range(num_levels))]
    name, error, pytorch_error, limit = max(
        zip([*names, "value", "level_weights"], triton_errors, pytorch_errors, limits, strict=True),
        key=lambda tensor: tensor[1] / tensor[3],
    )
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "levels": num_levels,
        "length": length,
        "width": width,
        "causal": is_causal,
        "padding": padding,
        "tensor": name,
        "error": error,
        "pytorch_error": pytorch_error,
        "limit": limit,
        "same_bits": same_bits,
        # A NaN is below no limit.
        "passed": same_bits and all(map(float.__le__, triton_errors, limits)),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output", nargs="?")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 1999])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--levels", type=int, nargs="+", default=[3, 1, 2, 4])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    options = parser.parse_args()
    cases = []
    for width, num_levels, dtype in itertools.product(options.widths, options.levels, options.dtypes):
        for length, is_causal, padding in itertools.product(
            options.lengths, (False, True), ("none", "right", "left", "gaps")
        ):
            if padding in ("left", "gaps") and length != options.lengths[-1]:
                continue  # each length more is one more choice of tiles
            case = check(getattr(torch, dtype), num_levels, length, width, is_causal, padding, options.device)
            print(
                *(
                    f"{key}={value:.2e}" if isinstance(value, float) else f"{key}={value}"
                    for key, value in case.items()
                )
            )
            cases.append(case)
            if options.output:
                from hkt_hf.environment import environment
                from hkt_hf.files import write_json

                write_json(options.output, {**environment(), "factor": FACTOR, "cases": cases})
    failed = sum(not case["passed"] for case in cases)
    print(f"{len(cases) - failed} of {len(cases)} cases passed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
