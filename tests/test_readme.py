"""The code of the README and of `docs/` runs and prints what it says; tables are those that `results/` holds."""

import contextlib
import inspect
import io
import json
import re
from pathlib import Path
from statistics import mean

import pytest

from hkt_hf.config import load_experiment
from hkt_hf.experiments.statistics import paired_difference
from hkt_hf.hsa import inject
from hkt_hf.training import train


ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "docs/theory.md", "docs/hsa.md"])
def test_python_snippets_print_what_they_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```(python|text)\n(.*?)```", text, flags=re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "text"] * (len(blocks) // 2)
    namespace: dict = {}
    for (_, code), (_, expected) in zip(blocks[::2], blocks[1::2], strict=True):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec"), namespace)
        lines = printed.getvalue().strip().splitlines()
        wanted = expected.strip().splitlines()
        assert lines[-len(wanted) :] == wanted


def test_the_yaml_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    Path("reviews.yaml").write_text(text)
    rows = [f"a film of {i} minutes,{i % 5 + 1}" for i in range(60)]
    Path("reviews.csv").write_text("\n".join(["review,stars", *rows]) + "\n")
    overrides = ["--model.hidden_size", "16", "--model.intermediate_size", "16", "--training.disable_tqdm", "true"]
    report = train(load_experiment("reviews.yaml", overrides))
    assert report["steps"] == 6 and set(report["test"]) == {"loss", "accuracy"}


def test_the_quickstart_table_is_the_measured_one():
    result = json.loads((ROOT / "results" / "quickstart.json").read_text(encoding="utf-8"))
    assert f"| majority class | | | {result['majority']:.1%} |" in README
    for arm, name in (("flat", "flat attention"), ("hkt", "HKT, 3 levels")):
        row = f"| {name} | {result['parameters'][arm]:,} | {result['seconds'][arm]:.0f} | {result[arm]:.1%} |"
        assert row in README
    assert result["hkt"] >= result["majority"] + 0.10


