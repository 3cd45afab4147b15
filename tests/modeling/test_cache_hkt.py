"""The decoder's cache: a token's logits do not depend on how the tokens before it were fed."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import IMPLEMENTATIONS, POSITIONS, left_padded, randomize, right_padded_batch, tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, LlamaForCausalLM, StaticCache

from hkt_hf import HKTConfig, HKTForCausalLM, HKTModel
from hkt_hf.modeling.cache_hkt import ROLLBACK_WINDOW


def decoder(implementation="sdpa", **fields):
    torch.manual_seed(0)
    model = randomize(HKTForCausalLM(tiny_config(is_decoder=True, max_position_embeddings=256, **fields)))
    model.set_attn_implementation(implementation)
    return model


def assert_same_logits(output, expected, accuracy=1e-5):
    """`accuracy` is relative to the largest logit where that is above one: the tiny model's reach 5 to 10."""
    largest = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(output, expected, rtol=0.0, atol=accuracy * largest)


def feed(model, chunks, cache=None, **kwargs):
    """Logits of `chunks`, pairs of ids and the mask of all columns so far, fed one after another."""
    logits = []
    for input_ids, attention_mask in chunks:
        outputs = model(input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **kwargs)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1), cache


def split(input_ids, attention_mask, sizes):
    start = 0
    for size in sizes:
        stop = start + size
        yield input_ids[:, start:stop], None if attention_mask is None else attention_mask[:, :stop]
        start = stop


@pytest.mark.parametrize("sizes", [[37], [1] * 37, [3, 7, 1, 1, 20, 5], [13, 24]], ids=["1", "37", "6", "2"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_levels", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel_size", [1, 2, 4])
def test_cached_logits_are_the_uncached_ones(num_levels, kernel_size, padded, sizes):
    positions = POSITIONS[(num_levels + kernel_size) % 2]
    for implementation in IMPLEMENTATIONS:
        model = decoder(
            implementation,
            num_levels=num_levels,
            downsample_kernel_size=kernel_size,
            position_embedding_type=positions,
        )
        input_ids, attention_mask = left_padded(*right_padded_batch([32, 37, 23], 37))
        mask = attention_mask if padded else None
        with torch.no_grad():
            expected = model(input_ids, attention_mask=mask, use_cache=False).logits
            output, cache = feed(model, split(input_ids, mask, sizes))
        real = attention_mask.bool() if padded else torch.ones_like(attention_mask, dtype=torch.bool)
        assert_same_logits(output[real], expected[real])
        assert cache.get_seq_length() == 37


@st.composite
def programs(draw):
    """What may happen to a cache: chunks whose real tokens lie anywhere in each row, crops, changes of the rows."""
    batch_size = draw(st.integers(1, 3))
    steps = []
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["feed", "feed", "feed", "crop", "select", "repeat"]))
        if kind == "feed":
            length = draw(st.one_of(st.integers(1, 4), st.integers(5, 40)))
            spans = [sorted(draw(st.tuples(*[st.integers(0, length)] * 2))) for _ in range(batch_size)]
            steps.append((kind, length, spans if draw(st.booleans()) else [[0, length]] * batch_size))
        elif kind == "crop":
            steps.append((kind, draw(st.integers(0, 30))))
        elif kind == "select":
            rows = draw(st.lists(st.integers(0, batch_size - 1), min_size=1, max_size=3))
            batch_size = len(rows)
            steps.append((kind, rows))
        elif batch_size < 3:
            batch_size *= 2
            steps.append((kind, 2))
    return steps


