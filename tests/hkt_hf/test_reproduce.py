"""`hkt reproduce`: arms that differ in one thing, runs that are searched, recorded, resumed and refused as they should be."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

from hkt_hf.cli import main
from hkt_hf.config import build_experiment
from hkt_hf.data import TaskData, load_data
from hkt_hf.experiments import arms
from hkt_hf.experiments import run as run_module
from hkt_hf.experiments.arms import ARMS, build_arm, count_flops, model_fields, parse_arm, setting_source
from hkt_hf.experiments.protocol import PROTOCOLS, TASKS, Setting, load_protocol
from hkt_hf.experiments.records import read_records
from hkt_hf.experiments.report import markdown
from hkt_hf.experiments.reproduce import Run, Sweep, reproduce
from hkt_hf.experiments.run import data_fingerprint, execute, record_run
from hkt_hf.modeling import HKTConfig, HSAConfig, HSAForSequenceClassification
from hkt_hf.tokenization import build_tokenizer


SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}
TINY = [
    "--model",
    json.dumps(SIZES),
    "--data.listops",
    '{"min_length": 4, "max_length": 16, "num_train": 64, "num_validation": 40, "num_test": 40}',
    *("--tokenizer.max_length", "16", "--training.per_device_train_batch_size", "8"),
    *("--training.max_steps", "6", "--training.eval_steps", "2", "--training.save_steps", "2"),
    *("--training.logging_steps", "1"),
    *("--search.training", "{max_steps: 2, eval_steps: 2, save_steps: 2}"),
    *("--pretraining.training", "{max_steps: 4, eval_steps: 2, save_steps: 2}"),
    *("--search.learning_rate", "[1e-3, 1e-2]", "--search.hidden_dropout", "[0.1]", "--search.weight_decay", "[0.01]"),
    *("--search.finalists", "0"),
]
VALUES = "hkt-post-norm-kernel-4-value-convolution"


def tiny_protocol(arm_names=("flat", "hkt"), seeds=(0,), *overrides):
    return load_protocol("listops", "cpu", [*TINY, *overrides], arms=list(arm_names), seeds=list(seeds))


def tiny_sweep(folder, *args):
    return Sweep(tiny_protocol(*args), folder / "results", folder / "runs", threads=1)


def run_all(sweep):
    """All runs of a sweep in this process; their records by arm and name."""
    for run in sweep.runs():
        if not sweep.is_finished(run):
            execute(sweep.specification(run))
    return {(run.arm, run.name): sweep.record(run) for run in sweep.runs()}


def built(name, seed=0, **fields):
    """Model of an arm at tiny sizes."""
    protocol = tiny_protocol()
    config = protocol.base_config()
    task = load_data(config.data)
    model = model_fields(name, {**config.model, **fields}, vocab_size=20, length=16, num_labels=10)
    values = {**config.to_dict(), "model": model, "seed": seed}
    return build_arm(name, build_experiment(values), task)[0]


@pytest.mark.parametrize("task", [task for task in TASKS if task != "imdb-words"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_are_complete(task, protocol):
    """Both arms, five seeds, a grid of three dimensions; at the lengths that they state."""
    loaded = load_protocol(task, protocol)
    assert {"flat", "hkt", "flat-rope", "hkt-rope", "flat-convolution", "bert"} <= set(loaded.arms)
    assert len(loaded.seeds) >= 5
    for values in (loaded.search.learning_rate, loaded.search.hidden_dropout, loaded.search.weight_decay):
        assert len(set(values)) >= 2
    if protocol == "paper":
        assert loaded.base_config().tokenizer.max_length == {"listops": 512, "cifar10": 1024, "imdb": 1024}[task]
        assert (
            loaded.experiment["model"]["hidden_size"] == 128
            and loaded.experiment["training"]["num_train_epochs"] == 30
        )


def test_the_protocol_of_hsa_is_fair():
    """HSA and the same layers on a flat tree: a search each, at least three seeds, one size; only HSA is told segments."""
    protocol = load_protocol("imdb-words", "cpu")
    assert {"hsa-flat", "hsa", "flat", "hkt"} <= set(protocol.arms)
    assert all(len(protocol.seeds_of(arm)) >= 3 for arm in protocol.arms)
    assert setting_source("hsa") == "hsa" and setting_source("hsa-flat") == "hsa-flat"
    fields = {
        name: model_fields(name, protocol.experiment["model"], vocab_size=50, length=16, num_labels=2)
        for name in ("hsa-flat", "hsa")
    }
    models = {}
    for name, values in fields.items():
        assert values.pop("model_type") == "hsa"
        models[name] = HSAForSequenceClassification(HSAConfig(vocab_size=50, **values))
    flat, tree = (dict(model.named_parameters()) for model in models.values())
    assert set(tree) - set(flat) == {f"model.layers.{i}.self_attn.sibling_positions.amplitude" for i in range(2)}
    assert set(flat) <= set(tree)


def test_hsa_is_reproduced_and_reported(tmp_path):
    """Two arms of one seed on tiny data, from the search to the report."""
    texts = ["Good. " * (2 + i % 3) + "\n\n" + "So it is." if i % 2 else "Bad. Not at all." for i in range(64)]
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(64)]}).to_parquet(
            str(tmp_path / "data" / f"{split}.parquet")
        )
    build_tokenizer("bytes", model_max_length=32).save_pretrained(tmp_path / "tokenizer")
    protocol = load_protocol(
        "imdb-words",
        "cpu",
        [
            *("--data.path", str(tmp_path / "data"), "--tokenizer.path", str(tmp_path / "tokenizer")),
            *("--data.max_validation_samples", "null", "--data.max_test_samples", "null"),
            *("--tokenizer.max_length", "32", "--search.finalists", "0", "--search.learning_rate", "[1e-3]"),
            *("--search.hidden_dropout", "[0.0]", "--search.weight_decay", "[0.01]"),
            *("--search.training", "{max_steps: 2, eval_steps: 2, save_steps: 2}"),
            *("--training.max_steps", "2", "--training.eval_steps", "2", "--training.save_steps", "2"),
            *("--model.hidden_size", "16", "--model.intermediate_size", "16", "--training.logging_steps", "1"),
        ],
        arms=["hsa-flat", "hsa"],
        seeds=[0],
    )
    sweep = Sweep(protocol, tmp_path / "results", tmp_path / "runs", threads=1)
    for run in sweep.runs():
        record = execute(sweep.specification(run))
        assert record["status"] == "finished", record["reason"]
        assert record["num_levels"] is None and record["arm"] == run.arm
        assert record["config"]["tokenizer"]["segments"] == (run.arm == "hsa")
    records = read_records(tmp_path / "results")
    assert len(records) == 4
    text = markdown(records)
    assert "hsa - hsa-flat (absolute)" in text and "IMDB in subwords 67.39 and 74.69 (+7.30)" in text


@pytest.mark.parametrize(
    "words, message",
    [
        (["--search.learning_rates", "[1e-3]"], "search.learning_rate"),
        (["--serch.seed", "1"], "nearest valid one is `search`"),
        (["--search.seed", "0"], "must not be one of `seeds`"),
        (["--seeds", "[1, 1]"], "different ones"),
        (["--arms", "[hkt-ropes]"], "hkt-rope"),
        (["--search.learning_rate", "[]"], "`search.learning_rate` must be a list of at least one number"),
        (["--search.learning_rate", "1e-3"], "`search.learning_rate` must be a list of at least one number"),
        (["--seeds", "[-1]"], "integers of at least 0, got -1"),
        (["--search.seed", "-3"], "integers of at least 0, got -3"),
        (["--search.finalists", "9"], "`search.finalists` must be an integer from 0 to"),
        (["--search.hidden_dropout", "[1.5]"], "hidden_dropout"),
        (["--max_run_hours", "0"], "`max_run_hours` must be a number greater than 0, or null, got 0"),
        (["--training.max_stepss", "3"], "max_steps"),
        (["--objective", "masked_lm"], "`objective` can't be changed"),
        (["--model.num_levels", "1"], "`model.num_levels` can't be changed: the arms and their search .*, got 1"),
        (["--model", "{checkpoint: x}"], "`model.checkpoint` can't be changed"),
        (["--training.learning_rate", "0.5"], "`training.learning_rate` can't be changed"),
        (["--search", "5"], "`search` must be a section of values, got 5"),
        (["--pretraining.training", "5"], "`pretraining.training` must be a section of values, got 5"),
        (["--arm_seeds", "3"], "`arm_seeds` must be a section of values, got 3"),
        (["--arm_seeds.hkt", "3"], "`arm_seeds.hkt` must be a list of seeds, got 3"),
    ],
)
def test_bad_protocols_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        protocol = load_protocol("listops", "cpu", words)
        protocol.search.settings()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--pretraining.training.max_stepz", "5"], "training.max_stepz"),
        (["--pretraining.mlm_probability", "5"], "`mlm_probability` must be between 0 and 1"),
        (["--search.training.max_stepz", "5"], "training.max_stepz"),
    ],
)
def test_what_only_a_later_stage_needs_is_checked_before_the_first(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_sweep(tmp_path, ("flat", "flat-pretrained"), (0,), *words)


@pytest.mark.parametrize("task, name", [(task, name) for task in TASKS for name in PROTOCOLS if task != "imdb-words"])
def test_every_arm_of_a_packaged_protocol_can_be_configured(task, name, tmp_path, monkeypatch):
    """On a few examples that stand for the task's, and at its own sizes."""
    rows = datasets.Dataset.from_dict({"text": ["1 2", "2 1"], "label": [0, 1]})
    data = TaskData(
        splits=datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows)),
        problem_type="single_label_classification",
        label_names=["0", "1"],
        tokenizer_kind="pixels" if task == "cifar10" else "bytes",
        description="two examples",
    )
    monkeypatch.setattr("hkt_hf.experiments.reproduce.load_data", lambda config: data)
    sweep = Sweep(load_protocol(task, name), tmp_path / "results", tmp_path / "runs", threads=1)
    assert {run.arm for run in sweep.runs()} >= set(sweep.protocol.arms)


