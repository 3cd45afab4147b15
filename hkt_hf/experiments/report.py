"""The report on `hkt reproduce`: tables in Markdown and the list of plots, built from the JSON records alone."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ..files import replacing, write_text
from ..tables import escape, format_size, table
from .comparisons import (
    HSA_PAPER,
    PAPER,
    PAPER_RESULTS,
    Comparison,
    comparisons,
    strongest_flat,
    strongest_hkt,
)
from .records import (
    FAILED,
    FINISHED,
    NOT_AVAILABLE,
    POSITION_TITLES,
    SETTING_KEYS,
    STAGES,
    TASK_TITLES,
    ArmRuns,
    Section,
    read_records,
    sections,
    setting_of,
)


REPORT_FILE = "report.md"

_STATUS_WORDS = {FAILED: "FAIL", NOT_AVAILABLE: "NA"}
_SETTING_NAMES = dict(zip(SETTING_KEYS, ("lr", "dropout", "decay"), strict=True))

_HOW_TO_READ = """\
Built by `hkt report` from the JSON files of `hkt reproduce` beside it. Accuracies are of the test split, in percent; \
gains are in percentage points (pp), of runs with the same seed. The interval to read is that of Student's t; bootstrap \
intervals of about 5 pairs are too short. `p` is of the two-sided paired t-test and is not corrected for the number of \
comparisons; `d_z` is the mean of the differences by their standard deviation. The seeds vary initial weights and data \
order: how much another test split would change is not in the intervals. FAIL: the run broke off; NA: it can't be run."""


def summary_table(records: Sequence[dict]) -> str:
    """The short table of gains over all tasks, as README shows it.

    One row a task, protocol and main comparison that has pairs: HKT against flat attention with the same positions, HKT
    with RoPE against the strongest flat arm, and both after self-pretraining.

    Args:
        records (sequence of `dict`): of [`~hkt_hf.experiments.records.read_records`].

    Returns:
        `str`: Markdown, without a line break at the end.
    """
    rows = []
    for section in sections(records):
        for comparison in comparisons(section):
            if comparison.is_main and comparison.seeds:
                rows.append(
                    [
                        TASK_TITLES[section.task],
                        section.protocol,
                        comparison.label,
                        *(
                            f"{_mean(comparison.accuracies(arm)):.2f}"
                            for arm in (comparison.control, comparison.treated)
                        ),
                        f"{comparison.gain:+.2f}",
                        _interval(comparison.t_interval),
                        _p(comparison.p_value),
                        str(len(comparison.seeds)),
                        _paper_gain(comparison),
                    ]
                )
    if not rows:
        return "No pair of runs of HKT and flat attention has finished yet."
    header = ["task", "protocol", "comparison", "flat, %", "HKT, %", "gain, pp", "95% t", "p", "pairs", "paper, pp"]
    return "\n".join(table(header, rows))


def markdown(records: Sequence[dict]) -> str:
    """The whole report. The same records give the same text, in whatever order they come.

    Args:
        records (sequence of `dict`): of [`~hkt_hf.experiments.records.read_records`].

    Returns:
        `str`: Markdown that shows the plots of [`write_report`] from the same folder.
    """
    parts = sections(records)
    lines = ["# HKT against flat attention", "", _HOW_TO_READ, "", "## Gains", "", summary_table(records), ""]
    lines += [_paper_sentence(parts), "", "![Gains with intervals](gains.png)", ""]
    for section in parts:
        lines += [f"## {section.title[0].upper()}{section.title[1:]}", "", *_provenance(section), ""]
        lines += ["### Accuracy", "", *accuracy_table(section), ""]
        lines += ["### Gains", "", *gain_table(section), ""]
        lines += ["### Cost", "", *_cost_table(section), ""]
        if any(arm.finished for arm in section.arms):
            lines += [f"![Accuracy against cost]({section.slug}_cost.png)", ""]
        lines += ["### Search", "", *_search_table(section), ""]
        if curve_arms(section):
            lines += ["### Learning curves", "", f"![Learning curves]({section.slug}_curves.png)", ""]
        lines += _level_weights(section)
    lines += ["## Hours", "", *_hours_table(parts)]
    return "\n".join(lines) + "\n"


def write_report(results: str | Path, output: str | Path) -> list[Path]:
    """Write `report.md` and its plots.

    Args:
        results (`str` or `Path`): folder of the records.
        output (`str` or `Path`): folder to write to; made if it does not exist.

    Returns:
        `list[Path]`: what was written, the report first.

    Raises:
        FileNotFoundError, ValueError: as [`~hkt_hf.experiments.records.read_records`] has them, before anything is
            written.
    """
    from matplotlib import pyplot as plt

    records = read_records(results)
    text = markdown(records)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / REPORT_FILE]
    for name, draw in _figures(sections(records)).items():
        figure = draw()
        try:
            with replacing(output / name) as temporary:
                figure.savefig(temporary, dpi=110, format="png")
        finally:
            plt.close(figure)
        paths.append(output / name)
    write_text(paths[0], text)  # last: the plots that it shows are there
    return paths


def _figures(parts: Sequence[Section]) -> dict[str, Callable[[], object]]:
    """File name to what draws it, for every plot that [`markdown`] shows."""
    from . import plots

    figures: dict[str, Callable[[], object]] = {"gains.png": lambda: plots.gains(parts)}
    for section in parts:
        if any(arm.finished for arm in section.arms):
            figures[f"{section.slug}_cost.png"] = lambda section=section: plots.cost(section)
        if curve_arms(section):
            figures[f"{section.slug}_curves.png"] = lambda section=section: plots.curves(section, curve_arms(section))
        for arm in section.arms:
            if arm.level_weights is not None:
                name = _level_weights_file(section, arm)
                figures[name] = lambda section=section, arm=arm: plots.level_weights(section, arm)
    return figures


def curve_arms(section: Section) -> list[ArmRuns]:
    """The arms whose learning curves are drawn: flat and its variants, HKT, HSA, and what is pretrained."""
    return [
        arm
        for arm in section.arms
        if arm.finished and arm.kind in ("flat", "flat variant", "hkt", "hsa", "pretrained")
    ]


def _paper_sentence(parts: Sequence[Section]) -> str:
    results = {section.task: PAPER_RESULTS[section.task] for section in parts}
    sentences = []
    for paper, before in (
        (PAPER, f"The paper ({PAPER}; three seeds, d = 128) reports for flat attention and HKT: "),
        (HSA_PAPER, f"The paper of HSA ({HSA_PAPER}; word2vec embeddings) reports for flat attention and HSA: "),
    ):
        values = [
            f"{TASK_TITLES[task]} {result.flat:.2f} and {result.hkt:.2f} ({result.gain:+.2f})"
            for task, result in results.items()
            if result.paper == paper
        ]
        if values:
            sentences.append(f"{before}{'; '.join(values)}.")
    return " ".join(sentences)


def _provenance(section: Section) -> list[str]:
    (num_test,) = section.distinct("num_test")[:1] or (None,)
    lines = []
    if num_test:
        error = 100 * math.sqrt(0.25 / num_test)
        lines.append(
            f"- Test split: {num_test:,} examples; the standard error of one accuracy from them is at most {error:.2f} pp."
        )
    machines = "; ".join(escape(machine) for machine in section.distinct("machine")) or "not recorded"
    threads = ", ".join(str(count) for count in section.distinct("threads")) or "not recorded"
    versions = sorted(
        {
            f"{name} {value}"
            for record in section.records
            for name, value in record.get("versions", {}).items()
            if value
        }
    )
    commits = ", ".join(f"`{commit[:12]}`" for commit in section.distinct("commit")) or "not recorded"
    lines.append(f"- Machine: {machines}; threads a run: {threads}; {escape(', '.join(versions), 400)}.")
    lines.append(f"- Commits: {commits}.")
    return lines


def accuracy_table(section: Section) -> list[str]:
    """Lines of Markdown: every arm's test accuracy, mean and each seed; what failed is named."""
    arms = [arm for arm in section.arms if arm.final]
    if not arms:
        return ["No final run yet."]
    seeds = sorted({seed for arm in arms for seed in arm.final})
    rows, remarks = [], []
    for arm in arms:
        cells = []
        for seed in seeds:
            record = arm.final.get(seed)
            if record is None:
                cells.append("")
            elif record["status"] == FINISHED:
                cells.append(f"{100 * record['test_accuracy']:.2f}")
            else:
                cells.append(_STATUS_WORDS[record["status"]])
        rows.append([arm.name, POSITION_TITLES[arm.positions], _mean_cell(arm), *cells])
        remarks += _failures(arm)
    header = ["arm", "positions", "mean ± sd, %", *(f"seed {seed}" for seed in seeds)]
    return [*table(header, rows), *([""] if remarks else []), *remarks]


