"""`hkt report`, on records of which the answer is known; and the committed results, where there are any."""

import itertools
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from hkt_hf import HKTConfig
from hkt_hf.cli import main
from hkt_hf.experiments.arms import parse_arm
from hkt_hf.experiments.comparisons import PAPER_RESULTS, comparisons, strongest_flat, strongest_hkt
from hkt_hf.experiments.protocol import load_protocol
from hkt_hf.experiments.records import read_records, sections
from hkt_hf.experiments.report import markdown, summary_table, write_report
from hkt_hf.experiments.reproduce import Sweep
from hkt_hf.experiments.run import execute
from hkt_hf.experiments.statistics import paired_difference


ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "reproduce"
BEGIN, END = "<!-- hkt report: begin -->", "<!-- hkt report: end -->"

FLAT = [0.50, 0.51, 0.49, 0.505, 0.52]
HKT = [0.54, 0.56, 0.55, 0.50, 0.58]
SETTING = {"learning_rate": 0.001, "hidden_dropout": 0.1, "weight_decay": 0.01}


def record(arm="hkt", test_accuracy=0.5, seed=0, **changes):
    """A finished final run; `changes` replace its values."""
    is_hkt = arm.startswith("hkt")
    validation = [
        {"step": step, "loss": 1.5, "accuracy": test_accuracy or 0.3, "seconds": 1.0}
        | ({"level_weights": [[[0.4 + step / 1e4, 0.35, 0.25 - step / 1e4]] * 2] * 2} if is_hkt else {})
        for step in (100, 200)
    ]
    return {
        "task": "listops",
        "protocol": "cpu",
        "arm": arm,
        "num_levels": 3 if is_hkt else 1,
        "position_embedding_type": "rope",
        "stage": "final",
        "seed": seed,
        "setting": SETTING,
        "status": "finished",
        "reason": None,
        "validation_accuracy": test_accuracy,
        "validation_loss": 1.5,
        "test_accuracy": test_accuracy,
        "config": {},
        "curve": {"train": [{"step": 100, "loss": 1.6}], "validation": validation},
        "pretraining": None,
        "seconds": 600.0,
        "memory": 3 * 2**29,
        "parameters": 401_234,
        "flops": 123_400_000,
        "tokens": 1_500_000,
        "threads": 1,
        "versions": {"torch": "2.13.0"},
        "machine": "two cores",
        "commit": "0123456789abcdef",
        "num_test": 2000,
        **changes,
    }


def search(arm, validation_accuracy, loss=1.5, **setting):
    return record(
        arm,
        None,
        seed=100,
        stage="search",
        validation_accuracy=validation_accuracy,
        validation_loss=loss,
        setting=SETTING | setting,
        seconds=300.0,
    )


def finalist(arm, loss, **setting):
    return search(arm, 0.55, loss, **setting) | {"stage": "finalist"}


def pretraining(arm, seconds):
    values = record(arm, None, stage="pretraining", setting=None, validation_accuracy=None, seconds=seconds)
    del values["flops"], values["num_test"]
    return values


def unfinished(arm, status, reason, **changes):
    """A final run that broke off: nothing was measured."""
    values = record(arm, None, status=status, reason=reason, **changes)
    for key in (
        "curve",
        "seconds",
        "memory",
        "parameters",
        "flops",
        "tokens",
        "versions",
        "machine",
        "commit",
        "num_test",
    ):
        del values[key]
    return values


def both_arms(**changes):
    return [
        record(arm, accuracy, seed, **changes)
        for arm, of_seeds in (("flat", FLAT), ("hkt", HKT))
        for seed, accuracy in enumerate(of_seeds)
    ]


def write(folder, records, reverse=False):
    """One file a record; `reverse` gives their names in the other order."""
    for number, values in enumerate(records):
        path = folder / f"{'ab'[number % 2]}" / f"{999 - number if reverse else number:03}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    return folder


GAIN = "hkt - flat (RoPE), the strongest flat arm"
"""The label where no other flat arm has run."""


def row(text, *first):
    """The cells of the only row that starts with these."""
    start = "| " + " | ".join(first) + " |"
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]][len(first) :]


