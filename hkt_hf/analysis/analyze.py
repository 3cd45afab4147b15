"""All instruments on one checkpoint: the reports as JSON, plots, and the page of attention maps."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from tqdm.auto import tqdm

from ..checkpoints import load_checkpoint
from ..data import load_data
from ..environment import environment
from ..experiments.arms import initialize_by_name
from ..files import replacing, write_json
from ..modeling import HKTConfig
from ..tables import table
from ..training import checkpoint_experiment
from . import plots
from .approximation import approximation_report, decay_rates
from .directions import directional_report
from .gaussianity import gaussianity_report, head_vectors
from .kernels import kernel_report
from .maps import attention_maps, focus_report
from .page import write_page


logger = logging.getLogger(__name__)

MAX_TOKENS = 256
PAGE_TOKENS = 96
OF_UNTRAINED = ("kernel", "gaussianity")


def analyze(
    checkpoint: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    text: str | None = None,
    num_examples: int = 8,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint with every instrument of this package.

    Args:
        checkpoint (`str` or `Path`): a run's folder, or a Hub id.
        out (`str` or `Path`): folder for `analysis.json`, the plots and `attention.html`; made if need be, files in it are
            replaced when all is measured.
        overrides (sequence of `str`): as in [`~hkt_hf.training.evaluate_checkpoint`], e.g. `["--data.path", "my.csv"]`.
        text (`str`, *optional*): the text whose attention is shown, cut at 96 tokens; by default the longest measured example
            that has no more.
        num_examples (`int`, *optional*, defaults to 8): so many examples of the validation split are measured, each cut at
            256 tokens. At least 1.
        command (`str`, *optional*): the command line that asked for it, for `analysis.json`.

    Returns:
        `dict`: what `analysis.json` holds: the reports by name, those of the same model with initial weights in `untrained`,
        `decay_rates`, `level_weights`, and where they come from.

    Raises:
        ValueError: no example, a text without tokens, too few tokens for the statistics, or a checkpoint or data that
            can't be used, e.g. a model of another type.
    """
    if num_examples < 1:
        raise ValueError(f"`num_examples` must be at least 1, got {num_examples}")
    config, objective = checkpoint_experiment(checkpoint, overrides)
    model, tokenizer = load_checkpoint(checkpoint, objective.auto_class)
    if model.config.model_type != HKTConfig.model_type:
        raise ValueError(
            f"`checkpoint` {str(checkpoint)!r} must be an HKT model, got one of type {model.config.model_type!r}"
        )
    examples = load_data(config.data, need_labels=objective.needs_labels).splits["validation"]
    texts = examples.select(range(min(num_examples, len(examples))))["text"][:]
    batch = _tokenize(tokenizer, texts, MAX_TOKENS)
    shown = text if text is not None else _longest_that_fits(tokenizer, texts)
    single = _tokenize(tokenizer, [shown], PAGE_TOKENS)
    steps = {
        "kernel": kernel_report,
        "directional": directional_report,
        "approximation": approximation_report,
        "gaussianity": gaussianity_report,
        "focus": focus_report,
    }
    untrained = copy.deepcopy(model)
    initialize_by_name(untrained, seed=0)
    found: dict[str, Any] = {"untrained": {}}
    for name, report in tqdm(steps.items(), desc="analysis", unit="report"):
        found[name] = report(model, batch)
        if name in OF_UNTRAINED:
            found["untrained"][name] = report(untrained, batch)
    tokens = tokenizer.convert_ids_to_tokens(single["input_ids"][0].tolist())
    maps = attention_maps(model, single, tokens)
    found |= {
        "decay_rates": decay_rates(found["approximation"]),
        "level_weights": maps.level_weights.tolist(),
        "command": command,
        "checkpoint": str(checkpoint),
        "examples": len(texts),
        "tokens": int(batch["attention_mask"].sum()),
        **environment(),
    }
    _write(Path(out), found, maps, head_vectors(model, batch), Path(checkpoint).name)
    return found


