"""What an approximation of the scores costs: the KL divergence of the attention rows, taken apart.

arXiv 2604.08829 has three components, an explicit non-Gaussian correction and a geometric decay in the number of levels. The
form here is ours. For a row with target scores `s*` and approximation `s` let `D = s* - s` and `p = softmax(s*)`. Then
`KL(p || softmax(s)) = E_p[D] + log E_p[exp(-D)]`, the cumulant series of `D` under `p` without its first term:
`k2 / 2 - k3 / 6 + k4 / 24 - ...`. The Gaussian term is `k2 / 2`, the non-Gaussian correction is all the rest. Leaving out
levels makes `|D| <= a = sum_l lambda_l max|s(l)|` over those left out, and Hoeffding's lemma gives `KL <= a^2 / 2`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .scores import SequenceScores, sequence_scores


def approximation_report(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    reference: nn.Module | torch.Tensor | None = None,
) -> list[dict[str, Any]]:
    """KL of the attention rows when only the first levels are kept, for every layer, head and number of levels.

    The weights of the levels that are kept stay as they are.

    Args:
        model (`nn.Module`): an HKT model, with or without a head.
        batch (mapping): inputs as the model takes them.
        reference (`nn.Module` or `torch.Tensor`, *optional*): where the target scores come from: another HKT model of as
            many layers and heads, e.g. a flat one, or scores `(layers, B, H, T, T)`, of which only those between real tokens
            are read. By default the same model with all levels.

    Returns:
        `list[dict]`: one for each layer, head and number of levels from 1 to `L`, with the keys `layer`, `head`,
        `num_levels`, and in nats, means over the rows of all sequences: `kl`, which is `gaussian + non_gaussian`; `gaussian`;
        `non_gaussian`; its leading terms `third_cumulant_term` (`-k3 / 6`) and `fourth_cumulant_term` (`k4 / 24`);
        `truncation`, the KL against the same model with all levels (which is `kl` without a `reference`), `truncation_bound`
        and `bound_holds`, whether it holds on every row; `truncation_max`, the largest of a row.

    Raises:
        TypeError, ValueError: as [`~hkt_hf.analysis.scores.sequence_scores`], or a reference of another shape.
    """
    rows: dict[tuple[int, int, int], dict[str, list[torch.Tensor]]] = {}
    targets = None if reference is None else _targets(reference, batch)
    for scores in sequence_scores(model, batch):
        complete = scores.scores()
        target = complete if targets is None else targets(scores)
        for num_levels in range(1, scores.num_levels + 1):
            kept = scores.scores(num_levels)
            found = divergence(target, kept, scores.visible)
            found["truncation"] = found["kl"] if targets is None else divergence(complete, kept, scores.visible)["kl"]
            found["truncation_bound"] = truncation_bound(scores, num_levels)
            for head in range(complete.shape[0]):
                entry = rows.setdefault((scores.layer, head, num_levels), {})
                for key, values in found.items():
                    entry.setdefault(key, []).append(values[head])
    report = []
    for (layer, head, num_levels), parts in sorted(rows.items()):
        of_rows = {key: torch.cat(values) for key, values in parts.items()}
        slack = 1e-12 * (1 + of_rows["truncation_bound"])  # the rounding of a KL that is zero
        report.append(
            {
                "layer": layer,
                "head": head,
                "num_levels": num_levels,
                **{key: values.mean().item() for key, values in of_rows.items()},
                "truncation_max": of_rows["truncation"].max().item(),
                "bound_holds": bool((of_rows["truncation"] <= of_rows["truncation_bound"] + slack).all()),
            }
        )
    return report


def decay_rates(report: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fit `truncation = c * rate ** num_levels` in each layer and head, by least squares of the logarithms.

    Args:
        report (`list[dict]`): of [`approximation_report`].

    Returns:
        `list[dict]`: keys `layer`, `head`, `rate` (below 1: each level that is kept divides the error by as much; `None` with
        fewer than two numbers of levels whose error is not zero) and `points` (how many there were: with two the fit is exact).
    """
    points: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for entry in report:
        found = points.setdefault((entry["layer"], entry["head"]), [])
        if entry["truncation"] > 1e-15:
            found.append((entry["num_levels"], math.log(entry["truncation"])))
    rates = []
    for (layer, head), found in points.items():
        rate = None
        if len(found) > 1:
            levels, logs = zip(*found, strict=True)
            center, height = sum(levels) / len(levels), sum(logs) / len(logs)
            slope = sum((level - center) * (log - height) for level, log in found)
            rate = math.exp(slope / sum((level - center) ** 2 for level in levels))
        rates.append({"layer": layer, "head": head, "rate": rate, "points": len(found)})
    return rates


