"""Every attention function computes the same model: eager, sdpa, flex attention, flash attention, registered ones.

Tolerances against eager, absolute and relative: float64 1e-10, float32 1e-5, gradients in float64 1e-8. In bfloat16 an
output is compared with float32 eager, 0.1 absolute (hidden states after a layer norm, of magnitude up to 4).
"""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from tiny_models import left_padded, randomize, right_padded_batch, tiny_config, tiny_head
from torch.nn.attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, modeling_flash_attention_utils
from transformers.masking_utils import sdpa_mask

from hkt_hf import HKTForCausalLM, HKTModel
from hkt_hf.modeling.modeling_hkt import AUTO_CLASSES


CALLS = []


def registered_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """What a user registers: any function of this signature; here the plain formula."""
    CALLS.append({"module": module, "mask": attention_mask, "scaling": scaling, "dropout": dropout, **kwargs})
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is None and module.is_causal:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2), scores.logsumexp(-1)


AttentionInterface.register("registered", registered_attention)
AttentionMaskInterface.register("registered", sdpa_mask)


@pytest.fixture
def unfused_flex(monkeypatch):
    """Flex attention without a compiler: the formula that its kernels are generated from."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    with torch.compiler.set_stance("force_eager"):
        yield


def batches():
    """Inputs by name; in each the same tokens are real."""
    torch.manual_seed(3)
    right_ids, right_mask = right_padded_batch([19, 8, 1], 19)
    left_ids, left_mask = left_padded(right_ids, right_mask)
    packed_ids = right_ids[right_mask == 1][None]
    position_ids = torch.cat([torch.arange(length) for length in (19, 8, 1)])[None]
    return {
        "alone": {"input_ids": right_ids[:1]},
        "right": {"input_ids": right_ids, "attention_mask": right_mask},
        "left": {"input_ids": left_ids, "attention_mask": left_mask},
        "packed": {"input_ids": packed_ids, "position_ids": position_ids},
    }


BATCHES = list(batches())


def run(model, implementation, inputs):
    """Hidden states of the real tokens, `(N, d)`."""
    model.set_attn_implementation(implementation)
    states = model(**inputs, use_cache=False).last_hidden_state
    return states[inputs["attention_mask"] == 1] if "attention_mask" in inputs else states.flatten(0, 1)


def build(num_levels, is_decoder=False, **fields):
    return randomize(HKTModel(tiny_config(num_levels=num_levels, is_decoder=is_decoder, **fields)))


@pytest.mark.parametrize("num_levels", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("implementation", ["sdpa", "polyphase", "flex_attention", "registered"])
def test_outputs_are_those_of_eager(implementation, batch, num_levels, unfused_flex):
    inputs = batches()[batch]
    for is_decoder in (False, True):
        positions = "absolute" if is_decoder == (num_levels % 2) else "rope"
        # Without a compiler flex attention takes its time.
        num_layers = 1 if implementation == "flex_attention" else 2
        model = build(num_levels, is_decoder, position_embedding_type=positions, num_hidden_layers=num_layers)
        with torch.no_grad():
            in_float32 = run(model, "eager", inputs)
            for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
                model.to(dtype)
                expected, actual = run(model, "eager", inputs), run(model, implementation, inputs)
                torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
            actual = run(model.to(torch.bfloat16), implementation, inputs)
            assert actual.dtype == torch.bfloat16
            torch.testing.assert_close(actual.float(), in_float32, rtol=0, atol=0.1)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("num_levels, share", [(1, False), (3, False), (3, True), (4, False)])
@pytest.mark.parametrize("implementation", ["sdpa", "polyphase", "registered"])
def test_gradients_are_those_of_eager(implementation, num_levels, share, batch):
    inputs = batches()[batch]
    positions = "absolute" if batch == "packed" else "rope"
    model = build(num_levels, share_level_projections=share, position_embedding_type=positions).double()
    gradients = []
    for name in ("eager", implementation):
        model.zero_grad()
        states = run(model, name, inputs)
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch generates C++ for flex attention on a CPU")
def test_compiled_flex_attention_is_eager_and_only_for_inference():
    torch._dynamo.reset()
    model = build(3)
    with torch.no_grad():
        for inputs in batches().values():
            actual, expected = run(model, "flex_attention", inputs), run(model, "eager", inputs)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        run(model, "flex_attention", batches()["alone"])


def test_a_registered_function_gets_what_transformers_functions_get():
    model = build(3)
    model.layers[0].self_attn.attention_dropout = 0.25
    CALLS.clear()
    inputs = batches()["left"]
    model.set_attn_implementation("registered")
    model.train()(**inputs, some_option="passed on")
    for index, call in enumerate(CALLS):
        assert call["module"] is model.layers[index].self_attn and call["module"].layer_idx == index
        assert call["module"].is_causal is False and call["module"].scaling == 8**-0.5
        assert call["scaling"] == 1.0  # the scale is in the lifted queries
        assert call["dropout"] == (0.25 if index == 0 else 0.0)
        assert call["some_option"] == "passed on"
        # Sequences lie at the left; True = attend.
        assert call["mask"].dtype == torch.bool and call["mask"].shape == (3, 1, 19, 19)
        assert torch.equal(call["mask"][:, 0, 0], torch.arange(19) < torch.tensor([[19], [8], [1]]))
    assert len(CALLS) == 2


@pytest.mark.parametrize("batch", BATCHES)
def test_the_module_of_a_decoder_says_that_it_is_causal(batch):
    """No mask is needed: sequences are padded on the right before a function gets them."""
    CALLS.clear()
    with torch.no_grad():
        run(build(3, is_decoder=True), "registered", batches()[batch])
    assert [(call["module"].is_causal, call["mask"]) for call in CALLS] == 2 * [(True, None)]


@pytest.mark.parametrize("batch", BATCHES)
def test_outputs_beside_the_states_are_recorded_as_everywhere(batch):
    """With sdpa there are no weights; a function that returns one number a query (flex attention on a GPU) is heard."""
    inputs, model = batches()[batch], build(2)
    batch_size, length = inputs["input_ids"].shape
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        assert model(**inputs, output_attentions=True).attentions == ()
        model.set_attn_implementation("registered")
        attentions = model(**inputs, output_attentions=True).attentions
        assert [tuple(attention.shape) for attention in attentions] == 2 * [(batch_size, 4, length)]
        expected = model(**batches()["alone"], output_attentions=True).attentions[0][0]
        second = {"input_ids": batches()["right"]["input_ids"][1:2, :8]}
        expected_second = model(**second, output_attentions=True).attentions[0][0]
    torch.testing.assert_close(attentions[0][0, :, :19], expected, rtol=1e-5, atol=1e-5)
    if batch != "alone":
        row, columns = {"right": (1, slice(0, 8)), "left": (1, slice(11, 19)), "packed": (0, slice(19, 27))}[batch]
        torch.testing.assert_close(attentions[0][row, :, columns], expected_second, rtol=1e-5, atol=1e-5)


# Flash attention. No kernel runs on a CPU: a stand-in for its two functions does, under transformers' own code, which
# unpads, checks and pads. It refuses what the kernels refuse.


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
):
    """Stand-in for `flash_attn.flash_attn_func`: `(B, T, H, D)`."""
    assert q.shape == k.shape == v.shape and q.shape[-1] <= 256
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert window_size == (-1, -1) and softcap == 0.0
    states = (tensor.transpose(1, 2).float() for tensor in (q, k, v))
    output = F.scaled_dot_product_attention(*states, scale=softmax_scale, is_causal=causal, dropout_p=dropout_p)
    return output.transpose(1, 2).to(q.dtype)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    """Stand-in for `flash_attn.flash_attn_varlen_func`: `(N, H, D)`, sequence `i` in `cu_seqlens[i : i + 2]`."""
    lengths = cu_seqlens_q.diff().tolist()
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    assert sum(lengths) == len(q) and max(lengths) == max_seqlen_q == max_seqlen_k
    CALLS.append({"lengths": lengths, "width": q.shape[-1]})
    options = (dropout_p, softmax_scale, causal, window_size, softcap, deterministic)
    sequences = zip(*(tensor.split(lengths) for tensor in (q, k, v)), strict=True)
    return torch.cat([flash_attn_func(*(part[None] for part in parts), *options)[0] for parts in sequences])


@pytest.fixture
def flash(monkeypatch):
    utils = modeling_flash_attention_utils
    functions = (flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
    CALLS.clear()


@pytest.mark.parametrize("num_levels", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("is_decoder", [False, True])
def test_the_flash_attention_path_gives_the_numbers_of_eager(is_decoder, batch, num_levels, flash):
    inputs, model = batches()[batch], build(num_levels, is_decoder)
    with torch.no_grad():
        in_float32 = run(model, "eager", inputs)
        actual = run(model.to(torch.bfloat16), "flash_attention_2", inputs)
    assert model.config._attn_implementation == "flash_attention_2"
    torch.testing.assert_close(actual.float(), in_float32, rtol=0, atol=0.1)
    if is_decoder or batch == "alone":
        assert not CALLS  # causality alone hides padding on the right
    else:
        assert CALLS == 2 * [{"lengths": [19, 8, 1], "width": num_levels * 8}]


@pytest.mark.parametrize("is_decoder", [False, True])
def test_boundaries_for_flash_attention_are_those_of_the_rows(is_decoder, flash):
    """What `DataCollatorWithFlattening` adds: the model cuts rows into sequences itself, and can cut them by it."""
    packed, model = batches()["packed"], build(3, is_decoder)
    boundaries = torch.tensor([0, 19, 27, 28], dtype=torch.int32)
    named = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 19, "max_length_k": 19}
    with torch.no_grad():
        expected = run(model, "eager", packed)
        assert torch.equal(run(model, "eager", {"input_ids": packed["input_ids"], **named}), expected)
        model.to(torch.bfloat16)
        for inputs in ({**packed, **named}, {"input_ids": packed["input_ids"], **named}):
            torch.testing.assert_close(run(model, "flash_attention_2", inputs).float(), expected, rtol=0, atol=0.1)


def test_boundaries_that_do_not_fit_are_refused():
    model = build(2)
    ids = batches()["packed"]["input_ids"]
    for boundaries, rows in (([0, 19, 27], ids), ([3, 28], ids), ([0], ids), ([0, 19, 28], ids.repeat(2, 1))):
        with pytest.raises(ValueError, match=r"`cu_seq_lens_q` must be where each sequence .* length, 28; got \["):
            model(rows, cu_seq_lens_q=torch.tensor(boundaries))
    for auto_class in ("AutoModelForSequenceClassification", "AutoModelForMultipleChoice"):
        rows = ids[None] if auto_class.endswith("Choice") else ids
        with pytest.raises(ValueError, match="names 3 sequences: packed sequences can't be pooled"):
            tiny_head(auto_class)(rows, cu_seq_lens_q=torch.tensor([0, 19, 27, 28]))


def test_the_flash_attention_path_has_the_gradients_of_eager(flash):
    inputs, model = batches()["left"], build(3)
    gradients = []
    for implementation in ("eager", "flash_attention_2"):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            run(model, implementation, inputs).float().square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.999


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_flash_attention_refuses_wide_heads_by_name(auto_class):
    fields = {"num_levels": 5, "hidden_size": 64, "head_dim": 64, "num_hidden_layers": 1}
    model = tiny_head(auto_class, **fields)
    message = r"'flash_attention_2' .* at most 256 .* `num_levels` \* `head_dim` = 5 \* 64 = 320"
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation("flash_attention_2")
    with pytest.raises(ValueError, match=message):
        type(model)._from_config(copy.deepcopy(model.config), attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match=r"'kernels-community/flash-attn2' .* = 320"):
        model.set_attn_implementation("kernels-community/flash-attn2")
    assert model.config._attn_implementation == "auto"


def test_a_head_as_wide_as_flash_attention_takes_is_not_refused(flash):
    model = build(4, hidden_size=64, head_dim=64, num_hidden_layers=1).to(torch.bfloat16)
    run(model, "flash_attention_2", batches()["left"])
    assert CALLS[-1]["width"] == 256


@pytest.mark.parametrize("model_class", [HKTModel, HKTForCausalLM])
def test_unknown_implementations_are_refused(model_class):
    model = model_class(tiny_config(is_decoder=True))
    with pytest.raises(ValueError, match='"no_such_attention"` is not supported'):
        model.set_attn_implementation("no_such_attention")
