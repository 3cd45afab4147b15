"""The backend "polyphase" against eager, and what `backend="auto"` and the models choose."""

import functools
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_hkt import make_inputs, make_padding_mask, output_and_gradients
from tiny_models import randomize, right_padded_batch, tiny_config
from torch.profiler import ProfilerActivity, profile

from hkt_hf import HKTForCausalLM, HKTModel, choose_backend, hierarchical_attention
from hkt_hf.modeling import attention_hkt, polyphase_hkt


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short sequences have several, and groups of heads."""
    monkeypatch.setattr(polyphase_hkt, "TILE", 32)


def relative_errors(actual, expected):
    """The largest error of each tensor, relative to its largest entry (at least 1)."""
    return [
        ((a.double() - e.double()).abs().max() / e.abs().max().clamp_min(1.0)).item()
        for a, e in zip(actual, expected, strict=True)
    ]


def make_any_mask(length, pattern, batch_size=2, seed=0):
    """Which keys are real: all, padding on the right, or anything, rows without any among them."""
    if pattern == "right":
        return make_padding_mask(length, batch_size, seed)
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(batch_size, 1, generator=generator)
    return None if pattern == "none" else torch.rand(batch_size, length, generator=generator) < share


CASES = {
    "length": st.integers(1, 150),
    "num_levels": st.integers(1, 4),
    "is_causal": st.booleans(),
    "pattern": st.sampled_from(["none", "right", "any"]),
    "width": st.sampled_from([1, 5, 16]),
    "num_heads": st.integers(1, 3),
    "tile": st.sampled_from([8, 32, 1024]),
    "seed": st.integers(0, 1000),
}


def make_case(length, num_levels, is_causal, pattern, width, num_heads, tile, seed, dtype=torch.float64):
    polyphase_hkt.TILE = tile
    inputs = make_inputs(length, num_levels, num_heads=num_heads, width=width, dtype=dtype, seed=seed)
    return inputs, {"is_causal": is_causal, "key_padding_mask": make_any_mask(length, pattern, seed=seed)}


@pytest.fixture(scope="module")
def restored_tile():
    """Hypothesis sets the tile of each example itself."""
    tile = polyphase_hkt.TILE
    yield
    polyphase_hkt.TILE = tile


@settings(max_examples=150)
@given(scale=st.sampled_from([None, 0.1, 1.7, -0.5]), **CASES)
def test_polyphase_equals_eager_in_float64(restored_tile, scale, **case):
    inputs, kwargs = make_case(**case)
    expected = output_and_gradients(inputs, backend="eager", scale=scale, **kwargs)
    actual = output_and_gradients(inputs, backend="polyphase", scale=scale, **kwargs)
    assert max(relative_errors(actual, expected)) < 1e-10


@settings(max_examples=60)
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), **CASES)
def test_polyphase_is_no_worse_than_pytorchs_attention_in_working_precision(restored_tile, dtype, **case):
    """Both against float64. PyTorch's own attention is that of the lifted form, whose sums have the same terms."""
    inputs, kwargs = make_case(**case)
    rounded = [
        [t.detach().to(dtype).requires_grad_() for t in part]
        if isinstance(part, list)
        else part.detach().to(dtype).requires_grad_()
        for part in inputs
    ]
    exact = [
        [t.detach().double().requires_grad_() for t in part]
        if isinstance(part, list)
        else part.detach().double().requires_grad_()
        for part in rounded
    ]
    expected = output_and_gradients(exact, backend="eager", **kwargs)
    lifted = relative_errors(output_and_gradients(rounded, backend="lifted", **kwargs), expected)
    polyphase = relative_errors(output_and_gradients(rounded, backend="polyphase", **kwargs), expected)
    floor = 4 * torch.finfo(dtype).eps
    for own, theirs in zip(polyphase, lifted, strict=True):
        assert own <= max(2 * theirs, floor)


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_onednn_the_numbers_are_the_same(is_causal, small_tiles, monkeypatch):
    inputs = make_inputs(70, 3, dtype=torch.float32)
    results = []
    for has_onednn in (polyphase_hkt._has_onednn(), False):
        monkeypatch.setattr(polyphase_hkt, "_has_onednn", functools.partial(bool, has_onednn))
        results.append(output_and_gradients(inputs, backend="polyphase", is_causal=is_causal))
    assert max(relative_errors(*results)) < 1e-5


