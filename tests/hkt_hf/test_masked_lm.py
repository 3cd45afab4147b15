"""Masked-language-model pretraining: masks, runs, interruption, fine-tuning, and what is refused."""

import json
import math
import pickle
import shutil
import signal
import subprocess
import sys
import time

import datasets
import pytest
import torch
from clients import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hkt_hf import HKTConfig, HKTForMaskedLM
from hkt_hf.cli import main
from hkt_hf.config import build_experiment
from hkt_hf.data import DataConfig, load_data
from hkt_hf.masking import MaskingCollator, TokenMasker
from hkt_hf.metrics import masked_lm_metrics, sum_masked_tokens
from hkt_hf.objectives import OBJECTIVES
from hkt_hf.tokenization import build_tokenizer
from hkt_hf.training import build_model_and_tokenizer, evaluate_checkpoint, predict, train, training_arguments


BYTES = build_tokenizer("bytes", model_max_length=64, add_cls_token=True)
VALUES = {
    "objective": "masked_lm",
    "model": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "num_levels": 2,
    },
    "data": {
        "task": "listops",
        "listops": {"min_length": 5, "max_length": 24, "num_train": 96, "num_validation": 20, "num_test": 20},
    },
    "tokenizer": {"max_length": 24},
    "training": {
        "per_device_train_batch_size": 16,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 10,
        "save_strategy": "steps",
        "save_steps": 10,
        "logging_steps": 1,
        "disable_tqdm": True,
    },
}


def experiment(output_dir, **changes):
    sections = {**VALUES, "output_dir": str(output_dir)}
    for name, change in changes.items():
        sections[name] = {**sections[name], **change} if isinstance(sections.get(name), dict) else change
    return {name: section for name, section in sections.items() if section is not None}


# --- Masks -----------------------------------------------------------------------------------------------------------


@given(ids=st.lists(st.integers(0, 260), min_size=1, max_size=40), probability=st.sampled_from([0.01, 0.15, 0.9]))
def test_masks_hide_ordinary_tokens_and_labels_tell_them(ids, probability):
    special = [id_ < 5 for id_ in ids]
    if all(special):
        return
    masked, labels = TokenMasker(BYTES, probability)(ids, (0, 1, 2))
    chosen = labels != -100
    assert masked.shape == labels.shape == (len(ids),) and chosen.any()
    assert labels[chosen].tolist() == torch.tensor(ids)[chosen].tolist()
    assert masked[~chosen].tolist() == torch.tensor(ids)[~chosen].tolist()
    assert not chosen[torch.tensor(special)].any()