def _mean_cell(arm: ArmRuns) -> str:
    """Mean and standard deviation over the finished seeds, how many if not all; why there are none."""
    if not arm.finished:
        return "; ".join(_reasons(arm))
    values = [100 * record["test_accuracy"] for record in arm.finished.values()]
    mean = _mean(values)
    cell = f"{mean:.2f}"
    if len(values) > 1:
        cell += f" ± {math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)):.2f}"
    return cell if len(values) == len(arm.final) else f"{cell} ({len(values)} of {len(arm.final)})"


def _reasons(arm: ArmRuns) -> list[str]:
    """Each different reason once, e.g. `FAIL (out of memory)`."""
    return list(
        dict.fromkeys(
            f"{_STATUS_WORDS[record['status']]} ({escape(record['reason'])})"
            for record in arm.final.values()
            if record["status"] != FINISHED
        )
    )


def _failures(arm: ArmRuns) -> list[str]:
    """A line a reason, where some seeds finished and others did not."""
    if not arm.finished:
        return []
    lines = []
    for reason in _reasons(arm):
        seeds = [
            seed
            for seed, record in arm.final.items()
            if record["status"] != FINISHED
            and reason == f"{_STATUS_WORDS[record['status']]} ({escape(record['reason'])})"
        ]
        lines.append(f"- {arm.label}, {_seeds(seeds)}: {reason}")
    return lines


