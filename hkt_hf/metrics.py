"""Metrics of the three problem types, as modules of `evaluate` that need no network, and of masked language models."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch.nn import functional as F


_CITATION = ""


class _LocalMetric(evaluate.Metric):
    """A metric defined in this file: `evaluate.load` would fetch its script from the Hub."""

    description = ""
    dtype = "int64"
    sequence = False

    def __init__(self):
        super().__init__(keep_in_memory=True, experiment_id=type(self).__name__)

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value(self.dtype)
        value = datasets.Sequence(value) if self.sequence else value
        return evaluate.MetricInfo(
            description=self.description,
            citation=_CITATION,
            features=datasets.Features({"predictions": value, "references": value}),
        )


class Accuracy(_LocalMetric):
    """Share of predictions that equal their reference, in [0, 1]; predictions and references are class ids `(N,)`."""

    description = "share of correct predictions"

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MultiLabel(_LocalMetric):
    """Micro-averaged F1 and share of rows with every label right; rows are 0/1 vectors `(N, num_labels)`."""

    description = "micro-averaged F1 and exact match"
    sequence = True

    def _compute(self, predictions, references) -> dict[str, float]:
        predictions, references = np.asarray(predictions, dtype=bool), np.asarray(references, dtype=bool)
        hits = np.sum(predictions & references)
        total = predictions.sum() + references.sum()
        return {
            "f1_micro": float(2 * hits / total) if total else 1.0,
            "exact_match": float(np.mean((predictions == references).all(axis=1))),
        }


class Regression(_LocalMetric):
    """Mean squared and mean absolute error; predictions and references are numbers `(N,)`."""

    description = "mean squared and mean absolute error"
    dtype = "float64"

    def _compute(self, predictions, references) -> dict[str, float]:
        error = np.asarray(predictions, dtype=np.float64) - np.asarray(references, dtype=np.float64)
        return {"mse": float(np.mean(error**2)), "mae": float(np.mean(np.abs(error)))}


# What is measured, by problem type of transformers; the first is the one that tables and curves show.
METRIC_NAMES = {
    "single_label_classification": ("accuracy",),
    "multi_label_classification": ("f1_micro", "exact_match"),
    "regression": ("mse", "mae"),
}
MASKED_LM_METRIC_NAMES = ("masked_accuracy", "perplexity")
# Of all these, the ones that are best when low.
ERRORS = ("mse", "mae", "perplexity")


def compute_metrics_for(problem_type: str):
    """The `compute_metrics` function that a `Trainer` wants, for a problem type of transformers.

    Args:
        problem_type (`str`): `"single_label_classification"`, `"multi_label_classification"` or `"regression"`.

    Returns:
        A function from an `EvalPrediction` (logits `(N, num_labels)`, labels) to a dict of floats, `loss` among them.

    Raises:
        ValueError: unknown problem type.
    """
    if problem_type not in METRIC_NAMES:
        raise ValueError(f"`problem_type` must be one of {sorted(METRIC_NAMES)}, got {problem_type!r}")
    metric = {
        "single_label_classification": Accuracy,
        "multi_label_classification": MultiLabel,
        "regression": Regression,
    }[problem_type]()

    def predictions_of(logits: np.ndarray) -> Any:
        if problem_type == "single_label_classification":
            return logits.argmax(axis=-1)
        if problem_type == "multi_label_classification":
            return (logits > 0).astype(np.int64)
        return logits.reshape(-1)

    def compute_metrics(prediction) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        if problem_type == "multi_label_classification":
            labels = labels.astype(np.int64)
        predictions = predictions_of(logits)
        values = metric.compute(predictions=predictions, references=labels.reshape(predictions.shape))
        # In place of the Trainer's own, in which rows count twice that fill up the last batch of several processes.
        return {**values, "loss": mean_loss(problem_type, logits, prediction.label_ids)}

    return compute_metrics


def mean_loss(problem_type: str, logits: np.ndarray, labels: np.ndarray) -> float:
    """The loss that the models of transformers compute, over all rows at once.

    Args:
        problem_type (`str`): as in [`compute_metrics_for`].
        logits (`np.ndarray`): `(N, num_labels)`.
        labels (`np.ndarray`): `(N,)`, or `(N, num_labels)` for several labels.
    """
    logits, labels = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.flatten().long()).item()
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.double()).item()
    return F.mse_loss(logits.flatten(), labels.double().flatten()).item()


def sum_masked_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Reduce the logits of a batch to what [`masked_lm_metrics`] needs; all of them would not fit into memory.

    Args:
        logits (`torch.FloatTensor` of shape `(B, T, vocab_size)`): scores of a masked language model.
        labels (`torch.LongTensor` of shape `(B, T)`): ids of the masked tokens, -100 elsewhere.

    Returns:
        `torch.FloatTensor` of shape `(B, 3)`: a row's negative log-likelihood, tokens told rightly, and masked tokens.
    """
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    hits = logits.argmax(dim=-1) == labels
    return torch.stack([losses.sum(1), hits.sum(1).float(), (labels != -100).sum(1).float()], dim=1)


def masked_lm_metrics(prediction) -> dict[str, float]:
    """Mean loss of a masked token, its exponential and the share of tokens told rightly, from [`sum_masked_tokens`].

    `loss` takes the place of the Trainer's own, which is the mean of the batches' means: it would depend on their size.
    """
    loss, hits, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    return {
        "loss": float(loss / tokens),
        "masked_accuracy": float(hits / tokens),
        "perplexity": float(np.exp(loss / tokens)),
    }
