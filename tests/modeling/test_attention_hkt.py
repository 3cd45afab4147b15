"""The operator against its definition: scores, backends, causality, padding, cost."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hkt_hf import CausalDownsample, hierarchical_attention, hierarchical_scores, lift
from hkt_hf.modeling.attention_hkt import _attend


def make_inputs(length, num_levels, batch_size=2, num_heads=2, width=4, dtype=torch.float64, seed=0):
    """Random operator inputs that require gradients: queries, keys, value, level weights."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    shapes = [(batch_size, num_heads, -(-length // 2**level), width) for level in range(num_levels)]
    queries = [randn(*shape) for shape in shapes]
    keys = [randn(*shape) for shape in shapes]
    level_weights = randn(num_heads, num_levels).softmax(-1).detach().requires_grad_()
    return queries, keys, randn(batch_size, num_heads, length, width), level_weights


def make_padding_mask(length, batch_size=2, seed=0):
    """Right padding: the first row is full, the others are cut at random lengths of at least 1."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (batch_size,), generator=generator)
    lengths[0] = length
    return torch.arange(length) < lengths[:, None]


def output_and_gradients(inputs, **kwargs):
    queries, keys, value, level_weights = inputs
    leaves = [*queries, *keys, value, level_weights]
    output = hierarchical_attention(*inputs, **kwargs)
    probe = torch.linspace(-1.0, 1.0, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * probe).sum(), leaves)]


def test_scores_equal_a_double_loop_over_the_definition():
    queries, keys, _, level_weights = make_inputs(length=11, num_levels=3)
    scores = hierarchical_scores(queries, keys, level_weights, scale=0.3)
    expected = torch.zeros_like(scores)
    for i in range(11):
        for j in range(11):
            for level in range(3):
                product = (queries[level][:, :, i // 2**level] * keys[level][:, :, j // 2**level]).sum(-1)
                expected[:, :, i, j] += level_weights[:, level] * 0.3 * product
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-13)


def test_the_default_scale_is_the_inverse_root_of_the_head_width():
    queries, keys, _, level_weights = make_inputs(length=9, num_levels=2, width=5)
    torch.testing.assert_close(
        hierarchical_scores(queries, keys, level_weights),
        hierarchical_scores(queries, keys, level_weights, scale=1 / math.sqrt(5)),
    )


@given(length=st.integers(1, 130), num_levels=st.integers(1, 4))
def test_the_product_of_lifted_queries_and_keys_is_the_score(length, num_levels):
    queries, keys, _, level_weights = make_inputs(length, num_levels)
    query, key = lift(queries, keys, level_weights)
    assert query.shape == key.shape == (2, 2, length, num_levels * 4)
    scores = hierarchical_scores(queries, keys, level_weights, scale=1.0)
    torch.testing.assert_close(query @ key.transpose(-1, -2), scores, rtol=0, atol=1e-12)


@settings(max_examples=200)
@given(
    length=st.integers(1, 130),
    num_levels=st.integers(1, 4),
    is_causal=st.booleans(),
    padded=st.booleans(),
    scale=st.sampled_from([None, 0.1, 1.7, -0.5]),
    precision=st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]),
    seed=st.integers(0, 1000),
)
def test_lifted_equals_eager_in_outputs_and_gradients(length, num_levels, is_causal, padded, scale, precision, seed):
    dtype, tolerance = precision
    inputs = make_inputs(length, num_levels, dtype=dtype, seed=seed)
    mask = make_padding_mask(length, seed=seed) if padded else None
    kwargs = {"is_causal": is_causal, "key_padding_mask": mask, "scale": scale}
    eager = output_and_gradients(inputs, backend="eager", **kwargs)
    lifted = output_and_gradients(inputs, backend="lifted", **kwargs)
    for expected, actual in zip(eager, lifted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, expected.abs().max()))


@pytest.mark.parametrize("num_levels", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 130])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 8.0])
def test_lifted_equals_eager_on_a_fixed_grid(num_levels, length, is_causal, scale):
    inputs = make_inputs(length, num_levels)
    kwargs = {"is_causal": is_causal, "key_padding_mask": make_padding_mask(length), "scale": scale}
    for expected, actual in zip(
        output_and_gradients(inputs, backend="eager", **kwargs),
        output_and_gradients(inputs, backend="lifted", **kwargs),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * max(1.0, expected.abs().max()))


def test_one_level_is_scaled_dot_product_attention():
    (query,), (key,), value, level_weights = inputs = make_inputs(length=17, num_levels=1)
    assert level_weights.detach().eq(1).all()
    expected = F.scaled_dot_product_attention(query, key, value)
    for backend in ("eager", "lifted"):
        torch.testing.assert_close(hierarchical_attention(*inputs, backend=backend), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", ["eager", "lifted"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_fully_padded_row_gives_zeros_and_finite_gradients(backend, is_causal):
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1] = False
    results = output_and_gradients(make_inputs(9, 3), key_padding_mask=mask, is_causal=is_causal, backend=backend)
    assert all(tensor.isfinite().all() for tensor in results)
    assert results[0][1].eq(0).all() and results[0][0].ne(0).any()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lifted_stays_finite_and_close_in_half_precision(dtype, is_causal):
    inputs = make_inputs(33, 3, dtype=torch.float32)
    mask = make_padding_mask(33)
    expected = hierarchical_attention(*inputs, key_padding_mask=mask, is_causal=is_causal, backend="eager")
    half = [[t.to(dtype) for t in part] if isinstance(part, list) else part.to(dtype) for part in inputs]
    actual = hierarchical_attention(*half, key_padding_mask=mask, is_causal=is_causal, backend="lifted")
    assert actual.dtype == dtype and actual.isfinite().all()
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("backend", ["eager", "lifted"])
def test_large_scores_in_half_precision_are_scaled_before_they_overflow(backend):
    query, value = torch.full((1, 1, 4, 64), 60.0), torch.ones(1, 1, 4, 64)
    inputs = ([query.half()], [query.half()], value.half(), torch.ones(1, 1))
    assert 64 * 60.0**2 > torch.finfo(torch.float16).max > 64 * 60.0**2 / 8
    torch.testing.assert_close(hierarchical_attention(*inputs, backend=backend), value.half())


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_padding_does_not_leak_in_half_precision_whatever_the_scale(scale):
    inputs = make_inputs(6, 2, dtype=torch.float32)
    queries, keys, value, level_weights = inputs
    mask = torch.arange(6).expand(2, 6) < 4
    value = value.detach().masked_fill(~mask[:, None, :, None], 100.0)
    half = ([q.half() for q in queries], [k.half() for k in keys], value.half(), level_weights)
    output = hierarchical_attention(*half, key_padding_mask=mask, is_causal=True, scale=scale, backend="lifted")
    assert output.abs().max() < 10


def test_the_softmax_of_half_precision_scores_is_taken_in_float32():
    scores, value = torch.randn(1, 1, 1, 4096).bfloat16(), torch.eye(4096)[None, None].bfloat16()
    _, weights = _attend(scores, value, None, 0.0)
    torch.testing.assert_close(weights, scores.float().softmax(-1).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["eager", "lifted"])
@pytest.mark.parametrize("num_levels", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4])
@pytest.mark.parametrize("downsample_type", ["depthwise", "dense"])
def test_causal_outputs_do_not_see_later_inputs(backend, num_levels, kernel_size, downsample_type):
    """Change the inputs after t; what the operator says at t and before must not move by a single bit."""
    width, length = 4, 21
    downsample = [CausalDownsample(width, kernel_size, downsample_type) for _ in range(num_levels - 1)]
    for module in downsample:
        torch.nn.init.normal_(module.weight)
    level_weights = torch.randn(1, num_levels).softmax(-1)

    def levels_and_output(hidden_states):
        levels = [hidden_states]
        for module in downsample:
            levels.append(module(levels[-1]))
        heads = [level.unsqueeze(1) for level in levels]
        output = hierarchical_attention(heads, heads, heads[0], level_weights, is_causal=True, backend=backend)
        return levels, output

    with torch.no_grad():
        hidden_states = torch.randn(1, length, width)
        levels, output = levels_and_output(hidden_states)
        for t in (0, 1, 6, 7, 8, 19):
            changed = hidden_states.clone()
            changed[:, t + 1 :] += torch.randn(1, length - t - 1, width) * 10
            changed_levels, changed_output = levels_and_output(changed)
            assert torch.equal(changed_output[:, :, : t + 1], output[:, :, : t + 1])
            for level, (before, after) in enumerate(zip(levels, changed_levels, strict=True)):
                block = t // 2**level
                assert torch.equal(after[:, : block + 1], before[:, : block + 1])
    assert not torch.equal(changed_output[:, :, -1], output[:, :, -1])


@given(
    length=st.integers(1, 40),
    kernel_size=st.integers(1, 6),
    downsample_type=st.sampled_from(["depthwise", "dense"]),
)
def test_downsampling_is_a_strided_left_padded_convolution(length, kernel_size, downsample_type):
    module = CausalDownsample(3, kernel_size, downsample_type).double()
    torch.nn.init.normal_(module.weight)
    inputs = torch.randn(2, length, 3, dtype=torch.float64)
    taps = module.weight.flip(0)
    weight = taps.T.unsqueeze(1) if downsample_type == "depthwise" else taps.permute(2, 1, 0)
    groups = 3 if downsample_type == "depthwise" else 1
    padded = F.pad(inputs.transpose(1, 2), (kernel_size - 1, 0))
    expected = F.conv1d(padded, weight, stride=2, groups=groups).transpose(1, 2)
    assert expected.shape[1] == -(-length // 2)
    torch.testing.assert_close(module(inputs), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("downsample_type", ["depthwise", "dense"])
def test_downsampling_starts_as_the_mean(downsample_type):
    inputs = torch.randn(1, 8, 5)
    expected = torch.stack([inputs[:, 2 * m - 2 : 2 * m + 1].mean(1) for m in range(1, 4)], dim=1)
    torch.testing.assert_close(CausalDownsample(5, 3, downsample_type)(inputs)[:, 1:], expected)


def count_score_flops(length, num_levels):
    queries, keys, _, level_weights = make_inputs(length, num_levels, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        hierarchical_scores(queries, keys, level_weights)
    return counter.get_total_flops()


@pytest.mark.parametrize("length", [4, 64, 128, 516])
def test_three_levels_cost_1_3125_times_the_score_flops_of_flat_attention(length):
    flat = count_score_flops(length, num_levels=1)
    assert flat == 2 * 2 * 2 * length * length * 4
    assert count_score_flops(length, num_levels=3) / flat == 1.3125


def test_cost_stays_below_four_thirds():
    ratios = [count_score_flops(512, num_levels) / count_score_flops(512, 1) for num_levels in range(1, 8)]
    assert all(low < high for low, high in pairwise(ratios)) and ratios[-1] < 4 / 3


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_lifted_reaches_the_fused_cpu_kernel_and_forms_no_square_matrix(is_causal, padded):
    length = 2048
    inputs = make_inputs(length, 3, batch_size=1, num_heads=1, dtype=torch.float32)
    mask = (torch.arange(length) < length - 100)[None] if padded else None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        hierarchical_attention(*inputs, key_padding_mask=mask, is_causal=is_causal, backend="lifted").sum().backward()
    names = {event.key for event in profiler.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_attention_math" not in names
    bytes_of_a_square_bool_mask = length * length
    assert max(event.cpu_memory_usage for event in profiler.events()) < bytes_of_a_square_bool_mask


def test_dropout_drops_weights_and_keeps_their_mean():
    queries, keys, _, level_weights = make_inputs(64, 2, batch_size=8, dtype=torch.float32)
    value = torch.ones(8, 2, 64, 4)
    for backend in ("eager", "lifted"):
        output = hierarchical_attention(queries, keys, value, level_weights, dropout_p=0.5, backend=backend)
        assert output.std() > 0.02
        torch.testing.assert_close(output.mean().item(), 1.0, rtol=0, atol=0.1)


def test_auto_is_one_of_the_exact_backends():
    inputs = make_inputs(19, 3)
    torch.testing.assert_close(
        hierarchical_attention(*inputs), hierarchical_attention(*inputs, backend="eager"), rtol=0, atol=1e-12
    )


def bad_calls():
    queries, keys, value, level_weights = make_inputs(8, 2)
    mask = torch.ones(2, 8, dtype=torch.bool)
    yield "backend", (queries, keys, value, level_weights), {"backend": "fast"}
    yield "dropout_p", (queries, keys, value, level_weights), {"dropout_p": 1.0}
    yield "queries", ([], keys, value, level_weights), {}
    yield "keys", (queries, keys[:1], value, level_weights), {}
    yield r"keys\[1\]", (queries, [keys[0], keys[0]], value, level_weights), {}
    yield r"queries\[1\]", ([queries[0], queries[1][:, :, :3]], keys, value, level_weights), {}
    yield r"queries\[0\]", ([queries[0][0], queries[1][0]], keys, value, level_weights), {}
    yield "value", (queries, keys, value[:, :, :7], level_weights), {}
    yield "value", (queries, keys, value.float(), level_weights), {}
    yield r"keys\[1\]", (queries, [keys[0], keys[1].float()], value, level_weights), {}
    yield "level_weights", (queries, keys, value, level_weights[:, :1]), {}
    yield "key_padding_mask", (queries, keys, value, level_weights), {"key_padding_mask": mask[:, :5]}
    yield "key_padding_mask", (queries, keys, value, level_weights), {"key_padding_mask": mask.long()}


@pytest.mark.parametrize(("name", "args", "kwargs"), list(bad_calls()))
def test_bad_arguments_are_named(name, args, kwargs):
    with pytest.raises(ValueError, match=f"`{name}`"):
        hierarchical_attention(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("kernel_size", {"hidden_size": 4, "kernel_size": 0}),
        ("hidden_size", {"hidden_size": 0}),
        ("downsample_type", {"hidden_size": 4, "downsample_type": "mean"}),
    ],
)
def test_bad_downsampling_is_named(name, kwargs):
    with pytest.raises(ValueError, match=f"`{name}`"):
        CausalDownsample(**kwargs)
