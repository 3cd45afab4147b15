"""Several processes on the CPU: DDP, FSDP2 and tensor parallelism give the numbers of one process."""

import json
import re
import sys
import time

import pytest
import torch
import transformers
import yaml
from launch import (
    ACCELERATE,
    ACCELERATE_LAUNCH,
    PROGRAMS,
    ROOT,
    TIMEOUT,
    TORCHRUN,
    finish,
    free_port,
    kill,
    launch,
    start,
)
from programs import fsdp_training, sharded_loading, trainer_steps
from tiny_models import randomize, tiny_config
from transformers import AutoConfig

from hkt_hf import HKTModel
from hkt_hf.config import build_experiment
from hkt_hf.modeling import modeling_hkt
from hkt_hf.modeling.modeling_hkt import AUTO_CLASSES
from hkt_hf.training import train


DOCUMENT = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")


def results_of(folder, launcher, program, *options):
    """What the two processes of a program wrote, in the order of their ranks."""
    launch([*launcher, PROGRAMS / program, folder, *options], cwd=folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return folder, results_of(folder, ACCELERATE, "trainer_steps.py")


@pytest.fixture(scope="module")
def accelerate_fsdp(tmp_path_factory):
    """With the configuration file of the documentation."""
    folder = tmp_path_factory.mktemp("accelerate-fsdp")
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    values = {**yaml.safe_load(text), "num_processes": 2, "mixed_precision": "no"}
    (folder / "fsdp2.yaml").write_text(yaml.safe_dump(values))
    launcher = [*ACCELERATE_LAUNCH, "--config_file", folder / "fsdp2.yaml", "--main_process_port", "0"]
    return folder, results_of(folder, launcher, "trainer_steps.py", "fsdp")


@pytest.mark.parametrize("engine", ["ddp", pytest.param("accelerate_fsdp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", trainer_steps.CASES)
def test_a_trainer_in_two_processes_trains_like_one(case, engine, request, tmp_path):
    folder, ranks = request.getfixturevalue(engine)
    expected = trainer_steps.train(case, tmp_path)
    found = [rank[case] for rank in ranks]
    assert [rank["world_size"] for rank in found] == [2, 2] and expected["world_size"] == 1
    steps = trainer_steps.STEPS
    shares = [[*first, *second] for first, second in zip(*(rank["rows"] for rank in found), strict=True)]
    assert shares[:steps] == expected["rows"][:steps]  # the same rows in the same steps
    names = {name for name in expected["gradients"][0] if engine == "accelerate_fsdp"}
    for rank in found:
        for step, gradients in enumerate(expected["gradients"]):
            torch.testing.assert_close(rank["gradients"][step], gradients, rtol=0, atol=1e-5)
        torch.testing.assert_close(rank["weights"], expected["weights"], rtol=0, atol=1e-4)
        assert rank["shards"].keys() == names
        assert all(local[0] <= (shape[0] + 1) // 2 for shape, local in rank["shards"].values())
    torch.testing.assert_close(found[0]["losses"], expected["losses"], rtol=0, atol=1e-5)
    assert len(expected["losses"]) == len(expected["gradients"]) == steps
    assert all(max(part.abs().max() for part in step.values()) > 1e-3 for step in expected["gradients"])
    model, info = trainer_steps.CASES[case].from_pretrained(folder / case, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(model.state_dict(), expected["weights"], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    return folder, results_of(folder, TORCHRUN, "fsdp_training.py")


@pytest.mark.parametrize("case", fsdp_training.CASES)
def test_fsdp2_gives_the_losses_and_gradients_of_one_process(fsdp, case):
    losses, gradients = fsdp_training.train(case, fsdp_training.build(case))
    for rank in fsdp[1]:
        assert rank["world_size"] == 2
        torch.testing.assert_close(rank["cases"][case]["losses"], losses, rtol=0, atol=1e-5)
        for step in range(fsdp_training.STEPS):
            torch.testing.assert_close(rank["cases"][case]["gradients"][step], gradients[step], rtol=0, atol=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("case", fsdp_training.CASES)
def test_fsdp2_shards_every_parameter(fsdp, case):
    ranks = [result["cases"][case]["shards"] for result in fsdp[1]]
    unsharded = {name: tuple(values.shape) for name, values in fsdp_training.build(case).named_parameters()}
    for shards in ranks:
        assert {name: shape for name, (shape, _) in shards.items()} == unsharded
        for name, ((length, *rest), local_shape) in shards.items():
            assert local_shape[1:] == tuple(rest) and local_shape[0] <= (length + 1) // 2, name
    for name, (length, *_) in unsharded.items():
        assert sum(shards[name][1][0] for shards in ranks) == length


@pytest.mark.parametrize("case", fsdp_training.CASES)
def test_what_fsdp2_trained_loads_in_one_process(fsdp, case):
    folder, ranks = fsdp
    model_class = fsdp_training.CASES[case][0]
    model, info = model_class.from_pretrained(folder / case, output_loading_info=True)
    assert not any(info.values())
    assert AutoConfig.from_pretrained(folder / case).model_type == "hkt"
    batch = fsdp_training.global_batch(case)
    batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    for rank in ranks:
        torch.testing.assert_close(rank["cases"][case]["logits"], logits, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for case, (model_class, _) in sharded_loading.CASES.items():
        torch.manual_seed(0)
        randomize(model_class(sharded_loading.config_of(case))).save_pretrained(folder / case)
    return folder, results_of(folder, TORCHRUN, "sharded_loading.py")


@pytest.fixture(scope="module")
def whole(sharded):
    """The same in one process: results, and weights after the training."""
    results = {}
    for case, (model_class, _) in sharded_loading.CASES.items():
        model = model_class.from_pretrained(sharded[0] / case)
        results[case] = sharded_loading.run(case, model), model.state_dict()
    return results


each_plan = pytest.mark.parametrize("kind", sharded_loading.KINDS)
each_case = pytest.mark.parametrize("case", sharded_loading.CASES)


@each_plan
@each_case
def test_a_declared_plan_gives_the_numbers_of_one_process(sharded, whole, case, kind):
    expected, _ = whole[case]
    for rank in sharded[1]:
        found = rank[case, kind]
        torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=1e-5)
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=0, atol=1e-5)
        assert found["gradients"][0].keys() == expected["gradients"][0].keys()
        for step in range(sharded_loading.STEPS):
            torch.testing.assert_close(found["gradients"][step], expected["gradients"][step], rtol=1e-5, atol=1e-5)
        if "generated" in expected:
            assert torch.equal(found["generated"], expected["generated"])
            torch.testing.assert_close(found["generated_logits"], expected["generated_logits"], rtol=0, atol=1e-5)
    assert expected["losses"][-1] < expected["losses"][0]


@each_case
def test_the_tensor_parallel_plan_shares_out_the_heads(sharded, case):
    by_rows = ("q_proj", "k_proj", "v_proj", "level_logits", "up_proj", "embed_tokens", "lm_head")
    by_columns = ("o_proj.weight", "down_proj.weight", "key_factors")
    for rank in sharded[1]:
        for name, (shape, dim, local_shape) in rank[case, "tp"]["parameters"].items():
            assert dim == (0 if any(part in name for part in by_rows) else 1 if name.endswith(by_columns) else None), (
                name
            )
            halves = [size // 2 if index == dim else size for index, size in enumerate(shape)]
            assert local_shape == tuple(halves), name


@each_case
def test_the_fsdp_plan_shards_every_parameter(sharded, case):
    for rank in sharded[1]:
        for name, (shape, dim, local_shape) in rank[case, "fsdp"]["parameters"].items():
            assert dim == 0 and local_shape[0] <= (shape[0] + 1) // 2, name


@pytest.mark.parametrize("score_symmetry", ["none", "symmetric", "psd"])
@pytest.mark.parametrize("norm_placement", ["pre", "post"])
@pytest.mark.parametrize("name", AUTO_CLASSES.values())
def test_every_rule_of_a_plan_names_something(name, norm_placement, score_symmetry):
    """A rule that names nothing is skipped with a warning, and a model without one for its tied head fails."""
    config = tiny_config(
        is_decoder=name == "HKTForCausalLM", norm_placement=norm_placement, score_symmetry=score_symmetry
    )
    model = getattr(modeling_hkt, name)(config)
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
    prefix = "" if name == "HKTModel" else "model."
    for plan in (model.tp_plan, model.fsdp_plan, model.pp_plan):
        assert set(plan) <= names
        assert any(rule.startswith(f"{prefix}layers") for rule in plan)
        assert ("lm_head" in plan) == (model.get_output_embeddings() is not None)
    keys = {"none": ["k_proj.*"], "symmetric": ["key_factors"], "psd": []}[score_symmetry]
    rules = {f"{prefix}layers.*.self_attn.{part}" for part in ("q_proj.*", "level_logits", *keys)}
    assert rules <= set(model.tp_plan)


def test_heads_that_can_not_be_shared_out_are_named():
    attention = HKTModel(tiny_config()).layers[0].self_attn
    attention.v_proj.weight = torch.nn.Parameter(attention.v_proj.weight[:12])  # one and a half of four heads
    with pytest.raises(
        ValueError, match=r"`num_attention_heads` \(4\) must be a multiple of the tensor-parallel size"
    ):
        attention(torch.randn(1, 5, 32))


@pytest.mark.parametrize("case", [case for case in sharded_loading.CASES if "decoder" in case])
def test_a_pipeline_of_two_stages_generates_what_one_process_does(sharded, case):
    expected = sharded_loading.infer(case, sharded_loading.CASES[case][0].from_pretrained(sharded[0] / case))
    for rank in sharded[1]:
        found = rank[case, "pp"]
        assert found["layers"] == 1
        torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=1e-5)
        assert torch.equal(found["generated"], expected["generated"])
        torch.testing.assert_close(found["generated_logits"], expected["generated_logits"], rtol=0, atol=1e-5)


@each_plan
@each_case
def test_a_sharded_model_is_saved_whole(sharded, whole, case, kind):
    model_class = sharded_loading.CASES[case][0]
    model, info = model_class.from_pretrained(sharded[0] / f"{case}-{kind}", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(model.state_dict(), whole[case][1], rtol=0, atol=1e-5)


def experiment(output_dir, processes, **training):
    """Steps of 16 rows of `processes` equal shares; 23 rows to validate, which no number of batches shares out evenly."""
    return {
        "output_dir": str(output_dir),
        "model": {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "intermediate_size": 16,
            "num_levels": 2,
            "hidden_dropout": 0.0,
        },
        "data": {
            "task": "listops",
            "listops": {"min_length": 5, "max_length": 24, "num_train": 96, "num_validation": 23, "num_test": 23},
        },
        "tokenizer": {"max_length": 24},
        "training": {
            "per_device_train_batch_size": 16 // processes,
            "per_device_eval_batch_size": 8,
            "learning_rate": 1e-2,
            "max_steps": 8,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_strategy": "steps",
            "save_steps": 4,
            "logging_steps": 1,
            **training,
        },
    }


def write_config(folder, name, **training):
    (folder / f"{name}.yaml").write_text(json.dumps(experiment(folder / name, processes=2, **training)))
    return folder / f"{name}.yaml"


def curves_of(folder):
    """Training steps (step, loss, gradient norm), and validations (step, loss, accuracy)."""
    curves = json.loads((folder / "curves.json").read_text())
    steps = [[entry["step"], entry["loss"], entry["grad_norm"]] for entry in curves["train"]]
    return steps, [[entry["step"], entry["loss"], entry["accuracy"]] for entry in curves["validation"]]


@pytest.fixture(scope="module")
def distributed_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(folder, "two")
    output = launch([*TORCHRUN, "-m", "hkt_hf.cli", "train", config], cwd=folder)
    return folder, output


def test_hkt_train_in_two_processes_measures_what_one_does(distributed_run):
    folder, _ = distributed_run
    expected = train(build_experiment(experiment(folder / "one", processes=1)))
    report = json.loads((folder / "two" / "metrics.json").read_text())
    assert (expected["processes"], report["processes"]) == (1, 2)
    for split in ("validation", "test"):
        assert report[split]["accuracy"] == expected[split]["accuracy"]
        assert report[split]["loss"] == pytest.approx(expected[split]["loss"], abs=1e-5)
    for found, wanted in zip(curves_of(folder / "two"), curves_of(folder / "one"), strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=1e-4)
    assert len(curves_of(folder / "two")[0]) == 8


def test_hkt_train_in_two_processes_speaks_and_writes_once(distributed_run):
    folder, output = distributed_run
    assert output.count("validation: loss") == 1 and output.count("model, card and curves") == 1
    assert output.count("tokenizing: 100%") == 3  # one for each split
    names = {path.name for path in (folder / "two").iterdir()}
    assert not [name for name in names if name.startswith(".")]
    assert {"metrics.json", "curves.json", "config.json", "model.safetensors", "README.md", "checkpoint-8"} <= names
    assert "8 steps of 16 sequences" in (folder / "two" / "README.md").read_text()


def test_each_process_draws_its_own_random_numbers(distributed_run):
    """Without dropout nothing was drawn; with it, the masks of two processes would otherwise be the same."""
    checkpoint = distributed_run[0] / "two" / "checkpoint-8"
    first, second = (torch.load(checkpoint / f"rng_state_{rank}.pth", weights_only=False)["cpu"] for rank in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_shards_is_refused(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=rf"{variable} is set: .*docs/distributed.md"):
        train(build_experiment(experiment(tmp_path / "run", processes=1)))
    assert not (tmp_path / "run").exists()


def test_processes_that_would_train_alone_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started .* each would train alone; `training.use_cpu`"):
        train(build_experiment(experiment(tmp_path / "run", processes=1, use_cpu=False)))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_shuffled_rows_are_shared_out_without_overlap(tmp_path):
    """Processes that shuffle each for itself would give other losses than one process."""
    config = write_config(tmp_path, "two", train_sampling_strategy="random", max_steps=12)
    launch([*TORCHRUN, "-m", "hkt_hf.cli", "train", config], cwd=tmp_path)
    one = experiment(tmp_path / "one", processes=1, train_sampling_strategy="random", max_steps=12)
    train(build_experiment(one))
    for found, wanted in zip(curves_of(tmp_path / "two"), curves_of(tmp_path / "one"), strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(
    transformers.__version__.startswith("5.17."),
    reason="its Trainer reads the optimizer onto a device 'cpu:0', which PyTorch does not know",
)
def test_a_killed_run_of_two_processes_continues_with_the_same_losses(tmp_path):
    """SIGKILL of every process; with dropout, so that each process needs its own random numbers again."""
    for name in ("killed", "whole"):
        values = experiment(tmp_path / name, processes=2, max_steps=40, save_steps=5, eval_steps=20)
        values["model"]["hidden_dropout"] = 0.1
        (tmp_path / f"{name}.yaml").write_text(json.dumps(values))
    command = [*TORCHRUN, "-m", "hkt_hf.cli", "train"]
    process = start([*command, "killed.yaml"], cwd=tmp_path)
    deadline = time.monotonic() + TIMEOUT
    while not (tmp_path / "killed" / "checkpoint-10" / "trainer_state.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.005)
    kill(process)
    assert not (tmp_path / "killed" / "metrics.json").exists()
    for name in ("killed", "whole"):
        launch([*command, f"{name}.yaml"], cwd=tmp_path)
    killed, whole = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("killed", "whole"))
    assert killed["resumed"] and not whole["resumed"]
    assert curves_of(tmp_path / "killed") == curves_of(tmp_path / "whole")
    assert killed["test"] == whole["test"]


@pytest.mark.slow
def test_the_other_commands_in_two_processes(distributed_run):
    folder, _ = distributed_run
    report = json.loads((folder / "two" / "metrics.json").read_text())
    output = launch(
        [*TORCHRUN, "-m", "hkt_hf.cli", "evaluate", "two", "--out", folder / "evaluation.json"], cwd=folder
    )
    assert output.count("test: loss") == 1
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["accuracy"] == report["test"]["accuracy"]
    assert found["loss"] == pytest.approx(report["test"]["loss"], abs=1e-6)
    output = launch([*TORCHRUN, "-m", "hkt_hf.cli", "predict", "two", "[MAX 2 9 ]"], cwd=folder)
    assert output.count("\t[MAX 2 9 ]") == 1
    output = launch([*TORCHRUN, "-m", "hkt_hf.cli", "train", "two.yaml"], cwd=folder)
    assert output.count("is finished already") == 1 and output.count("test: loss") == 1


MODULES = {
    "hkt": "hkt_hf.cli",
    "torchrun": "torch.distributed.run",
    "accelerate": "accelerate.commands.accelerate_cli",
}


def documented_commands():
    """The commands that train on several GPUs: for each, what runs on the first node, and on the second where there is one."""
    blocks = [block.strip().splitlines() for block in re.findall(r"```bash\n(.*?)```", DOCUMENT, flags=re.DOTALL)]
    commands = []
    for block in blocks:
        if all("--machine_rank" in line for line in block):
            commands.append(block)
        else:
            commands += [[line, line] if "--nnodes 2" in line else [line] for line in block]
    return commands


@pytest.mark.slow
@pytest.mark.parametrize("lines", documented_commands(), ids=lambda lines: lines[0].split(" -m ")[0])
def test_documented_commands_train(lines, tmp_path):
    """With two processes in all, and a small run in place of the documented one."""
    config = write_config(tmp_path, "run", max_steps=2, eval_strategy="no", save_strategy="no")
    port = free_port()
    processes = []
    for line in lines:
        line = line.replace("FIRST_NODE", "127.0.0.1").replace("29500", str(port))
        line = re.sub(r"--nproc_per_node \d+", f"--nproc_per_node {2 // len(lines)}", line)
        line = re.sub(r"--num_processes \d+", "--num_processes 2", line)
        program, *arguments = line.replace("listops-hkt-tiny", str(config)).split()
        processes.append(start([sys.executable, "-m", MODULES[program], *arguments], cwd=tmp_path))
    outputs = [finish(process) for process in processes]
    assert sum(output.count("validation: loss") for output in outputs) == 1
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert report["steps"] == 2 and report["processes"] == (1 if lines[0].startswith("hkt") else 2)
