"""The heads over the backbone: losses, padding, labels they refuse, tied embeddings, and weights that move between them."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_models import (
    HEAD_FIELDS,
    IMPLEMENTATIONS,
    POSITIONS,
    head_inputs,
    right_padded_batch,
    tiny_config,
    tiny_head,
)
from transformers import AutoModelForMaskedLM, Trainer, TrainerCallback, TrainingArguments

from hkt_hf import HKTForMaskedLM, HKTModel
from hkt_hf.modeling.modeling_hkt import AUTO_CLASSES


# Labels of three sequences of 9, 4 and 6 tokens, under the names of the arguments.
LENGTHS = [9, 4, 6]
TOKEN_LABELS = torch.full((3, 9), -100)
TOKEN_LABELS[0, 2], TOKEN_LABELS[0, 8], TOKEN_LABELS[1, 0], TOKEN_LABELS[2, 5] = 1, 0, 2, 2
LABELS = {
    "AutoModelForCausalLM": {"labels": TOKEN_LABELS.where(TOKEN_LABELS == -100, TOKEN_LABELS + 20)},
    "AutoModelForMaskedLM": {"labels": TOKEN_LABELS.where(TOKEN_LABELS == -100, TOKEN_LABELS + 30)},
    "AutoModelForTokenClassification": {"labels": TOKEN_LABELS},
    "AutoModelForQuestionAnswering": {
        "start_positions": torch.tensor([3, 0, 2]),
        "end_positions": torch.tensor([8, 1, 2]),
    },
    "AutoModelForMultipleChoice": {"labels": torch.tensor([2])},
}


def labelled_batch(auto_class):
    torch.manual_seed(0)
    return {**head_inputs(auto_class, *right_padded_batch(LENGTHS, 9)), **LABELS[auto_class]}


def mean_surprisal(logits, labels):
    """Mean of `-log softmax(logits)[label]` over the rows with a label, one by one in float64."""
    logits, labels = logits.reshape(-1, logits.shape[-1]).double(), labels.flatten().tolist()
    terms = [
        -(row[label].exp() / row.exp().sum()).log()
        for row, label in zip(logits, labels, strict=True)
        if 0 <= label < len(row)
    ]
    return torch.stack(terms).mean()


def expected_loss(output, auto_class):
    labels = LABELS[auto_class]
    if auto_class == "AutoModelForCausalLM":
        return mean_surprisal(output.logits[:, :-1], labels["labels"][:, 1:])
    if "labels" in labels:
        return mean_surprisal(output.logits, labels["labels"])
    start = mean_surprisal(output.start_logits, labels["start_positions"])
    return (start + mean_surprisal(output.end_logits, labels["end_positions"])) / 2


@pytest.mark.parametrize("auto_class", LABELS)
def test_loss_is_the_mean_over_what_has_a_label(auto_class):
    model = tiny_head(auto_class)
    output = model(**labelled_batch(auto_class))
    torch.testing.assert_close(output.loss.double(), expected_loss(output, auto_class), rtol=1e-5, atol=1e-6)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("auto_class", LABELS)
def test_losses_of_half_precision_models_are_computed_in_float32(auto_class, dtype):
    model = tiny_head(auto_class).to(dtype)
    output = model(**labelled_batch(auto_class))
    assert output[1].dtype == dtype and output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss.double(), expected_loss(output, auto_class), rtol=1e-5, atol=1e-5)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("auto_class", LABELS)
def test_labels_may_be_of_any_integer_type_and_layout(auto_class):
    model, batch = tiny_head(auto_class), labelled_batch(auto_class)
    loss = model(**batch).loss
    strided = {
        name: labels.int().unsqueeze(-1).repeat_interleave(2, -1)[..., 0]
        for name, labels in LABELS[auto_class].items()
    }
    assert not any(labels.is_contiguous() for labels in strided.values() if labels.numel() > 1)
    assert torch.equal(model(**{**batch, **strided}).loss, loss)


def test_ignored_questions_do_not_count():
    model = tiny_head("AutoModelForMultipleChoice")
    input_ids, attention_mask = right_padded_batch(LENGTHS * 2, 9)
    inputs = {"input_ids": input_ids.view(2, 3, 9), "attention_mask": attention_mask.view(2, 3, 9)}
    output = model(**inputs, labels=torch.tensor([-100, 1]))
    torch.testing.assert_close(output.loss.double(), mean_surprisal(output.logits[1], torch.tensor([1])))


def test_answers_beyond_the_input_are_ignored_and_no_tensor_of_the_caller_changes():
    model = tiny_head("AutoModelForQuestionAnswering")
    batch = labelled_batch("AutoModelForQuestionAnswering")
    batch["start_positions"] = torch.tensor([3, 9, 2])  # 9 is the first column beyond the input
    batch["end_positions"] = torch.tensor([8, 400, 11])
    copies = {name: tensor.clone() for name, tensor in batch.items()}
    output = model(**batch)
    start = mean_surprisal(output.start_logits[[0, 2]], torch.tensor([3, 2]))
    end = mean_surprisal(output.end_logits[:1], torch.tensor([8]))
    torch.testing.assert_close(output.loss.double(), (start + end) / 2, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(batch[name], copy) for name, copy in copies.items())
    column = {name: batch[name][:, None] for name in ("start_positions", "end_positions")}
    assert torch.equal(model(**{**batch, **column}).loss, output.loss)


class GradientRecorder(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = [parameter.grad.clone() for parameter in model.parameters()]


def rows_for_training(auto_class):
    """Eight examples; those with a label a token have different numbers of labels."""
    input_ids = torch.randint(5, 40, (8, 12))
    if auto_class == "AutoModelForMultipleChoice":
        return [{"input_ids": torch.stack([ids, ids.flip(0)]), "label": i % 2} for i, ids in enumerate(input_ids)]
    if auto_class == "AutoModelForQuestionAnswering":
        return [{"input_ids": ids, "start_positions": i, "end_positions": i + 4} for i, ids in enumerate(input_ids)]
    bound = 3 if auto_class == "AutoModelForTokenClassification" else 40
    labels = torch.randint(0, bound, (8, 12)).masked_fill(torch.arange(12) > torch.arange(8)[:, None], -100)
    return [{"input_ids": ids, "labels": row} for ids, row in zip(input_ids, labels, strict=True)]


@pytest.mark.parametrize("auto_class", LABELS)
def test_gradient_accumulation_gives_the_same_first_step(auto_class, tmp_path):
    rows = rows_for_training(auto_class)
    results = {}
    for accumulation in (1, 4):
        recorder = GradientRecorder()
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(accumulation)),
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model=tiny_head(auto_class), args=arguments, train_dataset=rows, callbacks=[recorder])
        trainer.train()
        results[accumulation] = trainer.state.log_history[0]["loss"], recorder.gradients
    assert results[1][0] == pytest.approx(results[4][0], abs=1e-4)
    for once, accumulated in zip(results[1][1], results[4][1], strict=True):
        torch.testing.assert_close(accumulated, once, rtol=1e-4, atol=1e-5)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    padding=st.integers(0, 5),
    positions=st.sampled_from(POSITIONS),
    pooling=st.sampled_from(["mean", "cls", "last"]),
    num_levels=st.integers(1, 4),
    implementation=st.sampled_from(IMPLEMENTATIONS),
)
@settings(max_examples=10)
@pytest.mark.parametrize("auto_class", LABELS)
def test_padding_on_either_side_changes_nothing(
    auto_class, lengths, padding, positions, pooling, num_levels, implementation
):
    torch.manual_seed(0)
    model = tiny_head(auto_class, position_embedding_type=positions, pooling=pooling, num_levels=num_levels)
    model.set_attn_implementation(implementation)
    total = max(lengths) + padding
    right = right_padded_batch(lengths, total)
    left = [torch.stack([row.roll(total - n) for row, n in zip(tensor, lengths, strict=True)]) for tensor in right]
    columns = {"right": [slice(0, n) for n in lengths], "left": [slice(total - n, total) for n in lengths]}

    def real_outputs(batch, side):
        with torch.no_grad():
            output = model(**head_inputs(auto_class, *batch))
        outputs = [value for name, value in output.items() if name.endswith("logits")]
        if auto_class == "AutoModelForMultipleChoice":
            return [value[0, row] for value in outputs for row in range(len(lengths))]
        return [value[row, real] for value in outputs for row, real in enumerate(columns[side])]

    alone = []
    for row, n in enumerate(lengths):
        with torch.no_grad():
            output = model(**head_inputs(auto_class, right[0][row : row + 1, :n], right[1][row : row + 1, :n]))
        alone.append([value[0] for name, value in output.items() if name.endswith("logits")])
    expected = [outputs[index] for index in range(len(alone[0])) for outputs in alone]
    for batch, side in ((right, "right"), (left, "left")):
        for actual, value in zip(real_outputs(batch, side), expected, strict=True):
            torch.testing.assert_close(actual, value.reshape(actual.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_every_class_hands_on_what_the_backbone_records(auto_class):
    model = tiny_head(auto_class)
    model.set_attn_implementation("eager")
    inputs = head_inputs(auto_class, *right_padded_batch([7, 5], 7))
    recorded = {"output_hidden_states": 3, "output_attentions": 2, "output_level_weights": 2}
    with torch.no_grad():
        output = model(**inputs, **dict.fromkeys(recorded, True))
        plain = model(**inputs)
        as_tuple = model(**inputs, return_dict=False)
    for name, count in recorded.items():
        assert len(output[name.removeprefix("output_")]) == count
        assert plain.get(name.removeprefix("output_")) is None
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], plain[0])


def bad_calls():
    ids = torch.randint(5, 40, (2, 6))
    choices = ids.view(2, 1, 6).repeat(1, 3, 1)
    mask = torch.ones(2, 6, dtype=torch.long)
    zeros, labels = torch.zeros(2, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    for auto_class, bound in (
        ("CausalLM", r"vocab_size\) = \[0, 40"),
        ("MaskedLM", r"vocab_size\) = \[0, 40"),
        ("TokenClassification", r"num_labels\) = \[0, 3"),
    ):
        yield auto_class, rf"`labels` must lie in \[0, {bound}\), got 40", {"input_ids": ids, "labels": labels + 40}
        yield auto_class, r"`labels` .* got -1", {"input_ids": ids, "labels": labels - 1}
        yield (
            auto_class,
            r"`labels` must have shape \(2, 6\), got \(2, 5\)",
            {"input_ids": ids, "labels": labels[:, 1:]},
        )
        yield auto_class, r"`labels` must have shape \(2, 6\), got \(2,\)", {"input_ids": ids, "labels": zeros}
        yield auto_class, r"`labels` must be integers, got torch.float32", {"input_ids": ids, "labels": labels.float()}
        yield auto_class, "exactly one of `input_ids` and `inputs_embeds`", {"labels": labels}
    answer = {"input_ids": ids, "start_positions": zeros, "end_positions": zeros}
    for auto_class, message, changes in (
        ("QuestionAnswering", "`start_positions` and `end_positions` must be given together", {"end_positions": None}),
        (
            "QuestionAnswering",
            r"`end_positions` must be columns .* at least 0, got -100",
            {"end_positions": zeros - 100},
        ),
        (
            "QuestionAnswering",
            r"`start_positions` must have shape \(2,\), got \(3,\)",
            {"start_positions": labels[0, :3]},
        ),
        ("QuestionAnswering", "`end_positions` must be integers, got torch.float32", {"end_positions": zeros.float()}),
        ("QuestionAnswering", "packed sequences", {"position_ids": packed}),
        ("QuestionAnswering", "exactly one of `input_ids` and `inputs_embeds`", {"input_ids": None}),
    ):
        yield auto_class, message, {**answer, **changes}
    for message, inputs in (
        (r"`input_ids` must have shape \(batch, choices, length\) .* got \(2, 6\)", {"input_ids": ids}),
        (r"`input_ids` .* at least 1 choice", {"input_ids": choices[:, :0]}),
        (
            r"`inputs_embeds` must have shape \(batch, choices, length, hidden_size\)",
            {"inputs_embeds": torch.ones(2, 6, 32)},
        ),
        ("exactly one of `input_ids` and `inputs_embeds`", {}),
        (
            "exactly one of `input_ids` and `inputs_embeds`",
            {"input_ids": choices, "inputs_embeds": torch.ones(2, 3, 6, 32)},
        ),
        (
            r"`attention_mask` must have shape .*\(2, 3, 6\), got \(2, 6\)",
            {"input_ids": choices, "attention_mask": mask},
        ),
        (
            r"`position_ids` must have shape .*\(2, 3, 6\), got \(1, 6\)",
            {"input_ids": choices, "position_ids": packed[:1]},
        ),
        ("packed sequences", {"input_ids": choices, "position_ids": packed[:, None].repeat(1, 3, 1)}),
        (r"`labels` must lie in \[0, choices\) = \[0, 3\), got 3", {"input_ids": choices, "labels": zeros + 3}),
        (r"`labels` must have shape \(2,\), got \(2, 3\)", {"input_ids": choices, "labels": labels[:, :3]}),
        ("`labels` must be integers", {"input_ids": choices, "labels": zeros.float()}),
    ):
        yield "MultipleChoice", message, inputs
    yield (
        "SequenceClassification",
        "`attention_mask` must have shape",
        {
            "input_ids": ids,
            "attention_mask": mask[:, 1:],
            "position_ids": packed,
        },
    )


@pytest.mark.parametrize(("head", "message", "kwargs"), list(bad_calls()))
def test_bad_inputs_are_refused_before_any_work(head, message, kwargs):
    model = tiny_head(f"AutoModelFor{head}")
    worked = []
    model.model.layers[0].register_forward_pre_hook(lambda *args: worked.append(args))
    with pytest.raises(ValueError, match=message):
        model(**kwargs)
    assert not worked


# The embeddings that the language-model head shares.


@pytest.mark.parametrize("tie", [True, False])
def test_tied_embeddings_stay_one_tensor_through_saving_and_resizing(tie, tmp_path):
    model = tiny_head("AutoModelForMaskedLM", tie_word_embeddings=tie)

    def check(model, vocab_size):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
        assert model.get_output_embeddings() is model.lm_head
        assert model.lm_head.weight.shape == (vocab_size, 32) and model.lm_head.bias.shape == (vocab_size,)

    check(model, 40)
    model.save_pretrained(tmp_path / "saved")
    names = safe_open(tmp_path / "saved" / "model.safetensors", "pt")
    assert ("lm_head.weight" in names.keys()) != tie
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")
    check(loaded, 40)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name

    loaded.resize_token_embeddings(50)
    check(loaded, 50)
    assert loaded.config.vocab_size == 50
    for name in ("lm_head.weight", "lm_head.bias", "model.embed_tokens.weight"):
        assert torch.equal(loaded.state_dict()[name][:40], model.state_dict()[name]), name
    input_ids, attention_mask = right_padded_batch([9, 5], 9, vocab_size=50)
    assert loaded(input_ids, attention_mask, labels=input_ids).logits.shape == (2, 9, 50)
    loaded.save_pretrained(tmp_path / "resized")
    check(AutoModelForMaskedLM.from_pretrained(tmp_path / "resized"), 50)


# Weights that move between heads.


def assert_same_backbone(model, other):
    state, expected = model.base_model.state_dict(), other.base_model.state_dict()
    assert state.keys() == expected.keys()
    for name in expected:
        assert torch.equal(state[name], expected[name]), name


@pytest.mark.parametrize("auto_class", [name for name in AUTO_CLASSES if name != "AutoModelForMaskedLM"])
def test_a_pretrained_backbone_moves_into_every_head_and_back(auto_class, tmp_path):
    pretrained = tiny_head("AutoModelForMaskedLM")
    pretrained.save_pretrained(tmp_path / "pretrained")
    loader = getattr(transformers, auto_class)
    fields = HEAD_FIELDS.get(AUTO_CLASSES[auto_class], {})
    torch.manual_seed(2)
    model, info = loader.from_pretrained(tmp_path / "pretrained", output_loading_info=True, **fields)
    assert_same_backbone(model, pretrained)
    shared = pretrained.state_dict().keys()
    head = {name for name in model.state_dict() if model is not model.base_model and not name.startswith("model.")}
    assert info["missing_keys"] == head - shared and not info["mismatched_keys"] and not info["error_msgs"]
    for name in head - shared:
        # A fresh head, not memory that nobody wrote: no bias, weights of the size of `initializer_range`.
        parameter = model.get_parameter(name)
        assert parameter.eq(0).all() if name.endswith("bias") else 0.005 < parameter.std() < 0.05, name

    model.save_pretrained(tmp_path / "tuned")
    fields = {name: getattr(pretrained.config, name) for name in fields}
    back, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "tuned", output_loading_info=True, **fields)
    assert_same_backbone(back, pretrained)
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert not any(name.startswith("model.") for name in info["missing_keys"])


def test_pretraining_moves_the_head_and_the_shared_table():
    """Both uses of the tied table reach its gradient: rows of ids that only labels name, and rows that only inputs name."""
    model = HKTForMaskedLM(tiny_config())
    labels = torch.full((1, 4), -100)
    labels[0, 1] = 33
    model(torch.tensor([[5, 6, 7, 8]]), labels=labels).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    untied = HKTForMaskedLM(tiny_config(tie_word_embeddings=False))
    untied.load_state_dict(model.state_dict())
    untied(torch.tensor([[5, 6, 7, 8]]), labels=labels).loss.backward()
    separate = untied.model.embed_tokens.weight.grad, untied.lm_head.weight.grad
    assert separate[0][33].eq(0).all() and separate[0][5].ne(0).any() and separate[1][33].ne(0).any()
    torch.testing.assert_close(gradient, separate[0] + separate[1])


def test_heads_wear_the_same_backbone():
    backbone = HKTModel(tiny_config()).state_dict()
    for auto_class in LABELS:
        assert tiny_head(auto_class).model.state_dict().keys() == backbone.keys()