def test_the_pretraining_figures_are_the_measured_ones():
    result = json.loads((ROOT / "results" / "pretrain_then_finetune.json").read_text(encoding="utf-8"))
    steps = (
        "1,000 steps of masked LM, then 1,000 of classification",
        "2,000 steps of classification (the same steps and tokens)",
        "1,000 steps of classification",
    )
    for arm, name in zip(("pretrained", "scratch", "short"), steps, strict=True):
        (row,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", README, flags=re.MULTILINE)
        shown = [float(value.rstrip("%")) for value in row.split(", ")]
        assert shown == pytest.approx([100 * accuracy for accuracy in result["test_accuracy"][arm]], abs=0.051)
        rates = [float(rate) for rate in result["search"][arm]]
        assert len(rates) == 5 and min(rates) < result["learning_rate"][arm] < max(rates)
    flat = " ".join(README.split())
    for control, text in (
        ("scratch", "loses 4.6 points (paired t over three seeds, 95% interval -6.4 to -2.7)"),
        ("short", "(-1.0, -2.3 to +0.3)"),
    ):
        assert text in flat
        difference = [100 * result["difference"][control][key] for key in ("mean", "low", "high")]
        shown = {"scratch": [-4.6, -6.4, -2.7], "short": [-1.0, -2.3, 0.3]}[control]
        assert difference == pytest.approx(shown, abs=0.051)
    assert {round(measured["perplexity"], 1) for measured in result["masked_lm"]} == {7.6}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def rows_of(text, first):
    """The cells of the table rows whose first cell is `first`."""
    return [row.split(" | ") for row in re.findall(rf"^\| {re.escape(first)} \| (.*) \|$", text, flags=re.MULTILINE)]


def test_the_figures_on_speed_are_the_measured_ones():
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")

    def entries(name, **wanted):
        rows = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        (row,) = [row for row in rows if wanted.items() <= row["configuration"].items()]
        return row["entries"]

    sizes = [(8, length, 64, False) for length in (512, 1024, 2048, 4096, 8192)]
    for heads, length, width, is_causal in [*sizes, (8, 2048, 32, False), (16, 1024, 16, False), (8, 2048, 64, True)]:
        size = {"batch_heads": heads, "length": length, "width": width, "is_causal": is_causal}
        both = [entries("benchmark_operators", mode=mode, **size) for mode in ("forward", "forward_backward")]
        expected = [f"{entry[name]['ratio']:.2f}" for entry in both for name in ("lifted", "polyphase")]
        assert expected in rows_of(text, f"{heads}, {length:,}, {width}{', causal' * is_causal}")
    for heads, length, width in ((8, 2048, 64), (8, 2048, 32), (16, 1024, 16)):
        size = {"batch_heads": heads, "length": length, "width": width, "mode": "forward_backward"}
        one = entries("benchmark_one_level", **size)["polyphase"]["ratio"]
        three = entries("benchmark_operators", is_causal=False, **size)["polyphase"]["ratio"]
        assert [f"{one:.2f}", f"{three:.2f}", f"{three / one:.2f}"] in rows_of(text, f"{heads}, {length:,}, {width}")
    choices = json.loads((ROOT / "results" / "cpu_choices.json").read_text(encoding="utf-8"))["rows"]
    slow = [f"{row['ratios']['without_onednn']:.2f}" for row in choices]
    assert f"take {slow[0]}, {slow[1]} and {slow[2]} times as long" in " ".join(text.split())
    (names,) = rows_of(text, "T")
    for length in (512, 1024, 2048, 4096, 8192):
        measured = entries("benchmark_models", mode="train_step", batch_size=1, length=length)
        ((_, *ratios),) = rows_of(text, f"{length:,}")
        expected = [f"{measured[name]['ratio']:.2f}" if name in measured else "not run" for name in names[1:]]
        assert ratios == expected
    taps = json.loads((ROOT / "results" / "taps.json").read_text(encoding="utf-8"))["rows"]
    assert [row["length"] for row in taps] == [512, 1024, 2048, 4096]
    *some, last = (f"{row['four_taps']['paired_ratio']:.2f}" for row in taps)
    assert f"{', '.join(some)} and {last} times as long at T = 512, 1,024, 2,048 and 4,096" in " ".join(text.split())
    *some, last = (f"{1 / row['flat']['paired_ratio']:.2f}" for row in taps)
    assert f"two taps took {', '.join(some)} and {last} times as long as flat" in " ".join(text.split())
    models = json.loads((ROOT / "results" / "training_step.json").read_text(encoding="utf-8"))["models"]
    (step,) = rows_of(text, "whole step, not profiled")
    assert step == [f"{1e3 * model['seconds']:.0f} ({model['ratio']:.2f}x)" for model in models.values()]


def test_the_figures_on_the_speed_of_hsa_are_the_measured_ones():
    text = (ROOT / "docs" / "hsa.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "results" / "hsa_speed.json").read_text(encoding="utf-8"))["rows"]
    measured = {(row["length"], row["mode"]): row["operators"] for row in rows}
    for length in (512, 2048, 8192, 32768):
        shown = [
            f"{measured[length, mode][name]['speedup']:.1f}"
            for mode in ("forward", "forward_backward")
            for name in ("hsa", "hsa-windows", "hsa-text")
        ]
        assert shown in rows_of(text, f"{length:,}")
    long = measured[131_072, "forward"]
    seconds, memory = ({name: long[name][key] for name in long} for key in ("seconds", "peak_bytes"))
    shown = (
        f"they take {seconds['hsa-windows']:.1f} s and {memory['hsa-windows'] / 1e9:.2f} GB, groups {seconds['hsa']:.2f} s and "
        f"{memory['hsa'] / 1e9:.2f} GB"
    )
    assert shown in " ".join(text.split())
    million = measured[1_000_000, "forward"]["hsa"]
    shown = f"forward in {million['seconds']:.1f} s with {million['peak_bytes'] / 1e9:.2f} GB"
    assert shown in " ".join(text.split())
    for length, mode, name, least in (
        (2048, "forward", "hsa", 8),
        (8192, "forward", "hsa", 35),
        (32768, "forward", "hsa", 80),
        (8192, "forward_backward", "hsa", 40),
        (8192, "forward", "hsa-text", 10),
    ):
        assert measured[length, mode][name]["speedup"] >= least


def test_the_figures_on_the_speed_of_injected_encoders_are_the_measured_ones():
    text = (ROOT / "docs" / "hsa.md").read_text(encoding="utf-8")
    injected = [
        *("three_layers_groups_of_4", "three_layers_windows_of_16"),
        *("all_layers_groups_of_4", "all_layers_groups_of_16", "all_layers_windows_of_16"),
    ]
    rows = json.loads((ROOT / "results" / "hsa_injection.json").read_text(encoding="utf-8"))["rows"]
    assert [row["length"] for row in rows] == [256, 512, 1024, 2048, 4096, 8192]
    for row in rows:
        shown = [f"{1 / row[name]['paired_ratio']:.2f}" for name in injected]
        assert [*shown, f"{row['own_attention']['seconds']['median']:.2f}"] in rows_of(text, f"{row['length']:,}")


def test_the_figures_on_two_modalities_are_the_measured_ones():
    text = " ".join((ROOT / "docs" / "hsa.md").read_text(encoding="utf-8").split())
    result = json.loads((ROOT / "results" / "hsa_two_modalities.json").read_text(encoding="utf-8"))
    finals = {
        arm: [row["accuracy"] for row in result["rows"] if (row["arm"], row["stage"]) == (arm, "final")]
        for arm in result["protocol"]["arms"]
    }
    assert all(len(accuracies) == 3 for accuracies in finals.values())
    means = {arm: f"{mean(accuracies):.1%}" for arm, accuracies in finals.items()}
    gains = {
        arm: f"{found['mean']:+.2f}{{}}, {found['low']:+.2f} to {found['high']:+.2f}"
        for arm, found in result["differences"].items()
    }
    assert f"without them {means['picture']} name the right one of ten" in text
    assert f"All tokens under the root have {means['flat']}; with" in text
    assert f"two children it is {means['modalities']} ({gains['modalities'].format(' points')})" in text
    line = result["differences"]["line"]
    assert (
        f"along the line {means['line']} ({gains['line'].format('')}, p {line['p_value']:.3f}, not corrected" in text
    )
    assert f"in a quadtree {means['quadtree']} ({gains['quadtree'].format('')})" in text
    protocol = result["protocol"]
    assert f"{protocol['steps']:,} steps of {protocol['batch_size']}, three seeds" in text


THEORY_ROWS = (
    "level weights, all layers and heads",
    "entropy of the combined attention, layers 0 and 1 (1: even)",
    "bilinear forms that meet the condition of Prop. 3.1",
    "their negative eigenvalues",
    "negative eigenvalues of the combined scores, symmetric part",
    "directional ratio of the combined scores, layers 0 and 1",
    "KL of keeping one level, two levels, nats",
    "of it the Gaussian term",
    "the bound of it",
    "Mardia's kurtosis of queries by a Gaussian's, layers 0 and 1",
)


def test_the_figures_on_injection_are_the_measured_ones():
    text = " ".join((ROOT / "docs" / "hsa.md").read_text(encoding="utf-8").split())
    result = json.loads((ROOT / "results" / "hsa_zero_shot_sst2.json").read_text(encoding="utf-8"))
    rows = {(tuple(row["layers"]), str(row["tree"])): row for row in result["rows"] if row["root_tokens"]}
    without = {(tuple(row["layers"]), str(row["tree"])): row for row in result["rows"] if not row["root_tokens"]}
    own, all_layers = without[(), "None"], tuple(range(6))

    def percent(row):
        return f"{100 * row['accuracy']:.2f}%"

    def loss(layers, tree, rows=rows):
        found = rows[layers, tree]["difference"]
        return f"{-found['mean']:.2f}", f"{-found['high']:.2f} to {-found['low']:.2f}"

    assert (
        f"SST-2 to {percent(own)} ({own['mean_length']:.0f} tokens on average, at most 64; {own['examples']} sent"
        in text
    )
    deep = rows[all_layers, "4"]
    lost, interval = loss(all_layers, "4")
    saved = f"{100 * deep['saved_in_replaced_layers']:.0f}%"
    assert (
        f"in all layers save {saved} of the operations of attention and lose {lost} points (95% interval {interval})"
        in text
    )
    assert "last three layers {} ({})".format(*loss((3, 4, 5), "4")) in text
    assert f"in the last two none ({percent(rows[(4, 5), '4'])})" in text and loss((4, 5), "4")[0].startswith("-")
    assert all(rows[(5,), tree]["difference"]["mean"] == 0 for tree in ("4", "[8, None]", "[16, None]"))
    chosen = [auto for auto in result["auto"] if auto["budget"] == 0.25]
    assert {len(auto["layers"]) for auto in chosen} == {1, 2, 4} and len(chosen) == 3
    changes = [rows[tuple(auto["layers"]), str(auto["tree"])]["difference"] for auto in chosen]
    assert -0.3 < min(change["mean"] for change in changes)
    assert f"by {max(c['mean'] for c in changes):+.2f} to {min(c['mean'] for c in changes):+.2f} points" in text
    assert all(change["mean"] > 0 or change["p_value"] > 0.1 for change in changes)
    assert next(auto for auto in result["auto"] if (auto["budget"], auto["tree"]) == (0.5, [16, None]))["layers"] == [
        *all_layers
    ]
    assert "lose {} ({})".format(*loss(all_layers, "[16, None]")) in text
    deep, _, wide = (gap["by_layer"] for gap in result["gaps"])
    assert f"add up to {sum(wide):.2f}, less than the first layer alone" in text and sum(wide) < deep[0]
    lost = [loss((3, 4, 5), "4", each)[0] for each in (without, rows)]
    assert f"it hardly matters ({lost[0]} and {lost[1]})" in text
    assert f"takes {1000 * own['seconds']:.1f} ms a sentence on one thread of a busy machine" in text
    assert "all others {:.1f} to {:.1f}".format(*shortest_and_longest(result["rows"])) in text
    default = inspect.signature(inject).parameters["budget"].default
    assert default == 0.25 and f"The default budget, {default} nats" in text


def shortest_and_longest(rows):
    """Milliseconds a text of injected models."""
    times = [1000 * row["seconds"] for row in rows if row["tree"] is not None]
    return min(times), max(times)


def test_the_figures_on_long_texts_are_the_measured_ones():
    text = " ".join((ROOT / "docs" / "hsa.md").read_text(encoding="utf-8").split())
    result = json.loads((ROOT / "results" / "hsa_zero_shot_imdb.json").read_text(encoding="utf-8"))
    rows = [row for row in result["rows"] if row["length"] == 512]
    short = [row for row in result["rows"] if row["length"] == 256]

    def found(layers, tree, exact=True, root=True, rows=rows, steps=0):
        wanted = layers, tree, exact, root, steps
        return next(
            row
            for row in rows
            if (
                *(row["layers"], row["tree"], bool(row["exact_tokens"]), bool(row["root_tokens"])),
                row["further_steps"],
            )
            == wanted
        )

    def loss(*case, **options):
        difference = found(*case, **options)["difference"]
        interval = f"{-difference['high']:.1f} to {-difference['low']:.1f}"
        return f"{0.0 - difference['mean']:.1f} ({interval})"

    own, best = found([], None, False, False), found([0, 4, 5], 4)
    assert f"IMDB to {100 * own['accuracy']:.1f}% (reviews of at most 512 tokens, {own['mean_length']:.0f} on" in text
    assert f"{own['examples'] // 1000},000 test reviews" in text
    saved = best["saved_in_replaced_layers"]
    lost, interval = loss([0, 4, 5], 4).split(" ", 1)
    assert f"save {saved:.2%} of the operations of attention there and lose {lost} points (95% interval" in text
    assert f"lose {lost} points (95% interval {interval[1:]}, in layers 0 and 5 {loss([0, 5], 4)}" in text
    last = {count: loss(list(range(6 - count, 6)), 4) for count in (2, 3, 6)}
    windows = loss([*range(6)], [16, None])
    defaults = [row for row in rows if row["exact_tokens"] and row["root_tokens"]]
    three = [row["layers"] for row in defaults if row["tree"] == 4 and len(row["layers"]) == 3]
    assert three == [[0, 4, 5], [3, 4, 5], [1, 3, 5]]
    other = f"the other choice of three {loss([1, 3, 5], 4).split()[0]}"
    shown = f"in the last two it is {last[2].split()[0]}, in the last three {last[3]}, {other}, in all six {last[6]}, or {windows}"
    assert f"{shown} with windows of 16" in text
    gaps = [gap for each in result["gaps"] if each["length"] == 512 for gap in each["by_layer"]]
    assert f"the smallest gap is {min(gaps):.2f}" in text
    assert not any(auto["layers"] for auto in result["auto"] if auto["budget"] == 0.25)
    without = loss([3, 4, 5], 4, root=False).split()[0]
    assert f"last three layers lose {without} points without them and {last[3].split()[0]} with them" in text
    docstring = " ".join(inspect.getdoc(inject).split())
    assert f"three layers lose {last[3].split()[0]} points instead of {without}" in docstring
    no_row = loss([4, 5], 4, exact=False).split()[0]
    assert f"last two layers lose {no_row} points on IMDB with trees of 4, with it {last[2].split()[0]}" in text
    before = found([], None, False, False, rows=short)["accuracy"]
    here = [loss(layers, 4, rows=short) for layers in ([0, 4, 5], [0, 5], [*range(6)])]
    shown = "{}, {} and {}, or {}".format(*here, loss([*range(6)], [16, None], rows=short))
    assert f"On these alone ({before:.1%}) the same choices lose {shown} with windows" in text
    further = {"rows": short, "steps": result["protocol"]["further_steps"]}
    trained = [loss([*range(6)], tree, **further) for tree in (4, [16, None])]
    after = found([], None, False, False, **further)["accuracy"]
    batch = result["config"]["training"]["per_device_train_batch_size"]
    shown = "all six layers then lose {}, windows of 16 {}".format(trained[0].replace(" (", " points ("), trained[1])
    assert f"{shown}, against the model's own attention after as many steps ({after:.1%})" in text
    assert f"{further['steps']} steps of {batch} reviews more" in text
    times = "{:.1f} to {:.1f}".format(*shortest_and_longest(rows))
    assert f"at 512 tokens {1000 * own['seconds']:.1f} and {times}" in text


def test_the_figures_on_the_chosen_layers_are_the_measured_ones():
    text = " ".join((ROOT / "docs" / "hsa.md").read_text(encoding="utf-8").split())
    own, two, three = json.loads((ROOT / "results" / "hsa_zero_shot_imdb-chosen.json").read_text("utf-8"))["rows"]
    assert [own["tree"], two["layers"], three["layers"]] == [None, [0, 5], [0, 4, 5]]

    def loss(found):
        return f"{-found['mean']:.1f} ({-found['high']:.1f} to {-found['low']:.1f})"

    shown = f"lose {loss(three['difference'])} and {loss(two['difference'])} of {own['accuracy']:.1%}"
    assert f"On {own['examples'] // 1000},000 reviews, mostly others, these two choices {shown}" in text
    # the paper loses 0.64 points
    assert -three["difference"]["mean"] <= 0.64 and -two["difference"]["low"] <= 0.64


def test_the_figures_on_texts_beyond_512_tokens_are_the_measured_ones():
    text = " ".join((ROOT / "docs" / "hsa.md").read_text(encoding="utf-8").split())
    result = json.loads((ROOT / "results" / "hsa_zero_shot_imdb-long.json").read_text(encoding="utf-8"))
    assert len(result["rows"]) == 1 + 2 * 3
    rows = {(tuple(row["layers"]), str(row["tree"])): row for row in result["rows"]}
    windows = str([16, None])

    def change(layers, tree, sign=1):
        found = rows[layers, tree]["difference"]
        low, high = sorted((sign * found["low"], sign * found["high"]))
        return f"{sign * found['mean']:+.1f}", f"{low:.1f} to {high:.1f}"

    own, best = rows[(), "None"], rows[(0, 4, 5), "4"]
    shown = f"{own['examples'] // 1000},000 test reviews that have more than {result['protocol']['min_tokens'] - 1}"
    assert f"{shown} ({own['mean_length']:.0f} on average, own attention {own['accuracy']:.1%}" in text
    (gain, interval), (other, other_interval) = change((0, 4, 5), "4"), change((0, 5), "4")
    shown = f"save {best['saved_in_replaced_layers']:.2%} of the operations there and lose nothing ({gain} points, {interval})"
    assert f"{shown}, nor do layers 0 and 5 ({other}, {other_interval}) or windows of 16" in text
    assert f"windows of 16 ({change((0, 4, 5), windows)[0]} and {change((0, 5), windows)[0]})" in text
    (loss, interval), (other, other_interval) = (change((*range(6),), tree, -1) for tree in ("4", windows))
    assert f"trees of 4 lose {loss[1:]} ({interval}), windows {other[1:]} ({other_interval})" in text
    least = min(gap for each in result["gaps"] for gap in each["by_layer"])
    assert f"they are {least:.2f} or more in each layer" in text
    assert f"{result['config']['training']['max_steps']} steps more" in text


def test_the_figures_on_theory_are_the_measured_ones():
    text = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    reports = [
        json.loads((ROOT / "results" / "analysis" / task / "analysis.json").read_text(encoding="utf-8"))
        for task in ("listops", "cifar10", "imdb", "imdb-pretrained")
    ]

    def means(report, key, groups, **wanted):
        return [mean(entry[key] for entry in report if (group | wanted).items() <= entry.items()) for group in groups]

    layers, combined = [{"layer": 0}, {"layer": 1}], {"level": "combined"}
    kept = [{"num_levels": 1}, {"num_levels": 2}]
    expected = [[] for _ in THEORY_ROWS]
    for report in reports:
        weights = [weight for layer in report["level_weights"] for head in layer for weight in head]
        forms = [entry for entry in report["kernel"] if entry["level"] != "combined"]
        met = sum(entry["verdict"] == "condition holds" for entry in forms)
        relative = [
            {**entry, "kurtosis": entry["kurtosis"] / entry["expected_kurtosis"]} for entry in report["gaussianity"]
        ]
        rows = [
            [min(weights), max(weights)],
            means(report["focus"], "relative_entropy", layers, **combined),
            [met, len(forms)],
            [100 * mean(entry["negative_fraction"] for entry in forms)],
            [100 * value for value in means(report["kernel"], "negative_fraction", [combined])],
            means(report["directional"], "directional_ratio", layers, **combined),
            means(report["approximation"], "truncation", kept),
            means(report["approximation"], "gaussian", kept),
            means(report["approximation"], "truncation_bound", kept),
            means(relative, "kurtosis", layers, of="queries"),
        ]
        for values, row in zip(expected, rows, strict=True):
            values.append(row)
        assert all(entry["bound_holds"] for entry in report["approximation"])
    for name, values in zip(THEORY_ROWS, expected, strict=True):
        (cells,) = rows_of(text, name)
        for cell, value in zip(cells, values, strict=True):
            shown = re.findall(r"\d[\d,]*\.?\d*(?<!,)", cell)
            digits = [len(number.partition(".")[2]) for number in shown]
            assert [f"{number:,.{places}f}" for number, places in zip(value, digits, strict=True)] == shown, name


def test_the_figures_on_constrained_scores_are_the_measured_ones():
    text = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "results" / "score_symmetry.json").read_text(encoding="utf-8"))
    accuracies = {}
    for symmetry, arm in (("none", "hkt-rope"), ("symmetric", "hkt-symmetric-rope"), ("psd", "hkt-psd-rope")):
        rows = [row for row in result["rows"] if row["arm"] == arm]
        records = [
            json.loads((ROOT / f"results/reproduce/listops/cpu/{arm}/final-seed{row['seed']}.json").read_text())
            for row in rows
        ]
        accuracies[symmetry] = [100 * row["test_accuracy"] for row in rows]
        assert accuracies[symmetry] == [100 * record["test_accuracy"] for record in records]
        least = [min(row[f"min_relative_eigenvalue_{of}"] for row in rows) for of in ("projections", "scores")]
        negative = mean(row["negative_fraction_scores"] for row in rows)
        expected = [
            ", ".join(f"{accuracy:.2f}" for accuracy in accuracies[symmetry]),
            ", ".join(f"{value:.0f}" if value < -1 else f"{value:.0e}" for value in least),
            f"{negative:.0%}",
            f"{mean(row['directional_ratio'] for row in rows):.2f}",
        ]
        assert rows_of(text, f'`"{symmetry}"`') == [expected]
        if symmetry != "none":
            assert min(least) >= -1e-6
    for symmetry, shown in (("symmetric", (-10.7, -14.4, -7.0)), ("psd", (-10.8, -13.9, -7.6))):
        found = paired_difference(accuracies[symmetry], accuracies["none"])
        assert [found[key] for key in ("mean", "low", "high")] == pytest.approx(shown, abs=0.051)


