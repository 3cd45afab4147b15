"""The decoder in transformers' stock decoding modes, and its head."""

import copy

import accelerate
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import left_padded, randomize, right_padded_batch, tiny_config
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, Trainer, TrainingArguments

from hkt_hf import (
    HKTForCausalLM,
    HKTForMaskedLM,
    HKTForMultipleChoice,
    HKTForSequenceClassification,
    HKTForTokenClassification,
    HKTModel,
)


def decoder(model_class=HKTForCausalLM, seed=0, **fields):
    torch.manual_seed(seed)
    return randomize(model_class(tiny_config(**{"is_decoder": True, "max_position_embeddings": 256, **fields})))


def prompts():
    torch.manual_seed(2)
    input_ids, attention_mask = left_padded(*right_padded_batch([7, 12, 5], 12))
    return {"input_ids": input_ids, "attention_mask": attention_mask}


OPTIONS = {"max_new_tokens": 30, "min_new_tokens": 30, "pad_token_id": 0}
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 10},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 5},
}


def generate(model, **kwargs):
    torch.manual_seed(5)
    return model.generate(**OPTIONS, **kwargs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_levels", [1, 3])
def test_a_ragged_batch_is_continued_as_without_a_cache(mode, num_levels):
    model = decoder(num_levels=num_levels)
    cached = generate(model, **prompts(), **MODES[mode])
    options = {key: value for key, value in MODES[mode].items() if key != "prefill_chunk_size"}
    assert torch.equal(cached, generate(model, **prompts(), **options, use_cache=False))


@pytest.mark.parametrize("assistant", ["prompt lookup", "another model", "the model itself"])
def test_assisted_decoding_gives_the_same_text(assistant):
    model = decoder(num_levels=3, downsample_kernel_size=3)
    prompt = torch.randint(5, 40, (1, 15))
    expected = generate(model, input_ids=prompt, do_sample=False, use_cache=False)
    if assistant == "prompt lookup":
        options = {"prompt_lookup_num_tokens": 7}
    else:
        helper = copy.deepcopy(model) if assistant == "the model itself" else decoder(num_levels=2, seed=3)
        helper.generation_config.num_assistant_tokens = 20
        options = {"assistant_model": helper}
    assert torch.equal(generate(model, input_ids=prompt, do_sample=False, **options), expected)


@pytest.mark.parametrize("length", [500, pytest.param(2000, marks=pytest.mark.slow)])
def test_long_generation_stays_exact(length):
    model = decoder(num_levels=3, max_position_embeddings=64)
    prompt = torch.randint(5, 40, (1, 5))
    outputs = model.generate(
        prompt, max_new_tokens=length, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        expected = model(outputs.sequences[:, :-1], use_cache=False).logits[0, 4:]
    logits = torch.cat(outputs.logits)
    assert logits.shape == (length, 40)
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def test_generation_goes_on_from_a_returned_cache_and_from_a_users_own():
    model = decoder(num_levels=3)
    prompt = torch.randint(5, 40, (1, 9))
    first = generate(model, input_ids=prompt, do_sample=False, return_dict_in_generate=True)
    expected = generate(model, input_ids=first.sequences, do_sample=False, use_cache=False)
    more = generate(model, input_ids=first.sequences, past_key_values=first.past_key_values, do_sample=False)
    assert torch.equal(more, expected)
    own = generate(model, input_ids=first.sequences, past_key_values=DynamicCache(), do_sample=False)
    assert torch.equal(own, expected)


def test_offloaded_weights_are_fetched_for_cached_steps():
    expected = generate(decoder(num_levels=3), **prompts(), do_sample=False)
    offloaded = decoder(num_levels=3)
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert torch.equal(generate(offloaded, **prompts(), do_sample=False), expected)


def test_embeddings_can_be_the_prompt():
    model = decoder(num_levels=3)
    prompt = torch.randint(5, 40, (1, 9))
    expected = generate(model, input_ids=prompt, do_sample=False)
    output = generate(model, inputs_embeds=model.model.embed_tokens(prompt), do_sample=False)
    assert torch.equal(output, expected[:, 9:])


@pytest.mark.parametrize("implementation", ["static", "quantized", "offloaded"])
def test_other_kinds_of_caches_are_refused(implementation):
    with pytest.raises(ValueError, match=f"`cache_implementation` must be None or 'dynamic', got '{implementation}'"):
        generate(decoder(), input_ids=torch.tensor([[5, 6]]), cache_implementation=implementation)


def test_a_static_cache_is_refused():
    model = decoder()
    with pytest.raises(ValueError, match="`past_key_values` must be an empty `DynamicCache"):
        generate(model, input_ids=torch.tensor([[5, 6]]), past_key_values=StaticCache(model.config, max_cache_len=40))


@given(num_levels=st.integers(1, 4), length=st.integers(2, 25), position=st.integers(1, 24))
def test_no_logit_sees_a_later_token(num_levels, length, position):
    position = min(position, length - 1)
    model = decoder(num_levels=num_levels, downsample_kernel_size=3)
    input_ids = torch.randint(5, 40, (1, length))
    changed = input_ids.clone()
    changed[:, position:] = torch.randint(5, 40, (1, length - position))
    with torch.no_grad():
        first, second = (model(ids, use_cache=False).logits[:, :position] for ids in (input_ids, changed))
    torch.testing.assert_close(first, second, rtol=0.0, atol=1e-6)


def test_loss_is_the_mean_over_the_next_tokens():
    model = decoder(num_levels=3)
    input_ids, attention_mask = right_padded_batch([9, 6], 9)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    outputs = model(input_ids, attention_mask=attention_mask, labels=labels)
    log_probabilities = outputs.logits.log_softmax(-1)
    terms = [-log_probabilities[row, i, input_ids[row, i + 1]] for row, n in enumerate((9, 6)) for i in range(n - 1)]
    torch.testing.assert_close(outputs.loss, torch.stack(terms).mean())
    split = model(input_ids, attention_mask=attention_mask, labels=labels, num_items_in_batch=torch.tensor(26))
    torch.testing.assert_close(split.loss, torch.stack(terms).sum() / 26)


def test_a_trainer_smooths_the_labels_of_the_next_tokens(tmp_path):
    """`Trainer` shifts the labels of those models that it knows to be causal."""
    model = decoder()
    input_ids = torch.randint(5, 40, (4, 20))
    losses = []
    for factor in (0.0, 1e-9):
        options = {"report_to": "none", "use_cpu": True, "label_smoothing_factor": factor}
        trainer = Trainer(model, TrainingArguments(str(tmp_path), **options))
        with torch.no_grad():
            losses.append(trainer.compute_loss(model, {"input_ids": input_ids, "labels": input_ids}).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_only_the_logits_asked_for_are_computed():
    model = decoder(num_levels=3)
    input_ids = torch.randint(5, 40, (2, 9))
    with torch.no_grad():
        whole = model(input_ids).logits
        torch.testing.assert_close(model(input_ids, logits_to_keep=2).logits, whole[:, -2:])
        torch.testing.assert_close(model(input_ids, logits_to_keep=torch.tensor([3, 5])).logits, whole[:, [3, 5]])


def test_a_mask_of_scores_replaces_the_causal_one():
    """Four dimensions, as everywhere in transformers: here a window of four tokens, and in pieces from a cache."""
    input_ids = torch.randint(5, 40, (2, 13))
    columns = torch.arange(13)
    window = (columns[None] <= columns[:, None]) & (columns[None] > columns[:, None] - 4)
    additive = torch.zeros(13, 13).masked_fill(~window, torch.finfo(torch.float32).min)
    results = []
    for implementation in ("eager", "sdpa"):
        model = decoder(num_levels=3)
        model.set_attn_implementation(implementation)
        for mask in (window[None, None], additive[None, None].expand(2, 4, -1, -1)):
            with torch.no_grad():
                results.append(model(input_ids, attention_mask=mask).logits)
                cache, pieces = DynamicCache(), []
                for start, stop in ((0, 5), (5, 6), (6, 13)):
                    piece = mask[:, :, start:stop, :stop]
                    outputs = model(input_ids[:, start:stop], attention_mask=piece, past_key_values=cache)
                    pieces.append(outputs.logits)
                results.append(torch.cat(pieces, dim=1))
    with torch.no_grad():
        assert not torch.allclose(model(input_ids).logits, results[0], atol=1e-2)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_masks_that_do_not_fit_are_refused(is_decoder):
    model = decoder(HKTModel, is_decoder=is_decoder)
    input_ids = torch.randint(5, 40, (2, 6))
    for shape in ((2, 6, 6), (3, 1, 6, 6), (2, 2, 6, 6), (2, 1, 6, 5), (2, 1, 5, 6)):
        with pytest.raises(ValueError, match="`attention_mask` must have shape"):
            model(input_ids, attention_mask=torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"must be bool .* or additive, got torch.int64"):
        model(input_ids, attention_mask=torch.ones(2, 1, 6, 6, dtype=torch.long))
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="packed sequences need a mask"):
        model(input_ids, attention_mask=torch.ones(2, 1, 6, 6, dtype=torch.bool), position_ids=packed)


def test_flags_that_contradict_each_other_are_refused():
    with pytest.raises(
        ValueError, match=r"`is_decoder` \(False\) must be True in the configuration of HKTForCausalLM"
    ):
        HKTForCausalLM(tiny_config())
    with pytest.raises(ValueError, match=r"`is_decoder` \(True\) must be False"):
        HKTForMaskedLM(tiny_config(is_decoder=True))
    for model_class in (HKTForSequenceClassification, HKTForMultipleChoice):
        for pooling in ("mean", "cls"):
            with pytest.raises(ValueError, match=rf"`pooling` \('{pooling}'\) must be 'last' with `is_decoder=True`"):
                model_class(tiny_config(is_decoder=True, pooling=pooling))
    with pytest.raises(ValueError, match=r"`is_causal` \(False\) can't be given"):
        decoder()(torch.tensor([[5, 6]]), is_causal=False)
    model = decoder(HKTForSequenceClassification, pooling="last")
    with pytest.raises(ValueError, match=r"must have shape .batch, length. where sequences are pooled"):
        model(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool))
    labels = torch.tensor([[5, 40]])
    with pytest.raises(ValueError, match=r"\[0, vocab_size\) = \[0, 40\), got 40"):
        decoder()(torch.tensor([[5, 6]]), labels=labels)


def test_the_backbone_of_a_decoder_serves_other_heads(tmp_path):
    decoder(num_levels=3, pooling="last").save_pretrained(tmp_path)
    language_model = AutoModelForCausalLM.from_pretrained(tmp_path)
    input_ids, attention_mask = right_padded_batch([9, 6], 9)
    hidden = language_model.model(input_ids, attention_mask=attention_mask)[0]
    for model_class in (HKTForSequenceClassification, HKTForTokenClassification):
        model = model_class.from_pretrained(tmp_path).eval()
        assert torch.equal(model.model(input_ids, attention_mask=attention_mask)[0], hidden)
        left = model(*left_padded(input_ids, attention_mask)).logits
        right = model(input_ids, attention_mask).logits
        if model_class is HKTForSequenceClassification:
            torch.testing.assert_close(left, right)
