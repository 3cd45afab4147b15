"""Does masked-language-model pretraining pay? Three arms on the same training texts are compared.

- `pretrained`: masked-LM pretraining without labels, then fine-tuning as a classifier;
- `scratch`: as many steps of classification from a fresh model (the same budget);
- `short`: the steps of fine-tuning alone, from a fresh model (what pretraining adds at the same fine-tuning).

A step is one batch of equally many texts in each, so `pretrained` and `scratch` see as many tokens, up to the chance of
which texts come. The learning rate of classification is chosen for each arm from the same values, by the accuracy on
validation of runs with a seed of their own. Test accuracies are read from the final runs alone.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib

from ..config import ExperimentConfig
from ..objectives import MaskedLM, SequenceClassification
from ..training import train
from .statistics import paired_difference


matplotlib.use("Agg")
from matplotlib import pyplot as plt


logger = logging.getLogger(__name__)

ARMS = ("pretrained", "scratch", "short")


@dataclass(frozen=True)
class Protocol:
    """How the two arms are run.

    Args:
        pretrain_steps (`int`): steps of masked-LM pretraining, at least 1.
        finetune_steps (`int`): steps of fine-tuning; from scratch there are as many and those of pretraining.
        pretrain_learning_rate (`float`): learning rate of pretraining, which is not searched.
        learning_rates (sequence of `float`): learning rates of classification to try in each arm.
        seeds (sequence of `int`): one final run an arm and seed, at least two.
        search_seed (`int`): seed of the runs that choose the learning rates.

    Raises:
        ValueError: too few steps or seeds, no learning rate, or a search seed that is among the seeds.
    """

    pretrain_steps: int
    finetune_steps: int
    pretrain_learning_rate: float
    learning_rates: Sequence[float]
    seeds: Sequence[int] = (0, 1, 2)
    search_seed: int = 100

    def __post_init__(self):
        for name in ("pretrain_steps", "finetune_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)!r}")
        if not self.learning_rates or min(self.learning_rates) <= 0 or self.pretrain_learning_rate <= 0:
            raise ValueError(
                f"`learning_rates` and `pretrain_learning_rate` must be greater than 0, got {list(self.learning_rates)} "
                f"and {self.pretrain_learning_rate!r}"
            )
        if len(set(self.seeds)) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must be at least two different ones for an interval, got {list(self.seeds)}")
        if self.search_seed in self.seeds:
            raise ValueError(f"`search_seed` ({self.search_seed}) must not be one of `seeds` {list(self.seeds)}")


def pretrain_then_finetune(config: ExperimentConfig, protocol: Protocol) -> dict:
    """Run the experiment; runs that are finished are kept, one that was interrupted is continued.

    Args:
        config ([`ExperimentConfig`]): a classifier from scratch: model, data and training but for steps, seed and
            learning rate. Its `output_dir` gets one folder a run.
        protocol ([`Protocol`]): how the two arms are run.

    Returns:
        `dict`: for each arm the learning rate chosen, and for each seed its test accuracy and loss, curve on validation,
        tokens and seconds (of classification, and of `pretraining`); the paired `difference` of test accuracies between
        `pretrained` and each other arm, with its interval; the search, and what made the result.

    Raises:
        ValueError: a configuration that is not of a classifier from scratch, or whose labels are not single classes.
    """
    if config.objective != SequenceClassification.name or "checkpoint" in config.model:
        raise ValueError("`config` must be that of a classifier from scratch: no other `objective`, no checkpoint")
    runs = _Runs(config, protocol)
    search = {
        arm: {rate: runs.classify(arm, protocol.search_seed, rate)["validation"] for rate in protocol.learning_rates}
        for arm in ARMS
    }
    if "accuracy" not in search["scratch"][protocol.learning_rates[0]]:
        raise ValueError("the labels must be single classes: the arms are compared by accuracy")
    chosen = {arm: max(tried, key=lambda rate, tried=tried: tried[rate]["accuracy"]) for arm, tried in search.items()}
    reports = {arm: [runs.classify(arm, seed, chosen[arm]) for seed in protocol.seeds] for arm in ARMS}
    accuracies = {arm: [report["test"]["accuracy"] for report in of_seeds] for arm, of_seeds in reports.items()}
    pretraining = [runs.pretrain(seed) for seed in protocol.seeds]
    curves = {arm: [runs.curve(arm, seed, chosen[arm]) for seed in protocol.seeds] for arm in ARMS}
    return {
        "test_accuracy": accuracies,
        "difference": {
            control: paired_difference(accuracies["pretrained"], accuracies[control])
            for control in ("scratch", "short")
        },
        "test_loss": {arm: [report["test"]["loss"] for report in of_seeds] for arm, of_seeds in reports.items()},
        "learning_rate": chosen,
        "search": {
            arm: {f"{rate:g}": measured["accuracy"] for rate, measured in tried.items()}
            for arm, tried in search.items()
        },
        "masked_lm": [report["test"] for report in pretraining],
        "steps": {
            "pretrained": [protocol.pretrain_steps, protocol.finetune_steps],
            "scratch": [protocol.pretrain_steps + protocol.finetune_steps],
            "short": [protocol.finetune_steps],
        },
        "tokens": {arm: [runs.tokens(arm, seed, chosen[arm]) for seed in protocol.seeds] for arm in ARMS},
        "seconds": {
            "pretraining": [report["seconds"] for report in pretraining],
            **{arm: [report["seconds"] for report in of_seeds] for arm, of_seeds in reports.items()},
        },
        "validation_curves": curves,
        "protocol": asdict(protocol),
        "config": config.to_dict(),
        "parameters": reports["scratch"][0]["parameters"],
        **{key: reports["scratch"][0][key] for key in ("versions", "machine", "commit")},
    }


class _Runs:
    """The runs of an experiment, each in its own folder."""

    def __init__(self, config: ExperimentConfig, protocol: Protocol):
        self.config = config
        self.protocol = protocol

    def pretrain(self, seed: int) -> dict:
        steps, rate = self.protocol.pretrain_steps, self.protocol.pretrain_learning_rate
        return self._train(self._folder("pretraining", seed), steps, seed, rate, objective=MaskedLM.name)

    def classify(self, arm: str, seed: int, learning_rate: float) -> dict:
        folder = self._folder(arm, seed, learning_rate)
        steps, model = self.protocol.finetune_steps, self.config.model
        if arm == "pretrained":
            self.pretrain(seed)
            model = {"checkpoint": str(self._folder("pretraining", seed))}
        elif arm == "scratch":
            steps += self.protocol.pretrain_steps
        return self._train(folder, steps, seed, learning_rate, model=model)

    def curve(self, arm: str, seed: int, learning_rate: float) -> dict[str, list]:
        """Accuracy on validation by step; the steps of pretraining are counted."""
        before = self.protocol.pretrain_steps if arm == "pretrained" else 0
        entries = self._log(self._folder(arm, seed, learning_rate), "validation")
        return {
            "step": [before + entry["step"] for entry in entries],
            "accuracy": [entry["accuracy"] for entry in entries],
        }

    def tokens(self, arm: str, seed: int, learning_rate: float) -> int:
        """Tokens trained on, padding not counted."""
        folders = [self._folder(arm, seed, learning_rate)]
        if arm == "pretrained":
            folders.append(self._folder("pretraining", seed))
        return sum(self._log(folder, "train")[-1]["num_input_tokens_seen"] for folder in folders)

    def _train(self, folder: Path, steps: int, seed: int, learning_rate: float, **changes) -> dict:
        logger.info("%s", folder)
        training = {
            **self.config.training,
            "max_steps": steps,
            "learning_rate": learning_rate,
            "include_num_input_tokens_seen": "non_padding",
        }
        if changes.get("objective") == MaskedLM.name:
            changes["mlm_probability"] = 0.15
        return train(replace(self.config, output_dir=str(folder), seed=seed, training=training, **changes))

    def _folder(self, name: str, seed: int, learning_rate: float | None = None) -> Path:
        rate = "" if learning_rate is None else f"-lr{learning_rate:g}"
        return Path(self.config.output_dir) / f"{name}{rate}-seed{seed}"

    @staticmethod
    def _log(folder: Path, part: str) -> list[dict]:
        return json.loads((folder / "curves.json").read_text(encoding="utf-8"))[part]


def plot(result: dict, path: str | Path) -> None:
    """Draw the accuracy on validation of every run, against all steps spent.

    Args:
        result (`dict`): of [`pretrain_then_finetune`].
        path (`str` or `Path`): PNG file to write.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    labels = {
        "pretrained": "masked-LM pretraining, then fine-tuning",
        "scratch": "from scratch, the same steps",
        "short": "from scratch, the steps of fine-tuning",
    }
    for arm, color in zip(ARMS, ("tab:orange", "tab:blue", "tab:gray"), strict=True):
        for number, curve in enumerate(result["validation_curves"][arm]):
            label = labels[arm] if number == 0 else None
            axes.plot(curve["step"], curve["accuracy"], color=color, marker=".", linewidth=1, label=label)
    axes.axvline(result["protocol"]["pretrain_steps"], color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="steps, pretraining included", ylabel="validation accuracy")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center")
    figure.savefig(path, dpi=120)
    plt.close(figure)