def test_shares_are_those_of_bert():
    ids = torch.arange(20_000) % 256 + 5
    masked, labels = TokenMasker(BYTES, 0.15)(ids, (7,))
    chosen = labels != -100
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01)
    replaced = masked[chosen]
    assert (replaced == BYTES.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (replaced == labels[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.03)


def collate(rows, epoch=0, seed=0, tokenizer=BYTES):
    collator = MaskingCollator(TokenMasker(tokenizer, 0.3), seed)
    collator.set_epoch(epoch)
    return collator([{"input_ids": ids, "example": number, "length": len(ids)} for number, ids in rows])


def test_masks_depend_on_seed_epoch_and_example_alone():
    rows = [(number, list(range(10, 10 + length))) for number, length in enumerate([30, 12, 25, 30])]
    torch.manual_seed(3)
    batch = collate(rows)
    torch.manual_seed(4)
    alone = [collate([row]) for row in rows]
    for index, single in enumerate(alone):
        length = single["input_ids"].shape[1]
        for name in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(batch[name][index, :length], single[name][0])
        assert (batch["labels"][index, length:] == -100).all() and not batch["attention_mask"][index, length:].any()
    first = batch["labels"]
    assert not torch.equal(first, collate(rows, epoch=1)["labels"])
    assert not torch.equal(first, collate(rows, seed=1)["labels"])
    assert not torch.equal(first[0], collate([(3, rows[0][1])])["labels"][0])


def test_labels_are_padded_on_the_side_of_the_tokens():
    left = build_tokenizer("bytes", model_max_length=64)
    left.padding_side = "left"
    rows = [(0, list(range(10, 30))), (1, list(range(10, 18)))]
    batch = collate(rows, tokenizer=left)
    alone = collate(rows[1:], tokenizer=left)
    assert torch.equal(batch["labels"][1, 12:], alone["labels"][0]) and (batch["labels"][1, :12] == -100).all()
    assert torch.equal(batch["input_ids"][1, 12:], alone["input_ids"][0])


def test_workers_that_outlive_an_epoch_change_the_masks():
    collator = MaskingCollator(TokenMasker(BYTES, 0.3), seed=0)
    rows = [{"input_ids": list(range(10, 40)), "example": number} for number in range(4)]
    loader = DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1):
        collator.set_epoch(epoch)
        epochs.append(torch.cat([batch["labels"] for batch in loader]))
        assert torch.equal(epochs[-1], collator(rows)["labels"])
    assert not torch.equal(*epochs)
    assert torch.equal(pickle.loads(pickle.dumps(collator))(rows)["labels"], epochs[1])


def test_metrics_are_those_of_all_masked_tokens():
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[0, 1:] = labels[1, 3:] = -100
    sums = torch.cat([sum_masked_tokens(logits[:2], labels[:2]), sum_masked_tokens(logits[2:], labels[2:])])
    metrics = masked_lm_metrics(type("Prediction", (), {"predictions": sums.numpy()}))
    chosen = labels != -100
    expected = torch.nn.functional.cross_entropy(logits[chosen], labels[chosen]).item()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    hits = (logits.argmax(-1) == labels)[chosen].double()
    assert metrics["masked_accuracy"] == pytest.approx(hits.mean().item())


# --- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "masked"
    return output_dir, train(build_experiment(experiment(output_dir)))


def test_a_masked_language_model_learns_and_says_what_it_is(pretrained):
    output_dir, report = pretrained
    losses = [entry["loss"] for entry in json.loads((output_dir / "curves.json").read_text())["train"]]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.2
    assert report["main_metric"] == "masked_accuracy"
    assert set(report["test"]) == {"loss", "masked_accuracy", "perplexity"}
    assert report["test"]["perplexity"] == pytest.approx(math.exp(report["test"]["loss"]))
    card = (output_dir / "README.md").read_text()
    for part in ("pipeline_tag: fill-mask", "AutoModelForMaskedLM", "masked language modeling", "type: fill-mask"):
        assert part in card
    assert f"| test | perplexity | {report['test']['perplexity']:.4f} |" in card
    assert type(AutoModelForMaskedLM.from_pretrained(output_dir)).__name__ == "HKTForMaskedLM"


def test_each_evaluation_has_the_same_masks(pretrained):
    """Whatever the batch size: the reported loss is the mean over all masked tokens."""
    output_dir, report = pretrained
    for batch_size in ("3", "64"):
        metrics = evaluate_checkpoint(output_dir, ["--training.per_device_eval_batch_size", batch_size])
        assert metrics == pytest.approx(report["test"], rel=1e-5)
    assert set(evaluate_checkpoint(output_dir, split="train")) == set(report["test"])
    other = evaluate_checkpoint(output_dir, ["--mlm_probability", "0.5"])
    assert other["loss"] != pytest.approx(report["test"]["loss"], rel=1e-3)


def test_the_loss_is_that_of_the_model_by_hand(pretrained):
    output_dir, report = pretrained
    config = build_experiment(experiment(output_dir))
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    model = AutoModelForMaskedLM.from_pretrained(output_dir)
    rows = OBJECTIVES["masked_lm"].prepare(load_data(config.data).splits, tokenizer, config)["test"]
    total = tokens = 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
        count = (labels != -100).sum().item()
        total, tokens = total + loss.item() * count, tokens + count
    assert report["test"]["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_a_checkpoint_fills_masks(pretrained, capsys):
    output_dir, _ = pretrained
    assert main(["predict", str(output_dir), "[MAX 2 [MASK] ]", "--json"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]
    scores = json.loads(line)["scores"]
    best, *_ = pipeline("fill-mask", model=str(output_dir))("[MAX 2 [MASK] ]")
    assert len(scores) == 5 and scores[0] == {"label": best["token_str"], "score": pytest.approx(best["score"])}
    assert main(["predict", str(output_dir), "[MAX 2 ]"]) == 1
    assert "'[MAX 2 ]' holds it 0 times" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds it 2 times"):
        predict(output_dir, ["[MAX [MASK] [MASK] ]"])


def test_fine_tuning_starts_from_the_pretrained_backbone(pretrained, tmp_path):
    output_dir, _ = pretrained
    values = experiment(tmp_path / "run", objective=None)
    config = build_experiment({**values, "model": {"checkpoint": str(output_dir)}})
    model, _ = build_model_and_tokenizer(config, load_data(config.data))
    source = AutoModelForMaskedLM.from_pretrained(output_dir)
    for name, parameter in source.model.named_parameters():
        assert torch.equal(dict(model.model.named_parameters())[name], parameter)
    report = train(config)
    assert set(report["test"]) == {"loss", "accuracy"} and report["steps"] == 20
    assert "Fine-tuned from `masked`" in (tmp_path / "run" / "README.md").read_text()
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")).__name__ == (
        "HKTForSequenceClassification"
    )
    assert evaluate_checkpoint(tmp_path / "run") == report["test"]


def test_pretraining_goes_on_from_a_checkpoint(pretrained, tmp_path):
    values = experiment(tmp_path / "more", training={"max_steps": 2})
    report = train(build_experiment({**values, "model": {"checkpoint": str(pretrained[0])}}))
    assert report["validation"]["loss"] < 1.1 * pretrained[1]["validation"]["loss"]


@pytest.mark.slow
def test_a_killed_run_repeats_the_masks(tmp_path):
    """SIGKILL in the second epoch of six steps; the resumed run logs what an uninterrupted one logs."""
    training = {"max_steps": 30, "save_steps": 4, "eval_steps": 15}
    values = {name: experiment(tmp_path / name, training=training) for name in ("killed", "whole")}
    (tmp_path / "killed.yaml").write_text(json.dumps(values["killed"]))
    command = [sys.executable, "-m", "hkt_hf.cli", "train", str(tmp_path / "killed.yaml")]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint-8" / "trainer_state.json").is_file():
        assert killed.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "metrics.json").exists()

    reports = {name: train(build_experiment(values[name])) for name in values}
    assert reports["killed"]["resumed"] and not reports["whole"]["resumed"]
    losses = {}
    for name in reports:
        curves = json.loads((tmp_path / name / "curves.json").read_text())
        losses[name] = [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in curves["train"]]
    assert len(losses["whole"]) == 30
    assert losses["killed"] == losses["whole"]
    assert reports["killed"]["test"] == reports["whole"]["test"]


def test_each_epoch_has_masks_of_its_own_also_after_resuming(pretrained, tmp_path, monkeypatch):
    output_dir = tmp_path / "run"
    shutil.copytree(pretrained[0], output_dir)
    (output_dir / "metrics.json").unlink()
    shutil.rmtree(output_dir / "checkpoint-20")
    epochs = []
    set_epoch = MaskingCollator.set_epoch
    monkeypatch.setattr(
        MaskingCollator, "set_epoch", lambda self, epoch: epochs.append(epoch) or set_epoch(self, epoch)
    )
    report = train(build_experiment(experiment(output_dir)))
    assert report["resumed"] and epochs == [1, 2, 3]  # six steps each; step 10 is in the second
    resumed, whole = (json.loads((folder / "curves.json").read_text()) for folder in (output_dir, pretrained[0]))
    assert [entry["loss"] for entry in resumed["train"]] == [entry["loss"] for entry in whole["train"]]
    assert report["test"] == pretrained[1]["test"]


def test_texts_without_labels_and_byte_masks(tmp_path):
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"line {i} of it"}) for i in range(40)))
    data = {"task": "text", "path": str(tmp_path / "texts.jsonl"), "listops": {}}
    values = experiment(tmp_path / "run", data=data, training={"max_steps": 2})
    report = train(build_experiment(values))
    assert math.isfinite(report["test"]["loss"])
    assert "without labels" in (tmp_path / "run" / "README.md").read_text()
    (best, *_) = predict(tmp_path / "run", ["l[MASK]ne"])
    assert len(best) == 5
    with pytest.raises(ValueError, match="label"):
        train(build_experiment({**values, "objective": "sequence_classification"}))