def summary(found: dict[str, Any]) -> list[str]:
    """A table of the reports in Markdown: a row a layer and level, means over heads."""
    levels = sorted({entry["level"] for entry in found["focus"]}, key=str)
    layers = sorted({entry["layer"] for entry in found["focus"]})
    header = [
        "layer",
        "level",
        "weight",
        "directional ratio",
        "entropy, share",
        "distance, tokens",
        "kernel",
        "b2 - p(p+2), queries",
    ]
    rows = []
    for layer in layers:
        for level in levels:
            focus, directions, kernels, gaussian = (
                [entry for entry in found[name] if (entry["layer"], entry["level"]) == (layer, level)]
                for name in ("focus", "directional", "kernel", "gaussianity")
            )
            gaussian = [entry for entry in gaussian if entry["of"] == "queries"]
            verdicts = [entry["verdict"] for entry in kernels]
            rows.append(
                [
                    str(layer),
                    str(level),
                    f"{_mean(focus, 'level_weight'):.3f}",
                    f"{_mean(directions, 'directional_ratio'):.2f}",
                    f"{_mean(focus, 'relative_entropy'):.2f}",
                    f"{_mean(focus, 'mean_distance'):.1f}",
                    ", ".join(f"{verdict} ({verdicts.count(verdict)})" for verdict in dict.fromkeys(verdicts)),
                    f"{_mean(gaussian, 'excess'):+.1f}" if gaussian else "-",
                ]
            )
    lines = [*table(header, rows), ""]
    for when, reports in (("before", found["untrained"]), ("after", found)):
        forms = [entry for entry in reports["kernel"] if entry["level"] != "combined"]
        lowest = [entry["min_eigenvalue"] / max(entry["max_eigenvalue"], 1e-300) for entry in forms]
        excess = [abs(entry["excess"]) / entry["expected_kurtosis"] for entry in reports["gaussianity"]]
        lines.append(
            f"{when.capitalize()} training: smallest eigenvalue of a bilinear form {min(lowest):+.3g} of the largest, negative "
            f"{_mean(forms, 'negative_fraction'):.0%} (mean); kurtosis off a Gaussian's by {sorted(excess)[len(excess) // 2]:.0%} "
            "(median)."
        )
    lines.append("")
    kept = [entry for entry in found["approximation"] if entry["truncation"] > 0]
    for num_levels in sorted({entry["num_levels"] for entry in kept}):
        of_number = [entry for entry in kept if entry["num_levels"] == num_levels]
        lines.append(
            f"Levels kept: {num_levels}; KL {_mean(of_number, 'truncation'):.3g} nats, bound "
            f"{_mean(of_number, 'truncation_bound'):.3g}, which holds "
            f"{'on every row' if all(entry['bound_holds'] for entry in of_number) else 'NOT on every row'}."
        )
    return lines


def _write(out: Path, found: dict[str, Any], maps, vectors, title: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "level_weights": plots.level_weights(maps),
        "attention": plots.attention(maps, 0, 0),
        "truncation": plots.truncation(found["approximation"]),
        "directional_ratio": plots.by_head(
            found["directional"], "directional_ratio", "||antisymmetric|| / ||scores||"
        ),
        "distance": plots.by_head(found["focus"], "mean_distance", "mean distance of attention, tokens"),
        "entropy": plots.by_head(found["focus"], "relative_entropy", "entropy, share of even attention"),
        "gaussianity": plots.principal_quantiles(vectors),
    }
    for name, figure in figures.items():
        with replacing(out / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110)
        plt.close(figure)
    write_page(maps, out / "attention.html", f"Attention of {title}")
    write_json(out / "analysis.json", found)


def _tokenize(tokenizer, texts: Sequence[str], max_length: int) -> dict[str, torch.Tensor]:
    length = min(max_length, tokenizer.model_max_length)
    encoded = tokenizer(list(texts), truncation=True, max_length=length, padding=True, return_tensors="pt")
    if encoded["input_ids"].shape[1] == 0:
        raise ValueError("`text` must hold at least one token, got none")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _longest_that_fits(tokenizer, texts: Sequence[str]) -> str:
    lengths = [len(ids) for ids in tokenizer(list(texts))["input_ids"]]
    fitting = [index for index, length in enumerate(lengths) if length <= PAGE_TOKENS]
    return texts[max(fitting, key=lengths.__getitem__)] if fitting else texts[0]


def _mean(entries: Sequence[dict[str, Any]], key: str) -> float:
    return sum(entry[key] for entry in entries) / len(entries)