def _cost_table(section: Section) -> list[str]:
    arms = [arm for arm in section.arms if arm.finished]
    if not arms:
        return ["No final run has finished."]

    def each(arm: ArmRuns, text: Callable[[dict], str]) -> str:
        return "; ".join(dict.fromkeys(text(record) for record in arm.finished.values()))

    rows = []
    for arm in arms:
        seconds, pretraining = arm.mean("seconds"), arm.pretraining_seconds()
        memory = [record["memory"] for record in arm.finished.values() if record["memory"] is not None]
        rows.append(
            [
                arm.name,
                POSITION_TITLES[arm.positions],
                each(arm, lambda record: "" if record["num_levels"] is None else str(record["num_levels"])),
                each(arm, lambda record: f"{record['parameters']:,}"),
                each(arm, lambda record: "" if record["flops"] is None else f"{record['flops'] / 1e6:,.1f}"),
                f"{arm.tokens_per_second:,.0f}",
                f"{seconds / 60:.1f}" + (f" + {pretraining / 60:.1f}" if pretraining else ""),
                format_size(max(memory)) if memory else "",
                each(arm, lambda record: _setting(setting_of(record))),
            ]
        )
    header = [
        "arm",
        "positions",
        "levels",
        "parameters",
        "forward MFLOPs",
        "tokens/s",
        "minutes",
        "peak memory",
        "setting",
    ]
    return [
        "Forward FLOPs are of one sequence of the longest length. Tokens (without padding) a second are of training "
        "steps; minutes are of a run with its evaluations, the mean of the seeds, and after `+` of pretraining. What ran "
        "beside a run slows both. The memory is the largest of the seeds.",
        "",
        *table(header, rows),
        *_other_machines(section, arms),
    ]


def _other_machines(section: Section, arms: Sequence[ArmRuns]) -> list[str]:
    """Which arms ran elsewhere than most, where there are several machines: their speed does not compare with the rest."""
    lines = []
    for machine in section.distinct("machine")[1:]:
        there = [
            arm.label for arm in arms if any(record.get("machine") == machine for record in arm.finished.values())
        ]
        if there:
            lines.append(
                f"- On another machine ({escape(machine)}), so that speeds do not compare: {', '.join(there)}."
            )
    return ["", *lines] if lines else []


