"""Experiment files: bases, overrides, and errors that name the key."""

from pathlib import Path

import pytest

from hkt_hf import HKTConfig, HKTModel, preset
from hkt_hf.config import build_experiment, differences, load_experiment, parse_overrides
from hkt_hf.presets import dump_yaml, parse_yaml


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def packaged_experiments():
    folder = Path(__file__).resolve().parents[2] / "configs"
    return sorted(path.stem for path in folder.glob("*.yaml"))


@pytest.mark.parametrize("name", packaged_experiments())
def test_every_packaged_experiment_is_valid(name):
    config = load_experiment(name)
    assert config.output_dir == f"runs/{name}"
    HKTConfig(**config.model)


def test_the_flat_twin_differs_in_the_number_of_levels_alone():
    flat, hkt = (load_experiment(f"listops-{arm}-tiny").to_dict() for arm in ("flat", "hkt"))
    assert differences(flat, hkt) == ["model.num_levels", "output_dir"]


@pytest.mark.parametrize(("name", "millions"), [("hkt-tiny", 0.1), ("hkt-small", 0.5), ("hkt-base", 130.0)])
def test_presets_have_their_size(name, millions):
    config = preset(name, vocab_size=22)
    parameters = sum(parameter.numel() for parameter in HKTModel(config).parameters()) / 1e6
    assert parameters == pytest.approx(millions, rel=0.35)
    assert config.num_levels == 3


def test_hkt_small_is_what_the_experiments_use():
    config = preset("hkt-small")
    sizes = (config.hidden_size, config.num_attention_heads, config.num_hidden_layers, config.intermediate_size)
    assert sizes == (128, 8, 2, 512)


def test_preset_overrides_and_unknown_names():
    with pytest.raises(ValueError, match="`num_levles`; the nearest valid one is `num_levels`"):
        preset("hkt-tiny", num_levles=1)
    assert preset("hkt-small", num_levels=1).num_levels == 1
    with pytest.raises(FileNotFoundError, match="hkt-huge"):
        preset("hkt-huge")


def test_bases_merge_in_order_and_the_file_wins(tmp_path):
    write(tmp_path, "size.yaml", "model: {hidden_size: 64, num_levels: 2}\nseed: 1\n")
    write(tmp_path, "task.yaml", "data: {task: sst2}\nmodel: {num_levels: 4}\ntraining: {learning_rate: 1e-3}\n")
    path = write(
        tmp_path, "run.yaml", "base: [size, task.yaml]\noutput_dir: out\nmodel: {num_attention_heads: 8}\nseed: 3\n"
    )
    config = load_experiment(path, ["--training.max_steps", "7", "--data.seed=5"])
    assert config.model == {"hidden_size": 64, "num_levels": 4, "num_attention_heads": 8}
    assert config.training == {"learning_rate": 0.001, "max_steps": 7}
    assert (config.seed, config.data.task, config.data.seed, config.output_dir) == (3, "sst2", 5, "out")


def test_text_that_looks_like_a_number_survives_writing(tmp_path):
    values = {"a": "1e3", "b": "no", "c": "true", "d": 1e-05, "e": None, "f": "0x1F", "g": "12:30"}
    assert parse_yaml(dump_yaml(values), source="dump") == values


def test_a_home_folder_is_expanded():
    values = {"output_dir": "~/run", "model": {"checkpoint": "~/other"}}
    config = build_experiment(values)
    assert config.output_dir == str(Path.home() / "run")
    assert config.model["checkpoint"] == str(Path.home() / "other")
    assert values["model"] == {"checkpoint": "~/other"}


def test_a_run_restores_from_what_it_wrote(tmp_path):
    import yaml

    config = load_experiment("listops-hkt-tiny")
    path = write(tmp_path, "hkt.yaml", yaml.safe_dump(config.to_dict()))
    assert load_experiment(path) == config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed", "3"], {"seed": 3}),
        (["--training.learning_rate", "1e-3"], {"training": {"learning_rate": 0.001}}),
        (["--training.learning_rate=-2.5E-4"], {"training": {"learning_rate": -0.00025}}),
        (["--training.eval_strategy", "no"], {"training": {"eval_strategy": "no"}}),
        (["--model.share_level_projections", "true"], {"model": {"share_level_projections": True}}),
        (
            ["--data.listops.max_length", "64", "--data.task", "listops"],
            {"data": {"listops": {"max_length": 64}, "task": "listops"}},
        ),
        (["--data.path", "a=b.csv"], {"data": {"path": "a=b.csv"}}),
        ([], {}),
    ],
)
def test_overrides(words, expected):
    assert parse_overrides(words) == expected