def test_pretraining_has_the_splits_of_the_classifier(tmp_path):
    """Or it would see texts that the classifier is tested on."""
    rows = [{"text": f"text {i}", "label": "ab"[i % 3 == 0]} for i in range(100)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(task="text", path=str(tmp_path / "rows.jsonl"))
    with_labels, without = (load_data(config, need_labels=need).splits for need in (True, False))
    assert {name: split["text"][:] for name, split in without.items()} == {
        name: split["text"][:] for name, split in with_labels.items()
    }


def test_the_best_checkpoint_is_the_one_of_lowest_perplexity(tmp_path):
    for name, greater in (("perplexity", False), ("masked_accuracy", True), ("loss", False)):
        training = {"metric_for_best_model": name}
        assert (
            training_arguments(build_experiment(experiment(tmp_path, training=training))).greater_is_better is greater
        )
    training = {"metric_for_best_model": "perplexity", "greater_is_better": True}
    assert training_arguments(build_experiment(experiment(tmp_path, training=training))).greater_is_better


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "masked_ml"}, "got 'masked_ml'; the nearest one is 'masked_lm'"),
        ({"objective": 3}, "`objective` must be one of"),
        ({"mlm_probability": 1.5}, r"`mlm_probability` must be between 0 and 1 \(exclusive\), got 1.5"),
        ({"mlm_probability": "many"}, "`mlm_probability` must be between 0 and 1"),
        (
            {"objective": "sequence_classification", "mlm_probability": 0.15},
            r"`mlm_probability` \(0.15\) is for the objective 'masked_lm', not for 'sequence_classification'",
        ),
    ],
)
def test_bad_values_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build_experiment(experiment(tmp_path / "run", **changes))


