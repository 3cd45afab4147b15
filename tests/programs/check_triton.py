"""The Triton kernels against float64 eager, next to the error of PyTorch's flat fused attention on the same machine.

usage: check_triton.py [OUTPUT.json] [--device cuda] [--lengths 2048 1999] [--dtypes bfloat16 float16 float32]
                       [--levels 1 2 3 4] [--widths 64 128]
Prints a table; ends with 1 when a case fails: an error above `FACTOR` times that of flat attention in the same
precision, a number that is not finite, or two runs that differ in a bit. Errors are the largest over the output and all
gradients, of the root mean square of the difference over that of the value.
"""

import argparse
import itertools

import torch
import torch.nn.functional as F

from hkt_hf.modeling.attention_hkt import hierarchical_attention


FACTOR = 2.0
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


def attend_flat(leaves, dtype, mask, is_causal):
    """Output and gradients of flat attention of the finest level."""
    num_levels = len(leaves) // 2 - 1
    leaves = [leaves[i].detach().to(dtype).clone().requires_grad_() for i in (0, num_levels, -2)]
    if mask is not None:
        mask = mask[:, None, None, :]
        if is_causal:
            length = mask.shape[-1]
            mask = mask & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    output = F.scaled_dot_product_attention(*leaves, attn_mask=mask, is_causal=is_causal and mask is None)
    return output_and_gradients(output, leaves)


def output_and_gradients(output, leaves):
    probe = torch.linspace(0, 50, output.numel(), dtype=torch.float64, device=output.device).sin().view_as(output)
    return [output.detach(), *torch.autograd.grad((output * probe.to(output.dtype)).sum(), leaves)]


def error(actual, expected, smallest=1e-6):
    """The largest relative error over the tensors, root mean squares; `smallest` is the least to divide by.

    The gradient of level weights is a sum over all features, large and of both signs: at least the root of their number.
    """
    errors = []
    for tensor, reference in zip(actual, expected, strict=True):
        least = (expected[0].numel() / len(reference)) ** 0.5 if reference.dim() == 2 else smallest
        norm = reference.norm().clamp_min(least * reference.numel() ** 0.5)
        errors.append(((tensor.double() - reference).norm() / norm).item())
    return max(errors)


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
        mask[:, 0] = True  # flat attention knows no row without a key
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
    actual, again = (attend(leaves, dtype, "triton", **kwargs) for _ in range(2))
    triton_error = error(actual, attend(leaves, torch.float64, "eager", **kwargs))
    flat_error = None
    if padding != "left" or not is_causal:
        flat = attend_flat(leaves, dtype, mask, is_causal)
        flat_error = error(flat, attend_flat(leaves, torch.float64, mask, is_causal))
    limit = FACTOR * (flat_error or {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype])
    same_bits = all(map(torch.equal, actual, again))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "levels": num_levels,
        "length": length,
        "width": width,
        "causal": is_causal,
        "padding": padding,
        "error": triton_error,
        "flat_error": flat_error,
        "same_bits": same_bits,
        "passed": same_bits and triton_error <= limit,  # false for a NaN
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