@given(
    program=programs(),
    num_levels=st.integers(1, 4),
    kernel_size=st.integers(1, 4),
    positions=st.sampled_from(POSITIONS),
    implementation=st.sampled_from(IMPLEMENTATIONS),
    record=st.booleans(),
)
@settings(max_examples=60)
def test_whatever_happens_to_a_cache_each_row_goes_on_as_if_alone(
    program, num_levels, kernel_size, positions, implementation, record
):
    model = decoder(
        implementation,
        num_levels=num_levels,
        downsample_kernel_size=kernel_size,
        position_embedding_type=positions,
        downsample_type="dense" if num_levels == 2 else "depthwise",
    )
    cache, rows = DynamicCache(), None  # rows: for each a list of columns, a token id or None
    with torch.no_grad():
        for kind, *arguments in program:
            if kind == "feed":
                length, spans = arguments
                rows = rows or [[] for _ in spans]
                input_ids = torch.randint(5, 40, (len(rows), length))
                for row, ids, (start, stop) in zip(rows, input_ids.tolist(), spans, strict=True):
                    row += [token if start <= column < stop else None for column, token in enumerate(ids)]
                mask = torch.tensor([[token is not None for token in row] for row in rows]).long()
                if len(rows[0]) > 200:
                    return
                empty = cache.get_seq_length() == 0
                sides = {(start > 0, stop < length) for start, stop in spans if stop > start}
                if empty and any(left for left, _ in sides) and any(right for _, right in sides):
                    return  # refused: padding on both sides of a batch without a cache
                outputs = model(input_ids, attention_mask=None if mask.all() else mask, past_key_values=cache)
                for row, logits, (start, stop) in zip(rows, outputs.logits, spans, strict=True):
                    if stop > start:
                        alone = torch.tensor([[token for token in row if token is not None]])
                        expected = model(alone, use_cache=False).logits[0, start - stop :]
                        assert_same_logits(logits[start:stop], expected)
                if record and empty:
                    cache.activate_past_recording()
            elif rows is None:
                continue
            elif kind == "crop":
                removed = min(arguments[0], len(rows[0]))
                cache.crop(-removed)
                rows = [row[: len(row) - removed] for row in rows]
            elif kind == "select":
                cache.batch_select_indices(torch.tensor(arguments[0]))
                rows = [list(rows[index]) for index in arguments[0]]
            else:
                cache.batch_repeat_interleave(2)
                rows = [list(row) for row in rows for _ in range(2)]


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_levels", [1, 2, 4])
def test_crop_by_the_whole_window_is_exact(num_levels, kernel_size):
    model = decoder(num_levels=num_levels, downsample_kernel_size=kernel_size)
    input_ids = torch.randint(5, 40, (1, 150))
    with torch.no_grad():
        expected = model(input_ids, use_cache=False).logits
        for length in range(128, 136):  # every phase of the blocks
            _, cache = feed(model, [(input_ids[:, :length], None)])
            cache.crop(-ROLLBACK_WINDOW)
            output, _ = feed(model, [(input_ids[:, length - ROLLBACK_WINDOW :], None)], cache)
            assert_same_logits(output, expected[:, length - ROLLBACK_WINDOW :])


@pytest.mark.parametrize("num_levels", [1, 3])
def test_crop_refuses_to_go_further(num_levels):
    model = decoder(num_levels=num_levels)
    input_ids = torch.randint(5, 40, (2, 150))
    with torch.no_grad():
        expected = model(input_ids, use_cache=False).logits
        _, cache = feed(model, [(input_ids[:, :130], None)])
        with pytest.raises(ValueError, match=rf"\(-65\): the cache can only go back by {ROLLBACK_WINDOW} tokens"):
            cache.crop(-65)
        with pytest.raises(ValueError, match="must be minus the number"):
            cache.crop(65)
        with pytest.raises(ValueError, match="holds 130 tokens"):
            cache.crop(-131)
        cache.crop(-40)
        cache.crop(-24)
        with pytest.raises(ValueError, match="only go back by 0 tokens"):
            cache.crop(-1)
        output, _ = feed(model, [(input_ids[:, 66:], None)], cache)
        assert_same_logits(output, expected[:, 66:])


def test_a_recording_cache_goes_back_by_everything_fed_since():
    model = decoder(num_levels=4, downsample_kernel_size=3)
    input_ids = torch.randint(5, 40, (1, 240))
    with torch.no_grad():
        expected = model(input_ids, use_cache=False).logits
        _, cache = feed(model, [(input_ids[:, :21], None)])
        sizes = [tail.shape for tail in cache.layers[0].tails]
        cache.activate_past_recording()
        feed(model, split(torch.randint(5, 40, (1, 190)), None, [1] * 30 + [100, 60]), cache)
        cache.crop(-190)
        assert [tail.shape for tail in cache.layers[0].tails] == sizes  # what was recorded is let go
        output, _ = feed(model, [(input_ids[:, 21:], None)], cache)
        assert_same_logits(output, expected[:, 21:])


def test_a_copied_cache_is_one_of_its_own():
    model = decoder(num_levels=3)
    prompt, first, second = torch.randint(5, 40, (1, 19)), torch.randint(5, 40, (1, 9)), torch.randint(5, 40, (1, 9))
    with torch.no_grad():
        _, cache = feed(model, [(prompt, None)])
        for continuation in (first, second):
            output, _ = feed(model, [(continuation, None)], copy.deepcopy(cache))
            expected = model(torch.cat([prompt, continuation], dim=1), use_cache=False).logits[:, 19:]
            assert_same_logits(output, expected)


