"""Are queries and keys Gaussian? Mardia's tests of multivariate normality (arXiv 2604.08829, Figs. 2 and 3).

The paper reports Mardia's kurtosis `b_{2,p}` of vectors of width `p = 16`, which is `p (p + 2) = 288` for a Gaussian. Here the
vectors are the queries and keys of a head, before rotary positions turn them (ours: the paper's public text does not say).
No library that is at hand has Mardia's tests, so they stand here, with the distributions of scipy.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn
from transformers import TrainerCallback

from ..files import write_json
from .scores import sequence_scores


CHUNK = 1024


@dataclass(frozen=True)
class MardiaTest:
    """Mardia's multivariate skewness and kurtosis of a sample, with the p-values of a Gaussian.

    Args:
        num_samples, width (`int`): `n` and `p`.
        skewness (`float`): `b_{1,p}`, mean over pairs of the cubed Mahalanobis products; 0 for a Gaussian of many samples.
        kurtosis (`float`): `b_{2,p}`, mean of the squared Mahalanobis distances' squares.
        expected_kurtosis (`float`): `p (p + 2)`, of a Gaussian of many samples.
        excess (`float`): `kurtosis - expected_kurtosis`.
        skewness_p_value, kurtosis_p_value (`float`): of a Gaussian, 0 to 1.
    """

    num_samples: int
    width: int
    skewness: float
    kurtosis: float
    expected_kurtosis: float
    excess: float
    skewness_p_value: float
    kurtosis_p_value: float


def mardia_test(samples: np.ndarray | torch.Tensor) -> MardiaTest:
    """Mardia's tests (Biometrika 57, 1970), with the moments of finite samples (Sankhya B 36, 1974).

    Skewness: `n b_1 / 6` times Mardia's factor for small samples, against chi-squared with `p (p + 1) (p + 2) / 6` degrees of
    freedom. Kurtosis: `b_2` by its exact mean and variance under normality, against the standard normal, both sides. The
    covariance has the denominator `n`.

    Args:
        samples (`np.ndarray` or `torch.Tensor`): `(n, p)`, finite; `n` above `p + 1`.

    Returns:
        [`MardiaTest`]

    Raises:
        ValueError: another shape, too few samples, values that are not finite, or a singular covariance.
    """
    samples = np.asarray(samples, dtype=np.float64)
    if samples.ndim != 2 or samples.shape[1] < 1:
        raise ValueError(f"`samples` must be (samples, width), got {samples.shape}")
    n, p = samples.shape
    if n < p + 2:
        raise ValueError(f"`samples` must be at least {p + 2} of width {p} (a covariance is singular below), got {n}")
    if not np.isfinite(samples).all():
        raise ValueError("`samples` must be finite, got NaN or infinite values")
    centered = samples - samples.mean(0)
    values, vectors = np.linalg.eigh(centered.T @ centered / n)
    if _is_negligible(values, n)[0]:
        raise ValueError(
            f"`samples` lie in a subspace: their covariance is singular (eigenvalues from {values[0]:.1e})"
        )
    white = centered @ vectors / np.sqrt(values)
    kurtosis = float((np.square(white).sum(1) ** 2).mean())
    skewness = sum(float(((white[start : start + CHUNK] @ white.T) ** 3).sum()) for start in range(0, n, CHUNK)) / n**2

    factor = (p + 1) * (n + 1) * (n + 3) / (n * ((n + 1) * (p + 1) - 6))
    skewness_p_value = stats.chi2.sf(n * factor * skewness / 6, p * (p + 1) * (p + 2) / 6)
    mean = p * (p + 2) * (n - 1) / (n + 1)
    variance = 8 * p * (p + 2) * (n - 3) * (n - p - 1) * (n - p + 1) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    kurtosis_p_value = 2 * stats.norm.sf(abs(kurtosis - mean) / math.sqrt(variance))
    expected = float(p * (p + 2))
    return MardiaTest(
        n, p, skewness, kurtosis, expected, kurtosis - expected, float(skewness_p_value), float(kurtosis_p_value)
    )


def gaussianity_report(
    model: nn.Module, batch: Mapping[str, torch.Tensor], max_samples: int = 4096
) -> list[dict[str, Any]]:
    """Mardia's tests of the queries and of the keys of each layer, head and level.

    Equal tokens give equal vectors in the first layer, and neighbours are never independent: with real text the p-values say
    how far from a Gaussian sample the vectors are, not how sure that is. Where there are too few different vectors to span
    the head (rotary positions and a small vocabulary, in the first layer) the test is that of the space they span.

    Args:
        model (`nn.Module`): an HKT model, with or without a head.
        batch (mapping): inputs as the model takes them; all blocks of all sequences are samples.
        max_samples (`int`, *optional*, defaults to 4096): more are thinned out evenly.

    Returns:
        `list[dict]`: keys `layer`, `head`, `level`, `of` (`"queries"` or `"keys"`), those of [`MardiaTest`], whose `width` is
        the dimension of the space that the vectors span.

    Raises:
        TypeError, ValueError: as [`~hkt_hf.analysis.scores.sequence_scores`], or too few blocks at a level; the message says at
            which.
    """
    report = []
    for (layer, head, level, of), samples in head_vectors(model, batch).items():
        step = -(-len(samples) // max_samples)
        try:
            found = mardia_test(_on_their_span(samples[::step]))
        except ValueError as error:
            raise ValueError(
                f"layer {layer}, head {head}, level {level}, {of}: {error}; give a larger `batch`"
            ) from None
        report.append({"layer": layer, "head": head, "level": level, "of": of, **asdict(found)})
    return report


def _on_their_span(samples: np.ndarray) -> np.ndarray:
    """Coordinates `(n, r)` of samples `(n, p)` in the space of dimension `r` that they span around their mean."""
    values, vectors = np.linalg.eigh(np.cov(samples, rowvar=False, ddof=0))
    return samples @ vectors[:, ~_is_negligible(values, len(samples))]


def _is_negligible(eigenvalues: np.ndarray, num_samples: int) -> np.ndarray:
    """Which eigenvalues, ascending, of a covariance are zero but for rounding."""
    return eigenvalues <= eigenvalues[-1] * num_samples * np.finfo(float).eps


def head_vectors(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[tuple, np.ndarray]:
    """Queries and keys before rotation, `(blocks, p)` float64, by `(layer, head, level, "queries" or "keys")`."""
    found: dict[tuple, list[np.ndarray]] = {}
    for scores in sequence_scores(model, batch, rotate=False):
        for of, levels in (("queries", scores.queries), ("keys", scores.keys)):
            for level, states in enumerate(levels):
                for head, vectors in enumerate(states):
                    found.setdefault((scores.layer, head, level, of), []).append(vectors.numpy())
    return {key: np.concatenate(vectors) for key, vectors in sorted(found.items())}


class GaussianityCallback(TrainerCallback):
    """Records [`gaussianity_report`] before training and after each epoch.

    Args:
        batch (mapping): inputs that stay the same.
        path (`str` or `Path`): JSON file, a list of `{"epoch", "step", "report"}`; a resumed run adds to it.
    """

    def __init__(self, batch: Mapping[str, torch.Tensor], path: str | Path):
        self.batch = batch
        self.path = Path(path)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Called by the Trainer."""
        self._record(state, model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        """Called by the Trainer."""
        self._record(state, model)

    def _record(self, state, model) -> None:
        if not state.is_world_process_zero:
            return
        history = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else []
        # Of a run that goes on from an earlier step what came after it is written anew.
        history = [entry for entry in history if entry["step"] < state.global_step]
        entry = {"epoch": state.epoch or 0.0, "step": state.global_step}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, [*history, {**entry, "report": gaussianity_report(model, self.batch)}])


def by_width(
    build: Callable[[int], nn.Module], widths: Sequence[int], batch: Mapping[str, torch.Tensor], **kwargs
) -> list[dict[str, Any]]:
    """[`gaussianity_report`] of untrained models of several widths.

    Args:
        build (`Callable`): from a width to a model.
        widths (sequence of `int`): to try.
        batch (mapping): inputs, the same for all.
        kwargs: of [`gaussianity_report`].

    Returns:
        `list[dict]`: entries of the reports, each with the key `hidden_size`.
    """
    return [
        {"hidden_size": width, **entry}
        for width in widths
        for entry in gaussianity_report(build(width), batch, **kwargs)
    ]