def test_the_probability_has_the_usual_default(tmp_path):
    assert build_experiment(experiment(tmp_path)).mlm_probability == 0.15
    assert build_experiment(experiment(tmp_path, objective=None)).mlm_probability is None


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    config = HKTConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **VALUES["model"])
    HKTForMaskedLM(config).save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    values = {**experiment(tmp_path / "run"), "model": {"checkpoint": str(tmp_path / "checkpoint")}}
    with pytest.raises(ValueError, match="needs a mask token"):
        train(build_experiment(values))
    assert not (tmp_path / "run").exists()


def test_a_text_of_special_tokens_alone_is_refused(tmp_path):
    rows = [f"[MAX {i % 9} ]" for i in range(30)]
    rows[4] = "unknown words alone"
    datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "train.parquet")
    data = {"task": "text", "path": str(tmp_path / "train.parquet"), "listops": {}}
    values = experiment(tmp_path / "run", data=data, tokenizer={"kind": "listops"})
    with pytest.raises(ValueError, match="has a text without a token to mask"):
        train(build_experiment(values))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_measured_as_what_it_is(pretrained):
    with pytest.raises(ValueError, match="is 'masked_lm', not 'sequence_classification'"):
        evaluate_checkpoint(pretrained[0], ["--objective", "sequence_classification", "--mlm_probability", "null"])
    with pytest.raises(ValueError, match=r"must be 'loss' or one of \('masked_accuracy', 'perplexity'\)"):
        values = experiment(pretrained[0].parent / "new", training={"metric_for_best_model": "accuracy"})
        train(build_experiment(values))