def test_the_command_takes_every_task(capsys):
    for task in TASKS:
        with pytest.raises(SystemExit) as ended:
            main(["reproduce", task, "--help"])
        assert ended.value.code == 0 and task in capsys.readouterr().out
    assert main(["reproduce", "imdb-words", "--protocol", "cpu", "--data.path", "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_checkpoints_of_other_records_lie_elsewhere(finished, monkeypatch):
    """By default; `hkt package` finds those of the records that it is given."""
    monkeypatch.chdir(finished[1])
    seen = {}
    monkeypatch.setattr("hkt_hf.experiments.package.package_best", lambda *args: seen.update(runs=args[1]))
    for results, runs in (("results/reproduce", "runs/reproduce"), ("elsewhere/other/", "runs/other")):
        assert main(["package", "listops", "--protocol", "cpu", "--results", results]) == 0
        assert seen["runs"] == Path(runs)


def test_arms_begin_with_the_same_weights_wherever_shapes_agree():
    reference = dict(built("hkt").named_parameters())
    for name in ("flat", "hkt-levels-4", "hkt-kernel-3", "flat-wide-parameters", "hkt-shared-projections"):
        weights = dict(built(name).named_parameters())
        common = [key for key in weights if key in reference and weights[key].shape == reference[key].shape]
        assert len(common) > 10 and "model.layers.1.self_attn.q_proj.0.weight" in common
        for key in common:
            assert torch.equal(weights[key], reference[key]), (name, key)
    other = dict(built("hkt", seed=1).named_parameters())
    assert not torch.equal(other["classifier.weight"], reference["classifier.weight"])
    assert abs(reference["model.layers.0.mlp.up_proj.weight"].std() - HKTConfig.initializer_range) < 0.005


@pytest.mark.parametrize("name", ["flat", "hkt", "hkt-dense", "flat-convolution", "hkt-rope", "hkt-post-norm", VALUES])
def test_arms_draw_the_same_dropout(name):
    built(name)
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(0)).item()


def test_wide_twins_have_the_cost_of_hkt():
    hkt = built("hkt")
    parameters = sum(p.numel() for p in hkt.parameters())
    wide = built("flat-wide-parameters")
    assert wide.config.num_levels == 1
    column = 2 * wide.config.num_hidden_layers * (2 * SIZES["hidden_size"] + 1)
    assert abs(sum(p.numel() for p in wide.parameters()) - parameters) <= column
    flops = count_flops(hkt, 16)
    assert count_flops(built("flat"), 16) < 0.9 * flops
    assert abs(count_flops(built("flat-wide-flops"), 16) / flops - 1) < 0.01


def test_flops_are_those_of_the_products():
    d, inner, length, layers = SIZES["hidden_size"], SIZES["intermediate_size"], 16, SIZES["num_hidden_layers"]
    layer = 4 * length * d * d + 2 * length * length * d + 2 * length * d * inner
    assert count_flops(built("flat"), length) == 2 * (layers * layer + d * 10)


def test_the_convolution_of_the_control_is_short_causal_and_before_queries_and_keys_only():
    model = built("flat-convolution").eval()
    attention = model.model.layers[0].self_attn
    inputs = torch.randn(1, 12, SIZES["hidden_size"], requires_grad=True)
    for projection in (attention.q_proj[0], attention.k_proj[0]):
        (gradient,) = torch.autograd.grad(projection(inputs)[0, 7].sum(), inputs)
        assert gradient[0].abs().sum(-1).nonzero().flatten().tolist() == [4, 5, 6, 7]
    (gradient,) = torch.autograd.grad(attention.v_proj(inputs)[0, 7].sum(), inputs)
    assert gradient[0].abs().sum(-1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("implementation", ["auto", "eager"])
def test_the_convolution_of_values_is_centred_begins_with_nothing_and_sees_no_padding(implementation):
    names = "flat-post-norm-value-convolution", "flat-post-norm"
    model, twin = (built(name).eval() for name in names)
    for each in (model, twin):
        each.set_attn_implementation(implementation)
        each.classifier.weight.data *= 100
    input_ids = torch.randint(5, 20, (2, 11))
    torch.testing.assert_close(model(input_ids).logits, twin(input_ids).logits, rtol=0, atol=0)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.convolution.weight.normal_()
    assert not torch.allclose(model(input_ids).logits, twin(input_ids).logits, atol=1e-3)

    inputs = torch.randn(1, 80, SIZES["hidden_size"], requires_grad=True)
    difference = attention(inputs)[0] - attention.attention(inputs)[0]
    (gradient,) = torch.autograd.grad(difference[0, 40].sum(), inputs)
    assert (gradient[0].abs().sum(-1) > 1e-6).nonzero().flatten().tolist() == list(range(8, 73))

    mask = torch.ones(2, 16, dtype=torch.long)
    mask[:, 11:] = 0
    padded = torch.cat([input_ids, torch.randint(5, 20, (2, 5))], dim=1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, model(input_ids).logits)
    with pytest.raises(ValueError, match="padding on the right"):
        model(padded.flip(1), attention_mask=mask.flip(1))


def test_without_attention_the_order_of_tokens_does_not_matter():
    """Rotary positions are then nowhere."""
    input_ids = torch.randint(5, 20, (2, 12))
    for name, is_same in (("flat-no-attention-rope", True), ("flat-rope", False)):
        model = built(name).eval()
        model.classifier.weight.data *= 100
        logits, turned = model(input_ids=input_ids).logits, model(input_ids=input_ids.flip(1)).logits
        assert torch.allclose(logits, turned, rtol=1e-4, atol=1e-5) == is_same


@pytest.mark.parametrize(
    "name, weights",
    [
        ("hkt-uniform-weights", [1 / 3, 1 / 3, 1 / 3]),
        ("hkt-only-level-0", [1.0, 0.0, 0.0]),
        ("hkt-only-level-2", [0.0, 0.0, 1.0]),
    ],
)
def test_fixed_level_weights_stay(name, weights):
    model = built(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(input_ids=torch.randint(5, 20, (2, 12)), labels=torch.tensor([1, 2])).loss.backward()
    optimizer.step()
    for layer in model.model.layers:
        torch.testing.assert_close(layer.self_attn.level_weights(), torch.tensor([weights, weights]))


def test_the_untrained_mean_stays():
    model = built("hkt-untrained-mean")
    model(input_ids=torch.randint(5, 20, (2, 12)), labels=torch.tensor([1, 2])).loss.backward()
    assert all(p.grad is None for layer in model.model.layers for p in layer.self_attn.downsample.parameters())
    assert model.model.layers[0].self_attn.level_logits.grad is not None


def test_only_level_0_is_the_flat_model():
    """With all weight on level 0, HKT computes what its flat twin computes."""
    input_ids = torch.randint(5, 20, (2, 13))
    flat, single = built("flat").eval(), built("hkt-only-level-0").eval()
    torch.testing.assert_close(single(input_ids).logits, flat(input_ids).logits)


def test_arm_names():
    assert parse_arm("hkt-rope") == (ARMS["hkt"], "rope") and parse_arm("hkt") == (ARMS["hkt"], "absolute")
    assert parse_arm("bert")[1] is None and all(parse_arm(peer)[0].is_peer for peer in ("mamba", "h-transformer-1d"))
    assert setting_source("hkt-dense-rope") == "hkt-rope" and setting_source("hkt-dense") == "hkt"
    assert setting_source("flat-convolution-rope") == "flat-convolution-rope"
    assert setting_source(VALUES) == "hkt-post-norm"
    with pytest.raises(ValueError, match="nearest one is 'hkt-rope'"):
        parse_arm("hkt-rop")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep of both arms with two seeds, its folder, and its records by arm and name."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep = tiny_sweep(folder, ("flat", "hkt"), (0, 1))
    return sweep, folder, run_all(sweep)


def test_a_sweep_records_every_run(finished):
    sweep, folder, records = finished
    assert len(records) == 2 * (2 + 2)
    for (arm, _), record in records.items():
        assert record["status"] == "finished" and record["arm"] == arm and record["task"] == "listops"
        assert record["protocol"] == "cpu" and record["position_embedding_type"] == "absolute"
        assert record["num_levels"] == (3 if arm == "hkt" else 1)
        assert (record["test_accuracy"] is None) == (record["stage"] == "search")
        assert record["config"]["training"]["learning_rate"] == record["setting"]["learning_rate"]
        assert record["config"]["model"]["hidden_dropout"] == record["setting"]["hidden_dropout"]
        for key in ("seconds", "memory", "parameters", "flops", "tokens"):
            assert record[key] > 0
        assert record["versions"]["torch"] and len(record["curve"]["train"]) == record["steps"]
        assert record["steps"] == (2 if record["stage"] == "search" else 6)
        assert record["seed"] in ([100] if record["stage"] == "search" else [0, 1])
        for entry in record["curve"]["validation"]:
            weights = entry.get("level_weights")
            if arm == "hkt":
                assert torch.tensor(weights).shape == (2, 2, 3)
            else:
                assert weights is None
    for arm in ("flat", "hkt"):
        tried = [record for (name, _), record in records.items() if name == arm and record["stage"] == "search"]
        best = min(tried, key=lambda record: record["validation_loss"])
        assert records[arm, "final-seed0"]["setting"] == best["setting"]
        assert not Path(tried[0]["config"]["output_dir"]).exists()
        assert (folder / "runs/listops/cpu" / arm / "final-seed0" / "README.md").is_file()
    assert run_all(sweep) == records  # nothing is run twice


def test_the_packaged_checkpoint_gives_the_accuracy_of_its_card(finished, tmp_path):
    """The best of two runs by validation accuracy, from an archive that holds all that loading and measuring need."""
    _, folder, records = finished
    folders = ["--results", str(folder / "results"), "--runs", str(folder / "runs")]
    command = ["package", "listops", "--protocol", "cpu", *folders, "--output"]
    for name in ("out", "again"):
        assert main([*command, str(tmp_path / name)]) == 0
    archive = tmp_path / "out" / "listops-cpu.tar.gz"
    assert archive.read_bytes() == (tmp_path / "again" / "listops-cpu.tar.gz").read_bytes()
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    best = max((records["hkt", f"final-seed{seed}"] for seed in (0, 1)), key=lambda each: each["validation_accuracy"])
    checkpoint = tmp_path / "unpacked" / "listops-cpu"
    assert main(["evaluate", str(checkpoint), "--out", str(tmp_path / "out.json")]) == 0
    accuracy = json.loads((tmp_path / "out.json").read_text())["accuracy"]
    assert accuracy == best["test_accuracy"]
    card = (checkpoint / "README.md").read_text()
    assert f"| test | accuracy | {accuracy:.4f} |" in card and f"seed {best['seed']}" in card
    assert "# listops-cpu" in card and "hkt - flat (absolute)" in card and str(folder) not in card
    assert (checkpoint / "modeling_hkt.py").is_file() and not list(checkpoint.glob("checkpoint-*"))
    assert main(["package", "imdb", "--protocol", "cpu", *folders]) == 1


def test_a_card_is_written_anew_where_the_archive_alone_is_left(finished, tmp_path):
    _, folder, records = finished
    results = shutil.copytree(folder / "results", tmp_path / "results")
    folders = ["--results", str(results), "--output", str(tmp_path)]
    command = ["package", "listops", "--protocol", "cpu", *folders, "--runs"]
    archive = tmp_path / "listops-cpu.tar.gz"
    assert main([*command, "nowhere"]) == 1 and not archive.exists()
    assert main([*command, str(folder / "runs")]) == 0
    before = archive.read_bytes()
    assert main([*command, "nowhere"]) == 0 and archive.read_bytes() == before

    worst = min((records["hkt", f"final-seed{seed}"] for seed in (0, 1)), key=lambda each: each["validation_accuracy"])
    path = results / "listops/cpu/hkt" / f"final-seed{worst['seed']}.json"
    other_best = json.loads(path.read_text()) | {"validation_accuracy": 1.0}
    path.write_text(json.dumps(other_best))
    assert main([*command, "nowhere"]) == 1 and archive.read_bytes() == before


def searched(sweep, run, loss, setting=None, status="finished"):
    """Put down a run of a search as if it had been done."""
    path = sweep.record_path(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"status": status, "reason": "no luck", "validation_accuracy": 0.5, "validation_loss": loss}
    path.write_text(json.dumps(values | {"setting": vars(setting or run.setting)}))


def test_search_takes_the_lowest_validation_loss(tmp_path):
    sweep = tiny_sweep(tmp_path)
    low, high = (Run("flat", "search", 100, setting) for setting in sweep.protocol.search.settings())
    searched(sweep, low, 1.2)
    searched(sweep, high, 1.1)
    assert sweep.setting(Run("flat", "final", 0)) == high.setting
    searched(sweep, low, 1.0)
    assert sweep.setting(Run("flat", "final", 0)) == sweep.setting(Run("flat-wide-flops", "final", 0)) == low.setting
    assert sweep.setting(Run("hkt", "final", 0)) is None


def test_full_runs_of_the_best_learning_rates_decide(tmp_path):
    """Short runs choose two of three learning rates, each with its best dropout; full runs choose between these."""
    grid = ["--search.learning_rate", "[1e-3, 2e-3, 4e-3]", "--search.hidden_dropout", "[0.0, 0.1]"]
    sweep = tiny_sweep(tmp_path, ("flat",), (0,), *grid, "--search.finalists", "2")
    *short, first, second, final = sweep.runs()
    assert [run.name for run in (first, second, final)] == ["finalist-1", "finalist-2", "final-seed0"]
    assert sweep.needs(first) == sweep.needs(second) == short and sweep.needs(final) == [*short, first, second]
    losses = {
        (1e-3, 0.0): 1.6,
        (1e-3, 0.1): 1.5,
        (2e-3, 0.0): 1.3,
        (2e-3, 0.1): 1.4,
        (4e-3, 0.0): 1.7,
        (4e-3, 0.1): 1.8,
    }
    for run in short:
        searched(sweep, run, losses[run.setting.learning_rate, run.setting.hidden_dropout])
    settings = [sweep.setting(run) for run in (first, second)]
    assert [(each.learning_rate, each.hidden_dropout) for each in settings] == [(2e-3, 0.0), (1e-3, 0.1)]
    assert sweep.specification(first).config["training"]["max_steps"] == 6
    assert sweep.specification(short[0]).config["training"]["max_steps"] == 2
    assert sweep.setting(final) is None
    searched(sweep, first, 0.9, settings[0])
    searched(sweep, second, 0.8, settings[1])
    assert sweep.setting(final) == settings[1]
    searched(sweep, second, None, settings[1], status="failed")
    assert sweep.setting(final) == settings[0]
    for run in (first, second):
        searched(sweep, run, None, settings[0], status="failed")
    assert sweep.setting(final) is None and sweep.give_up(final) == "failed"
    assert sweep.record(final)["reason"] == "in its search: no luck"


def test_final_runs_of_another_setting_than_the_chosen_are_refused(tmp_path):
    sweep = tiny_sweep(tmp_path, ("flat",))
    low, high, final = sweep.runs()
    for run, loss in ((low, 1.0), (high, 1.1)):
        record_run(sweep.specification(run), {"status": "finished", "reason": None, "validation_loss": loss})
    record_run(sweep.specification(final), {"status": "finished", "reason": None})
    sweep.check_records()
    record_run(sweep.specification(low), {"status": "finished", "reason": None, "validation_loss": 1.2})
    with pytest.raises(
        ValueError, match=r"final-seed0.json is of a run with other settings \(training.learning_rate\)"
    ):
        sweep.check_records()


def test_pretrained_arms_begin_from_their_own_pretraining(tmp_path):
    sweep = tiny_sweep(tmp_path, ("hkt-pretrained",))
    records = run_all(sweep)
    stages = [(record["stage"], record["seed"]) for record in records.values()]
    assert stages == [("pretraining", 100), ("search", 100), ("search", 100), ("pretraining", 0), ("final", 0)]
    final = records["hkt-pretrained", "final-seed0"]
    assert final["num_levels"] == 3
    assert final["pretraining"]["steps"] == 4 and 0 <= final["pretraining"]["masked_accuracy"] <= 1
    assert final["config"]["model"]["checkpoint"].endswith("hkt-pretrained/pretraining-seed0")
    pretraining = records["hkt-pretrained", "pretraining-seed0"]
    assert pretraining["test_accuracy"] is None and pretraining["setting"] is None


def test_pretraining_begins_with_the_same_weights_wherever_shapes_agree(tmp_path):
    """Embeddings, each projection and the head; a decoder tied to the embeddings has their weights, padding row and all."""
    sweep = tiny_sweep(tmp_path, ("flat-pretrained", "hkt-pretrained"))
    states = []
    for run in sweep.runs():
        if run.stage == "pretraining" and run.seed == 0:
            config = build_experiment(sweep.specification(run).config)
            states.append(build_arm(run.arm, config, sweep.task)[0].state_dict())
    flat, hkt = states
    shared = [name for name in flat if name in hkt and flat[name].shape == hkt[name].shape]
    assert all(torch.equal(flat[name], hkt[name]) for name in shared)
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.0.weight"} <= set(shared)
    assert not flat["model.embed_tokens.weight"][0].any() and flat["model.embed_tokens.weight"][1].any()


def test_a_run_that_diverged_is_not_chosen(tmp_path):
    sweep = tiny_sweep(tmp_path, ("flat",), (0,), "--search.finalists", "2")
    low, high, first, second, final = sweep.runs()
    searched(sweep, low, math.nan)
    searched(sweep, high, 2.3)
    assert sweep.setting(first) == high.setting and sweep.setting(second) is None
    searched(sweep, high, math.inf)
    assert sweep.setting(first) is None and sweep.give_up(final) == "failed"
    assert sweep.record(final)["reason"] == "in its search: no run has a finite validation loss"


def test_what_could_not_be_searched_is_reported_and_tried_again(tmp_path):
    """Records of an arm that can't run here are read and shown; those of failed ones do not stand in the way of a repair."""
    sweep = tiny_sweep(tmp_path, ("h-transformer-1d",), (0,), "--search.finalists", "2")
    *short, first, second, final = sweep.runs()
    for run in short:
        record_run(sweep.specification(run), {"status": "not_available", "reason": "not installed"})
    for run in (first, second, final):
        assert sweep.give_up(run) == "not_available" and sweep.record(run)["setting"] is None
    records = read_records(tmp_path / "results")
    assert len(records) == 5 and "not installed" in markdown(records)
    for rate, run in enumerate(short):
        measured = {"validation_loss": 1.0 + rate, "validation_accuracy": 0.5}
        record_run(sweep.specification(run), {"status": "finished", "reason": None, **measured})
    repaired = tiny_sweep(tmp_path, ("h-transformer-1d",), (0,), "--search.finalists", "2")
    assert repaired.setting(first) == short[0].setting


def test_a_run_of_other_settings_keeps_its_results(finished, tmp_path):
    """Another folder of records with the same folder of checkpoints: refused, and what is there stays."""
    other = Sweep(
        tiny_protocol(("hkt",), (0,), "--training.max_steps", "4"), tmp_path, finished[1] / "runs", threads=1
    )
    for run in other.runs()[:-1]:
        searched(other, run, 1.0)
    final = other.runs()[-1]
    before = (other.folder(final) / "metrics.json").read_text()
    record = execute(other.specification(final))
    assert record["status"] == "failed" and "holds a run with other settings" in record["reason"]
    assert (other.folder(final) / "metrics.json").read_text() == before


def test_tokens_are_counted_to_the_last_step(finished, tmp_path):
    """However seldom the training loss and the evaluations are logged."""
    *_, records = finished
    rare = ["--training.logging_steps", "100", "--training.eval_steps", "4", "--training.save_steps", "4"]
    sweep = tiny_sweep(tmp_path, ("hkt",), (0,), *rare)
    for run in sweep.runs()[:-1]:
        searched(sweep, run, 1.0, Setting(**records["hkt", "final-seed0"]["setting"]))
    record = execute(sweep.specification(sweep.runs()[-1]))
    assert record["status"] == "finished", record["reason"]
    assert record["tokens"] == records["hkt", "final-seed0"]["tokens"]
    # Interrupted after the last step, before the record.
    again = execute(sweep.specification(sweep.runs()[-1]))
    assert again["step_seconds"] == record["step_seconds"] > 0 and again["tokens"] == record["tokens"]


def test_peers_have_the_tokenizer_and_the_padding_of_the_task(tmp_path):
    """Nystromformer takes multiples of 64 tokens: at 100 its FLOPs are those of 128."""
    tokenizer = build_tokenizer("listops", model_max_length=100)
    tokenizer.add_tokens(["more", "words"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = ["--tokenizer.path", str(tmp_path / "tokenizer"), "--tokenizer.max_length", "100"]
    sweep = tiny_sweep(tmp_path, ("nystromformer",), (0,), *words)
    record = execute(sweep.specification(sweep.runs()[0]))
    assert record["status"] == "finished", record["reason"]
    model, own = build_arm("nystromformer", build_experiment(record["config"]), sweep.task)
    assert record["flops"] == count_flops(model, 128) and len(own) == len(tokenizer)


def test_records_of_other_data_are_refused(finished, tmp_path):
    sweep, folder, _ = finished
    shutil.copytree(folder / "results", tmp_path / "results")
    path = tmp_path / "results/listops/cpu/hkt/final-seed1.json"
    record = json.loads(path.read_text())
    assert record["data_fingerprint"] == sweep.data_fingerprint
    path.write_text(json.dumps(record | {"data_fingerprint": "0123456789abcdef"}))
    with pytest.raises(
        ValueError, match=r"final-seed1.json is of a run with other settings \(the data or the tokenizer\)"
    ):
        Sweep(sweep.protocol, tmp_path / "results", tmp_path / "runs", threads=1)
    with pytest.raises(ValueError, match="are of different data or tokenizers"):
        read_records(tmp_path / "results")


def test_the_fingerprint_tells_data_and_tokenizers_apart():
    def task(texts=("1 2", "2 1"), labels=(0, 1)):
        rows = datasets.Dataset.from_dict({"text": list(texts), "label": list(labels)})
        return TaskData(datasets.DatasetDict(test=rows), "single_label_classification", ["0", "1"], "bytes", "")

    bytes_, longer = (build_tokenizer(kind, model_max_length=8) for kind in ("bytes", "listops"))
    found = [
        data_fingerprint(task(), bytes_),
        data_fingerprint(task(texts=("3 2", "2 1")), bytes_),
        data_fingerprint(task(labels=(1, 0)), bytes_),
        data_fingerprint(task(), longer),
    ]
    assert len(set(found)) == 4 and data_fingerprint(task(), bytes_) == found[0]


def test_a_failed_run_is_recorded_and_tried_again(tmp_path, monkeypatch):
    sweep = tiny_sweep(tmp_path, ("hkt-dense",))
    *search, final = sweep.runs()
    assert [(run.arm, run.stage) for run in search] == 2 * [("hkt", "search")]
    for run in search:
        execute(sweep.specification(run))

    def out_of_memory(model):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(arms.ARMS, "hkt-dense", arms.Arm("broken", change=out_of_memory, setting_of="hkt"))
    record = execute(sweep.specification(final))
    assert record["status"] == "failed" and record["reason"] == "RuntimeError: out of memory"
    assert record["test_accuracy"] is None
    assert not sweep.is_finished(final)
    monkeypatch.undo()
    assert execute(sweep.specification(final))["status"] == "finished" and sweep.is_finished(final)


@pytest.mark.parametrize("name", ["results", "runs"])
def test_a_file_in_place_of_a_folder_is_refused_before_anything_runs(name, tmp_path):
    (tmp_path / "file").write_text("")
    folders = {"results": tmp_path / "results", "runs": tmp_path / "runs", name: tmp_path / "file"}
    with pytest.raises(ValueError, match=f"`{name}` must be a folder, got a file"):
        Sweep(tiny_protocol(), **folders, threads=1)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "is no record"), ("{}", "is no record")])
def test_a_damaged_record_is_named(text, message, tmp_path):
    sweep = tiny_sweep(tmp_path)
    path = sweep.record_path(sweep.runs()[0])
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path.name} {message}"):
        tiny_sweep(tmp_path)


def test_of_two_processes_with_one_run_the_second_takes_the_record_of_the_first(tmp_path, monkeypatch):
    sweep = tiny_sweep(tmp_path)
    specification = sweep.specification(sweep.runs()[0])
    measured = {"status": "finished", "reason": None, "validation_loss": 1.0}
    monkeypatch.setattr(run_module, "_measure", lambda specification: pytest.fail("the run was done twice"))
    with ThreadPoolExecutor(1) as pool:
        with run_module._alone(sweep.folder(sweep.runs()[0])):
            second = pool.submit(execute, specification)
            time.sleep(0.3)
            assert not second.done()
            first = record_run(specification, measured)
        assert second.result(timeout=30) == json.loads(json.dumps(first))


def test_a_killed_run_goes_on_before_others_choose_without_it(tmp_path, monkeypatch):
    """Once: the sweep has the table of one that was never killed. A validation accuracy of 0 is one, too."""
    sweep = tiny_sweep(tmp_path, ("flat",))
    starts = []

    class Process:
        def __init__(self, run):
            starts.append(run)
            self.returncode = -9 if run.setting.learning_rate == 1e-2 and starts.count(run) == 1 else 0
            if self.returncode == 0:
                loss = 1.0 if run.setting.learning_rate == 1e-2 else 2.0
                measured = {"validation_loss": loss, "validation_accuracy": 0.0, "test_accuracy": 0.0, "seconds": 1}
                record_run(sweep.specification(run), {"status": "finished", "reason": None, **measured})

        def poll(self):
            return self.returncode

    def start(sweep, run):
        return Process(replace(run, setting=sweep.setting(run)))

    monkeypatch.setattr("hkt_hf.experiments.reproduce._start", start)
    outcome = reproduce(sweep)
    assert not outcome["failed"] and len(starts) == 5  # two runs have this learning rate
    assert sweep.record(Run("flat", "final", 0))["setting"]["learning_rate"] == 1e-2


def test_what_fails_or_is_missing_is_written_out(tmp_path, monkeypatch):
    """A peer that can't be built here, one that its sizes do not fit, and a process that is killed."""
    sweep = tiny_sweep(tmp_path, ("flat", "h-transformer-1d", "nystromformer"))
    statuses = {"flat": -9, "h-transformer-1d": "not_available", "nystromformer": "failed"}

    class Process:
        """Stands for a run's process: it has ended with a record, or with an exit status and none."""

        def __init__(self, run):
            self.returncode = 0
            status = statuses[run.arm] if run.stage == "search" else "finished"
            if isinstance(status, int) and run.setting.learning_rate == 1e-2:
                self.returncode = status
            else:
                measured = {"validation_loss": 1.0, "validation_accuracy": 0.2, "test_accuracy": 0.2, "seconds": 1}
                status = "finished" if isinstance(status, int) else status
                reason = None if status == "finished" else "no luck"
                record_run(sweep.specification(run), {"status": status, "reason": reason, **measured})

        def poll(self):
            return self.returncode

    monkeypatch.setattr("hkt_hf.experiments.reproduce._start", lambda sweep, run: Process(run))
    outcome = reproduce(sweep)
    assert [(run.arm, run.stage) for run in outcome["failed"]] == [
        ("flat", "search"),
        *[("nystromformer", "search")] * 2,
        ("nystromformer", "final"),
    ]
    assert sweep.record(outcome["failed"][0])["reason"] == "the process ended with exit status -9"
    final = {arm: sweep.record(Run(arm, "final", 0)) for arm in statuses}
    assert final["flat"]["status"] == "finished" and final["flat"]["setting"]["learning_rate"] == 1e-3
    for arm in ("h-transformer-1d", "nystromformer"):
        assert (final[arm]["status"], final[arm]["reason"]) == (statuses[arm], "in its search: no luck")
    assert sweep.is_finished(Run("h-transformer-1d", "final", 0))
    assert not sweep.is_finished(Run("nystromformer", "final", 0))


def test_what_would_take_too_long_is_not_begun(tmp_path, monkeypatch):
    """An arm whose first steps are too slow: the first run of its search tells, and no other is started."""
    sweep = tiny_sweep(tmp_path, ("flat",), (0,), "--max_run_hours", "1e-9", "--search.training", "{max_steps: 5}")
    started = []

    class Process:
        returncode = 0

        def __init__(self, run):
            started.append(execute(sweep.specification(run)))

        def poll(self):
            return 0

    monkeypatch.setattr("hkt_hf.experiments.reproduce._start", lambda sweep, run: Process(run))
    outcome = reproduce(sweep)
    assert not outcome["failed"] and [record["stage"] for record in started] == ["search"]
    assert [run.stage for run in outcome["finished"]] == ["search", "search", "final"]
    assert all(sweep.record(run)["status"] == "not_available" for run in outcome["finished"])
    final = sweep.record(Run("flat", "final", 0))
    assert re.match(r"in its search: .*a step its 5 steps would take .* `max_run_hours` allows", final["reason"])
    assert "NA (in its search: " in markdown(read_records(tmp_path / "results"))


def test_the_limit_of_a_run_follows_its_length():
    steps = tiny_protocol(("flat",), (0,), "--max_run_hours", "3")
    assert [steps.max_hours_of(stage) for stage in ("search", "finalist", "final")] == [1.0, 3, 3]
    assert steps.max_hours_of("pretraining") is None
    epochs = load_protocol("listops", "paper", ["--max_run_hours", "10"])
    assert epochs.max_hours_of("search") == 1.0 and epochs.max_hours_of("final") == 10
    assert load_protocol("listops", "paper").max_hours_of("search") is None


def test_records_of_other_settings_are_refused(finished, capsys):
    folder = finished[1]
    command = ["reproduce", "listops", "--protocol", "cpu", *TINY, "--arms", "flat", "--data.listops.num_train", "65"]
    assert main([*command, "--results", str(folder / "results"), "--runs", str(folder / "runs")]) == 1
    assert "other settings (data.listops.num_train)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"text": ["a", "b"]}, "label"),
        ({"label": [0, 1]}, "text"),
        ({"text": ["a"] * 40, "label": [1] * 40}, "single class"),
        ({"text": [], "label": []}, "no examples"),
    ],
)
def test_a_wrong_dataset_stops_at_once(rows, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    features = {"text": datasets.Value("string"), "label": datasets.Value("int64")}
    features = datasets.Features({name: feature for name, feature in features.items() if name in rows})
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    assert main(["reproduce", "imdb", "--protocol", "cpu", "--data.path", str(tmp_path / "data")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


def test_an_interrupted_sweep_goes_on_to_the_same_results(tmp_path):
    """Two runs side by side are ended in the middle; the command then gives what runs one by one in this process give."""
    command = ["reproduce", "listops", "--protocol", "cpu", *TINY, "--arms", "hkt", "--seeds", "0", "--jobs", "2"]
    command += ["--threads", "1", "--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    killed = subprocess.Popen(
        [sys.executable, "-m", "hkt_hf.cli", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/**/checkpoint-2/trainer_state.json")):
        assert killed.poll() is None and time.monotonic() < deadline, "no run could be interrupted"
        time.sleep(0.01)
    killed.send_signal(signal.SIGTERM)
    assert killed.wait(60) == 130
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("results/**/*.json")}
    assert len(finished) < 3
    assert main(command) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())

    torch.set_num_threads(1)
    expected = run_all(tiny_sweep(tmp_path / "whole", ("hkt",)))
    resumed = tiny_sweep(tmp_path, ("hkt",))
    assert len(resumed.runs()) == 3  # two of the search, side by side, and the final one
    for run in resumed.runs():
        found, wanted = resumed.record(run), expected[run.arm, run.name]
        for key in ("test_accuracy", "validation_accuracy", "setting", "tokens", "parameters"):
            assert found[key] == wanted[key], (run, key)
        assert [e["loss"] for e in found["curve"]["train"]] == [e["loss"] for e in wanted["curve"]["train"]]
