"""Reciprocal and directional parts of the scores (Props. 3.5 and 3.6 of arXiv 2604.08829), level by level.

`s = (s + s^T) / 2 + (s - s^T) / 2`: the symmetric part is what two tokens have to say to each other, the antisymmetric part
tells who looks at whom. The decomposition is unique, upsampling commutes with it, and so does the convex mix.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .scores import SequenceScores, sequence_scores, spread


LOOKS_THRESHOLD = 0.05


def split(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric and antisymmetric part of square matrices `(..., n, n)`; their sum is the input."""
    transposed = scores.transpose(-1, -2)
    return (scores + transposed) / 2, (scores - transposed) / 2


def directional_report(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """How far the scores of each layer, head and level point from one token to another.

    Args:
        model (`nn.Module`): an HKT model, with or without a head.
        batch (mapping): inputs as the model takes them.

    Returns:
        `list[dict]`: one for each layer, head and level, and one whose level is `"combined"`, with the keys `layer`, `head`,
        `level`; `symmetric_norm` and `antisymmetric_norm` (Frobenius, over the sequences); `directional_ratio`,
        `||antisymmetric|| / ||scores||`, 0 to 1; `forward_share`, the weight that a query gives to later tokens less
        that to earlier ones, -1 to 1, mean over queries, by a softmax of the antisymmetric part alone, whatever a causal mask
        hides; `looks`, `"forward"` or `"back"` where that exceeds 0.05, else `"both ways"`. Of `"combined"` also `recombination_error`: the largest difference
        between the scores and the sum of the levels' upsampled and weighted parts, relative to the largest score.

    Raises:
        TypeError, ValueError: as [`~hkt_hf.analysis.scores.sequence_scores`].
    """
    sums: dict[tuple, dict[str, float]] = {}
    for scores in sequence_scores(model, batch):
        combined = scores.scores()
        for level in range(scores.num_levels):
            _add(sums, scores, level, scores.level_scores(level))
        _add(sums, scores, "combined", combined)
        difference = (recombined(scores) - combined).abs().amax((-1, -2)) / combined.abs().amax((-1, -2)).clamp_min(
            1e-300
        )
        for head, error in enumerate(difference.tolist()):
            entry = sums[scores.layer, head, "combined"]
            entry["recombination_error"] = max(entry.get("recombination_error", 0.0), error)
    report = []
    for (layer, head, level), found in sorted(sums.items(), key=lambda item: (item[0][:2], str(item[0][2]))):
        symmetric, antisymmetric = found["symmetric"] ** 0.5, found["antisymmetric"] ** 0.5
        total = (found["symmetric"] + found["antisymmetric"]) ** 0.5
        forward = found["forward"] / found["rows"]
        entry = {
            "layer": layer,
            "head": head,
            "level": level,
            "symmetric_norm": symmetric,
            "antisymmetric_norm": antisymmetric,
            "directional_ratio": antisymmetric / total if total > 0 else 0.0,
            "forward_share": forward,
            "looks": "forward" if forward > LOOKS_THRESHOLD else "back" if forward < -LOOKS_THRESHOLD else "both ways",
        }
        if level == "combined":
            entry["recombination_error"] = found["recombination_error"]
        report.append(entry)
    return report


def forward_share(scores: torch.Tensor) -> torch.Tensor:
    """Weight on later tokens less that on earlier ones by a softmax of the antisymmetric part: `(..., T, T)` to `(..., T)`."""
    weights = split(scores)[1].softmax(-1)
    return weights.triu(1).sum(-1) - weights.tril(-1).sum(-1)


def recombined(scores: SequenceScores) -> torch.Tensor:
    """The combined scores `(H, T, T)` out of the two parts of each level, split between blocks and then upsampled."""
    total = torch.zeros(1, dtype=torch.float64)
    for level in range(scores.num_levels):
        for part in split(scores.block_scores(level)):
            total = total + scores.level_weights[:, level, None, None] * spread(part, level, scores.length)
    return total


def _add(sums: dict, scores: SequenceScores, level: int | str, values: torch.Tensor) -> None:
    symmetric, antisymmetric = (part.square().sum((-1, -2)).tolist() for part in split(values))
    forward = forward_share(values).sum(-1).tolist()
    for head in range(len(values)):
        entry = sums.setdefault(
            (scores.layer, head, level), dict.fromkeys(("symmetric", "antisymmetric", "forward", "rows"), 0)
        )
        entry["symmetric"] += symmetric[head]
        entry["antisymmetric"] += antisymmetric[head]
        entry["forward"] += forward[head]
        entry["rows"] += scores.length
