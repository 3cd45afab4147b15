"""The Triton kernels, run by Triton's interpreter on the CPU, against eager in float64; and compiled for a GPU.

Tolerance: of the output and of each gradient, twice the larger error of PyTorch's own attention ("eager" and "lifted") in
the same dtype, plus a small floor (tests/programs/check_triton.py). The interpreter truncates where a GPU rounds to
bfloat16, so that errors in bfloat16 are twice those of a GPU at most.
"""

import importlib.util
import json
import math
import sys

import pytest
import torch
from clients import run_python
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from launch import ROOT
from programs.check_triton import attend, compare, errors, floors, make_inputs
from programs.check_triton import main as check_triton

from hkt_hf import hierarchical_attention, hierarchical_scores
from hkt_hf.modeling import triton_hkt


on_gpu = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(triton_hkt.triton is None, reason="needs the package triton")
DEVICE = "cuda" if on_gpu else "cpu"


def set_tiles(monkeypatch, held, walked):
    """How many phases the kernels hold and walk, at most."""
    monkeypatch.setattr(triton_hkt, "HELD_PHASES", dict.fromkeys(triton_hkt.HELD_PHASES, held))
    monkeypatch.setitem(triton_hkt.INTERPRETED_TILE, "WALKED", walked)


@pytest.fixture(autouse=True, scope="module")
def _large_tiles():
    """The interpreter takes as long for a large tile as for a small one."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_tiles(monkeypatch, 4, 4)
        yield


def assert_close(leaves, dtype=torch.float32, mask=None, is_causal=False, **kwargs):
    leaves = [*(leaf.to(dtype).double() for leaf in leaves[:-1]), leaves[-1]]
    # Of the size of the inputs, 1: where a query sees one key, gradients are what rounding leaves of zero.
    actual, triton_errors, _, limits = compare(
        leaves, dtype, smallest=1.0, key_padding_mask=mask, is_causal=is_causal, **kwargs
    )
    for i, (error, limit) in enumerate(zip(triton_errors, limits, strict=True)):
        assert error <= limit, f"tensor {i} of the output, queries, keys, value and weights"
    return actual


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes
@given(
    length=st.integers(1, 48),
    num_levels=st.integers(1, 4),
    width=st.sampled_from([8, 16, 24]),
    is_causal=st.booleans(),
    padding=st.sampled_from([None, "any", "left", "right"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
@example(length=1, num_levels=3, width=16, is_causal=True, padding=None, dtype=torch.float32, seed=0)
@example(length=69, num_levels=3, width=24, is_causal=True, padding="any", dtype=torch.float32, seed=0)
@example(length=64, num_levels=2, width=16, is_causal=False, padding=None, dtype=torch.bfloat16, seed=0)
def test_outputs_and_gradients_are_those_of_eager(length, num_levels, width, is_causal, padding, dtype, seed):
    torch.manual_seed(seed)
    mask = None
    if padding is not None:
        cut = torch.randint(0, length + 1, (2, 1))
        index = torch.arange(length)
        mask = {"any": torch.rand(2, length) < 0.5, "left": index >= cut, "right": index < cut}[padding].to(DEVICE)
    leaves = make_inputs(length, num_levels, width, DEVICE, batch_size=2, num_heads=1)
    assert_close(leaves, dtype, mask, is_causal, scale=0.7 if seed % 2 else None)


def test_the_rounding_of_the_output_does_not_reach_the_gradients_of_level_weights():
    """Scores of a mean far from zero: what the score gradients of a row miss to sum to zero would be multiplied by it."""
    queries, keys, value, weights = make_inputs(16, 1, 16, DEVICE, 1, 12)
    leaves = [leaf.bfloat16().double() for leaf in (queries + 1.0, keys + 1.0, value)] + [weights]
    _, triton_errors, pytorch_errors, _ = compare(leaves, torch.bfloat16)
    assert triton_errors[-1] <= 1.5 * pytorch_errors[-1]


@pytest.mark.parametrize(
    "num_levels, held, walked",
    [(3, 1, 1), (3, 1, 2), (3, 1, 4), (3, 2, 2), (3, 2, 4), (3, 4, 1), (4, 2, 8), (4, 8, 2)],
)
def test_how_many_phases_a_program_takes_does_not_matter(num_levels, held, walked, monkeypatch):
    set_tiles(monkeypatch, held, walked)
    mask = torch.rand(1, 45, device=DEVICE) < 0.8
    assert_close(make_inputs(45, num_levels, 16, DEVICE, 1, 1), mask=mask, is_causal=True)


def test_several_blocks_of_columns_and_heads():
    # 150 = 37 columns and a half at three levels: three blocks, the last one cut.
    for is_causal in (False, True):
        assert_close(make_inputs(150, 3, 16, DEVICE, 1, 2), is_causal=is_causal)


def test_a_query_that_sees_no_key_gives_zeros_and_zero_gradients():
    mask = torch.ones(2, 21, dtype=torch.bool, device=DEVICE)
    mask[0], mask[1, :6] = False, False
    leaves = make_inputs(21, 3, 16, DEVICE, 2, 1)
    output, *gradients = assert_close(leaves, mask=mask, is_causal=True)
    assert output[0].eq(0).all() and output[1, :, :6].eq(0).all() and output[1, :, 6:].ne(0).any()
    for gradient in gradients[:-1]:
        assert gradient[0].eq(0).all() and gradient[1].ne(0).any()
    assert gradients[-2][1, :, :6].eq(0).all()


def test_two_runs_give_the_same_bits_and_a_level_without_weight_has_its_gradient():
    leaves = make_inputs(53, 3, 16, DEVICE, 2, 2)
    leaves[-1] = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64, device=DEVICE)
    first = assert_close(leaves)
    assert all(map(torch.equal, first, attend([leaf.float() for leaf in leaves], torch.float32, "triton")))
    assert first[-1].ne(0).all()


def test_heads_cut_out_of_tokens_are_read_and_written_in_place():
    *features, weights = make_inputs(33, 3, 16, DEVICE, 2, 2)
    features = [tensor.float() for tensor in features]
    cut = [tensor.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in features]
    output = hierarchical_attention(cut[:3], cut[3:6], cut[6], weights.float(), backend="triton")
    assert output.transpose(1, 2).is_contiguous()
    expected = hierarchical_attention(features[:3], features[3:6], features[6], weights.float(), backend="triton")
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    gradients = torch.autograd.grad(output.sin().sum(), cut)
    assert all(gradient.transpose(1, 2).is_contiguous() for gradient in gradients)
    mixed = [*cut[:5], features[5], features[6]]
    torch.testing.assert_close(
        hierarchical_attention(mixed[:3], mixed[3:6], mixed[6], weights.float(), backend="triton"), expected
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_is_the_same_in_the_backward_pass(is_causal):
    length, width, p = 30, 32, 0.3
    *features, weights = [leaf.float() for leaf in make_inputs(length, 3, width, DEVICE, 2, 2)]
    queries, keys, value = features[:3], features[3:6], features[6]
    kwargs = {"is_causal": is_causal, "dropout_p": p, "backend": "triton"}
    torch.manual_seed(1)
    identity = torch.eye(length, width, device=DEVICE).expand_as(value)
    kept = hierarchical_attention(queries, keys, identity, weights, **kwargs)[..., :length] != 0
    visible = torch.ones(length, length, device=DEVICE).tril() if is_causal else torch.ones(length, length)
    share = kept.sum() / (4 * visible.sum())
    assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / (4 * visible.sum()))
    assert not torch.equal(kept[0, 0], kept[0, 1]) and not torch.equal(kept[0], kept[1])

    torch.manual_seed(1)
    actual = attend([*features, weights], torch.float32, "triton", is_causal=is_causal, dropout_p=p)
    leaves = [leaf.double().requires_grad_() for leaf in (*features, weights)]
    scores = hierarchical_scores(leaves[:3], leaves[3:6], leaves[7])
    if is_causal:
        scores = scores.masked_fill(visible == 0, -torch.inf)
    output = (scores.softmax(-1) * kept / (1 - p)) @ leaves[6]
    probe = torch.linspace(0, 50, output.numel(), dtype=torch.float64, device=DEVICE).sin().view_as(output)
    expected = [output.detach(), *torch.autograd.grad((output * probe).sum(), leaves)]
    for error, limit in zip(errors(actual, expected), floors(torch.float32, 3), strict=True):
        assert error < limit

    again = attend([*features, weights], torch.float32, "triton", is_causal=is_causal, dropout_p=p)
    assert not torch.equal(actual[0], again[0])


def test_autocast_and_a_compiled_caller_change_nothing():
    *features, weights = make_inputs(18, 2, 16, DEVICE, 1, 1)
    features = [tensor.bfloat16() for tensor in features]

    def attention(scale):
        return hierarchical_attention(features[:2], features[2:4], features[4], weights, scale=scale, backend="triton")

    expected = attention(0.5)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(attention(0.5), expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(attention, backend="eager")(0.5), expected)


def test_what_the_kernels_do_not_take_is_refused(monkeypatch):
    def call(dtype=torch.float32, num_levels=2, width=16):
        *features, weights = make_inputs(6, num_levels, width, DEVICE)
        features = [tensor.to(dtype) for tensor in features]
        queries, keys = features[:num_levels], features[num_levels:-1]
        return hierarchical_attention(queries, keys, features[-1], weights, backend="triton")

    with pytest.raises(ValueError, match='float64; use `backend="lifted"`'):
        call(dtype=torch.float64)
    with pytest.raises(ValueError, match="at most 4 levels, got 5"):
        call(num_levels=5)
    with pytest.raises(ValueError, match="at most 128 wide, got 130"):
        call(width=130)
    monkeypatch.setattr(triton_hkt, "is_interpreting", lambda: False)
    if not on_gpu:
        with pytest.raises(ValueError, match='NVIDIA GPU, got `value` on cpu; use `backend="lifted"`'):
            call()
    monkeypatch.setattr(triton_hkt, "triton", None)
    with pytest.raises(ImportError, match='package `triton`, which is not installed; use `backend="lifted"`'):
        call()


def test_the_module_can_be_imported_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("triton_hkt_without_triton", triton_hkt.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.triton is None and not module.is_interpreting()


COMPILE = "import sys; from programs.compile_triton import main; main()"


def compiled_tiles(tmp_path, *options):
    environment = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    return [json.loads(line) for line in run_python(COMPILE, tmp_path, environment, *options).splitlines()]


def assert_fits(tile):
    assert tile["shared"] <= 227 * 1024, tile
    if tile["dtype"] != "float32" and tile["width"] <= 64:
        assert tile["wgmma"] and tile["stack"] <= 128, tile


def test_every_kernel_compiles_for_hopper(tmp_path):
    """The interpreter knows no types and no layouts."""
    tiles = compiled_tiles(tmp_path, "--tiles", "first")
    assert {tile["kernel"] for tile in tiles} == set(triton_hkt.KERNELS)
    for tile in tiles:
        assert_fits(tile)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, width", [("bfloat16", 64), ("bfloat16", 16), ("float16", 128), ("float32", 64)])
def test_every_tile_of_the_autotuner_compiles_for_hopper(dtype, width, tmp_path):
    for tile in compiled_tiles(tmp_path, "--dtypes", dtype, "--widths", width):
        assert_fits(tile)


def test_the_program_for_a_gpu_runs(monkeypatch, tmp_path):
    options = ["--device", DEVICE, "--lengths", "9", "--dtypes", "float32", "--levels", "2", "--widths", "16"]
    monkeypatch.setattr(sys, "argv", ["check_triton.py", str(tmp_path / "check.json"), *options])
    assert check_triton() == 0
    result = json.loads((tmp_path / "check.json").read_text())
    assert len(result["cases"]) == 8 and all(case["passed"] for case in result["cases"])
    assert result["versions"]["torch"] == torch.__version__


@pytest.mark.gpu
@pytest.mark.skipif(not on_gpu, reason="needs an NVIDIA GPU")
def test_the_kernels_on_the_gpu_are_as_exact_as_flat_attention(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check_triton.py"])
    assert check_triton() == 0