def test_attention_weights_of_a_step_are_rows_of_the_whole_matrix():
    model = decoder("eager", num_levels=3)
    input_ids, attention_mask = left_padded(*right_padded_batch([14, 20], 20))
    with torch.no_grad():
        expected = model(input_ids, attention_mask=attention_mask, output_attentions=True).attentions
        cache = DynamicCache()
        for start, stop in ((0, 3), (3, 11), (11, 12), (12, 20)):
            outputs = model(
                input_ids[:, start:stop],
                attention_mask=attention_mask[:, :stop],
                past_key_values=cache,
                output_attentions=True,
            )
            for weights, whole in zip(outputs.attentions, expected, strict=True):
                for row, padding in enumerate((6, 0)):
                    first = max(padding - start, 0)
                    rows = whole[row, :, start + first : stop, :stop]
                    torch.testing.assert_close(weights[row, :, first:], rows, rtol=1e-5, atol=1e-6)


def test_gradients_flow_through_a_cache():
    model = decoder(num_levels=3)
    input_ids, attention_mask = left_padded(*right_padded_batch([14, 20], 20))
    gradients = []
    for sizes in ([20], [7, 1, 12]):
        model.zero_grad()
        logits, _ = feed(model, split(input_ids, attention_mask, sizes))
        logits[attention_mask == 1].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for chunked, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item() + 1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decoding_stays_close(dtype):
    model = decoder(num_levels=3).to(dtype)
    input_ids, attention_mask = left_padded(*right_padded_batch([20, 33], 33))
    with torch.no_grad():
        expected = model.float()(input_ids, attention_mask=attention_mask, use_cache=False).logits
        output, cache = feed(model.to(dtype), split(input_ids, attention_mask, [11, 1, 1, 20]))
    assert all(tensor.dtype == dtype for tensor in tensors_of(cache) if tensor.is_floating_point())
    real = attention_mask == 1
    assert_same_logits(output[real].float(), expected[real], accuracy=0.05)


def tensors_of(cache):
    for layer in cache.layers:
        values = vars(layer).values()
        yield from (value for value in values if isinstance(value, torch.Tensor))
        yield from (
            tensor for value in values if isinstance(value, list) for tensor in value if torch.is_tensor(tensor)
        )


def num_bytes(cache):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(cache))


@pytest.mark.parametrize(("length", "bound"), [(1024, 1.5), (4096, 1.4)])
def test_cache_memory_is_near_its_limit_of_1_375(length, bound):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    flat = LlamaForCausalLM(LlamaConfig(vocab_size=40, intermediate_size=64, **sizes)).eval()
    model = HKTForCausalLM(tiny_config(is_decoder=True, num_levels=3, **sizes)).eval()
    input_ids = torch.randint(5, 40, (1, length))
    with torch.no_grad():
        flat_bytes = num_bytes(flat(input_ids).past_key_values)
        prompt_bytes = num_bytes(model(input_ids).past_key_values)
        _, cache = feed(model, split(input_ids, None, [length - 5, 1, 1, 1, 1, 1]))
    assert flat_bytes == 2 * 4 * 64 * length
    assert 1.375 * flat_bytes <= prompt_bytes < bound * flat_bytes
    assert num_bytes(cache) == prompt_bytes


def test_the_cost_of_a_step_does_not_depend_on_how_the_prompt_was_fed():
    model = decoder(num_levels=3)
    input_ids = torch.randint(5, 40, (2, 98))

    def flops(sizes):
        with torch.no_grad():
            _, cache = feed(model, split(input_ids, None, sizes))
            with FlopCounterMode(display=False) as counter:
                feed(model, [(input_ids[:, -1:], None)], cache)
        return counter.get_total_flops()

    counts = {flops(sizes) for sizes in ([97], [1] * 97, [50, 47], [96, 1])}
    assert len(counts) == 1
    # Linear in the context: projections and feed-forward do not grow, scores and values do.
    longer = torch.randint(5, 40, (2, 194))
    with torch.no_grad():
        _, cache = feed(model, [(longer[:, :193], None)])
        with FlopCounterMode(display=False) as counter:
            feed(model, [(longer[:, -1:], None)], cache)
    assert counter.get_total_flops() < 2 * counts.pop()