def part(text, heading, before="##"):
    """What stands below a heading."""
    return re.split(rf"^{before}.* ", text.partition(f"{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def test_a_gain_is_that_of_the_paired_test():
    text = markdown(both_arms())
    test = stats.ttest_rel(HKT, FLAT)
    low, high = (100 * bound for bound in test.confidence_interval(0.95))
    differences = [100 * (a - b) for a, b in zip(HKT, FLAT, strict=True)]
    mean, sd = statistics.mean(differences), statistics.stdev(differences)

    gain, t, bootstrap, p, d_z, pairs, paper, seeds = row(part(text, "### Gains"), GAIN)
    assert (gain, t, p) == (f"{mean:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{test.pvalue:.3f}")
    assert (d_z, pairs, paper) == (f"{mean / sd:+.2f}", "5", "+4.77")
    assert low < float(bootstrap.split(" to ")[0]) < mean < float(bootstrap.split(" to ")[1]) < high
    # Power of the two-sided t-test by its noncentral distribution, written out.
    power = {
        n: stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, 4.77 / sd * math.sqrt(n))
        for n in (int(seeds) - 1, int(seeds))
    }
    assert power[int(seeds)] >= 0.8 and power.get(int(seeds) - 1, 0) < 0.8

    short = row(summary_table(both_arms()), "ListOps", "cpu", GAIN)
    assert short == ["50.50", "54.60", f"{mean:+.2f}", t, p, "5", "+4.77"]
    assert part(text, "## Gains").strip().startswith(summary_table(both_arms()))


def test_every_seed_and_cost_is_shown():
    text = markdown(both_arms())
    sd = statistics.stdev(100 * value for value in FLAT)
    cells = row(part(text, "### Accuracy"), "flat", "RoPE")
    assert cells == [f"50.50 ± {sd:.2f}", "50.00", "51.00", "49.00", "50.50", "52.00"]
    assert row(part(text, "### Cost"), "hkt", "RoPE") == [
        "3",
        "401,234",
        "123.4",
        "2,500",
        "10.0",
        "1.5 GiB",
        "lr 0.001, dropout 0.1, decay 0.01",
    ]
    assert "On another machine" not in text
    elsewhere = markdown([*both_arms(), record("fnet", 0.4, machine="a third core")])
    (line,) = [line for line in part(elsewhere, "### Cost").splitlines() if line.startswith("- On another machine")]
    assert "(a third core)" in line and line.endswith(": fnet (RoPE).")
    # The whole worth of a test split: 2,000 coin flips.
    assert "2,000 examples; the standard error of one accuracy from them is at most 1.12 pp" in text


def test_the_paper_is_quoted_right():
    assert {task: (result.flat, result.hkt, result.gain) for task, result in PAPER_RESULTS.items()} == {
        "listops": (50.33, 55.10, 4.77),
        "cifar10": (34.01, 35.45, 1.44),
        "imdb": (62.72, 70.19, 7.47),
        "imdb-words": (67.39, 74.69, 7.30),
    }
    text = markdown([*both_arms(), *both_arms(task="imdb")])
    assert "ListOps 50.33 and 55.10 (+4.77); character IMDB 62.72 and 70.19 (+7.47)" in text
    assert row(summary_table(both_arms(task="imdb")), "character IMDB", "cpu", GAIN)[-1] == "+7.47"


def test_a_paper_is_quoted_for_its_own_model_alone():
    """On IMDB in subwords HSA's paper says what HSA gains, and nobody what HKT does."""
    accuracies = {"flat": (0.5, 0.51, 0.53), "hkt": (0.52, 0.55, 0.54)}
    accuracies |= {"hsa-flat": accuracies["flat"], "hsa": accuracies["hkt"]}
    records = [
        record(arm, accuracy, seed=seed, task="imdb-words", position_embedding_type="absolute")
        for arm, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]
    found = {each.label: each for each in comparisons(sections(records)[0])}
    assert found["hsa - hsa-flat (absolute)"].paper_gain == 7.30 and found["hsa - hsa-flat (absolute)"].seeds_needed
    assert found["hkt - flat (absolute)"].paper_gain is None and found["hkt - flat (absolute)"].seeds_needed is None
    assert "+7.30" not in summary_table(records)


def test_trees_of_pictures_are_compared_with_a_flat_one_and_with_each_other():
    accuracies = {"hsa-flat": (0.2, 0.21), "hsa-line": (0.25, 0.24), "hsa-quadtree": (0.3, 0.31)}
    records = [
        record(arm, accuracy, seed=seed, task="cifar10", position_embedding_type="absolute")
        for arm, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]
    found = {each.label: each.gain for each in comparisons(sections(records)[0]) if each.gain is not None}
    expected = {"hsa-line - hsa-flat": 4.0, "hsa-quadtree - hsa-flat": 10.0, "hsa-quadtree - hsa-line": 6.0}
    assert found == pytest.approx({f"{label} (absolute)": mean for label, mean in expected.items()})


def test_the_order_of_files_does_not_matter(tmp_path):
    records = [
        *both_arms(),
        *both_arms(task="cifar10", position_embedding_type="absolute"),
        *both_arms(protocol="paper"),
        search("hkt", 0.5),
        search("hkt", 0.5, learning_rate=0.01),
        search("flat", 0.4, weight_decay=0.0),
    ]
    forth = read_records(write(tmp_path / "forth", records))
    back = read_records(write(tmp_path / "back", records, reverse=True))
    assert forth == back and len(forth) == len(records)
    assert markdown(forth) == markdown(back) == markdown(records[::-1])
    titles = re.findall(r"^## (.*)$", markdown(forth), flags=re.MULTILINE)
    assert titles == [
        "Gains",
        "ListOps, protocol cpu",
        "ListOps, protocol paper",
        "Sequential CIFAR-10, protocol cpu",
        "Hours",
    ]


def test_runs_are_paired_by_seed():
    """Seed 1 is missing in flat, seed 3 failed in hkt and seed 4 in flat: two pairs are left, and all is said."""
    records = [r for r in both_arms() if (r["arm"], r["seed"]) not in (("flat", 1), ("hkt", 3), ("flat", 4))]
    records.append(unfinished("hkt", "failed", "loss is nan", seed=3))
    records.append(unfinished("flat", "failed", "killed", seed=4))
    text = markdown(records)
    gain, *_, pairs, _, _ = row(part(text, "### Gains"), GAIN)
    assert pairs == "2" and gain == f"{100 * statistics.mean(HKT[i] - FLAT[i] for i in (0, 2)):+.2f}"
    assert "- Missing, so in no pair: seed 1 of flat (RoPE) (not run)." in text
    assert "- Missing, so in no pair: seed 3 of hkt (RoPE) (FAIL)." in text
    assert "- Missing, so in no pair: seed 4 of flat (RoPE) (FAIL)." in text
    assert row(summary_table(records), "ListOps", "cpu", GAIN)[-2] == "2"
    mean, *seeds = row(part(text, "### Accuracy"), "hkt", "RoPE")
    assert mean.endswith("(4 of 5)") and seeds[3] == "FAIL"
    assert "- hkt (RoPE), seed 3: FAIL (loss is nan)" in text


def test_few_or_equal_differences_have_no_interval():
    one = [r for r in both_arms() if r["seed"] == 2]
    assert row(part(markdown(one), "### Gains"), GAIN) == [
        "+6.00", "-", "-", "-", "-", "1", "+4.77", "-",
    ]  # fmt: skip
    equal = [record("flat", 0.5, 0), record("flat", 0.6, 1), record("hkt", 0.51, 0), record("hkt", 0.61, 1)]
    text = markdown(equal)
    assert row(part(text, "### Gains"), GAIN)[:2] == ["+1.00", "-"]
    assert f"{GAIN}: all differences are equal" in text
    none = markdown([record("hkt", 0.5), record("flat", 0.5, 1)])
    assert row(part(none, "### Gains"), GAIN)[0] == "no pairs"
    assert "No pair of runs" in summary_table([record("hkt", 0.5), record("flat", 0.5, 1)])


def test_what_did_not_run_is_written_out():
    reason = "ImportError: no mamba_ssm | <class 'x'>\n" + "again " * 99
    peer = {"position_embedding_type": None, "num_levels": None}
    text = markdown(
        [
            *both_arms(),
            unfinished("mamba", "not_available", reason, **peer),
            unfinished("fnet", "failed", "out of memory", **peer),
        ]
    )
    accuracy = part(text, "### Accuracy")
    assert row(accuracy, "fnet", "")[:2] == ["FAIL (out of memory)", "FAIL"]
    shown, seed, *_ = row(accuracy, "mamba", "")
    assert shown.startswith(r"NA (ImportError: no mamba\_ssm \| \<class 'x'\> again") and shown.endswith("...)")
    assert len(shown) < 200 and seed == "NA"
    header, *_ = accuracy.strip().splitlines()
    assert all(line.replace(r"\|", "").count("|") == header.count("|") for line in accuracy.strip().splitlines())


def test_the_strongest_flat_arm_is_chosen_by_validation():
    """The convolution is best on validation, the wide arm on test; neither HKT nor a pretrained arm is in the choice."""
    records = both_arms()
    for arm, validation, test in (
        ("flat-convolution", 0.54, 0.52),
        ("flat-wide-flops", 0.53, 0.56),
        ("flat-pretrained", 0.70, 0.70),
        ("fnet", 0.80, 0.80),
    ):
        records += [
            record(arm, test + HKT[seed] / 100, seed, validation_accuracy=validation, num_levels=None)
            for seed in range(5)
        ]
    (section,) = sections(records)
    assert strongest_flat(section).label == "flat-convolution (RoPE)"
    text = markdown(records)
    label = "hkt - flat-convolution (RoPE), the strongest flat arm"
    gain = 100 * (statistics.mean(HKT) - 0.52 - statistics.mean(HKT) / 100)
    assert row(part(text, "### Gains"), label)[0] == f"{gain:+.2f}"
    assert "(54.00%): flat-convolution (RoPE)." in text
    assert [line.split(" | ")[2] for line in summary_table(records).splitlines()[2:]] == ["hkt - flat (RoPE)", label]

    options = {"validation_accuracy": 0.9, "position_embedding_type": "absolute", "num_levels": None}
    bert = [record("bert", 0.51, seed, **options) for seed in range(3)]
    assert strongest_flat(sections([*records, *bert[:2]])[0]).label == "flat-convolution (RoPE)"
    (section,) = sections([*records, *bert])
    assert strongest_flat(section).label == "bert (absolute)"
    assert "hkt (RoPE) - bert (absolute), the strongest flat arm" in markdown([*records, *bert])
    flat = [record("flat", 0.5, validation_accuracy=0.95, position_embedding_type="rope", num_levels=1)]
    (section,) = sections([*records, *flat])
    labels = [item.label for item in comparisons(section) if item.is_main]
    assert labels == [GAIN]  # once


def test_the_strongest_hkt_arm_is_chosen_by_validation():
    """Of those with as many seeds; the arm that is best on test, and one that has three seeds, are not in the choice."""
    flat = [record("flat", value, seed) for seed, value in enumerate(FLAT)]
    records = [*flat, *(record("hkt", value, seed) for seed, value in enumerate(HKT))]
    short = "hkt - flat (RoPE), the strongest flat arm"
    assert [item.label for item in comparisons(sections(records)[0]) if item.is_main] == [short]
    for arm, validation, test, seeds in (
        ("hkt-kernel-4", 0.60, 0.56, 5),
        ("hkt-kernel-3", 0.59, 0.70, 5),
        ("hkt-levels-4", 0.80, 0.80, 3),
    ):
        records += [record(arm, test, seed, validation_accuracy=validation) for seed in range(seeds)]
    (section,) = sections(records)
    assert strongest_hkt(section).label == "hkt-kernel-4 (RoPE)"
    labels = [item.label for item in comparisons(section) if item.is_main]
    third = "hkt-kernel-3 - flat (RoPE)"  # all ablations of all seeds are compared with flat
    assert labels == [short, third, "hkt-kernel-4 - flat (RoPE), the strongest of both"]
    assert "so chosen (60.00%), of those with all seeds of hkt (RoPE): hkt-kernel-4 (RoPE)." in markdown(records)
    records += [record("flat-convolution", 0.52, seed, validation_accuracy=0.53) for seed in range(5)]
    labels = [item.label for item in comparisons(sections(records)[0]) if item.is_main]
    assert labels[2:] == [
        third,
        "hkt-kernel-4 - flat (RoPE), the strongest HKT arm",
        "hkt-kernel-4 - flat-convolution (RoPE), the strongest of both",
    ]
    records += [record("hkt-convolution", 0.7, seed, validation_accuracy=0.7) for seed in range(5)]
    labels = [item.label for item in comparisons(sections(records)[0]) if item.is_main]
    assert labels[2:] == [
        "hkt-convolution - flat-convolution (RoPE), the strongest of both",  # beside what has all but its levels
        third,
        "hkt-kernel-4 - flat (RoPE)",
    ]
    assert strongest_hkt(sections(flat)[0]) is None


def test_which_arms_are_compared():
    records = []
    for positions in ("absolute", "rope"):
        for arm in ("flat", "hkt", "flat-convolution", "hkt-levels-2", "hkt-pretrained", "flat-pretrained"):
            records.append(record(arm, 0.5, position_embedding_type=positions))
    records += [record("hkt-levels-10", 0.5), record("bert", 0.4, position_embedding_type="absolute")]
    records += [record(f"hkt-{name}", 0.5) for name in ("convolution", "post-norm", "post-norm-kernel-4")]
    records += [record("flat-post-norm-value-convolution", 0.4)]
    records += [record("mamba", 0.5, position_embedding_type=None)]
    (section,) = sections(records)
    assert [arm.label for arm in section.arms][-3:] == ["hkt-pretrained (RoPE)", "bert (absolute)", "mamba"]
    found = comparisons(section)
    assert [(item.treated.label, item.control.label) for item in found] == [
        ("hkt (absolute)", "flat (absolute)"),
        ("hkt (RoPE)", "flat (RoPE)"),
        ("hkt (RoPE)", "flat (absolute)"),  # the strongest: the first of equal ones
        ("hkt-convolution (RoPE)", "flat-convolution (RoPE)"),
        ("hkt-levels-2 (absolute)", "flat (absolute)"),
        ("hkt-levels-2 (RoPE)", "flat (RoPE)"),
        ("hkt-levels-10 (RoPE)", "flat (RoPE)"),
        ("hkt-post-norm (RoPE)", "flat-post-norm (RoPE)"),
        ("hkt-post-norm-kernel-4 (RoPE)", "flat-post-norm (RoPE)"),
        ("flat-convolution (absolute)", "flat (absolute)"),
        ("flat-convolution (RoPE)", "flat (RoPE)"),
        ("flat-post-norm-value-convolution (RoPE)", "flat (RoPE)"),
        ("flat-post-norm-value-convolution (RoPE)", "flat-post-norm (RoPE)"),
        ("bert (absolute)", "flat (absolute)"),
        ("hkt (absolute)", "flat-convolution (absolute)"),
        ("hkt (RoPE)", "flat-convolution (RoPE)"),
        ("hkt (RoPE)", "flat-post-norm-value-convolution (RoPE)"),
        ("hkt (absolute)", "bert (absolute)"),
        ("hkt-convolution (RoPE)", "hkt (RoPE)"),
        ("hkt-levels-2 (absolute)", "hkt (absolute)"),
        ("hkt-levels-2 (RoPE)", "hkt (RoPE)"),
        ("hkt-levels-10 (RoPE)", "hkt (RoPE)"),
        ("hkt-post-norm (RoPE)", "hkt (RoPE)"),
        ("hkt-post-norm-kernel-4 (RoPE)", "hkt-post-norm (RoPE)"),
        ("flat-pretrained (absolute)", "flat (absolute)"),
        ("flat-pretrained (RoPE)", "flat (RoPE)"),
        ("hkt-pretrained (absolute)", "hkt (absolute)"),
        ("hkt-pretrained (RoPE)", "hkt (RoPE)"),
        ("hkt-pretrained (absolute)", "flat-pretrained (absolute)"),
        ("hkt-pretrained (RoPE)", "flat-pretrained (RoPE)"),
    ]
    assert [item.is_papers for item in found] == [True] * 2 + [False] * 28


def test_the_search_and_the_hours():
    records = [
        *both_arms(),
        search("hkt", 0.50),
        search("hkt", 0.52, loss=1.25, learning_rate=0.003),
        search("hkt", 0.53, hidden_dropout=0.0),
        search("hkt", 0.60, weight_decay=0.1) | {"status": "failed", "reason": "nan", "validation_accuracy": None},
        record("hkt-pretrained", 0.6, 0, pretraining={"steps": 9, "seconds": 1800.0, "masked_accuracy": 0.3}),
        # The setting was searched on the same pretraining, which has a record of its own: its hours count once.
        search("hkt-pretrained", 0.6) | {"seed": 0, "pretraining": {"steps": 9, "seconds": 1800.0}},
        pretraining("hkt-pretrained", 1800.0),
    ]
    text = markdown(records)
    found = part(text, "### Search")
    assert row(found, "hkt", "RoPE") == [
        "4 (3 finished)",
        "lr 0.001, 0.003; dropout 0, 0.1; decay 0.01, 0.1",
        "-",
        "lr 0.003, dropout 0.1, decay 0.01",
        "1.2500",
        "52.00",
    ]
    assert "hkt (RoPE), seeds 0, 1, 2, 3, 4: the final runs have another setting, lr 0.001, dropout 0.1" in found
    assert "hkt (RoPE): lr 0.003 is the largest that was tried." in found
    assert "hkt-pretrained (RoPE), seed" not in found
    hours = part(text, "## Hours")  # pretraining, search, finalist, final, sum
    assert row(hours, "ListOps", "cpu") == ["0.50", f"{5 * 300 / 3600:.2f}", "0.00", f"{11 / 6:.2f}", "2.75", "17"]
    assert row(hours, "all", "")[-2:] == ["2.75", "17"]
    assert row(part(text, "### Cost"), "hkt-pretrained", "RoPE")[4] == "10.0 + 30.0"


def test_the_setting_of_the_lowest_loss_is_chosen():
    """As `hkt reproduce` chooses it: of the short runs, or where there are some, of the full ones."""
    records = [
        search("hkt", accuracy, loss, learning_rate=rate)
        for rate, loss, accuracy in ((0.001, 1.3, 0.6), (0.003, 1.1, 0.4), (0.01, 1.2, 0.5))
    ]
    (arm,) = sections(records)[0].arms
    assert arm.chosen == records[1]
    full = [finalist("hkt", 1.05, learning_rate=0.003), finalist("hkt", 0.9, learning_rate=0.001)]
    (arm,) = sections([*records, *full])[0].arms
    assert arm.chosen == full[1]
    found = part(markdown([*records, *full]), "### Search")
    assert row(found, "hkt", "RoPE")[2:] == [
        "lr 0.001, dropout 0.1, decay 0.01: 0.9000; lr 0.003, dropout 0.1, decay 0.01: 1.0500",
        "lr 0.001, dropout 0.1, decay 0.01",
        "0.9000",
        "55.00",
    ]
    assert "hkt (RoPE): lr 0.001 is the smallest that was tried." in found


def test_tokens_a_second_are_of_training_steps():
    text = markdown([record("hkt", 0.5, step_seconds=300.0), record("flat", 0.5)])
    assert row(part(text, "### Cost"), "hkt", "RoPE")[3:5] == ["5,000", "10.0"]
    assert row(part(text, "### Cost"), "flat", "RoPE")[3:5] == ["2,500", "10.0"]


def test_what_hkt_reproduce_writes_is_reported(tmp_path):
    """All stages, at tiny sizes."""
    words = [
        *("--model", '{"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}'),
        *(
            "--data.listops",
            '{"min_length": 4, "max_length": 8, "num_train": 32, "num_validation": 10, "num_test": 20}',
        ),
        *("--tokenizer.max_length", "8", "--training.max_steps", "2", "--training.eval_steps", "1"),
        *("--training.save_steps", "1", "--training.logging_steps", "1"),
        *("--search.training", "{max_steps: 1}", "--pretraining.training", "{max_steps: 1}"),
        *("--search.learning_rate", "[1e-3]", "--search.hidden_dropout", "[0.1]", "--search.weight_decay", "[0.01]"),
        *("--search.finalists", "1"),
    ]
    arms = ["flat-pretrained", "hkt", "hkt-levels-2"]
    sweep = Sweep(load_protocol("listops", "cpu", words, arms=arms, seeds=[0]), tmp_path, tmp_path / "runs", threads=1)
    for run in sweep.runs():
        execute(sweep.specification(run))
    records = read_records(sweep.results)
    assert {record["status"] for record in records} == {"finished"} and len(records) == 9
    text = markdown(records)
    (accuracy,) = {record["test_accuracy"] for record in records if record["arm"] == "hkt" and record["test_accuracy"]}
    assert row(part(text, "### Accuracy"), "hkt", "absolute") == [f"{100 * accuracy:.2f}"] * 2
    assert row(part(text, "### Gains"), "hkt-levels-2 - hkt (absolute)")[5] == "1"
    assert row(part(text, "### Search"), "flat-pretrained", "absolute")[0] == "1"
    assert "20 examples" in text and "listops_cpu_level_weights_hkt-absolute.png" in text


def test_the_command_writes_report_and_plots(tmp_path, capsys):
    peer = record("mamba", 0.4, position_embedding_type=None, num_levels=None, flops=None, memory=None)
    fixed = record("hkt-uniform-weights", 0.5)
    for entry in fixed["curve"]["validation"]:
        entry["level_weights"] = [[[1 / 3] * 3] * 2] * 2
    records = [
        *both_arms(),
        *both_arms(task="imdb", position_embedding_type="absolute"),
        peer,
        fixed,
        search("hkt", 0.5),
    ]
    write(tmp_path / "runs", records)
    assert main(["report", "--results", str(tmp_path / "runs"), "--output", str(tmp_path / "made" / "here")]) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "made" / "here" / "report.md").read_text(encoding="utf-8")
    assert text == markdown(records) and printed.startswith(summary_table(records))
    names = {path.name for path in (tmp_path / "made" / "here").iterdir()}
    assert names == {
        "report.md",
        "gains.png",
        *(f"{task}_cpu_{kind}.png" for task in ("listops", "imdb") for kind in ("cost", "curves")),
        "listops_cpu_level_weights_hkt-rope.png",
        "imdb_cpu_level_weights_hkt-absolute.png",
    }
    assert all(str(tmp_path / "made" / "here" / name) in printed for name in names)
    assert set(re.findall(r"\]\((.*?)\)", text)) == names - {"report.md"}
    for name in names - {"report.md"}:
        with Image.open(tmp_path / "made" / "here" / name) as picture:
            assert picture.size[0] > 300 and len(set(picture.convert("L").resize((200, 100)).tobytes())) > 5

    assert main(["report", "--results", str(tmp_path / "runs")]) == 0  # beside the records, and again
    assert main(["report", "--results", str(tmp_path / "runs")]) == 0
    assert (tmp_path / "runs" / "report.md").read_text(encoding="utf-8") == text


