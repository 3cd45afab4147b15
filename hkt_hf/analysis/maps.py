"""Who looks at whom: attention maps level by level, and how wide each level looks (ours)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .scores import sequence_scores


COMBINED = "combined"


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of all layers on one sequence.

    Args:
        tokens (sequence of `str`): the `T` tokens.
        weights (`np.ndarray`): float64 `(layers, L + 1, H, T, T)`, rows sum to 1: what each level would attend to by a softmax
            of its own scores, and last the combined attention of the model.
        level_weights (`np.ndarray`): float64 `(layers, H, L)`, how the levels' scores are mixed.
    """

    tokens: Sequence[str]
    weights: np.ndarray
    level_weights: np.ndarray

    @property
    def level_names(self) -> list[str]:
        """Names along the second dimension of `weights`."""
        return [*(f"level {level}" for level in range(self.level_weights.shape[2])), COMBINED]


def attention_maps(
    model: nn.Module, batch: Mapping[str, torch.Tensor], tokens: Sequence[str] | None = None, sequence: int = 0
) -> AttentionMaps:
    """Attention maps of one sequence of a batch.

    Args:
        model (`nn.Module`): an HKT model, with or without a head.
        batch (mapping): inputs as the model takes them.
        tokens (sequence of `str`, *optional*): names of the sequence's real tokens; by default their positions.
        sequence (`int`, *optional*, defaults to 0): which sequence of the batch.

    Raises:
        TypeError, ValueError: as [`~hkt_hf.analysis.scores.sequence_scores`], a sequence that the batch does not have, or
            another number of tokens.
    """
    layers = [scores for scores in sequence_scores(model, batch) if scores.sequence == sequence]
    if not layers:
        raise ValueError(f"`sequence` must be one of the batch with real tokens, got {sequence}")
    length = layers[0].length
    tokens = [str(position) for position in range(length)] if tokens is None else list(tokens)
    if len(tokens) != length:
        raise ValueError(f"`tokens` must name the {length} tokens of the sequence, got {len(tokens)}")
    weights = [
        torch.stack(
            [
                *(each.attention(each.level_scores(level)) for level in range(each.num_levels)),
                each.attention(each.scores()),
            ]
        )
        for each in layers
    ]
    return AttentionMaps(
        tokens, torch.stack(weights).numpy(), torch.stack([each.level_weights for each in layers]).numpy()
    )


def focus_report(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """How sharp and how far each layer, head and level looks.

    Args:
        model (`nn.Module`): an HKT model, with or without a head.
        batch (mapping): inputs as the model takes them.

    Returns:
        `list[dict]`: one for each layer, head and level, and one whose level is `"combined"`, with the keys `layer`, `head`,
        `level`; `level_weight`, of the level in the mix (1 for `"combined"`); `entropy`, mean over queries in nats, and
        `relative_entropy`, as a share of that of attending to all visible tokens alike; `mean_distance`, mean of `|i - j|` in
        tokens under the attention, and `relative_distance`, as a share of that of attending to all alike. Of a level it
        is the attention by its own scores alone.

    Raises:
        TypeError, ValueError: as [`~hkt_hf.analysis.scores.sequence_scores`].
    """
    sums: dict[tuple, np.ndarray] = {}
    level_weights: dict[tuple, float] = {}
    for scores in sequence_scores(model, batch):
        positions = torch.arange(scores.length, dtype=torch.float64)
        distance = (positions[:, None] - positions).abs()
        even = scores.attention(torch.zeros(1, scores.length, scores.length, dtype=torch.float64))[0]
        even_entropy, even_distance = (
            even.log().neg().masked_fill(~scores.visible, 0.0).amax(-1),
            (even * distance).sum(-1),
        )
        for level in (*range(scores.num_levels), COMBINED):
            weights = scores.attention(scores.scores() if level == COMBINED else scores.level_scores(level))
            entropy = torch.special.entr(weights).sum(-1)
            found = torch.stack(
                [
                    *(entropy, even_entropy.expand_as(entropy)),
                    *((weights * distance).sum(-1), even_distance.expand_as(entropy)),
                    torch.ones_like(entropy),
                ]
            ).sum(-1)
            for head in range(len(weights)):
                key = scores.layer, head, level
                sums[key] = sums.get(key, 0.0) + found[:, head].numpy()
                level_weights[key] = 1.0 if level == COMBINED else scores.level_weights[head, level].item()
    report = []
    for (layer, head, level), (entropy, even_entropy, distance, even_distance, rows) in sums.items():
        report.append(
            {
                "layer": layer,
                "head": head,
                "level": level,
                "level_weight": level_weights[layer, head, level],
                "entropy": entropy / rows,
                "relative_entropy": entropy / even_entropy if even_entropy > 0 else 1.0,
                "mean_distance": distance / rows,
                "relative_distance": distance / even_distance if even_distance > 0 else 1.0,
            }
        )
    return sorted(report, key=lambda entry: (entry["layer"], entry["head"], str(entry["level"])))