def test_padded_columns_cost_no_memory_in_a_single_row():
    """Rows lie in the cache from their first real token on."""
    model = decoder(num_levels=3)
    input_ids = torch.randint(5, 40, (1, 30))
    mask = torch.ones_like(input_ids)
    mask[:, :20] = 0
    with torch.no_grad():
        layer = model(input_ids, attention_mask=mask).past_key_values.layers[0]
    assert [keys.shape[2] for keys in layer.level_keys] == [10, 5, 3]
    assert layer.get_seq_length() == 30
    assert layer.get_mask_sizes(1) == (31, 0)


def test_reset_makes_a_cache_new():
    model = decoder(num_levels=3)
    input_ids = torch.randint(5, 40, (1, 30))
    with torch.no_grad():
        expected, cache = feed(model, [(input_ids, None)])
        cache.reset()
        assert cache.get_seq_length() == 0
        output, _ = feed(model, [(input_ids, None)], cache)
    assert torch.equal(output, expected)


def test_no_cache_where_none_can_be():
    model = decoder(num_levels=3)
    input_ids = torch.randint(5, 40, (1, 9))
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    assert model(input_ids, use_cache=False).past_key_values is None
    assert model(input_ids, position_ids=packed).past_key_values is None
    model.gradient_checkpointing_enable()
    assert model.train()(input_ids).past_key_values is None


def wrong_caches():
    """Messages, and what is given beside three new tokens for each of two rows."""
    model = decoder(num_levels=3)
    ids = torch.randint(5, 40, (2, 4))
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    whole_mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1)
    gap = torch.ones(2, 7)
    gap[1, 5] = 0

    def filled(**kwargs):
        return model(ids, **kwargs).past_key_values

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    static = StaticCache(config=model.config, max_cache_len=8)
    two_caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
    other = decoder(num_levels=2)(ids).past_key_values
    training = copy.deepcopy(model).train()
    training.gradient_checkpointing_enable()
    absolute = decoder(num_levels=3, position_embedding_type="absolute")
    long = absolute(torch.randint(5, 40, (2, 254))).past_key_values

    yield "got StaticCache: static", model, static, {}
    yield "got EncoderDecoderCache", model, two_caches, {}
    yield "filled by another model", model, llama(ids).past_key_values, {}
    yield "offloaded", model, DynamicCache(offloading=True), {}
    yield "2 layers of 2 levels, the model 2 of 3", model, other, {}
    yield r"\(batch, cached \+ new\) = \(2, 7\)", model, filled(), {"attention_mask": mask}
    yield "values they were fed with", model, filled(), {"attention_mask": whole_mask}
    yield "values they were fed with", model, filled(attention_mask=mask), {"attention_mask": torch.ones(2, 7)}
    yield "values they were fed with", model, filled(attention_mask=mask), {}
    yield "side by side", model, filled(), {"attention_mask": gap}
    yield "must go on from the cached", model, filled(), {"position_ids": torch.arange(3)[None]}
    padded = {"attention_mask": whole_mask, "position_ids": torch.arange(4, 7)[None]}
    yield "must go on from the cached", model, filled(attention_mask=mask), padded
    wrong_shape = torch.ones(2, 1, 3, 6, dtype=torch.bool)
    yield r"\(1 or 2, 1 or 4, 3, 7\)", model, filled(), {"attention_mask": wrong_shape}
    yield "4 tokens\\) can't be continued under gradient checkpointing", training, filled(), {}
    yield "257 tokens, more than", absolute, long, {}


@pytest.mark.parametrize("case", range(15))
def test_caches_that_would_give_wrong_answers_are_refused(case):
    message, model, cache, arguments = list(wrong_caches())[case]
    length = cache.get_seq_length()
    with pytest.raises(ValueError, match=message):
        model(torch.randint(5, 40, (2, 3)), past_key_values=cache, **arguments)
    assert cache.get_seq_length() == length  # nothing is half-written


def test_an_encoder_takes_no_cache():
    with pytest.raises(ValueError, match="`past_key_values` can't be given to an encoder"):
        HKTModel(tiny_config())(torch.tensor([[5, 6]]), past_key_values=DynamicCache())


def test_config_round_trip_keeps_the_decoder(tmp_path):
    model = decoder(num_levels=3)
    model.save_pretrained(tmp_path)
    loaded = HKTForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.is_decoder and HKTConfig.from_pretrained(tmp_path).use_cache
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