def test_the_figures_on_gaussianity_are_the_measured_ones():
    text = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "results" / "gaussianity.json").read_text(encoding="utf-8"))
    named = {f"untrained, width {entry['hidden_size']}": entry for entry in result["by_width"]}
    named |= {f"HKT-tiny, epoch {entry['epoch']:.0f}": entry for entry in result["by_epoch"][1:]}
    assert len(named) == 7
    for name, entry in named.items():
        found = [entry[f"queries, layer {layer}, level 0"] for layer in (0, 1)]
        assert [[f"{each['kurtosis']:.1f}, {each['rejected']:.0%}" for each in found]] == rows_of(text, name)
        assert {each["samples"] for each in found} == {442}
        assert {each["rejected_by_skewness"] for each in found} == {1.0}


def test_the_speed_that_is_claimed_is_reached():
    """Of the committed measurement: HKT-small within 1.45 times the time and 1.31 times the memory of its flat twin."""
    rows = json.loads((ROOT / "results" / "benchmark_models.json").read_text(encoding="utf-8"))["rows"]
    wanted = {"mode": "train_step", "batch_size": 8, "length": 1024}
    (entries,) = [row["entries"] for row in rows if wanted.items() <= row["configuration"].items()]
    flat, hkt = (entry["peak_bytes"] + entry["resident_bytes"] for entry in (entries["flat"], entries["hkt"]))
    assert entries["hkt"]["ratio"] < 1.45 and hkt / flat < 1.31