@pytest.mark.parametrize("words", [["seed", "3"], ["--seed"], ["-s", "3"], ["--model", "3", "--model.a", "3"]])
def test_bad_overrides(words):
    with pytest.raises(ValueError, match="option"):
        parse_overrides(words)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"outputdir": "x"}, "unknown key `outputdir`; the nearest valid one is `output_dir`"),
        ({}, "`output_dir` must be given"),
        ({"output_dir": "x", "seed": "one"}, "`seed`"),
        (
            {"output_dir": "x", "model": {"num_level": 3}},
            "`model.num_level`; the nearest valid one is `model.num_levels`",
        ),
        ({"output_dir": "x", "model": {"vocab_size": 30}}, "`model.vocab_size` can't be set"),
        ({"output_dir": "x", "model": {"hidden_size": 30, "num_attention_heads": 4}}, "hidden_size"),
        ({"output_dir": "x", "model": {"num_levels": 0}}, "num_levels"),
        ({"output_dir": "x", "model": [1]}, "`model` must be a mapping"),
        (
            {"output_dir": "x", "training": {"learning_rat": 1}},
            "`training.learning_rat`; the nearest valid one is `training.learning_rate`",
        ),
        ({"output_dir": "x", "training": {"seed": 1}}, "`training.seed` can't be set"),
        ({"output_dir": "x", "training": {"learning_rate": "fast"}}, "`training.learning_rate` must be of type float"),
        ({"output_dir": "x", "training": {"max_steps": 1.5}}, "`training.max_steps` must be of type int"),
        ({"output_dir": "x", "training": {"per_device_train_batch_size": 0}}, "batch_size` must be greater than 0"),
        ({"output_dir": "x", "training": {"learning_rate": -1}}, "`training.learning_rate` must be at least 0"),
        ({"output_dir": "x", "training": {"train_sampling_strategy": "sorted"}}, "sampling_strategy` must be one of"),
        ({"output_dir": "x", "training": {"max_steps": 0}}, "`training.max_steps` must be at least 1, or -1"),
        ({"output_dir": "x", "training": {"eval_steps": 0}}, "`training.eval_steps` must be greater than 0"),
        ({"output_dir": "x", "training": {"do_train": False}}, "`training.do_train` can't be set"),
        ({"output_dir": "x", "model": {"checkpoint": 3}}, "`model.checkpoint` must be a folder or a Hub id, got 3"),
        ({"output_dir": "x", "model": {"checkpoint": None, "num_levels": 0}}, "num_levels"),
        ({"output_dir": "x", "tokenizer": {"kind": "pixels"}}, "`tokenizer.kind` must be one of .* got 'pixels'"),
        ({"output_dir": "x", "tokenizer": {"max_length": 100}}, "`tokenizer.max_length` must be at least 128"),
        (
            {"output_dir": "x", "data": {"task": "cifar10"}, "tokenizer": {"max_length": 1024, "add_cls_token": True}},
            "`tokenizer.max_length` must be at least 1025",
        ),
        (
            {"output_dir": "x", "data": {"task": "cifar10", "image_size": 16}, "tokenizer": {"max_length": 255}},
            "`tokenizer.max_length` must be at least 256",
        ),
        ({"output_dir": "x", "training": {"push_to_hub": True}}, "`training.push_to_hub` can't be set: use"),
        ({"output_dir": "x", "model": {"num_levels": 5}, "tokenizer": {"max_length": 8}}, "num_levels"),
        ({"output_dir": "x", "model": {"max_position_embeddings": 8}}, r"`model.max_position_embeddings` \(8\)"),
        ({"output_dir": "x", "tokenizer": {"kind": "words"}}, "`tokenizer.kind`"),
        ({"output_dir": "x", "tokenizer": {"max_length": 0}}, "`tokenizer.max_length`"),
        ({"output_dir": "x", "tokenizer": {"path": "x", "kind": "bytes"}}, "`tokenizer.path` .* can't be given with"),
        ({"output_dir": "x", "tokenizer": {"path": "x", "add_cls_token": True}}, "`tokenizer.path` .* can't be given"),
        ({"output_dir": "x", "tokenizer": {"segments": True}}, "set `model.model_type` to 'hsa'"),
        (
            {"output_dir": "x", "tokenizer": {"segments": 1}, "model": {"model_type": "hsa"}},
            "`tokenizer.segments` must be true or false",
        ),
        (
            {"output_dir": "x", "model": {"model_type": "hkd"}},
            "`model.model_type` must be one of .* nearest one is 'hkt'",
        ),
        (
            {"output_dir": "x", "model": {"model_type": "hsa", "num_levels": 3}},
            "unknown key `model.num_levels`",
        ),
        ({"output_dir": "x", "model": {"model_type": "hsa", "branching": [1]}}, "branching"),
        ({"output_dir": "x", "data": {"tusk": "imdb"}}, "`data.tusk`; the nearest valid one is `data.task`"),
        ({"output_dir": "x", "data": {"task": "imdbb"}}, "imdb"),
        ({"output_dir": "x", "data": {"listops": {"max_len": 3}}}, "`data.listops.max_len`"),
    ],
)
def test_bad_values_name_the_key(values, message):
    with pytest.raises(ValueError, match=message):
        build_experiment(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1, 2", "can't be read as YAML"),
        ("just text", "mapping"),
        ("base: 3", "`base` .* got 3"),
        ("base: run\noutput_dir: x", "circles"),
    ],
)
def test_unreadable_files(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_experiment(write(tmp_path, "run.yaml", text))


def test_binary_files(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        load_experiment(path)


def test_missing_files():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_experiment("nowhere.yaml")
    with pytest.raises(FileNotFoundError, match="listops-hkt-tiny"):
        load_experiment("listops-hkt-tinny")