def test_level_weights_are_of_all_seeds():
    first, second = record("hkt", 0.5, 0), record("hkt", 0.5, 1)
    for entry, value in zip(second["curve"]["validation"], (0.0, 1.0), strict=True):
        entry["level_weights"] = [[[value] * 3] * 2] * 2
    second["curve"]["validation"].append(
        {"step": 300, "loss": 1.0, "accuracy": 0.5, "level_weights": [[[1.0] * 3] * 2] * 2}
    )
    (arm,) = sections([first, second])[0].arms
    steps, weights = arm.level_weights
    assert steps == [100, 200] and weights.shape == (2, 2, 2, 2, 3)
    np.testing.assert_allclose(weights[0, :, 0, 0], [[0.41, 0.35, 0.24], [0.42, 0.35, 0.23]])
    assert weights[1, 0].max() == 0 and weights[1, 1].min() == 1
    second["curve"]["validation"][0]["level_weights"] = [[[0.5, 0.5]]]
    (arm,) = sections([first, second])[0].arms
    with pytest.raises(ValueError, match=r"hkt \(RoPE\): `level_weights` must be \[layer\]\[head\]\[level\]"):
        _ = arm.level_weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("test_accuracy"), "0.json is no record of `hkt reproduce`: it lacks `test_accuracy`"),
        (
            lambda r: r.update(task="mnist"),
            "0.json: `task` must be one of listops, cifar10, imdb, imdb-words, got 'mnist'",
        ),
        (lambda r: r.update(seed="0"), "0.json: `seed` must be int, got '0'"),
        (lambda r: r.update(seed=True), "`seed` must be int, got 'True'"),
        (lambda r: r.update(status="done"), "`status` must be one of finished, failed, not_available"),
        (lambda r: r.update(test_accuracy=55.1), "`test_accuracy` must be between 0 and 1 for a finished final run"),
        (lambda r: r.update(test_accuracy=math.nan), "`test_accuracy` must be between 0 and 1"),
        (lambda r: r.update(test_accuracy=None), "`test_accuracy` must be between 0 and 1"),
        (lambda r: r.update(validation_accuracy=None), "`validation_accuracy` must be between 0 and 1"),
        (lambda r: r.update(stage="search"), "`test_accuracy` must be null but for a finished final run"),
        (lambda r: r.update(status="failed", test_accuracy=None), "`reason` must be a text for a run that is failed"),
        (lambda r: r.update(seconds=0), "`seconds` must be greater than 0 for a finished run, got '0'"),
        (lambda r: r.update(setting={"learning_rate": 1}), "`setting` must be numbers for `learning_rate`, "),
        (lambda r: r.update(setting=None), "`setting` must be numbers for `learning_rate`, "),
        (lambda r: r.update(stage="pretraining", test_accuracy=None), "`setting` must be null for pretraining"),
        (lambda r: r.pop("flops"), "0.json is no record of `hkt reproduce`: it lacks `flops`"),
        (lambda r: r.update(curve={"train": []}), "`curve` must be an object with the lists"),
    ],
)
def test_a_file_that_is_no_record_is_named(tmp_path, capsys, change, message):
    values = record()
    change(values)
    (tmp_path / "0.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(tmp_path, tmp_path)
    assert main(["report", "--results", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"hkt report: {tmp_path}/0.json")
    assert [path.name for path in tmp_path.iterdir()] == ["0.json"]


def test_what_else_is_refused(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path / "nowhere")]) == 1
    assert "nowhere is no folder" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="holds no record"):
        read_records(tmp_path)
    for content, message in (("[1]", "it holds list"), ("{", "is not JSON"), ("\xff", "is not JSON")):
        (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=message):
            read_records(tmp_path)
    (tmp_path / "a.json").unlink()

    write(tmp_path / "twice", [record(), record(setting=SETTING | {"learning_rate": 0.1})])  # a final run is its seed
    with pytest.raises(ValueError, match=r"a/000.json and .*b/001.json are records of the same run"):
        read_records(tmp_path / "twice")
    write(tmp_path / "tries", [search("hkt", 0.5), search("hkt", 0.6, learning_rate=0.1)])
    assert len(read_records(tmp_path / "tries")) == 2
    write(tmp_path / "splits", [record(), record("flat", num_test=1000)])
    with pytest.raises(ValueError, match=r"were tested on 2000 and 1000 examples"):
        read_records(tmp_path / "splits")