def gain_table(section: Section) -> list[str]:
    """Lines of Markdown: every comparison with its interval, p, effect size and the seeds that the paper's gain needs."""
    found = comparisons(section)
    if not found:
        return ["No final run to compare yet."]
    gain = PAPER_RESULTS[section.task].gain
    rows, remarks = [], []
    strongest = strongest_flat(section)
    if strongest is not None:
        accuracy = 100 * strongest.mean("validation_accuracy")
        remarks.append(
            f"- The strongest flat arm, by mean validation accuracy of its final runs ({accuracy:.2f}%): {strongest.label}."
        )
    best = strongest_hkt(section)
    if best is not None:
        accuracy = 100 * best.mean("validation_accuracy")
        remarks.append(
            f"- The strongest HKT arm, so chosen ({accuracy:.2f}%), of those with all seeds of hkt (RoPE): {best.label}."
        )
    for comparison in found:
        cells = ["no pairs", "", "", "", ""]
        if comparison.seeds:
            cells = [
                f"{comparison.gain:+.2f}",
                _interval(comparison.t_interval),
                _interval(comparison.bootstrap_interval),
                _p(comparison.p_value),
                "-" if comparison.effect_size is None else f"{comparison.effect_size:+.2f}",
            ]
        needed = comparison.seeds_needed
        rows.append(
            [
                comparison.label,
                *cells,
                str(len(comparison.seeds)),
                _paper_gain(comparison),
                "-" if needed is None else str(needed) if needed <= 1000 else "> 1,000",
            ]
        )
        if len(comparison.seeds) > 1 and comparison.t_interval is None:
            remarks.append(f"- {comparison.label}: all differences are equal, so nothing tells how far they scatter.")
    remarks += _unpaired(found)
    header = [
        "comparison",
        "gain, pp",
        "95% t",
        "95% bootstrap",
        "p",
        "d_z",
        "pairs",
        "paper, pp",
        f"seeds to see {gain:.2f} pp",
    ]
    note = (
        f"The last column: seeds with which a two-sided paired t-test at 5% finds a gain of {gain:.2f} pp, that of the "
        "paper, with power 0.8, if the differences scatter as they do here. `-`: it takes two pairs that differ."
    )
    return [note, "", *table(header, rows), *([""] if remarks else []), *remarks]


def _unpaired(found: Sequence[Comparison]) -> list[str]:
    """Which seeds are in no pair because an arm lacks them: a line for each set of seeds and reason."""
    missing: dict[tuple[str, str], list[int]] = {}
    for comparison in found:
        for seed, arm in comparison.unpaired:
            record = arm.final.get(seed)
            why = "not run" if record is None else _STATUS_WORDS[record["status"]]
            seeds = missing.setdefault((arm.label, why), [])
            if seed not in seeds:
                seeds.append(seed)
    arms: dict[tuple[str, str], list[str]] = {}
    for (arm, why), seeds in missing.items():
        arms.setdefault((_seeds(sorted(seeds)), why), []).append(arm)
    return [
        f"- Missing, so in no pair: {seeds} of {', '.join(names)} ({why})." for (seeds, why), names in arms.items()
    ]


def _search_table(section: Section) -> list[str]:
    arms = [arm for arm in section.arms if arm.search]
    if not arms:
        return ["No search: the settings of the final runs were given."]
    rows, remarks = [], []
    for arm in arms:
        finished = sum(record["status"] == FINISHED for record in arm.search)
        tried = [sorted(set(values)) for values in zip(*map(setting_of, arm.search), strict=True)]
        chosen = arm.chosen
        rows.append(
            [
                arm.name,
                POSITION_TITLES[arm.positions],
                str(len(arm.search)) if finished == len(arm.search) else f"{len(arm.search)} ({finished} finished)",
                "; ".join(
                    f"{name} {', '.join(f'{value:g}' for value in values)}"
                    for name, values in zip(_SETTING_NAMES.values(), tried, strict=True)
                ),
                "; ".join(map(_finalist, arm.finalists)) or "-",
                "" if chosen is None else _setting(setting_of(chosen)),
                "" if chosen is None else f"{chosen['validation_loss']:.4f}",
                "" if chosen is None else f"{100 * chosen['validation_accuracy']:.2f}",
            ]
        )
        if chosen is not None:
            remarks += [*_edge(arm, chosen, tried[0]), *_other_settings(arm, chosen)]
    header = ["arm", "positions", "settings tried", "values", "full runs: loss", "chosen"]
    lines = [
        "Validation losses. Short runs of all settings; where there are full runs, they decide, else the short ones.",
        "",
        *table([*header, "validation loss", "accuracy, %"], rows),
    ]
    return [*lines, *([""] if remarks else []), *remarks]


