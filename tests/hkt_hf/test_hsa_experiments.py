"""HSA's experiments at tiny sizes: what is measured, what is kept, and what is refused."""

import json
import math
import runpy
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from hkt_hf.config import build_experiment
from hkt_hf.data import load_data
from hkt_hf.data.images import CIFAR10_NAMES
from hkt_hf.experiments import two_modalities as modalities
from hkt_hf.experiments import zero_shot as frontier
from hkt_hf.tokenization import build_tokenizer
from hkt_hf.training import train


@pytest.fixture
def fine_tuning(tmp_path):
    """Configuration of a tiny BERT that is fine-tuned on texts of two classes."""
    tokenizer = build_tokenizer("bytes", model_max_length=32, add_cls_token=True)
    tokenizer.save_pretrained(tmp_path / "encoder")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, pad_token_id=0, **sizes)
    BertModel(config).save_pretrained(tmp_path / "encoder")
    texts = ["good " * (1 + i % 5) if i % 2 else "bad and " * (1 + i % 4) for i in range(60)]
    Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(60)]}).to_csv(str(tmp_path / "texts.csv"))
    return build_experiment(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"checkpoint": str(tmp_path / "encoder")},
            "data": {"task": "text", "path": str(tmp_path / "texts.csv"), "test_fraction": 0.3},
            "tokenizer": {"max_length": 32},
            "training": {
                **{"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "disable_tqdm": True},
                **{"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
            },
        }
    )