def block(text):
    """What README shows of the report; `None` if it has no place for it.

    Raises:
        ValueError: other than one pair of marks.
    """
    if BEGIN not in text and END not in text:
        return None
    (found,) = re.findall(rf"{BEGIN}\n(.*?){END}", text, flags=re.DOTALL)
    return found.strip()


def test_the_block_of_the_readme_is_found():
    assert block(f"before\n{BEGIN}\n| a |\n{END}\nafter") == "| a |" and block("nothing") is None
    assert block(f"{BEGIN}\n{END}\n") == ""
    for text in (BEGIN, f"{END}\n{BEGIN}", 2 * f"{BEGIN}\nx\n{END}\n"):
        with pytest.raises(ValueError, match="unpack"):
            block(text)


def test_the_readme_shows_the_gains_of_the_records():
    shown = block((ROOT / "README.md").read_text(encoding="utf-8"))
    if shown is None:
        pytest.skip("README has no block of `hkt report`")
    assert shown == summary_table(read_records(RESULTS))


def test_the_committed_report_is_that_of_the_records():
    if not (RESULTS / "report.md").exists():
        pytest.skip("no report of `hkt reproduce`")
    assert (RESULTS / "report.md").read_text(encoding="utf-8") == markdown(read_records(RESULTS))


def test_the_committed_records_are_of_the_models_that_the_protocols_ask_for():
    """Whatever the defaults of `HKTConfig` are by now: the protocols and the records name what decides a result."""
    chosen = ("hidden_dropout", "position_embedding_type", "intermediate_size")  # by the search, the name, and width
    checked = 0
    for run in read_records(RESULTS):
        found = run["config"]["model"]
        arm = parse_arm(run["arm"])[0]
        if run["stage"] != "final" or "checkpoint" in found or not arm.has_levels:
            continue
        wanted = {**load_protocol(run["task"], run["protocol"]).experiment["model"], **arm.fields}
        for name in chosen:
            found.pop(name, None)
            wanted.pop(name, None)
        assert found == wanted, run["arm"]
        checked += 1
    assert checked


