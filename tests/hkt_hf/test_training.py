"""Training runs: from configuration to checkpoint, interruption, accumulation, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from hkt_hf import HKTConfig, HKTForSequenceClassification
from hkt_hf.checkpoints import load_checkpoint
from hkt_hf.cli import main
from hkt_hf.config import build_experiment
from hkt_hf.curves import CurvesCallback
from hkt_hf.tokenization import build_tokenizer
from hkt_hf.training import EpochSeededLengthSampler, check_output_dir, evaluate_checkpoint, predict, train


TINY_MODEL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "num_levels": 2,
}
TINY_LISTOPS = {
    "task": "listops",
    "listops": {"min_length": 5, "max_length": 24, "num_train": 96, "num_validation": 20, "num_test": 20},
}


def experiment(output_dir, **sections):
    values = {
        "output_dir": str(output_dir),
        "model": TINY_MODEL,
        "data": TINY_LISTOPS,
        "tokenizer": {"max_length": 24},
        "training": {
            "per_device_train_batch_size": 16,
            "max_steps": 8,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_strategy": "steps",
            "save_steps": 4,
            "logging_steps": 1,
            "disable_tqdm": True,
        },
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) and name in values else section
    return values


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "listops"
    report = train(build_experiment(experiment(output_dir)))
    return output_dir, report


def test_a_run_leaves_a_complete_checkpoint(finished_run):
    output_dir, report = finished_run
    names = {path.name for path in output_dir.iterdir()}
    expected = {"config.json", "model.safetensors", "tokenizer.json", "modeling_hkt.py", "README.md", "hkt.yaml"}
    assert (
        expected | {"curves.json", "curves.png", "metrics.json", "attention_hkt.py", "configuration_hkt.py"} <= names
    )
    assert not [name for name in names if name.startswith(".")]
    assert report["steps"] == 8 and set(report["test"]) == {"loss", "accuracy"}
    assert json.loads((output_dir / "metrics.json").read_text()) == report
    assert report["versions"]["torch"] == torch.__version__ and report["machine"] and "commit" in report


def test_curves_hold_every_logged_step(finished_run):
    curves = json.loads((finished_run[0] / "curves.json").read_text())
    assert [entry["step"] for entry in curves["train"]] == list(range(1, 9))
    assert [entry["step"] for entry in curves["validation"]] == [4, 8]
    assert all("accuracy" in entry for entry in curves["validation"])
    with Image.open(finished_run[0] / "curves.png") as picture:
        assert picture.size[0] > 600


def test_curves_are_drawn_while_a_long_run_goes_on(tmp_path, monkeypatch):
    """At an evaluation ten seconds after the last drawing; the numbers are written at every one."""
    now = [0.0]
    monkeypatch.setattr("hkt_hf.curves.time.monotonic", lambda: now[0])
    callback, state = CurvesCallback(tmp_path, "accuracy"), TrainerState(is_world_process_zero=True)
    drawn = []
    for step, seconds in enumerate((1, 11, 12, 22), start=1):
        now[0] = float(seconds)
        state.log_history += [{"step": step, "loss": 1.0}, {"step": step, "eval_loss": 1.0, "eval_accuracy": 0.5}]
        callback.on_evaluate(None, state, None)
        assert len(json.loads((tmp_path / "curves.json").read_text())["validation"]) == step
        drawn.append((tmp_path / "curves.png").exists())
        (tmp_path / "curves.png").unlink(missing_ok=True)
    assert drawn == [False, True, False, True]


def test_the_card_says_what_was_done(finished_run):
    output_dir, report = finished_run
    card = (output_dir / "README.md").read_text()
    for part in ("library_name: transformers", "listops", "| seed | 0 |", "trust_remote_code=True", "8 steps of 16"):
        assert part in card
    assert f"| test | accuracy | {report['test']['accuracy']:.4f} |" in card


def test_the_checkpoint_loads_and_evaluates_as_reported(finished_run):
    output_dir, report = finished_run
    assert evaluate_checkpoint(output_dir)["accuracy"] == report["test"]["accuracy"]
    assert evaluate_checkpoint(output_dir / "checkpoint-8")["accuracy"] == report["test"]["accuracy"]
    assert evaluate_checkpoint(output_dir, split="validation")["accuracy"] == report["validation"]["accuracy"]
    model = AutoModelForSequenceClassification.from_pretrained(output_dir)
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    logits = model(**tokenizer(["[MAX 2 9 ]"], return_tensors="pt")).logits
    (scores,) = predict(output_dir, ["[MAX 2 9 ]"])
    assert scores[0]["label"] == model.config.id2label[logits.argmax().item()]
    assert sum(score["score"] for score in scores) == pytest.approx(1.0, abs=1e-5)


def test_a_finished_run_is_returned_not_repeated(finished_run):
    output_dir, report = finished_run
    before = (output_dir / "model.safetensors").stat().st_mtime_ns
    assert train(build_experiment(experiment(output_dir))) == report
    assert (output_dir / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_with_another_run_or_other_things_is_refused(finished_run, tmp_path):
    output_dir, _ = finished_run
    with pytest.raises(ValueError, match=r"other settings \(model.num_levels, seed\)"):
        train(build_experiment(experiment(output_dir, model={"num_levels": 1}, seed=3)))
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something that is not a run"):
        train(build_experiment(experiment(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "curves.png").write_bytes(b"my picture")
    with pytest.raises(ValueError, match="holds something that is not a run"):
        train(build_experiment(experiment(other)))
    (other / "hkt.yaml").write_text("colour: red\n")
    with pytest.raises(ValueError, match=r"holds a hkt.yaml of something else: unknown key `colour`"):
        train(build_experiment(experiment(other)))
    assert (other / "curves.png").read_bytes() == b"my picture"
    with pytest.raises(ValueError, match="is a file"):
        train(build_experiment(experiment(tmp_path / "thesis.txt")))


def write_csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture
def review_rows():
    return [f"{'good' if i % 2 else 'bad'} film number {i},{'pos' if i % 2 else 'neg'}" for i in range(40)]


def test_own_csv_data_trains_with_a_ten_line_config(tmp_path, review_rows):
    write_csv(tmp_path / "reviews.csv", review_rows)
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"output_dir: {tmp_path}/run\n"
        "model: {hidden_size: 16, num_attention_heads: 2, num_hidden_layers: 1, intermediate_size: 16}\n"
        "tokenizer: {max_length: 64}\n"
        f"data: {{task: text, path: {tmp_path}/reviews.csv}}\n"
        "training: {max_steps: 3, per_device_train_batch_size: 8, disable_tqdm: true}\n"
    )
    assert main(["train", str(config)]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.label2id == {"neg": 0, "pos": 1}


def test_regression_and_fine_tuning_from_a_checkpoint(tmp_path, finished_run):
    rows = [f"[MAX {i % 7} {i % 3} ],{i % 7 / 2}" for i in range(40)]
    write_csv(tmp_path / "scores.csv", rows)
    report = train(
        build_experiment(
            experiment(
                tmp_path / "run",
                model={"checkpoint": str(finished_run[0]), **TINY_MODEL},
                data={"task": "text", "path": str(tmp_path / "scores.csv")},
            )
        )
    )
    assert report["main_metric"] == "mse" and set(report["test"]) == {"loss", "mse", "mae"}
    assert report["test"]["mse"] == pytest.approx(report["test"]["loss"], rel=1e-4)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Fine-tuned from `listops`" in card and "license" not in card and str(finished_run[0]) not in card
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"
    for change in ({"num_levels": 3}, {"share_level_projections": True}, {"score_symmetry": "psd"}):
        with pytest.raises(ValueError, match=r"does not fit the section `model`: \d+ weights are missing, have"):
            train(
                build_experiment(
                    experiment(
                        tmp_path / "other",
                        model={"checkpoint": str(finished_run[0]), **change},
                        data={"task": "text", "path": str(tmp_path / "scores.csv")},
                    )
                )
            )


def test_a_checkpoint_in_half_precision_is_trained_in_full_precision_and_at_the_length_that_is_asked_for(
    tmp_path, finished_run
):
    shutil.copytree(finished_run[0], tmp_path / "half")
    AutoModelForSequenceClassification.from_pretrained(finished_run[0], dtype=torch.bfloat16).save_pretrained(
        tmp_path / "half"
    )
    changes = {"model": {"checkpoint": str(tmp_path / "half"), **TINY_MODEL}, "tokenizer": {"max_length": 8}}
    train(build_experiment(experiment(tmp_path / "run", **changes)))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert AutoTokenizer.from_pretrained(tmp_path / "run").model_max_length == 8
    text = "[MAX 1 2 3 [MIN 4 5 6 7 8 9 ] ]"
    (whole,), (cut,) = (predict(tmp_path / "run", [words]) for words in (text, text[: text.index(" 7")]))
    assert whole == cut


def test_a_trained_model_is_not_another_one_when_it_is_evaluated(finished_run):
    with pytest.raises(ValueError, match="section `model` can't be changed"):
        evaluate_checkpoint(finished_run[0], ["--model.num_levels", "1"])


@pytest.mark.parametrize("segments", [False, True])
def test_hsa_trains_evaluates_and_predicts(tmp_path, segments):
    """From the configuration alone, with trees of the text or of the configuration, and with a tokenizer from a folder."""
    write_csv(tmp_path / "reviews.csv", [f"Film {i}. It was {'good' if i % 2 else 'bad'}.,{i % 2}" for i in range(60)])
    build_tokenizer("bytes", model_max_length=512).save_pretrained(tmp_path / "tokenizer")
    sizes = {name: value for name, value in TINY_MODEL.items() if name != "num_levels"}
    values = experiment(
        tmp_path / "run", tokenizer={"path": str(tmp_path / "tokenizer"), "segments": segments, "max_length": 24}
    )
    values |= {
        "model": {"model_type": "hsa", "branching": [4, None], **sizes},
        "data": {"task": "text", "path": str(tmp_path / "reviews.csv")},
    }
    report = train(build_experiment(values))
    assert report["steps"] == 8 and set(report["test"]) == {"loss", "accuracy"}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model_type"] == "hsa"
    assert "trust_remote_code=True" in (tmp_path / "run" / "README.md").read_text()
    assert evaluate_checkpoint(tmp_path / "run")["loss"] == pytest.approx(report["test"]["loss"], abs=1e-6)

    text = "Film 3. It was good."
    model, tokenizer = load_checkpoint(tmp_path / "run")
    inputs = dict(tokenizer(text, return_tensors="pt"))
    if segments:  # two sentences in one paragraph
        inputs["segment_ids"] = torch.tensor([[[0] * 8 + [1] * 12, [0] * 20]])
    with torch.no_grad():
        expected = sorted(model(**inputs).logits[0].softmax(-1).tolist(), reverse=True)
    (found,) = predict(tmp_path / "run", [text])
    assert [entry["score"] for entry in found] == pytest.approx(expected, abs=1e-6)


def test_segments_are_for_classification(tmp_path):
    sizes = {name: value for name, value in TINY_MODEL.items() if name != "num_levels"}
    values = experiment(tmp_path / "run", tokenizer={"segments": True}) | {"objective": "masked_lm"}
    with pytest.raises(ValueError, match=r"`tokenizer\.segments` is for classification"):
        train(build_experiment({**values, "model": {"model_type": "hsa", **sizes}}))


def test_several_labels_train_evaluate_and_predict(tmp_path, capsys):
    rows = [{"text": f"{'ab' if i % 2 else 'cd'} {i}", "label": [["x", "y"], ["x"]][i % 2]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"task": "text", "path": str(tmp_path / "rows.jsonl")}
    report = train(build_experiment(experiment(tmp_path / "run", data=data)))
    assert set(report["test"]) == {"loss", "f1_micro", "exact_match"}
    assert evaluate_checkpoint(tmp_path / "run") == report["test"]
    (scores,) = predict(tmp_path / "run", ["ab 3"])
    assert {score["label"] for score in scores} == {"x", "y"}
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), "ab 3"]) == 0
    chosen = [score["label"] for score in scores if score["score"] > 0.5] or [scores[0]["label"]]
    assert capsys.readouterr().out.split("\t")[0] == ", ".join(chosen)


def fine_tuning(tmp_path, checkpoint, **sections):
    write_csv(tmp_path / "rows.csv", [f"[MAX {i % 7} ],{i % 2}" for i in range(40)])
    model = {"checkpoint": str(checkpoint), **sections.pop("model", {})}
    values = experiment(tmp_path / "run", data={"task": "text", "path": str(tmp_path / "rows.csv")}, **sections)
    return build_experiment({**values, "model": model})


@pytest.mark.parametrize(
    ("damage", "sections", "message"),
    [
        ("truncated", {}, "truncated"),
        ("no tokenizer", {}, "has no tokenizer"),
        ("no config", {}, r"config\.json"),
        ("none", {"model": {"hidden_dropout": 7.0}}, "hidden_dropout"),
        ("none", {"model": {"hidden_dropuot": 0.1}}, "unknown key `model.hidden_dropuot`"),
        ("none", {"tokenizer": {"max_length": 60}}, "`tokenizer.max_length` must be at most 24"),
        ("none", {"model": {"checkpoint": "./nowhere/at/all"}}, "does not exist"),
    ],
)
def test_unusable_checkpoints_are_not_fine_tuned(tmp_path, finished_run, damage, sections, message):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(finished_run[0], checkpoint)
    if damage == "truncated":
        weights = (checkpoint / "model.safetensors").read_bytes()
        (checkpoint / "model.safetensors").write_bytes(weights[:-8])
    elif damage == "no tokenizer":
        for path in checkpoint.glob("tokenizer*"):
            path.unlink()
    elif damage == "no config":
        (checkpoint / "config.json").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(fine_tuning(tmp_path, checkpoint, **sections))
    assert not (tmp_path / "run").exists()


def test_an_unfinished_run_is_not_evaluated_as_a_finished_one(tmp_path, finished_run):
    (tmp_path / "hkt.yaml").write_bytes((finished_run[0] / "hkt.yaml").read_bytes())
    for use in (lambda: evaluate_checkpoint(tmp_path), lambda: predict(tmp_path, ["[MAX 1 ]"])):
        with pytest.raises(ValueError, match=r"unfinished run: continue it with `hkt train`, or name one of its"):
            use()


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("hkt_hf.training.train", interrupted)
    assert main(["train", "listops-hkt-tiny", "--output_dir", str(tmp_path / "run")]) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_a_push_without_a_connection_is_an_error_not_a_traceback(finished_run, tmp_path):
    """In a process of its own: the address of the Hub is read when huggingface_hub is imported."""
    command = [sys.executable, "-m", "hkt_hf.cli", "push", str(finished_run[0]), "someone/name"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_none"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "hkt push: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["a,0", "b,1"] * 8, "sentence,label", "text"),
        ([], "text,label", "no examples"),
        (["a,0"] * 16, "text,label", "class"),
        (["a,0", "b,7"] * 8, "text,label", "label"),
    ],
)
def test_bad_data_stops_before_anything_is_written(tmp_path, rows, header, message):
    write_csv(tmp_path / "data.csv", rows, header)
    config = build_experiment(experiment(tmp_path / "run", data={"task": "text", "path": str(tmp_path / "data.csv")}))
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()


def test_an_unknown_metric_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"`training.metric_for_best_model` must be 'loss' or one of \('accuracy',\)"):
        train(build_experiment(experiment(tmp_path / "run", training={"metric_for_best_model": "f1"})))
    assert not (tmp_path / "run").exists()


def test_trackers_that_are_not_installed_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"section `training` can't be used here: .*wandb"):
        train(build_experiment(experiment(tmp_path / "run", training={"report_to": "wandb"})))


def test_a_run_without_any_checkpoint_gives_way_to_other_settings(tmp_path):
    first = build_experiment(experiment(tmp_path, training={"dataloader_num_workers": 1, "optim_args": "nonsense"}))
    with pytest.raises(ValueError):
        train(first)
    assert [path.name for path in tmp_path.iterdir()] == ["hkt.yaml"]
    check_output_dir(tmp_path, build_experiment(experiment(tmp_path, seed=5)))


def test_command_line_reports_errors_without_a_traceback(capsys, tmp_path):
    assert main(["train", "nowhere.yaml"]) == 1
    assert main(["train", "listops-hkt-tiny", "--model.num_levls", "3"]) == 1
    assert main(["train", "listops-hkt-tiny", "--model.hidden_size", "30"]) == 1
    new = ["--output_dir", str(tmp_path / "new")]
    assert main(["train", "listops-hkt-tiny", "--training.eval_strategy", "sometimes", *new]) == 1
    assert main(["evaluate", str(tmp_path)]) == 1
    assert main(["predict", str(tmp_path / "none"), "text"]) == 1
    errors = capsys.readouterr().err
    for word in ("nowhere.yaml", "num_levls", "hidden_size", "sometimes", "holds no hkt.yaml", "does not exist"):
        assert word in errors


def test_command_line_evaluates_and_predicts(finished_run, capsys, tmp_path):
    output_dir, report = finished_run
    assert main(["evaluate", str(output_dir), "--out", str(tmp_path / "metrics.json")]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["accuracy"] == report["test"]["accuracy"]
    assert main(["predict", str(output_dir), "[MIN 3 4 ]", "[MAX 1 1 ]", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]
    assert [line["text"] for line in lines] == ["[MIN 3 4 ]", "[MAX 1 1 ]"]
    assert {score["label"] for score in lines[0]["scores"]} == set("0123456789")


def test_a_killed_run_continues_with_the_same_losses(tmp_path):
    """SIGKILL in the middle of the second epoch; the resumed run logs what an uninterrupted one logs."""

    def command(name):
        config = tmp_path / f"{name}.yaml"
        values = experiment(tmp_path / name, training={"max_steps": 40, "save_steps": 5, "eval_steps": 20})
        config.write_text(json.dumps(values))
        return [sys.executable, "-m", "hkt_hf.cli", "train", str(config)]

    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    killed = subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint-10" / "trainer_state.json").is_file():
        assert killed.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    for name in ("killed", "whole"):
        subprocess.run(command(name), env=environment, check=True, capture_output=True)

    reports = {name: json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("killed", "whole")}
    assert reports["killed"]["resumed"] and not reports["whole"]["resumed"]
    losses = {}
    for name in reports:
        curves = json.loads((tmp_path / name / "curves.json").read_text())
        losses[name] = [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in curves["train"]]
    assert len(losses["whole"]) == 40
    assert losses["killed"] == losses["whole"]
    assert reports["killed"]["test"] == reports["whole"]["test"]


@pytest.mark.parametrize("best", [False, True])
def test_a_run_killed_after_its_last_step_is_only_finished(tmp_path, best):
    """The last checkpoint, in the middle of an epoch, is there; what comes after training is not."""
    config = experiment(tmp_path / "run", training={"load_best_model_at_end": best})
    report = train(build_experiment(config))
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    for name in ("metrics.json", "model.safetensors", "config.json"):
        (tmp_path / "run" / name).unlink()
    again = train(build_experiment(config))
    assert again["steps"] == 8 and again["resumed"]
    assert again["test"] == report["test"] and again["validation"] == report["validation"]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    curves = json.loads((tmp_path / "run" / "curves.json").read_text())
    assert [entry["step"] for entry in curves["train"]] == list(range(1, 9))
    assert again["seconds"] >= curves["validation"][-1]["seconds"] >= curves["validation"][0]["seconds"] > 0


def test_what_is_not_measured_or_saved(tmp_path):
    report = train(build_experiment(experiment(tmp_path / "run")), measure=("validation",), save_model=False)
    assert "test" not in report and report["validation"]["accuracy"] >= 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "hkt.yaml",
        "curves.json",
        "curves.png",
        "metrics.json",
    }


def test_the_data_order_depends_on_seed_and_epoch_alone():
    lengths = [3, 9, 4, 4, 8, 1, 2, 7, 5, 6] * 5

    def order(seed, epoch):
        sampler = EpochSeededLengthSampler(4, lengths, seed)
        sampler.set_epoch(epoch)
        torch.rand(epoch + seed)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == list(range(50))
    assert order(0, 1) != order(0, 2) != order(1, 1)


class _Recorder(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append([parameter.grad.clone() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", [0, 1, 2, 3, 0, 1, 2, 3]),
        ("multi_label_classification", [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]] * 4),
        ("regression", [[0.5, -1.0, 2.0, 0.0], [3.0, 0.1, -0.2, 1.0]] * 4),
    ],
)
def test_gradient_accumulation_gives_the_same_first_step(tmp_path, problem_type, labels):
    rows = torch.randint(5, 22, (8, 12)).tolist()
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "labels": labels})
    results = {}
    for accumulation in (1, 4):
        torch.manual_seed(0)
        model = HKTForSequenceClassification(
            HKTConfig(vocab_size=22, num_labels=4, problem_type=problem_type, hidden_dropout=0.0, **TINY_MODEL)
        )
        recorder = _Recorder()
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
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[recorder])
        trainer.train()
        results[accumulation] = (trainer.state.log_history[0]["loss"], recorder.gradients[0])
    assert results[1][0] == pytest.approx(results[4][0], abs=1e-4)
    for once, accumulated in zip(results[1][1], results[4][1], strict=True):
        torch.testing.assert_close(accumulated, once, rtol=1e-4, atol=1e-6)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    from hkt_hf.files import write_json

    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [path.name for path in Path(tmp_path).iterdir()] == ["a.json"]
