"""Is the score a positive semidefinite kernel? The condition is Prop. 3.1 of arXiv 2604.08829; spectra and verdicts are ours.

Per level and head the score of two features `x`, `y` is the bilinear form `x^T M y` with `M = WQ^T WK`. If the symmetric
part `B = (M + M^T) / 2` is positive semidefinite (PSD) at every level, the symmetric part of the combined scores is a PSD
kernel on every input: upsampling and convex combination keep that. The condition is sufficient, not necessary. With rotary
positions it is not even sufficient, since queries and keys are turned by different angles. Projections with linearly
independent rows, all of them together, never meet it: then `x^T M x` is a sum of products of independent coordinates, each a
difference of squares, and half of the eigenvalues that are not zero are negative (Sylvester's law of inertia).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .scores import attention_layers, sequence_scores


RELATIVE_TOLERANCE = 1e-6
HOLDS, FAILS = "condition holds", "condition fails"
PSD_ANYWAY = "PSD although the condition fails"
UNDECIDED = "undecided by the projections"
PSD, INDEFINITE = "PSD", "indefinite"


def kernel_report(model: nn.Module, batch: Mapping[str, torch.Tensor] | None = None) -> list[dict[str, Any]]:
    """Spectra that decide whether scores are a PSD kernel, for every layer, head and level.

    Args:
        model (`nn.Module`): an HKT model, with or without a head.
        batch (mapping, *optional*): inputs as the model takes them. With them, the symmetric part of the combined scores
            is looked at, too.

    Returns:
        `list[dict]`: one for each layer, head and level, with the keys `layer`, `head`, `level`, `min_eigenvalue` and
        `max_eigenvalue` of `B`, `negative_fraction` (of those eigenvalues that its rank allows to be other than zero: at most
        twice the head width) and `verdict`: `"condition holds"`, `"condition fails"`, or with rotary positions
        `"undecided by the projections"` (with `score_symmetry="psd"` it holds with these, too). An eigenvalue counts as
        negative below -1e-6 of the largest absolute one. With projections that have biases, `B` is of features with a
        constant 1 appended.

        With a batch also one for each layer and head whose level is `"combined"`: the extreme eigenvalues over the
        sequences, the negative fraction of all, and as verdict `"condition holds"`, `"PSD although the condition fails"`
        or `"condition fails"` (the scores are indefinite), with rotary positions `"PSD"` or `"indefinite"`.

    Raises:
        TypeError, ValueError: as [`~hkt_hf.analysis.scores.sequence_scores`].
    """
    layers = attention_layers(model)
    report = [entry for layer in layers for level in range(layer.num_levels) for entry in _projections(layer, level)]
    report.sort(key=lambda entry: (entry["layer"], entry["head"], entry["level"]))
    if batch is None:
        return report
    spectra: dict[tuple[int, int], list[torch.Tensor]] = {}
    for scores in sequence_scores(model, batch):
        combined = scores.scores()
        eigenvalues = torch.linalg.eigvalsh((combined + combined.transpose(-1, -2)) / 2)
        for head, of_head in enumerate(eigenvalues):
            spectra.setdefault((scores.layer, head), []).append(of_head)
    for (layer, head), of_sequences in spectra.items():
        verdicts = {entry["verdict"] for entry in report if (entry["layer"], entry["head"]) == (layer, head)}
        # A sequence is PSD or not by its own scale.
        is_psd = all(_is_psd(eigenvalues) for eigenvalues in of_sequences)
        if UNDECIDED in verdicts:
            verdict = PSD if is_psd else INDEFINITE
        elif verdicts == {HOLDS}:
            verdict = HOLDS if is_psd else FAILS
        else:
            verdict = PSD_ANYWAY if is_psd else FAILS
        negative = sum((~_not_negative(each)).sum().item() for each in of_sequences)
        report.append(
            {
                "layer": layer,
                "head": head,
                "level": "combined",
                "min_eigenvalue": min(each[0].item() for each in of_sequences),
                "max_eigenvalue": max(each[-1].item() for each in of_sequences),
                "negative_fraction": negative / sum(map(len, of_sequences)),
                "verdict": verdict,
            }
        )
    return report


@torch.no_grad()
def bilinear_forms(layer: nn.Module, level: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key projections of a level, float64 `(H, p, d)`: the form of a head is `WQ^T WK`.

    With biases `d + 1` columns: they act on features with a constant 1 appended.

    Args:
        layer (`nn.Module`): an `HKTAttention`.
        level (`int`): which level.
    """
    projection = min(level, len(layer.q_proj) - 1)

    def by_head(linear: nn.Linear) -> torch.Tensor:
        weight = linear.weight if linear.bias is None else torch.cat([linear.weight, linear.bias[:, None]], dim=1)
        return weight.to("cpu", torch.float64).unflatten(0, (layer.num_heads, layer.head_dim))

    query = by_head(layer.q_proj[projection])
    if layer.score_symmetry == "none":
        return query, by_head(layer.k_proj[projection])
    if layer.score_symmetry == "psd":
        return query, query
    factors = layer.key_factors[projection].to("cpu", torch.float64)
    return query, query * factors.repeat(1, layer.head_dim // factors.shape[-1])[:, :, None]


def symmetric_spectrum(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Eigenvalues, ascending, of the symmetric part of `WQ^T WK`: those that its rank allows to be other than zero.

    Args:
        query, key (`torch.Tensor`): `(..., p, d)` each.

    Returns:
        `torch.Tensor`: `(..., min(d, 2 * p))`.
    """
    # In an orthonormal basis of the rows of both.
    _, triangle = torch.linalg.qr(torch.cat([query, key], dim=-2).transpose(-1, -2))
    query, key = triangle.split(query.shape[-2], dim=-1)
    form = query @ key.transpose(-1, -2)
    return torch.linalg.eigvalsh((form + form.transpose(-1, -2)) / 2)


def _projections(layer: nn.Module, level: int) -> list[dict[str, Any]]:
    spectra = symmetric_spectrum(*bilinear_forms(layer, level))
    has_rotation = layer.config.position_embedding_type == "rope"
    entries = []
    for head, eigenvalues in enumerate(spectra):
        verdict = HOLDS if _is_psd(eigenvalues) else FAILS
        if has_rotation and layer.score_symmetry != "psd":
            verdict = UNDECIDED
        entries.append(
            {
                "layer": layer.layer_idx,
                "head": head,
                "level": level,
                "min_eigenvalue": eigenvalues[0].item(),
                "max_eigenvalue": eigenvalues[-1].item(),
                "negative_fraction": (~_not_negative(eigenvalues)).double().mean().item(),
                "verdict": verdict,
            }
        )
    return entries


def _not_negative(eigenvalues: torch.Tensor) -> torch.Tensor:
    return eigenvalues >= -RELATIVE_TOLERANCE * eigenvalues.abs().max()


def _is_psd(eigenvalues: torch.Tensor) -> bool:
    return bool(_not_negative(eigenvalues).all())