def arms_of(results):
    """Runs of each arm by task and label, of a folder of records."""
    return {(section.task, arm.label): arm for section in sections(read_records(results)) for arm in section.arms}


def test_the_figures_of_other_settings_are_those_of_their_records():
    """What docs/experiments.md says of runs whose setting the search did not choose."""
    text = " ".join((ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").split())
    arms = arms_of(ROOT / "results" / "other_settings")
    labels = (("listops", "flat (absolute)"), ("listops", "hkt (absolute)"), ("listops", "flat (RoPE)"))
    flat, hkt, flat_rope, pixels = (
        arms.pop(key).mean("test_accuracy") for key in (*labels, ("cifar10", "hkt (absolute)"))
    )
    assert not arms
    assert f"give {flat:.2%} and {hkt:.2%}" in text and f"a gain of {100 * (hkt - flat):+.2f}" in text
    assert f"half of it, that of flat attention, has {pixels:.2%} (`results/other_settings`)" in text
    gain = 100 * (arms_of(RESULTS)["listops", "hkt (RoPE)"].mean("test_accuracy") - flat_rope)
    assert f"flat attention 1e-3 and {flat_rope:.2%}, and HKT a gain of {gain:+.2f}" in text


def test_the_figures_on_the_gain_are_those_of_the_records():
    """What docs/experiments.md says of the controls and ablations on ListOps, and of positions on CIFAR-10."""
    text = " ".join((ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").split())
    arms = arms_of(RESULTS)

    def accuracies(label, task="listops"):
        return {seed: 100 * run["test_accuracy"] for seed, run in arms[task, label].final.items()}

    def gain(treated, control, task="listops"):
        treated, control = accuracies(treated, task), accuracies(control, task)
        seeds = sorted(treated.keys() & control.keys())
        found = paired_difference([treated[seed] for seed in seeds], [control[seed] for seed in seeds])
        return f"{found['mean']:+.2f}", f"{found['low']:+.2f} to {found['high']:+.2f}", f"p {found['p_value']:.3f}"

    rope, interval, p_value = gain("hkt (RoPE)", "flat (RoPE)")
    assert f"{gain('hkt (absolute)', 'flat (absolute)')[0]} points with absolute positions, {rope} with rotary" in text
    assert f"(95% interval {interval}, {p_value})" in text
    convolution, interval, _ = gain("flat-convolution (RoPE)", "flat (RoPE)")
    assert f"is worth {convolution} ({interval})" in text
    kept, interval, p_value = gain("hkt (RoPE)", "flat-convolution (RoPE)")
    assert f"HKT keeps {kept} points ({interval}, {p_value}), {float(kept) / float(rope):.0%} of its gain" in text
    hkt, short, plain = (accuracies(f"{name} (RoPE)") for name in ("hkt", "flat-convolution", "flat"))
    rest = paired_difference([hkt[s] - short[s] for s in hkt], [short[s] - plain[s] for s in hkt])
    assert f"kept less explained: {rest['mean']:+.2f}, {rest['low']:+.2f} to {rest['high']:+.2f}" in text
    sizes = [statistics.mean(accuracies(f"flat-wide-{what} (absolute)").values()) for what in ("parameters", "flops")]
    assert {f"{accuracy:.1f}" for accuracy in sizes} == {"42.3"} and "or FLOPs have 42.3% each" in text
    wide = [gain("hkt (absolute)", f"flat-wide-{what} (absolute)") for what in ("parameters", "flops")]
    assert f"HKT is {wide[0][0][1:]} and {wide[1][0][1:]} points ahead of them ({wide[0][1]}, {wide[1][1]})" in text
    single = [accuracies(f"hkt-only-level-{level} (RoPE)") for level in (0, 1, 2)]
    uniform, seeds = accuracies("hkt-uniform-weights (RoPE)"), sorted(single[0])
    levels = [f"{statistics.mean(runs.values()):.2f}%" for runs in single]
    same = {name: statistics.mean(runs[seed] for seed in seeds) for name, runs in (("hkt", hkt), ("flat", plain))}
    shown = (
        f"gives {levels[0]}, {levels[1]} and {levels[2]}, close to what flat attention has ({same['flat']:.2f}% with"
    )
    assert f"{shown} the same seeds)" in text
    lost = [paired_difference([hkt[s] for s in seeds], [runs[s] for s in seeds]) for runs in single]
    assert "; ".join(f"{each['mean']:.2f}, {each['low']:+.2f} to {each['high']:+.2f}" for each in lost) in text
    found = paired_difference([uniform[s] for s in seeds], [hkt[s] for s in seeds])
    shown = f"give {statistics.mean(uniform.values()):.2f}%, trained ones {same['hkt']:.2f}% (difference {found['mean']:+.2f}, "
    assert f"{shown}{found['low']:+.2f} to {found['high']:+.2f})" in text
    names = ("flat", "hkt-levels-2", "hkt", "hkt-levels-4")
    by_levels = [[accuracies(f"{name} (RoPE)")[seed] for seed in (0, 1, 2)] for name in names]
    assert all(low < high for few, more in itertools.pairwise(by_levels) for low, high in zip(few, more, strict=True))
    one, two, three, four = (f"{statistics.mean(values):.2f}%" for values in by_levels)
    assert f"{one} with one, {two} with two, {three} with three and {four} with four" in text
    for more, few in itertools.pairwise(reversed(by_levels)):
        step = paired_difference(more, few)
        assert f"{step['mean']:+.2f} ({step['low']:+.2f} to {step['high']:+.2f}, p {step['p_value']:.3f})" in text
    taps, two_taps, flat_rope, locality = (
        f"{name} (RoPE)" for name in ("hkt-kernel-4", "hkt", "flat", "flat-convolution")
    )
    over_two, over_flat, over_locality = (gain(taps, control) for control in (two_taps, flat_rope, locality))
    assert all(
        accuracies(taps)[seed] > accuracies(label)[seed]
        for label in (two_taps, flat_rope, locality)
        for seed in range(5)
    )
    four = statistics.mean(accuracies(taps).values())
    assert f"HKT has {four:.2f}% (five seeds), {over_two[0]} over two taps ({over_two[1]}, {over_two[2]})" in text
    assert f"and {over_flat[0]} over flat attention ({over_flat[1]}, p < 0.001;" in text and over_flat[2] == "p 0.000"
    assert f"it is {over_locality[0]} ({over_locality[1]}, {over_locality[2]})" in text
    pixels = {name: accuracies(name, "cifar10") for name in (taps, two_taps, flat_rope)}
    assert all(pixels[taps][seed] > pixels[name][seed] for name in (two_taps, flat_rope) for seed in range(5))
    over_two, over_flat = (gain(taps, control, "cifar10") for control in (two_taps, flat_rope))
    four = statistics.mean(pixels[taps].values())
    assert f"four taps have {four:.2f}%, {over_two[0]} over two ({over_two[1]}, {over_two[2]})" in text
    assert f"and {over_flat[0]} over flat attention ({over_flat[1]}, p < 0.001;" in text and over_flat[2] == "p 0.001"
    three, of_two, of_four = (
        statistics.mean(accuracies(label)[seed] for seed in (0, 1, 2))
        for label in ("hkt-kernel-3 (RoPE)", two_taps, taps)
    )
    assert f"{three:.2f}% with three seeds, where two have {of_two:.2f}% and four {of_four:.2f}%" in text
    for name, shown in (
        ("shared-projections", "(one pair for all: "),
        ("untrained-mean", "(fixed to the mean: "),
        ("pool-cls", "first token in place of the mean ("),
        ("pool-last", "the last one ("),
        ("dense", "dense downsampling ("),
        ("convolution", "convolution on level 0 ("),
    ):
        difference, interval, _ = gain(f"hkt-{name} (RoPE)", two_taps)
        own = statistics.mean(accuracies(f"hkt-{name} (RoPE)").values())
        assert f"{shown}{own:.2f}%, {difference}, {interval})" in text
    absolute, (rope, interval, p_value) = (
        gain(f"hkt ({positions})", f"flat ({positions})", "cifar10") for positions in ("absolute", "RoPE")
    )
    ahead = [
        sum(run > accuracies(f"flat ({positions})", "cifar10")[seed] for seed, run in runs.items())
        for positions in ("absolute", "RoPE")
        for runs in [accuracies(f"hkt ({positions})", "cifar10")]
    ]
    assert ahead == [4, 5]
    assert f"HKT gains {absolute[0]} points with absolute positions, ahead with four seeds of five" in text
    assert f"and {rope} with rotary ones ({interval}, {p_value}), ahead with every seed" in text
    flat, without, both = (
        statistics.mean(accuracies(label, "cifar10").values())
        for label in ("flat (RoPE)", "hkt (absolute)", "hkt (RoPE)")
    )
    pixels, with_rope = accuracies("hkt (absolute)", "cifar10"), accuracies("flat (RoPE)", "cifar10")
    found = paired_difference(list(with_rope.values()), [pixels[seed] for seed in with_rope])
    shown = f"flat attention with them ({flat:.2f}%) is ahead of HKT without ({without:.2f}%; difference {found['mean']:+.2f}"
    assert f"{shown}, {found['low']:+.2f} to {found['high']:+.2f})" in text
    assert f"and HKT with them has {both:.2f}%" in text
    bert, post_norm, none = "bert", "flat-post-norm (absolute)", "flat-no-attention (absolute)"
    means = {name: statistics.mean(accuracies(name, "cifar10").values()) for name in (bert, post_norm, none)}
    over_flat, interval, _ = gain(bert, "flat (absolute)", "cifar10")
    assert f"has {means[bert]:.2f}% there, {over_flat[1:]} points more than our flat attention with the same" in text
    assert f"({interval}, five seeds), and {gain(bert, 'hkt (absolute)', 'cifar10')[0][1:]} more than HKT" in text
    over_flat, interval, _ = gain(post_norm, "flat (absolute)", "cifar10")
    assert f"has {means[post_norm]:.2f}%, {over_flat[1:]} points more than with norms before" in text
    assert f"({interval}). That is the strongest flat arm but one (below)" in text
    ahead, interval, p_value = gain("hkt (RoPE)", post_norm, "cifar10")
    assert f"ahead of HKT with rotary positions ({both:.2f}%, difference {ahead}, {interval}, {p_value})" in text
    assert "four taps (difference {}, {})".format(*gain(taps, post_norm, "cifar10")) in text
    norms = "hkt-post-norm (absolute)"
    (more, wide), (left, interval, p_value) = (
        gain(norms, "hkt (absolute)", "cifar10")[:2],
        gain(norms, post_norm, "cifar10"),
    )
    best = statistics.mean(accuracies(norms, "cifar10").values())
    assert f"`hkt-post-norm` has {best:.2f}%, {more[1:]} points more than" in text
    assert f"({wide}). Over flat attention with the same norms that is {left} ({interval}, {p_value}), ahead" in text
    rest = accuracies(post_norm, "cifar10")
    assert sum(run > rest[seed] for seed, run in accuracies(norms, "cifar10").items()) == 4
    assert f"({interval}, {p_value}), ahead with four seeds of five" in text
    both = "hkt-post-norm-kernel-4 (absolute)"
    best = statistics.mean(accuracies(both, "cifar10").values())
    assert f"With four taps, too, it has {best:.2f}%: " in text
    assert "{} over two taps ({}, {})".format(*gain(both, norms, "cifar10")) in text
    assert "and {} over flat attention with the same norms ({}, {})".format(*gain(both, post_norm, "cifar10")) in text
    assert all(run > rest[seed] for seed, run in accuracies(both, "cifar10").items())
    rotary = "flat-post-norm (RoPE)"
    rest = accuracies(rotary, "cifar10")
    added, interval, _ = gain(rotary, post_norm, "cifar10")
    assert f"with these norms ({statistics.mean(rest.values()):.2f}%, {added}, {interval})" in text
    assert "ahead of that arm, too: {} ({}, {}), with every seed".format(*gain(both, rotary, "cifar10")) in text
    assert all(run > rest[seed] for seed, run in accuracies(both, "cifar10").items())
    assert f"Without any attention {means[none]:.2f}% are right" in text
    over_none, interval, _ = gain("flat (absolute)", none, "cifar10")
    assert f"adds {over_none[1:]} points ({interval}), HKT's" in text
    over_none, interval, _ = gain("hkt (absolute)", none, "cifar10")
    assert f"HKT's {over_none[1:]} ({interval})" in text
    flat, levels = (gain(f"{name} (absolute)", none) for name in ("flat", "hkt"))
    shown = f"without any, {statistics.mean(accuracies(none).values()):.2f}% are right, and flat attention adds {flat[0][1:]}"
    assert f"{shown} points to that ({flat[1]}), HKT {levels[0][1:]} ({levels[1]})" in text
    flat, levels = (gain(f"{name} (absolute)", none, "imdb") for name in ("flat", "hkt"))
    assert (
        f"is worth {flat[0][1:]} points to flat attention ({flat[1]}) and {levels[0][1:]} to HKT ({levels[1]})" in text
    )
    assert f"without any attention {statistics.mean(accuracies(none, 'imdb').values()):.2f}% are right" in text
    found = accuracies("bert", "imdb")
    shown = f"has {statistics.mean(found.values()):.2f}% ({min(found.values()):.2f}% to {max(found.values()):.2f}%)"
    less, interval, _ = gain("bert", "flat (absolute)", "imdb")
    assert f"{shown}: {less[1:]} points less than flat attention ({interval})" in text and less[0] == "-"


def test_the_figures_on_long_convolutions_and_on_norms_are_those_of_the_records():
    """What docs/experiments.md says of a convolution of values on CIFAR-10 and of norms after the sums on ListOps."""
    text = " ".join((ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").split())
    arms, numbers = arms_of(RESULTS), {2: "two", 3: "three", 5: "five"}

    def accuracies(task, label):
        return {seed: 100 * run["test_accuracy"] for seed, run in sorted(arms[task, label].finished.items())}

    def mean(task, label):
        return f"{statistics.mean(accuracies(task, label).values()):.2f}%"

    def gain(task, treated, control):
        treated, control = accuracies(task, treated), accuracies(task, control)
        seeds = sorted(treated.keys() & control.keys())
        found = paired_difference([treated[seed] for seed in seeds], [control[seed] for seed in seeds])
        interval = f"{found['low']:+.2f} to {found['high']:+.2f}"
        return f"{found['mean']:+.2f}", interval, f"p {found['p_value']:.3f}", f"{numbers[len(seeds)]} seeds"

    norms, taps = "flat-post-norm (absolute)", "hkt-post-norm-kernel-4 (absolute)"
    flat, hkt = (f"{name}-value-convolution (absolute)" for name in ("flat-post-norm", "hkt-post-norm-kernel-4"))
    over, interval, p_value, seeds = gain("cifar10", flat, norms)
    assert f"has {mean('cifar10', flat)}, {over} over the same without ({interval}, {p_value}, {seeds})" in text
    over, interval, p_value, _ = gain("cifar10", taps, flat)
    assert (
        f"what HKT with four taps and the same norms is ahead of it is within the noise: {over} ({interval}, {p_value})"
        in text
    )
    assert over[0] == "+" and interval[0] == "-" and " to +" in interval
    added, over = gain("cifar10", hkt, taps), gain("cifar10", hkt, flat)
    most = "the most of our arms without pretraining"
    assert f"{mean('cifar10', hkt)} with both, {most}, {added[0]} over HKT without ({added[1]}, {added[3]})" in text
    ours = [arm for (task, _), arm in arms.items() if task == "cifar10" and arm.kind not in ("pretrained", "peer")]
    assert max((arm for arm in ours if arm.final), key=lambda arm: arm.mean("test_accuracy")).label == hkt
    assert f"{over[0]} over flat attention with it ({over[1]}, {over[2]}, ahead with four seeds of five)" in text
    both, control = (accuracies("cifar10", label) for label in (hkt, flat))
    assert sum(both[seed] > control[seed] for seed in both) == 4
    (section,) = sections(
        [run for run in read_records(RESULTS) if (run["task"], run["protocol"]) == ("cifar10", "cpu")]
    )
    assert strongest_flat(section).label == flat and "It is the strongest flat arm, and what HKT" in text
    assert f"with the same norms (above) has {accuracies('cifar10', flat)[0]:.2f}% with that seed" in text

    norms = "flat-post-norm (RoPE)"
    added, interval, p_value, seeds = gain("listops", norms, "flat (RoPE)")
    assert f"has {mean('listops', norms)} with them, {added} ({interval}, {p_value}, {seeds})" in text
    two, four = (gain("listops", f"{name} (RoPE)", norms) for name in ("hkt", "hkt-kernel-4"))
    assert (
        f"by {two[0][1:]} with two taps ({two[1]}, {two[2]}) and {four[0][1:]} with four ({four[1]}, {four[2]})"
        in text
    )
    hkt = "hkt-post-norm (RoPE)"
    without, over = gain("listops", hkt, "hkt (RoPE)"), gain("listops", hkt, norms)
    found = f"{mean('listops', hkt)}, {without[0]} over HKT without ({without[1]}, {without[3]})"
    assert f"{found} and {over[0]} over flat attention with them ({over[1]}, {over[2]})" in text
    bert = "bert"
    over, ahead = gain("listops", bert, "flat (absolute)"), gain("listops", "hkt (absolute)", bert)
    assert f"has {mean('listops', bert)}: {over[0]} over flat attention with the same positions ({over[1]})" in text
    assert f"HKT with them is {ahead[0]} ahead of it ({ahead[1]}, {ahead[2]})" in text


def test_the_figures_on_peers_are_those_of_the_records():
    """What docs/experiments.md says of other architectures on CIFAR-10."""
    text = " ".join((ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").split())
    text = text.partition("Other architectures on CIFAR-10")[2]
    arms = {label: arm for (task, label), arm in arms_of(RESULTS).items() if task == "cifar10"}
    names = ("fnet", "big_bird", "modernbert", "h-transformer-1d", "nystromformer", "bert")
    fnet, big_bird, modernbert, h_transformer, nystromformer, bert = (
        arms[name].mean("test_accuracy") for name in names
    )
    shown = f"FNet has {fnet:.2%}, BigBird, whose attention is full at this length, {big_bird:.2%}, BERT {bert:.2%} (five seeds)"
    assert (
        f"{shown}, ModernBERT {modernbert:.2%}, H-Transformer-1D (its own package) {h_transformer:.2%}, and Nyströmformer {nystromformer:.2%}. "
        in text
    )
    assert [len(arms[name].finished) for name in names] == [1, 1, 1, 1, 1, 5]
    for name, shown in (
        (
            "hkt-post-norm-kernel-4",
            "({mean:.2%}) and with that seed ({first:.2%}), if less than its best seed ({best:.2%})",
        ),
        ("hkt-post-norm-kernel-4-value-convolution", "({mean:.2%} and {first:.2%}, at best {best:.2%})"),
    ):
        hkt = arms[f"{name} (absolute)"]
        first, *others = (hkt.finished[seed]["test_accuracy"] for seed in range(5))
        best, mean = max(first, *others), hkt.mean("test_accuracy")
        assert shown.format(mean=mean, first=first, best=best) in text
        assert best > nystromformer > max(first, mean)
        assert min(first, *others) > max(fnet, big_bird, modernbert, h_transformer, bert)
    other_norms = arms["hkt-kernel-4 (RoPE)"].mean("test_accuracy")
    assert other_norms < h_transformer and f"with norms before each layer ({other_norms:.2%} with four taps)" in text
    (mamba,) = arms["mamba"].final.values()
    assert mamba["status"] == "not_available" and "at 5.4 s a step" in mamba["reason"]
    protocol = load_protocol("cifar10", "cpu")
    assert protocol.max_run_hours * 3600 / protocol.experiment["training"]["max_steps"] == 3


def test_the_evidence_for_defaults_is_that_of_the_records():
    """What the docstring of `HKTConfig` says of levels, taps and positions."""
    text = " ".join(HKTConfig.__doc__.split())
    arms = arms_of(RESULTS)
    names = ("flat", "hkt-levels-2", "hkt", "hkt-levels-4")
    one, two, three, four = (
        statistics.mean(100 * arms["listops", f"{name} (RoPE)"].final[seed]["test_accuracy"] for seed in (0, 1, 2))
        for name in names
    )
    assert f"{one:.1f}, {two:.1f}, {three:.1f} and {four:.1f}% with one to four, means of three seeds" in text
    post, pre = (
        100 * arms["cifar10", f"{name} (absolute)"].mean("test_accuracy") for name in ("hkt-post-norm", "hkt")
    )
    assert f"is better on CIFAR-10, {post:.1f}% against {pre:.1f}%, means of five seeds" in text
    post, pre = (100 * arms["listops", f"{name} (RoPE)"].mean("test_accuracy") for name in ("flat-post-norm", "flat"))
    assert f"it changes little without levels, {post:.1f}% against {pre:.1f}%" in text
    two, three, four, shared = (
        statistics.mean(100 * arms["listops", f"{name} (RoPE)"].final[seed]["test_accuracy"] for seed in (0, 1, 2))
        for name in ("hkt", "hkt-kernel-3", "hkt-kernel-4", "hkt-shared-projections")
    )
    assert f"{two:.1f}, {three:.1f} and {four:.1f}% with two, three and four, means of three seeds" in text
    assert max(two, three, four) == four and HKTConfig().downsample_kernel_size == 4
    post, pre = (arms["cifar10", f"{name} (absolute)"].mean("test_accuracy") for name in ("hkt-post-norm", "hkt"))
    assert f'`"post"` is better on CIFAR-10, {post:.1%} against {100 * pre:.1f}%, means of five seeds' in text
    pixels = [arms["cifar10", f"{name} (RoPE)"].mean("test_accuracy") for name in ("hkt", "hkt-kernel-4")]
    assert f"{100 * pixels[0]:.1f} and {pixels[1]:.1%} with two and four, of five" in text
    assert f"one for all has {shared:.1f}%, one pair a level {two:.1f}% (three seeds, a difference within the" in text
    first, last = (arms["listops", f"hkt-pool-{name} (RoPE)"].mean("test_accuracy") for name in ("cls", "last"))
    shown = f"the mean has {two:.1f}%, the first token {first:.1%} and the last one {last:.1%} (three seeds, differences within"
    assert shown in text
    dense = arms["listops", "hkt-dense (RoPE)"].mean("test_accuracy")
    assert f"with two taps, the first has {two:.1f}%, the second {dense:.1%} (three seeds, a difference within" in text
    rope, absolute, rope_pixels, absolute_pixels = (
        f"{arms[task, f'hkt ({positions})'].mean('test_accuracy'):.1%}"
        for task in ("listops", "cifar10")
        for positions in ("RoPE", "absolute")
    )
    assert f"{rope} against {absolute} on ListOps, {rope_pixels} against {absolute_pixels} on CIFAR-10" in text


def test_the_figures_on_hsa_are_those_of_the_records():
    """What docs/hsa.md and docs/experiments.md say of HSA from scratch."""
    texts = [
        " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split()) for name in ("hsa.md", "experiments.md")
    ]
    arms = arms_of(RESULTS)
    hsa, flat = (arms["imdb-words", f"{name} (absolute)"] for name in ("hsa", "hsa-flat"))
    runs = [[100 * arm.finished[seed]["test_accuracy"] for seed in (0, 1, 2)] for arm in (hsa, flat)]
    shown = [f"{first:.2f}, {second:.2f} and {third:.2f}%" for first, second, third in runs]
    assert f"paragraphs has {shown[0]}, the same layers on a flat tree {shown[1]}" in texts[0]
    assert all(mine > other for mine, other in zip(*runs, strict=True))
    found = paired_difference(*runs)
    gain, interval = f"{found['mean']:+.2f} points", f"{found['low']:+.2f} to {found['high']:+.2f}"
    assert f"{gain} ({interval}, p {found['p_value']:.3f}), ahead with every seed" in texts[0]
    assert (
        f"{gain} over the same layers on a flat tree ({interval}, p {found['p_value']:.3f}, three seeds)" in texts[1]
    )
    paper = PAPER_RESULTS["imdb-words"]
    assert f"the paper reports {paper.gain:+.2f}, with a flat arm of {paper.flat:.2f}%" in texts[0]
    ratio = flat.tokens_per_second / hsa.tokens_per_second
    assert f"takes {ratio:.1f} times as long" in texts[0]
    pixels = {
        name: [100 * arms["cifar10", f"{name} (absolute)"].finished[seed]["test_accuracy"] for seed in (0, 1, 2)]
        for name in ("hsa-flat", "hsa-line", "hsa-quadtree")
    }
    flat, line, quadtree = (f"{statistics.mean(accuracies):.2f}%" for accuracies in pixels.values())
    line_gain, quadtree_gain, between = (
        f"{found['mean']:+.2f}{{}}, {found['low']:+.2f} to {found['high']:+.2f}"
        for found in (
            paired_difference(pixels[one], pixels[other])
            for one, other in (
                *(("hsa-line", "hsa-flat"), ("hsa-quadtree", "hsa-flat")),
                ("hsa-quadtree", "hsa-line"),
            )
        )
    )
    assert f"have {flat} on a flat tree, {line} in groups of 4" in texts[0]
    assert f"of pixels ({line_gain.format(' points')}) and {quadtree} along a quadtree" in texts[0]
    assert f"({quadtree_gain.format('')}; over the line {between.format('')}): no tree" in texts[0]
    assert f"line of pixels ({line_gain.format('')}) nor a quadtree ({quadtree_gain.format('')})" in texts[1]
    assert f"ahead of the flat tree ({flat}, three seeds)" in texts[1]


def test_the_figures_on_pretraining_are_those_of_the_records():
    """What docs/experiments.md says of IMDB and CIFAR-10 after masked LM on their own training inputs."""
    text = " ".join((ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").split())
    arms = arms_of(RESULTS)
    runs = {name: arms["imdb", f"{name}-pretrained (RoPE)"].finished for name in ("flat", "hkt")}
    assert runs["flat"].keys() == runs["hkt"].keys() == {0, 1, 2}
    accuracies = {name: [100 * runs[name][seed]["test_accuracy"] for seed in (0, 1, 2)] for name in runs}
    flat, hkt = (f"{statistics.mean(accuracies[name]):.2f}%" for name in ("flat", "hkt"))
    scratch = [f"{arms['imdb', f'{name} (absolute)'].mean('test_accuracy'):.2%}" for name in ("flat", "hkt")]
    assert (
        f"flat attention {flat} and HKT {hkt} (from scratch, absolute positions: {scratch[0]} and {scratch[1]})"
        in text
    )
    found = paired_difference(accuracies["hkt"], accuracies["flat"])
    assert f"is {found['mean']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f}, p {found['p_value']:.3f})" in text
    welch = stats.ttest_ind(accuracies["hkt"], accuracies["flat"], equal_var=False)
    interval = welch.confidence_interval()
    assert f"gives {interval.low:+.2f} to {interval.high:+.2f}, p {welch.pvalue:.3f}" in text
    pixels = {name: arms["cifar10", f"{name}-pretrained (RoPE)"].finished for name in ("flat", "hkt")}
    assert pixels["flat"].keys() == pixels["hkt"].keys() == {0, 1, 2}
    of_pixels = {name: [100 * pixels[name][seed]["test_accuracy"] for seed in (0, 1, 2)] for name in pixels}
    flat, hkt = (f"{statistics.mean(of_pixels[name]):.2f}%" for name in ("flat", "hkt"))
    scratch = [f"{arms['cifar10', f'{name} (RoPE)'].mean('test_accuracy'):.2%}" for name in ("flat", "hkt")]
    assert (
        f"give flat attention {flat} and HKT {hkt} (from scratch: {scratch[0]} and {scratch[1]}, five seeds)" in text
    )
    found = paired_difference(of_pixels["hkt"], of_pixels["flat"])
    assert (
        f"gain is {found['mean']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f}, p {found['p_value']:.3f})" in text
    )
    for name, shown in (("flat", "of the masked pixels right with flat attention"), ("hkt", "with HKT")):
        masked = sorted(run["pretraining"]["masked_accuracy"] for run in pixels[name].values())
        assert f"{masked[0]:.1%} to {masked[-1]:.1%} {shown}" in text
    for name, shown in (("flat", "of the masked bytes right with flat attention"), ("hkt", "with HKT")):
        masked = sorted(run["pretraining"]["masked_accuracy"] for run in runs[name].values())
        assert f"{masked[0]:.1%} to {masked[-1]:.1%} {shown}" in text
        seconds = statistics.mean(run["seconds"] + run["pretraining"]["seconds"] for run in runs[name].values())
        assert f"{seconds / 60:.0f} {'minutes of a core with flat' if name == 'flat' else 'with HKT'}" in text