def _finalist(record: dict) -> str:
    loss = f"{record['validation_loss']:.4f}" if record["status"] == FINISHED else _STATUS_WORDS[record["status"]]
    return loss if record["setting"] is None else f"{_setting(setting_of(record))}: {loss}"


def _edge(arm: ArmRuns, chosen: dict, rates: Sequence[float]) -> list[str]:
    rate = chosen["setting"]["learning_rate"]
    if len(rates) < 2 or rates[0] < rate < rates[-1]:
        return []
    return [f"- {arm.label}: lr {rate:g} is the {'smallest' if rate == rates[0] else 'largest'} that was tried."]


def _other_settings(arm: ArmRuns, chosen: dict) -> list[str]:
    others: dict[tuple, list[int]] = {}
    for seed, record in arm.finished.items():
        if setting_of(record) != setting_of(chosen):
            others.setdefault(setting_of(record), []).append(seed)
    return [
        f"- {arm.label}, {_seeds(seeds)}: the final runs have another setting, {_setting(used)}."
        for used, seeds in others.items()
    ]


def _level_weights(section: Section) -> list[str]:
    arms = [arm for arm in section.arms if arm.level_weights is not None]
    if not arms:
        return []
    lines = ["### Level weights", ""]
    for arm in arms:
        if arm.kind == "hkt":
            lines += [f"![Level weights of {arm.label}]({_level_weights_file(section, arm)})", ""]
    others = [f"[{arm.label}]({_level_weights_file(section, arm)})" for arm in arms if arm.kind != "hkt"]
    return [*lines, *([f"Of other arms: {', '.join(others)}.", ""] if others else [])]


def _level_weights_file(section: Section, arm: ArmRuns) -> str:
    return f"{section.slug}_level_weights_{arm.slug}.png"


def _hours_table(parts: Sequence[Section]) -> list[str]:
    rows, totals = [], [0.0] * len(STAGES)
    for section in parts:
        seconds = [_stage_seconds(section, stage) for stage in STAGES]
        rows.append([TASK_TITLES[section.task], section.protocol, *_hours(seconds), str(len(section.records))])
        totals = [total + value for total, value in zip(totals, seconds, strict=True)]
    runs = sum(len(section.records) for section in parts)
    rows.append(["all", "", *_hours(totals), str(runs)])
    return [
        "Hours of the runs that finished, summed whether they ran side by side or not; evaluation of the test split is "
        "not in them.",
        "",
        *table(["task", "protocol", *STAGES, "sum", "runs"], rows),
    ]


def _stage_seconds(section: Section, stage: str) -> float:
    if stage != "pretraining":
        return sum(record.get("seconds") or 0 for record in section.records if record["stage"] == stage)
    # One pretraining serves several runs, which all state its seconds; it may have a record of its own.
    by_seed = {}
    for arm in section.arms:
        for record in arm.records:
            measured = record if record["stage"] == stage else record["pretraining"]
            if measured and measured.get("seconds"):
                by_seed[arm.label, record["seed"]] = measured["seconds"]
    return sum(by_seed.values())


def _hours(seconds: Sequence[float]) -> list[str]:
    return [f"{value / 3600:.2f}" for value in (*seconds, sum(seconds))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"


def _p(p_value: float | None) -> str:
    if p_value is None:
        return "-"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _paper_gain(comparison: Comparison) -> str:
    return f"{comparison.paper_gain:+.2f}" if comparison.is_papers and comparison.paper_gain is not None else ""


def _setting(setting: tuple) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in zip(_SETTING_NAMES.values(), setting, strict=True))


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
