"""Learning curves of a run: JSON and PNG beside the checkpoint, renewed as it goes on."""

import time
from pathlib import Path

import matplotlib
from transformers import TrainerCallback

from .files import replacing, write_json


matplotlib.use("Agg")
from matplotlib import pyplot as plt


SECONDS_BETWEEN_PLOTS = 10.0


def curves_from_log(log_history: list[dict]) -> dict[str, list[dict]]:
    """Split a Trainer's log into the entries of training and of validation.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.

    Returns:
        `dict[str, list[dict]]`: `train` (step, epoch, loss, learning_rate, grad_norm) and `validation` (step, epoch,
        loss and metrics, without the prefix `eval_`).
    """
    train = [dict(entry) for entry in log_history if "loss" in entry]
    validation = [
        {key.removeprefix("eval_"): value for key, value in entry.items()}
        for entry in log_history
        if "eval_loss" in entry
    ]
    return {"train": train, "validation": validation}


def write_curves(log_history: list[dict], folder: str | Path, metric: str, *, plot: bool = True) -> None:
    """Write `curves.json`, and with `plot` `curves.png`, into `folder`.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        folder (`str` or `Path`): an existing folder.
        metric (`str`): the validation metric to plot beside the losses, e.g. `"accuracy"`.
        plot (`bool`, *optional*, defaults to `True`): draw them, too, which takes about half a second.
    """
    folder = Path(folder)
    curves = curves_from_log(log_history)
    write_json(folder / "curves.json", curves)
    if not plot:
        return
    figure = _plot(curves, metric)
    try:
        with replacing(folder / "curves.png") as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    finally:
        plt.close(figure)


def _plot(curves: dict[str, list[dict]], metric: str):
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name in ("train", "validation"):
        steps = [entry["step"] for entry in curves[name]]
        marker = "o" if name == "validation" else None
        losses.plot(steps, [entry["loss"] for entry in curves[name]], label=name, marker=marker, markersize=4)
    losses.set(xlabel="step", ylabel="loss")
    losses.legend()
    measured = [entry for entry in curves["validation"] if metric in entry]
    scores.plot([entry["step"] for entry in measured], [entry[metric] for entry in measured], marker="o", markersize=4)
    scores.set(xlabel="step", ylabel=f"validation {metric}")
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


class CurvesCallback(TrainerCallback):
    """Renews the learning curves at every evaluation and at the end, on the main process.

    They are drawn every 10 seconds at most: short runs would else spend more time on plots than on training.
    """

    def __init__(self, folder: str | Path, metric: str):
        self.folder = Path(folder)
        self.metric = metric
        self.drawn = time.monotonic()

    def on_evaluate(self, args, state, control, **kwargs):
        """Called by the Trainer after each evaluation."""
        if state.is_world_process_zero and self.folder.is_dir():
            is_due = time.monotonic() - self.drawn >= SECONDS_BETWEEN_PLOTS
            write_curves(state.log_history, self.folder, self.metric, plot=is_due)
            if is_due:
                self.drawn = time.monotonic()

    on_train_end = on_evaluate