def test_zero_shot_measures_every_case_once(fine_tuning, tmp_path):
    protocol = frontier.Protocol(
        lengths=[16, 32],
        layer_sets=[[1], [0, 1]],
        trees=[4, [8, None]],
        num_test=9,
        batch_size=4,
        without_exact=[([1], 4)],
        without_root=[([0, 1], 4)],
        budgets=[0.0, 100.0],
        further_steps=2,
        further=[([0, 1], 4)],
    )
    path = tmp_path / "result.json"
    result = frontier.zero_shot(fine_tuning, protocol, path)
    assert len(result["rows"]) == 2 * (1 + 2 * 2 + 2) + 2 and len(result["gaps"]) == 2 * 2
    assert len(result["auto"]) == 2 * 2 * 2 and [auto["layers"] for auto in result["auto"][:2]] == [[], [0, 1]]
    flat = result["rows"][0]
    assert flat["tree"] is None and flat["operations"] == flat["operations_flat"]
    assert flat["saved_in_replaced_layers"] is None and flat["examples"] == 9
    for row in result["rows"]:
        assert 0 <= row["accuracy"] <= 1 and row["operations"] <= row["operations_flat"]
        assert row["accuracy"] == pytest.approx(1 - len(set(row["wrong"])) / 9) and set(row["wrong"]) <= set(range(9))
        own = next(
            other
            for other in result["rows"]
            if (other["tree"], other["length"], other["further_steps"]) == (None, row["length"], row["further_steps"])
        )
        if row is not own:
            gain = 100 * (row["accuracy"] - own["accuracy"])
            assert row["difference"]["pairs"] == 9 and row["difference"]["mean"] == pytest.approx(gain)
    exact, without = (
        next(row for row in result["rows"] if (row["layers"], row["tree"], row["exact_tokens"]) == ([1], 4, tokens))
        for tokens in ([0], [])
    )
    assert without["saved_in_replaced_layers"] > exact["saved_in_replaced_layers"] > 0
    with_root, without_root = (
        next(row for row in result["rows"] if (row["layers"], row["tree"], row["root_tokens"]) == ([0, 1], 4, tokens))
        for tokens in ([0, -1], [])
    )
    assert without_root["operations"] != with_root["operations"]
    assert [(row["tree"], row["further_steps"]) for row in result["rows"][-3:]] == [(4, 0), (None, 2), (4, 2)]
    before = path.read_text()
    again = frontier.zero_shot(fine_tuning, protocol, path)
    assert again["rows"] == json.loads(before)["rows"]
    frontier.plot(again, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    longer = frontier.zero_shot(fine_tuning, replace(protocol, layer_sets=[[1], [0], [0, 1]]), path)
    added = [row["layers"] for row in longer["rows"][len(again["rows"]) :]]
    assert added == [[0]] * 4 and longer["rows"][: -len(added)] == again["rows"]
    assert json.loads(path.read_text())["protocol"]["layer_sets"] == [[1], [0], [0, 1]]
    for change in (replace(protocol, num_test=8), replace(protocol, min_tokens=5), replace(protocol, budgets=[1.0])):
        with pytest.raises(ValueError, match="another configuration, or with"):
            frontier.zero_shot(fine_tuning, change, path)


def test_only_long_texts_are_measured_where_asked(fine_tuning, tmp_path):
    protocol = frontier.Protocol(lengths=[32], layer_sets=[[1]], trees=[4], num_test=100, min_tokens=21)
    fine_tuning.data.max_test_samples = 2  # of training; long texts come from the whole split
    result = frontier.zero_shot(fine_tuning, protocol, tmp_path / "long.json")
    texts = load_data(replace(fine_tuning.data, max_test_samples=None)).splits["test"]["text"][:]
    long = [text for text in texts if len(text) + 1 >= 21]  # bytes and [CLS]
    assert 2 < len(long) < len(texts)
    assert all(row["examples"] == len(long) and row["mean_length"] >= 21 for row in result["rows"])
    with pytest.raises(ValueError, match="`min_tokens` must be at least 0, got -1"):
        replace(protocol, min_tokens=-1)
    with pytest.raises(ValueError, match=r"no test example has `min_tokens` \(33\) tokens"):
        frontier.zero_shot(fine_tuning, replace(protocol, min_tokens=33), tmp_path / "longer.json")


def test_a_classifier_takes_longer_texts_with_its_positions_repeated(fine_tuning, tmp_path):
    train(fine_tuning)
    target = tmp_path / "longer"
    frontier.add_positions(fine_tuning.output_dir, target, 80)
    own = AutoModelForSequenceClassification.from_pretrained(fine_tuning.output_dir).eval()
    longer = AutoModelForSequenceClassification.from_pretrained(target).eval()
    table = longer.bert.embeddings.position_embeddings.weight
    assert table.shape[0] == 80 == AutoTokenizer.from_pretrained(target).model_max_length
    assert torch.equal(table[:32], table[32:64]) and torch.equal(table[:16], table[64:])
    short = torch.arange(1, 33)[None]
    assert torch.equal(longer(input_ids=short).logits, own(input_ids=short).logits)
    assert longer(input_ids=short.repeat(1, 2)).logits.shape == (1, 2)
    written = (target / "model.safetensors").stat().st_mtime_ns
    frontier.add_positions(fine_tuning.output_dir, target, 80)  # what is there is kept
    assert (target / "model.safetensors").stat().st_mtime_ns == written


def test_questions_name_the_class_of_the_picture_and_another():
    generator = torch.Generator().manual_seed(0)
    pixels, classes = torch.randint(256, (4000, 16), generator=generator), torch.arange(10).repeat(400)
    input_ids, lengths = modalities.examples(pixels, classes, generator)
    words = {index: word for word, index in modalities.VOCABULARY.items()}
    assert torch.equal(input_ids[:, :16] - 1, pixels) and int(lengths.max()) == modalities.LONGEST_QUESTION
    pairs, first = Counter(), 0
    for row, shown in enumerate(CIFAR10_NAMES[index] for index in classes):
        question = [words[index] for index in input_ids[row, 16 : 16 + lengths[row]].tolist()]
        named = [word for word in question if word in CIFAR10_NAMES]
        assert len(set(named)) == 2 and shown in named and question.count("or") == 1
        assert (input_ids[row, 16 + lengths[row] :] == modalities.PAD).all()
        pairs[frozenset(named)] += 1
        first += named[0] == shown
    assert len(pairs) == 45 and min(pairs.values()) > 50  # of 89 on average
    assert first / 4000 == pytest.approx(0.5, abs=0.03)  # the order tells nothing


@pytest.mark.parametrize("arm", modalities.ARMS)
def test_trees_of_two_modalities(arm):
    """Pictures of 4 by 4 pixels and questions of two and five words."""
    tree = modalities.ARMS[arm](4, torch.tensor([2, 5]))
    seen = [16, 16] if arm == "picture" else [18, 21]
    assert tree.size == 16 + modalities.LONGEST_QUESTION and tree.lengths.tolist() == seen
    pixels, words = list(range(16)), [16, 17]
    blocks = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    expected = {
        "flat": [*pixels, *words],
        "modalities": [pixels, words],
        "quadtree": [blocks, words],
        "line": [[pixels[start : start + 4] for start in range(0, 16, 4)], words],
        "picture": pixels,
    }
    assert tree.nested()[0] == expected[arm]


@pytest.fixture
def pictures(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 60), ("test", 20)):
        pixels = torch.randint(256, (count, 1024), generator=generator, dtype=torch.uint8)
        rows = {"pixels": [bytes(each.tolist()) for each in pixels], "label": [i % 10 for i in range(count)]}
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Dataset.from_dict(rows).to_parquet(str(tmp_path / "pictures" / f"{split}.parquet"))
    return str(tmp_path / "pictures")


