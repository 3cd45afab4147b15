"""Plots of the reports. Each function returns a figure, which the caller saves and closes."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from .maps import COMBINED, AttentionMaps


matplotlib.use("Agg")
from matplotlib import pyplot as plt


MAX_LABELS = 64


def level_weights(maps: AttentionMaps):
    """Weights of the levels: a panel a layer, a stacked bar a head; the dashed lines are the uniform mix."""
    layers, heads, levels = maps.level_weights.shape
    figure, panels = plt.subplots(
        1, layers, figsize=(1.5 + 3.2 * layers, 1.2 + 0.35 * heads), sharey=True, layout="constrained", squeeze=False
    )
    colors = plt.get_cmap("viridis")(np.linspace(0.15, 0.9, levels))
    for layer, axes in enumerate(panels[0]):
        starts = np.zeros(heads)
        for level in range(levels):
            values = maps.level_weights[layer, :, level]
            axes.barh(range(heads), values, left=starts, color=colors[level], label=f"level {level}")
            starts = starts + values
        for level in range(1, levels):
            axes.axvline(level / levels, color="white", linewidth=1, linestyle="--")
        axes.set(title=f"layer {layer}", xlim=(0, 1), xlabel="weight", yticks=range(heads))
        axes.invert_yaxis() if layer == 0 else None
    panels[0, 0].set_ylabel("head")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=levels, frameon=False)
    return figure


def attention(maps: AttentionMaps, layer: int, head: int):
    """Maps of one head, a panel a level and one of the combined attention; queries downwards, keys to the right."""
    names, tokens = maps.level_names, maps.tokens
    side = min(9.0, max(3.2, 0.16 * len(tokens)))
    figure, panels = plt.subplots(
        1, len(names), figsize=(side * len(names), side + 0.6), layout="constrained", squeeze=False
    )
    every = -(-len(tokens) // MAX_LABELS)
    ticks = range(0, len(tokens), every)
    labels = [token.replace("$", r"\$") for token in tokens[::every]]
    for index, axes in enumerate(panels[0]):
        axes.imshow(maps.weights[layer, index, head], cmap="Blues", vmin=0, interpolation="nearest")
        axes.set_xticks(ticks, labels, rotation=90, fontsize=6)
        axes.set_yticks(ticks, labels, fontsize=6)
        weight = "" if names[index] == COMBINED else f", weight {maps.level_weights[layer, head, index]:.3f}"
        axes.set_title(f"{names[index]}{weight}", fontsize=9)
    figure.suptitle(f"layer {layer}, head {head}")
    return figure


def truncation(report: Sequence[dict[str, Any]]):
    """KL of keeping the first levels alone, and its bound, by number of levels: a line a head, a panel a layer."""
    layers = sorted({entry["layer"] for entry in report})
    figure, panels = plt.subplots(
        1, len(layers), figsize=(1 + 3.4 * len(layers), 3.4), sharey=True, layout="constrained", squeeze=False
    )
    for layer, axes in zip(layers, panels[0], strict=True):
        for head in sorted({entry["head"] for entry in report}):
            found = [entry for entry in report if (entry["layer"], entry["head"]) == (layer, head)][:-1]
            steps = [entry["num_levels"] for entry in found]
            color = f"C{head % 10}"
            axes.semilogy(steps, [entry["truncation"] for entry in found], "o-", color=color, label=f"head {head}")
            axes.semilogy(steps, [entry["truncation_bound"] for entry in found], ":", color=color)
        axes.set(title=f"layer {layer}", xlabel="levels kept", xticks=steps)
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("KL, nats (dotted: bound)")
    panels[0, -1].legend(fontsize=7, ncols=2)
    return figure


def by_head(report: Sequence[dict[str, Any]], key: str, title: str):
    """A number of each layer, head and level: a panel a level, layers downwards, heads to the right."""
    levels = sorted({entry["level"] for entry in report}, key=str)
    layers, heads = (sorted({entry[name] for entry in report}) for name in ("layer", "head"))
    figure, panels = plt.subplots(
        1,
        len(levels),
        figsize=(1.5 + len(levels) * (1 + 0.5 * len(heads)), 1.6 + 0.5 * len(layers)),
        layout="constrained",
        squeeze=False,
    )
    values = {(entry["level"], entry["layer"], entry["head"]): entry[key] for entry in report}
    low, high = min(values.values()), max(values.values())
    for level, axes in zip(levels, panels[0], strict=True):
        grid = [[values[level, layer, head] for head in heads] for layer in layers]
        image = axes.imshow(grid, vmin=low, vmax=high, aspect="auto")
        for row, line in enumerate(grid):
            for column, value in enumerate(line):
                color = "black" if image.norm(value) > 0.6 else "white"  # on the bright end of the colours
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
        axes.set(title=str(level) if level == COMBINED else f"level {level}", xlabel="head", ylabel="layer")
        axes.set_xticks(range(len(heads)), heads)
        axes.set_yticks(range(len(layers)), layers)
    figure.colorbar(image, ax=panels[0].tolist())
    figure.suptitle(title)
    return figure


def principal_quantiles(vectors: dict[tuple, np.ndarray]):
    """QQ plots of the first principal component of queries against a Gaussian: a panel a layer and level, a line a head."""
    found = {key: value for key, value in vectors.items() if key[3] == "queries"}
    layers, levels = (sorted({key[position] for key in found}) for position in (0, 2))
    figure, panels = plt.subplots(
        len(layers), len(levels), figsize=(2.6 * len(levels) + 0.6, 2.4 * len(layers) + 0.5), layout="constrained",
        squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    for (layer, head, level, _), samples in found.items():
        axes = panels[layers.index(layer), levels.index(level)]
        centered = samples - samples.mean(0)
        component = centered @ np.linalg.svd(centered, full_matrices=False)[2][0]
        (theory, ordered), _ = stats.probplot(component / component.std())
        axes.plot(theory, ordered, linewidth=1, label=f"head {head}")
        axes.set_title(f"layer {layer}, level {level}", fontsize=9)
    for axes in panels.flat:
        axes.axline((0, 0), slope=1, color="black", linewidth=0.8, linestyle="--")
    panels[0, -1].legend(fontsize=6)
    figure.supxlabel("Gaussian quantiles")
    figure.supylabel("quantiles of the first principal component")
    return figure