def test_only_real_keys_and_visible_tiles_are_worked_on(small_tiles, monkeypatch):
    """Tiles that are all padding or all in the future are skipped, not masked."""
    tiles = []
    scores = polyphase_hkt._scores
    monkeypatch.setattr(polyphase_hkt, "_scores", lambda *args: tiles.append(1) or scores(*args))
    inputs = make_inputs(128, 3, batch_size=1, num_heads=1)

    def count(**kwargs):
        tiles.clear()
        with torch.no_grad():
            hierarchical_attention(*inputs, backend="polyphase", **kwargs)
        return len(tiles)

    assert count() == 4 * 4
    assert count(is_causal=True) == 4 * 5 // 2
    assert count(key_padding_mask=torch.arange(128)[None] < 33) == 4 * 2


@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_drops_weights_and_its_gradient_is_that_of_the_same_weights(is_causal, small_tiles):
    queries, keys, _, level_weights = make_inputs(64, 3, width=64)
    identity = torch.eye(64, dtype=torch.float64).expand(2, 2, 64, 64)

    def attend(value, backend="polyphase", dropout_p=0.25):
        torch.manual_seed(5)
        return hierarchical_attention(
            queries, keys, value, level_weights, backend=backend, dropout_p=dropout_p, is_causal=is_causal
        )

    weights = attend(identity, "eager", 0.0)
    dropped = attend(identity)
    kept = dropped.ne(0)
    visible = weights.ne(0)
    assert abs(1 - kept[visible].double().mean() - 0.25) < 0.02
    torch.testing.assert_close(dropped, weights * kept / 0.75)
    assert torch.equal(attend(identity), dropped)

    leaves = [*queries, *keys, level_weights]
    probe = torch.randn(2, 2, 64, 64, dtype=torch.float64)
    value = torch.randn(2, 2, 64, 64, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(((weights * kept / 0.75) @ value * probe).sum(), [value, *leaves])
    actual = torch.autograd.grad((attend(value) * probe).sum(), [value, *leaves])
    assert max(relative_errors(actual, expected)) < 1e-10


def test_dropout_differs_between_calls_heads_and_tiles(small_tiles):
    queries, keys, _, level_weights = make_inputs(64, 1, width=64)
    queries = [torch.zeros_like(query) for query in queries]
    identity = torch.eye(64, dtype=torch.float64).expand(2, 2, 64, 64)
    first, second = (
        hierarchical_attention(queries, keys, identity, level_weights, backend="polyphase", dropout_p=0.5)
        for _ in range(2)
    )
    blocks = [*first.unflatten(2, (2, 32)).unflatten(4, (2, 32)).permute(0, 1, 2, 4, 3, 5).flatten(0, 3), second[0, 0]]
    patterns = {tuple(block[:32, :32].ne(0).flatten().tolist()) for block in blocks}
    assert len(patterns) == len(blocks)


def test_autocast_does_not_reach_the_inside(small_tiles):
    inputs = make_inputs(70, 3, dtype=torch.float32)
    expected = output_and_gradients(inputs, backend="polyphase")
    with torch.autocast("cpu", torch.bfloat16):
        actual = output_and_gradients(inputs, backend="polyphase")
    assert max(relative_errors(actual, expected)) < 2e-2  # the level weights are multiplied outside
    weighted = [query / 2 for query in inputs[0]]
    with torch.autocast("cpu", torch.bfloat16):
        inside = polyphase_hkt.polyphase_attention(weighted, inputs[1], inputs[2])
    assert torch.equal(inside, polyphase_hkt.polyphase_attention(weighted, inputs[1], inputs[2]))


def test_no_allocation_has_the_size_of_the_scores():
    length = 4096
    inputs = make_inputs(length, 3, batch_size=1, num_heads=1, dtype=torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output_and_gradients(inputs, backend="polyphase", is_causal=True)
    largest = max(event.cpu_memory_usage for event in profiler.events())
    assert largest < 1.1 * 31 * 2**20 < length * length * 4


@pytest.mark.slow
def test_memory_of_a_long_sequence_stays_below_two_gibibytes():
    length = 16384
    inputs = make_inputs(length, 3, batch_size=1, num_heads=8, width=64, dtype=torch.float32)
    before = resident_bytes_at_peak()
    output_and_gradients(inputs, backend="polyphase")
    assert resident_bytes_at_peak() - before < 2 * 2**30


def resident_bytes_at_peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_it_is_one_operator_for_a_compiler(small_tiles):
    torch._dynamo.reset()
    inputs = make_inputs(70, 3, dtype=torch.float32)
    compiled = torch.compile(
        functools.partial(hierarchical_attention, backend="polyphase"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*inputs), hierarchical_attention(*inputs, backend="polyphase"))
    queries, keys, value, _ = inputs
    torch.library.opcheck(polyphase_hkt._forward, (queries, keys, value, None, True, 0.0, None))


def test_the_choice_is_explained_and_logged_once(monkeypatch):
    assert choose_backend(4096, 3) == ("polyphase", "the fastest on a CPU beyond 160 tokens")
    assert choose_backend(64, 3).backend == "eager"
    assert choose_backend(64, 3, dtype=torch.bfloat16).backend == "lifted"
    assert choose_backend(4096, 1).backend == "lifted"
    assert choose_backend(4096, 3, is_compiling=True).backend == "lifted"
    on_a_gpu = choose_backend(4096, 3, device="cuda")
    assert on_a_gpu == ("lifted", "no backend was measured against PyTorch's kernels on 'cuda'")

    messages = []
    monkeypatch.setattr(attention_hkt.logger, "info", lambda message, *values: messages.append(message % values))
    attention_hkt._log_choice.cache_clear()
    for _ in range(2):
        hierarchical_attention(*make_inputs(170, 2))
    assert messages == ["hierarchical attention uses the backend 'polyphase': the fastest on a CPU beyond 160 tokens"]


@pytest.fixture
def calls(monkeypatch):
    """Names of the backends that are called."""
    names = []

    def recorded(name, backend):
        return lambda *args: names.append(name) or backend(*args)

    for name, backend in attention_hkt.BACKENDS.items():
        monkeypatch.setitem(attention_hkt.BACKENDS, name, recorded(name, backend))
    return names


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize(
    "implementation, expected", [("auto", "polyphase"), ("polyphase", "polyphase"), ("sdpa", None)]
)
def test_a_model_uses_what_is_chosen_and_an_explicit_choice_wins(implementation, expected, is_decoder, calls):
    model_class = HKTForCausalLM if is_decoder else HKTModel
    config = tiny_config(is_decoder=is_decoder, max_position_embeddings=256, num_hidden_layers=1)
    assert model_class(config).config._attn_implementation == "auto"
    model = randomize(model_class._from_config(config, attn_implementation=implementation))
    assert model.config._attn_implementation == implementation
    input_ids, attention_mask = right_padded_batch([170, 90], 170)
    with torch.no_grad():
        actual = model(input_ids, attention_mask=attention_mask)[0]
        assert calls == ([] if expected is None else [expected])
        model.set_attn_implementation("eager")
        torch.testing.assert_close(
            actual[attention_mask == 1],
            model(input_ids, attention_mask=attention_mask)[0][attention_mask == 1],
            rtol=1e-4,
            atol=1e-4,
        )


def test_a_mask_of_scores_is_left_to_pytorchs_kernel_and_refused_by_name(calls):
    model = randomize(HKTModel(tiny_config(max_position_embeddings=256, num_hidden_layers=1)))
    input_ids, _ = right_padded_batch([170], 170)
    mask = torch.rand(1, 1, 170, 170) < 0.5
    with torch.no_grad():
        actual = model(input_ids, attention_mask=mask)[0]
        assert calls == []
        model.set_attn_implementation("eager")
        torch.testing.assert_close(actual, model(input_ids, attention_mask=mask)[0], rtol=1e-4, atol=1e-4)
        model.set_attn_implementation("polyphase")
        with pytest.raises(ValueError, match="needs `attn_implementation` 'auto', 'eager' or 'sdpa', got 'polyphase'"):
            model(input_ids, attention_mask=mask)
