"""Peers as arms of experiments: padding, masks, pooling, dropout, the Trainer, and what can't be built."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from hkt_hf.benchmark import registry
from hkt_hf.benchmark.measurement import NotAvailableError
from hkt_hf.benchmark.registry import PEERS, MeanClassifier, ModelSizes, library_config, model_unavailable
from hkt_hf.experiments.peers import build_peer, peer_padding
from hkt_hf.tokenization import build_tokenizer


SIZES = {
    "vocab_size": 40,
    "num_labels": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
}
LENGTH = 100
ONE_LENGTH = ("nystromformer", "fnet", "h-transformer-1d")
MEAN = ("bert", "nystromformer", "mamba", "h-transformer-1d")
# Others for the rest of transformers: an encoder, two decoders, and one without a classifier of its own.
OTHERS = ("distilbert", "gpt2", "qwen3", "granite")


def build(name, length=LENGTH, **changes):
    if reason := model_unavailable(name):
        pytest.skip(reason)
    return build_peer(name, length=length, **{**SIZES, **changes})


def randomized(name, length=LENGTH):
    """Parameters that let every path be seen, in evaluation mode."""
    model = build(name, length)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def batch(name, lengths, length=LENGTH, padding_id=0):
    """Sequences that depend on their length alone, padded as the peer needs it."""
    multiple = peer_padding(name, length) or 1
    total = -(-max(lengths) // multiple) * multiple
    mask = (torch.arange(total) < torch.tensor(lengths)[:, None]).long()
    rows = [torch.randint(5, 40, (total,), generator=torch.Generator().manual_seed(own)) for own in lengths]
    return {"input_ids": torch.stack(rows).masked_fill(mask == 0, padding_id), "attention_mask": mask}


# Training


@pytest.mark.parametrize("name", [*PEERS, *OTHERS])
def test_peers_train_save_and_evaluate_with_the_trainer(name, tmp_path):
    model = build(name, dropout=0.1)
    rows = [
        {"input_ids": torch.randint(5, 40, (length,)).tolist(), "labels": index % 3}
        for index, length in enumerate([30, LENGTH, 5, 41, 12, 77, 60])
    ]
    tokenizer = build_tokenizer("pixels", model_max_length=LENGTH)
    gradients = {}

    class Recorder(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            gradients.update({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
            return loss

    trainer = Recorder(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=3,
            per_device_eval_batch_size=4,
            save_steps=1,
            learning_rate=1e-3,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=peer_padding(name, LENGTH)),
    )
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    trainer.train()
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    # BigBird builds a pooler that its own classifier does not read.
    assert {key for key in trained - set(gradients) if "bert.pooler" not in key} == set()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(not torch.equal(before[key], parameter) for key, parameter in model.named_parameters())
    predictions = trainer.predict(rows)
    assert predictions.predictions.shape == (len(rows), 3) and predictions.metrics["test_loss"] > 0
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    model.load_state_dict(saved, strict=True)


@pytest.mark.parametrize("length", [705, 960])
def test_big_bird_stays_sparse_behind_704_tokens(length):
    model = build("big_bird", length, num_hidden_layers=1)
    model.train()
    inputs = batch("big_bird", [20, 300], length)
    assert inputs["input_ids"].shape[1] == peer_padding("big_bird", length) > 704
    model(**inputs, labels=torch.tensor([0, 2])).loss.backward()
    assert model.model.bert.attention_type == "block_sparse"
    with pytest.raises(ValueError, match=r"must be padded to .* tokens"):
        model(inputs["input_ids"][:, :640])


def test_bert_learns_a_tiny_problem_by_heart():
    model = build("bert")
    inputs = batch("bert", [50, 20, 9, 34, 27, 13])
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(3.0).log().item(), abs=0.1)
    assert losses[-1] < 0.05


# Padding and masks


@pytest.mark.parametrize(("name", "length"), [*((name, LENGTH) for name in [*PEERS, *OTHERS]), ("big_bird", 800)])
def test_other_rows_do_not_change_a_sequence(name, length):
    model = randomized(name, length)
    with torch.no_grad():
        together = model(**batch(name, [30, length, 11], length)).logits
        alone = model(**batch(name, [30], length)).logits
    assert together.std() > 1e-3
    # Nyströmformer begins its iterative inverse from a maximum over the whole batch.
    tolerance = 1e-3 if name == "nystromformer" else 1e-5
    torch.testing.assert_close(together[:1], alone, atol=tolerance, rtol=tolerance)


WITHOUT_MASK = {
    "fnet": "a Fourier transform has no padding mask",
    "nystromformer": "landmarks are means over padding too",
    "h-transformer-1d": "a token whose neighbours are all padding attends to them",
    # Decoders of transformers find the last real token by its id.
    "gpt2": "finds the last token that is not the padding id",
    "qwen3": "finds the last token that is not the padding id",
}


@pytest.mark.parametrize("name", [*PEERS, *OTHERS])
def test_padding_behind_the_mask_is_not_read(name):
    if name in WITHOUT_MASK:
        pytest.skip(WITHOUT_MASK[name])
    model = randomized(name)
    with torch.no_grad():
        zeros, others = (model(**batch(name, [30, LENGTH], padding_id=padding_id)).logits for padding_id in (0, 7))
    torch.testing.assert_close(zeros, others, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["fnet", "nystromformer", "h-transformer-1d"])
def test_peers_that_read_their_padding_are_given_one_length(name):
    model = randomized(name)
    with torch.no_grad():
        zeros, others = (model(**batch(name, [30, LENGTH], padding_id=padding_id)).logits for padding_id in (0, 7))
    assert (zeros[0] - others[0]).abs().max() > 1e-3
    padded = peer_padding(name, LENGTH)
    assert padded >= LENGTH
    with pytest.raises(
        ValueError, match=f"'{name}' must be padded to {padded} tokens, as `peer_padding` says, got 50"
    ):
        model(torch.full((1, 50), 5))


@given(length=st.integers(1, 5000), name=st.sampled_from([*PEERS, "distilbert"]))
def test_padding_reaches_the_longest_sequence_at_once(length, name):
    multiple = peer_padding(name, length)
    if name in ONE_LENGTH or (name == "big_bird" and length > 704):
        assert length <= multiple < max(2 * length, 128)  # every shorter batch is padded to it as well
    else:
        assert multiple is None


@pytest.mark.parametrize("name", ONE_LENGTH)
@given(length=st.integers(1, 300))
def test_every_length_can_be_built(name, length):
    if model_unavailable(name):
        return
    model = build(name, length, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    inputs = batch(name, [length, (length + 1) // 2], length)
    assert model.eval()(**inputs).logits.isfinite().all()


# Pooling and dropout


@pytest.mark.parametrize("name", MEAN)
def test_encoders_without_a_pooler_take_the_mean_over_real_tokens(name):
    model = randomized(name)
    model = getattr(model, "model", model)
    assert isinstance(model, MeanClassifier) and not any("pooler" in key for key, _ in model.named_parameters())
    inputs = batch(name, [30, 11, LENGTH])
    with torch.no_grad():
        hidden_states = model.encoder(**{"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]})
        pooled = torch.stack(
            [row[:length].mean(0) for row, length in zip(hidden_states, [30, 11, LENGTH], strict=True)]
        )
        torch.testing.assert_close(model(**inputs).logits, model.classifier(pooled), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*PEERS, *OTHERS])
def test_dropout_is_what_was_asked_for(name):
    inputs = batch(name, [30, LENGTH])
    model = build(name, dropout=0.0)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(**inputs).logits, model.eval()(**inputs).logits, atol=1e-5, rtol=1e-5)
        model = build(name, dropout=0.25).train()
        # Decoders since Llama have no dropout but that of attention weights.
        assert torch.equal(model(**inputs).logits, model(**inputs).logits) is (name == "qwen3")
    rates = {key: module.p for key, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert set(rates.values()) <= {0.0, 0.25}
    inner = ("encoder.", "layer", "embeddings", "transformer.")
    heads = [rate for key, rate in rates.items() if not any(part in key for part in inner)]
    if name not in ("gpt2", "qwen3"):  # classifiers of decoders have no dropout
        assert heads and set(heads) == {0.25}


def test_dropouts_of_configurations():
    sizes = ModelSizes(LENGTH, dropout=0.25)
    bert = library_config("bert", sizes)
    assert (bert.hidden_dropout_prob, bert.classifier_dropout, bert.attention_probs_dropout_prob) == (0.25, 0.25, 0.0)
    modernbert = library_config("modernbert", sizes)
    assert (modernbert.embedding_dropout, modernbert.mlp_dropout, modernbert.classifier_dropout) == (0.25, 0.25, 0.25)
    assert modernbert.attention_dropout == 0.0
    bart = library_config("bart", sizes)
    assert (bart.dropout, bart.activation_dropout, bart.attention_dropout, bart.encoder_layerdrop) == (0.25, 0, 0, 0)
    assert library_config("esm", sizes).token_dropout is False
    assert library_config("bert", ModelSizes(LENGTH)).hidden_dropout_prob == 0.0


# What can be built


@pytest.mark.parametrize("name", OTHERS)
def test_any_model_type_gets_the_sizes(name):
    model = build(name)
    config = (model.encoder.model if name == "granite" else model).config
    for field in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"):
        assert getattr(config, field) == SIZES[field]
    assert {"distilbert": "hidden_dim", "gpt2": "n_inner"}.get(name, "intermediate_size") in config.to_dict()
    linear = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    convolutions = [module.nf for module in model.modules() if type(module).__name__ == "Conv1D"]
    assert SIZES["intermediate_size"] in (*linear, *convolutions) and 3 in linear


@pytest.mark.parametrize("name", PEERS)
def test_the_number_of_labels_and_the_padding_id_are_free(name):
    model = build(name, num_labels=7, pad_token_id=4).eval()
    inputs = batch(name, [30, LENGTH], padding_id=4)
    output = model(**inputs, labels=torch.tensor([6, 0]))
    assert output.logits.shape == (2, 7)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, torch.tensor([6, 0])))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("canine", "no field for vocab_size"),
        ("bloom", "no field for intermediate_size"),
        ("vit", "no field for vocab_size"),
        ("t5", "an encoder-decoder"),
        ("squeezebert", "can't build it at these sizes: AssertionError"),
    ],
)
def test_peers_that_cannot_be_built_say_why(name, reason):
    with pytest.raises(NotAvailableError, match=reason):
        build_peer(name, length=LENGTH, **SIZES)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotAvailableError, match="pip install h-transformer-1d"):
        build_peer("h-transformer-1d", length=LENGTH, **SIZES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "modernbrt"}, "got 'modernbrt'; the nearest one is 'modernbert'"),
        ({"num_labels": 1}, "`num_labels` must be at least 2, got 1"),
        ({"length": 0}, "`length` must be at least 1, got 0"),
        ({"dropout": 1.0}, r"`dropout` must lie in \[0, 1\), got 1.0"),
        ({"pad_token_id": 40}, r"`pad_token_id` must be less than `vocab_size` \(40\), got 40"),
        ({"hidden_size": 30}, "`hidden_size` must be a multiple of the 4 heads, got 30"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        build_peer(**{"name": "bert", "length": LENGTH, **SIZES, **changes})
    if "name" in changes:
        with pytest.raises(ValueError, match=message):
            peer_padding(changes["name"], LENGTH)