def test_two_modalities_trains_every_arm_once(pictures, tmp_path):
    protocol = modalities.Protocol(
        side=4,
        arms=["flat", "quadtree", "picture"],
        seeds=[0, 1],
        search_seed=9,
        learning_rates=[1e-3, 1e-2],
        steps=2,
        batch_size=4,
        num_train=40,
        num_validation=6,
        num_test=10,
        model={"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8},
    )
    path = tmp_path / "result.json"
    result = modalities.two_modalities(protocol, path, pictures)
    assert [(row["stage"], row["arm"]) for row in result["rows"]] == [
        (stage, arm) for arm in protocol.arms for stage in ("search", "search", "final", "final")
    ]
    for arm in protocol.arms:
        rows = [row for row in result["rows"] if row["arm"] == arm]
        best = min(rows[:2], key=lambda row: row["loss"])["learning_rate"]
        assert {row["learning_rate"] for row in rows[2:]} == {best}
        assert [row["examples"] for row in rows] == [6, 6, 10, 10]
    assert set(result["differences"]) == {"quadtree", "picture"} and result["differences"]["quadtree"]["pairs"] == 2
    again = modalities.two_modalities(protocol, path, pictures)
    assert again["rows"] == result["rows"]
    modalities.plot(again, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="another protocol"):
        modalities.two_modalities(replace(protocol, steps=3), path, pictures)
    train = Dataset.from_parquet(f"{pictures}/train.parquet").select(range(59, -1, -1))
    train.to_parquet(f"{pictures}/train.parquet")
    with pytest.raises(ValueError, match="other data"):
        modalities.two_modalities(protocol, path, pictures)


def test_a_learning_rate_that_diverges_is_not_chosen(pictures, tmp_path, monkeypatch):
    def train(protocol, arm, seed, rate, splits, measured):
        return {"loss": math.nan if rate > 1e-3 or arm == "modalities" else 1.0, "accuracy": 0.5}

    monkeypatch.setattr(modalities, "_train", train)
    sizes = {"steps": 1, "batch_size": 1, "num_train": 40, "num_validation": 20, "num_test": 20, "model": {}}
    protocol = modalities.Protocol(16, ["flat"], [0], 100, [1e-2, 1e-3], **sizes)
    final = modalities.two_modalities(protocol, tmp_path / "flat.json", pictures)["rows"][-1]
    assert (final["stage"], final["learning_rate"]) == ("final", 1e-3)
    with pytest.raises(ValueError, match="modalities diverged with each of them"):
        modalities.two_modalities(replace(protocol, arms=["modalities"]), tmp_path / "other.json", pictures)


@pytest.mark.parametrize(
    "change, message",
    [({"arms": ["tree"]}, "`arms` must be among"), ({"search_seed": 1}, r"`search_seed` \(1\) must not be one of")],
)
def test_protocols_that_make_no_sense_are_refused(change, message):
    values = {"side": 4, "arms": ["flat"], "seeds": [1], "search_seed": 0, "learning_rates": [1e-3]}
    sizes = dict.fromkeys(("steps", "batch_size", "num_train", "num_validation", "num_test"), 1)
    with pytest.raises(ValueError, match=message):
        modalities.Protocol(**{**values, **sizes, "model": {}, **change})


def test_the_script_of_speed_measures_and_goes_on(tmp_path, monkeypatch, capsys):
    output = tmp_path / "speed.json"
    script = str(modalities.Path(frontier.__file__).parents[2] / "scripts" / "hsa_speed.py")
    for lengths in (["64"], ["64", "96"]):
        words = ["--lengths", *lengths, "--repeats", "1", "--flat-limit", "64", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", [script, *words])
        runpy.run_path(script, run_name="__main__")
    rows = json.loads(output.read_text())["rows"]
    assert [(row["length"], row["mode"]) for row in rows] == [
        (length, mode) for length in (64, 96) for mode in ("forward", "forward_backward")
    ]
    first, last = rows[0]["operators"], rows[-1]["operators"]
    assert set(first) == {"flat", "hsa", "hsa-windows", "hsa-text"} and first["flat"]["speedup"] == 1.0
    assert "flat" not in last and all(entry["peak_bytes"] > 0 for entry in last.values())
    assert capsys.readouterr().out.count("64 forward ") == 4  # measured once
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_script_of_injected_encoders_measures_every_choice(tmp_path, monkeypatch):
    script = modalities.Path(frontier.__file__).parents[2] / "scripts" / "benchmark_injection.py"
    output = tmp_path / "injection.json"
    monkeypatch.setattr(sys, "argv", [str(script), "--lengths", "20", "33", "--repeats", "2", "--output", str(output)])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # it would hold for later tests, too
    sizes = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 16}
    names = runpy.run_path(str(script))
    names["SIZES"].update(sizes)
    names["main"]()
    result = json.loads(output.read_text())
    assert [row["length"] for row in result["rows"]] == [20, 33]
    for row in result["rows"]:
        own = row["own_attention"]["seconds"]["median"]
        assert len(row) == 2 + 5 and row["own_attention"]["paired_ratio"] == 1.0
        assert row["all_layers_groups_of_4"]["ratio"] == row["all_layers_groups_of_4"]["seconds"]["median"] / own
    monkeypatch.setattr(sys, "argv", [str(script), "--repeats", "1"])
    with pytest.raises(SystemExit):
        names["main"]()
