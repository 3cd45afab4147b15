"""Plots of the report on `hkt reproduce`. Each function returns a figure, which the caller saves and closes."""

from collections.abc import Sequence

import matplotlib
import numpy as np

from .comparisons import PAPER_RESULTS, comparisons
from .records import POSITION_TITLES, ArmRuns, Section


matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator


_MARKERS = {"absolute": "o", "rope": "^", None: "s"}


def gains(parts: Sequence[Section]):
    """All gains with their intervals: one panel a task and protocol, one row a comparison.

    The thick bar is the t interval, the thin one with caps below it the bootstrap interval; comparisons of one pair have
    neither. The dashed line is the gain over flat attention that the paper reports.
    """
    rows = {section.slug: [item for item in comparisons(section) if item.seeds] for section in parts}
    heights = [max(len(rows[section.slug]), 1) + 1.5 for section in parts]
    figure, panels = plt.subplots(
        len(parts),
        1,
        figsize=(11, 1.2 + 0.34 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for section, axes in zip(parts, panels[:, 0], strict=True):
        found = rows[section.slug]
        axes.axvline(0, color="black", linewidth=0.8)
        axes.axvline(PAPER_RESULTS[section.task].gain, color="tab:red", linewidth=1.2, linestyle="--")
        for y, comparison in enumerate(found):
            color = "tab:blue" if comparison.is_main else "tab:gray"
            if comparison.t_interval is not None:
                axes.plot(comparison.t_interval, (y, y), color=color, linewidth=3.5, alpha=0.45, solid_capstyle="butt")
                axes.plot(comparison.bootstrap_interval, (y + 0.28, y + 0.28), color=color, linewidth=1, marker="|")
            points = np.subtract(comparison.accuracies(comparison.treated), comparison.accuracies(comparison.control))
            axes.plot(points, [y] * len(points), linestyle="", marker=".", markersize=4, color="black", alpha=0.6)
            axes.plot(comparison.gain, y, marker="D", markersize=6, color=color)
        axes.set_yticks(range(len(found)), [comparison.label for comparison in found])
        axes.set_ylim(max(len(found), 1) - 0.3, -0.7)
        axes.set_title(section.title, loc="left", fontsize=11)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("gain in test accuracy, percentage points")
    handles = [
        Line2D([], [], color="tab:blue", marker="D", linestyle="", label="mean (blue: HKT against flat)"),
        Line2D([], [], color="black", marker=".", linestyle="", alpha=0.6, label="each seed"),
        Line2D([], [], color="tab:blue", linewidth=3.5, alpha=0.45, label="95% t interval"),
        Line2D([], [], color="tab:blue", linewidth=1, marker="|", label="95% bootstrap interval"),
        Line2D([], [], color="tab:red", linestyle="--", label="the paper's gain over flat attention"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def curves(section: Section, arms: Sequence[ArmRuns]):
    """Validation accuracy by step: a panel a type of positions; the mean of the seeds thick, each seed thin.

    The mean is taken at the steps that all finished seeds have.
    """
    positions = [kind for kind in POSITION_TITLES if any(arm.positions == kind for arm in arms)]
    figure, panels = plt.subplots(
        1, len(positions), figsize=(6.2 * len(positions), 4.6), sharey=True, layout="constrained", squeeze=False
    )
    colors = _colors(dict.fromkeys(arm.name for arm in arms))
    for kind, axes in zip(positions, panels[0], strict=True):
        for arm in arms:
            if arm.positions != kind:
                continue
            by_seed = [
                {entry["step"]: 100 * entry["accuracy"] for entry in record["curve"]["validation"]}
                for record in arm.finished.values()
            ]
            style = {"color": colors[arm.name], "linestyle": "-" if arm.name.startswith("hkt") else "--"}
            for of_seed in by_seed:
                axes.plot(list(of_seed), list(of_seed.values()), linewidth=0.7, alpha=0.35, **style)
            steps = sorted(set.intersection(*map(set, by_seed)))
            means = [np.mean([of_seed[step] for of_seed in by_seed]) for step in steps]
            axes.plot(steps, means, linewidth=2.2, marker=".", label=f"{arm.name}, {len(by_seed)} seeds", **style)
        axes.set(xlabel="step", title=f"{POSITION_TITLES[kind]} positions" if kind else "")
        axes.legend(frameon=False, fontsize=9, loc="lower right")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("validation accuracy, %")
    figure.suptitle(section.title)
    return figure


def level_weights(section: Section, arm: ArmRuns):
    """Level weights over training: a panel a layer (rows) and head (columns), a line a level.

    Lines are means over the seeds, bands reach from the smallest to the largest seed: heads of different seeds have
    nothing in common but their number, so a mean may hide what each of them learned.
    """
    steps, weights = arm.level_weights
    seeds, _, layers, heads, levels = weights.shape
    mean, low, high = weights.mean(axis=0), weights.min(axis=0), weights.max(axis=0)
    figure, panels = plt.subplots(
        layers,
        heads,
        figsize=(1.2 + 1.75 * heads, 1.1 + 1.7 * layers),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.85, levels))
    marker = "." if len(steps) < 3 else None
    for layer in range(layers):
        for head in range(heads):
            axes = panels[layer, head]
            axes.axhline(1 / levels, color="black", linewidth=0.8, linestyle=":")
            for level in range(levels):
                at = (slice(None), layer, head, level)
                axes.fill_between(steps, low[at], high[at], color=colors[level], alpha=0.15, linewidth=0)
                axes.plot(steps, mean[at], color=colors[level], linewidth=1.6, marker=marker)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
            axes.tick_params(labelsize=8)
            if layer == 0:
                axes.set_title(f"head {head}", fontsize=9)
        panels[layer, 0].set_ylabel(f"layer {layer}", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("step", fontsize=8)
    handles = [Line2D([], [], color=color, label=f"level {level}") for level, color in enumerate(colors)]
    handles.append(Line2D([], [], color="black", linewidth=0.8, linestyle=":", label="uniform"))
    figure.legend(handles=handles, loc="outside lower center", ncols=levels + 1, frameon=False, fontsize=9)
    of_seeds = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    figure.suptitle(f"Level weights of {arm.label}, {of_seeds}; {section.title}", fontsize=10)
    return figure


def cost(section: Section):
    """Test accuracy against forward FLOPs, and against seconds of training with pretraining; bars are one sd."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.2), sharey=True, layout="constrained")
    arms = [arm for arm in section.arms if arm.finished]
    colors = _colors(dict.fromkeys(arm.name for arm in arms if arm.kind != "hkt ablation"))
    labels = {}
    for arm in arms:
        accuracies = [100 * record["test_accuracy"] for record in arm.finished.values()]
        ablation = arm.kind == "hkt ablation"
        style = {
            "marker": _MARKERS[arm.positions],
            "color": "lightsteelblue" if ablation else colors[arm.name],
            "markersize": 5 if ablation else 9 if arm.kind in ("flat", "hkt") else 7,
            "linestyle": "",
            "zorder": 2 if ablation else 3,
        }
        label = f"ablations of hkt ({POSITION_TITLES[arm.positions]})" if ablation else arm.label
        labels[label] = Line2D([], [], label=label, **style)
        sd = np.std(accuracies, ddof=1) if len(accuracies) > 1 else None
        flops, seconds = arm.mean("flops"), arm.mean("seconds") + arm.pretraining_seconds()
        for axes, x in zip(panels, (None if flops is None else flops / 1e6, seconds), strict=True):
            if x is not None:
                axes.errorbar(x, np.mean(accuracies), yerr=sd, elinewidth=0.9, **style)
    for axes, label in zip(
        panels, ("forward MFLOPs of one sequence", "seconds of training, with pretraining"), strict=True
    ):
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy, %")
    figure.suptitle(section.title)
    figure.legend(handles=list(labels.values()), loc="outside right center", frameon=False, fontsize=9)
    return figure


def _colors(names) -> dict[str, object]:
    """A colour a name: black for flat, blue for HKT, and for the others what differs from these."""
    fixed = {"flat": "black", "hkt": "tab:blue"}
    others = [
        color
        for palette in ("tab10", "Dark2", "Set2")
        for index, color in enumerate(plt.get_cmap(palette).colors)
        if (palette, index) not in (("tab10", 0), ("tab10", 7))
    ]
    rest = [name for name in names if name not in fixed]
    return {**fixed, **{name: others[index % len(others)] for index, name in enumerate(rest)}}