def divergence(
    target: torch.Tensor, scores: torch.Tensor, visible: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """KL divergence of attention rows, taken apart.

    Args:
        target (`torch.Tensor`): target scores, `(..., T, T)`; float64 for exact identities.
        scores (`torch.Tensor`): their approximation, likewise.
        visible (`torch.Tensor`, *optional*): bool, broadcastable to these; every row sees a key. All keys by default.

    Returns:
        `dict[str, torch.Tensor]`: `kl`, `gaussian`, `non_gaussian`, `third_cumulant_term` and `fourth_cumulant_term`,
        `(..., T)` each, in nats.
    """
    hidden = torch.zeros_like(target, dtype=torch.bool) if visible is None else ~visible
    log_p = target.masked_fill(hidden, -torch.inf).log_softmax(-1)
    log_q = scores.masked_fill(hidden, -torch.inf).log_softmax(-1)
    p = log_p.exp()
    kl = (p * (log_p - log_q).masked_fill(hidden, 0.0)).sum(-1)
    difference = (target - scores).masked_fill(hidden, 0.0)
    centered = difference - (p * difference).sum(-1, keepdim=True)
    second, third, fourth = ((p * centered**order).sum(-1) for order in (2, 3, 4))
    return {
        "kl": kl,
        "gaussian": second / 2,
        "non_gaussian": kl - second / 2,
        "third_cumulant_term": -third / 6,
        "fourth_cumulant_term": (fourth - 3 * second**2) / 24,
    }


def truncation_bound(scores: SequenceScores, num_levels: int) -> torch.Tensor:
    """`(sum_l lambda_l max|s(l)|)^2 / 2` over the levels from `num_levels` on, the maximum over the row: `(H, T)`."""
    left_out = torch.zeros(scores.queries[0].shape[:2], dtype=torch.float64)
    for level in range(num_levels, scores.num_levels):
        largest = scores.level_scores(level).masked_fill(~scores.visible, 0.0).abs().amax(-1)
        left_out = left_out + scores.level_weights[:, level, None] * largest
    return left_out**2 / 2


def _targets(reference: nn.Module | torch.Tensor, batch: Mapping[str, torch.Tensor]):
    """A function from the scores of a layer and sequence to the target scores `(H, T, T)`."""
    if isinstance(reference, nn.Module):
        found = {(each.layer, each.sequence): each.scores() for each in sequence_scores(reference, batch)}
    elif isinstance(reference, torch.Tensor) and reference.dim() == 5:
        found = {
            (layer, sequence): reference[layer, sequence].to("cpu", torch.float64)
            for layer in range(reference.shape[0])
            for sequence in range(reference.shape[1])
        }
    else:
        shape = (
            f"a tensor {tuple(reference.shape)}" if isinstance(reference, torch.Tensor) else type(reference).__name__
        )
        raise TypeError(f"`reference` must be an HKT model or scores (layers, batch, heads, T, T), got {shape}")

    def target(scores: SequenceScores) -> torch.Tensor:
        values = found.get((scores.layer, scores.sequence))
        heads, length = scores.queries[0].shape[:2]
        if values is None or values.shape[0] != heads or min(values.shape[1:]) < length:
            raise ValueError(
                f"`reference` must have scores of {heads} heads and {length} tokens for layer {scores.layer}, got "
                f"{None if values is None else tuple(values.shape)}"
            )
        return values[:, :length, :length]

    return target
