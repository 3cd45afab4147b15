"""What strict loading refuses, and which checkpoint of an interrupted run counts as complete."""

import json
import logging
import shutil

import pytest
import torch
from clients import TEXTS, tiny_config, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Trainer, TrainingArguments

from hkt_hf import HKTForSequenceClassification, HKTModel
from hkt_hf.checkpoints import last_complete_checkpoint, load_checkpoint, load_model, local_folder


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return HKTForSequenceClassification(tiny_config(initializer_range=0.5)).eval()


@pytest.fixture
def folder(original, tmp_path):
    original.save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def test_loads_the_very_weights(folder, original):
    model, tokenizer = load_checkpoint(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert not model.training
    assert torch.equal(model(**batch).logits, original(**batch).logits)


def test_loads_shards_and_subfolders(original, tmp_path):
    original.save_pretrained(tmp_path / "sub", max_shard_size="20KB")
    model = load_model(str(tmp_path), subfolder="sub")
    assert len(list((tmp_path / "sub").glob("*.safetensors"))) > 1
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_missing_weight_is_refused(folder):
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"does not fit .*missing weights model\.norm\.weight"):
        load_model(folder)


def test_many_missing_weights_are_counted(folder):
    change_weights(folder, lambda weights: [weights.pop(key) for key in list(weights) if "layers.1" in key])
    with pytest.raises(ValueError, match=r"missing weights .*, \.\.\. \(\d+ in all\)"):
        load_model(folder)


def test_unexpected_weight_is_refused(folder):
    change_weights(folder, lambda weights: weights.update({"model.extra": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"unexpected weights model\.extra"):
        load_model(folder)


def test_weight_of_another_shape_is_refused(folder):
    change_weights(folder, lambda weights: weights.update({"classifier.bias": torch.zeros(7)}))
    with pytest.raises(ValueError, match=r"weights of another shape classifier\.bias \(7,\) instead of \(3,\)"):
        load_model(folder)


def test_other_number_of_labels_is_refused(folder):
    with pytest.raises(ValueError, match=r"another shape classifier\.bias \(3,\) instead of \(5,\)"):
        load_model(folder, num_labels=5)


def test_all_problems_are_reported_at_once(folder):
    def change(weights):
        weights["extra"] = torch.zeros(1)
        weights["classifier.bias"] = torch.zeros(7)
        del weights["model.norm.bias"]

    change_weights(folder, change)
    with pytest.raises(ValueError, match=r"missing.*; unexpected.*; weights of another shape"):
        load_model(folder)


def test_backbone_has_no_trained_head(tmp_path):
    HKTModel(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no trained head, missing weights classifier\.bias, classifier\.weight"):
        load_model(tmp_path)
    assert isinstance(load_model(tmp_path, AutoModel), HKTModel)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-4], lambda data: data[:20], lambda data: b"", lambda data: b"\xff" * len(data)],
    ids=["tail", "header", "empty", "garbage"],
)
def test_broken_weights_are_refused(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors' is truncated or not a safetensors file"):
        load_model(folder)


def test_missing_files_are_named(folder, original, tmp_path):
    shards = tmp_path / "shards"
    original.save_pretrained(shards, max_shard_size="20KB")
    shard = min(shards.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_model(shards)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(folder)


def test_index_must_stay_in_the_folder(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"classifier.bias": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="does not exist beside"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        load_model(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "no `model_type`"),
        ('{"model_type": "hkt", "hidden_size": "wide"}', "hidden_size"),
    ],
)
def test_invalid_config_is_refused(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_tokenizer_must_be_there_and_fit(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"29 tokens.*embeddings for 28"):
        load_checkpoint(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer of `checkpoint`"):
        load_checkpoint(folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_checkpoint(folder)


def test_arguments_are_checked(folder, tmp_path):
    with pytest.raises(ValueError, match="`ignore_mismatched_sizes` cannot be given, got True"):
        load_model(folder, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match="got the file"):
        load_model(folder / "config.json")
    for nothing in ("", None, 3):
        with pytest.raises(ValueError, match="`checkpoint` must be a folder"):
            load_model(nothing)
    for missing in (tmp_path / "missing", str(tmp_path / "missing"), "runs/some/missing"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_model(missing)
    assert local_folder("someone/model") is None


@pytest.fixture(scope="module")
def run(original, tmp_path_factory):
    """The output folder of a real run with the checkpoints of steps 1, 2 and 10 (a copy of 2 that counts to 10)."""
    output_dir = tmp_path_factory.mktemp("run")
    batch = tiny_tokenizer()(TEXTS, padding="max_length", max_length=16)
    rows = [{"input_ids": ids, "attention_mask": mask, "labels": 0} for ids, mask in zip(*batch.values(), strict=True)]
    arguments = TrainingArguments(
        output_dir=output_dir,
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = HKTForSequenceClassification(original.config)
    Trainer(model, arguments, train_dataset=rows, processing_class=tiny_tokenizer()).train()
    shutil.copytree(output_dir / "checkpoint-2", output_dir / "checkpoint-10")
    state = output_dir / "checkpoint-10" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "global_step": 10}))
    return output_dir


@pytest.fixture
def output_dir(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_newest_checkpoint_by_step(output_dir):
    (output_dir / "checkpoint-best").mkdir()
    (output_dir / "checkpoint-99").touch()
    assert last_complete_checkpoint(output_dir) == output_dir / "checkpoint-10"
    load_checkpoint(output_dir / "checkpoint-10")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"],
)
def test_partial_checkpoint_is_skipped(output_dir, caplog, name, damage):
    damage(output_dir / "checkpoint-10" / name)
    with caplog.at_level(logging.WARNING, logger="hkt_hf"):
        assert last_complete_checkpoint(str(output_dir)) == output_dir / "checkpoint-2"
    assert "checkpoint-10" in caplog.text
    assert name.removesuffix(".pth") in caplog.text


def test_every_file_that_is_there_must_be_whole(output_dir):
    (output_dir / "checkpoint-10" / "scaler.pt").write_bytes(b"PK")
    assert last_complete_checkpoint(output_dir) == output_dir / "checkpoint-2"
    (output_dir / "checkpoint-2" / "rng_state_1.pth").write_bytes(b"PK")
    assert last_complete_checkpoint(output_dir) == output_dir / "checkpoint-1"


def test_state_of_another_step_does_not_count(output_dir):
    shutil.copy(output_dir / "checkpoint-2" / "trainer_state.json", output_dir / "checkpoint-10")
    assert last_complete_checkpoint(output_dir) == output_dir / "checkpoint-2"


def test_no_complete_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path / "missing") is None
    assert last_complete_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-3").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`output_dir` must be a folder"):
        last_complete_checkpoint(tmp_path / "file")
