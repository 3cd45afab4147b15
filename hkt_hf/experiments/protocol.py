"""What `hkt reproduce` runs for a task: its data, model and training, and how settings are searched. Read from YAML."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..config import ExperimentConfig, build_experiment, merge, parse_overrides, read_with_bases
from ..presets import check_keys
from .arms import check_arm
from .records import PROTOCOLS, SETTING_KEYS, TASK_TITLES


TASKS = tuple(TASK_TITLES)
ARMS_GIVE = (
    "objective",
    "mlm_probability",
    "model.checkpoint",
    "model.num_levels",
    "model.position_embedding_type",
    "model.hidden_dropout",
    "training.learning_rate",
    "training.weight_decay",
)
SECTIONS = ("search", "search.training", "pretraining", "pretraining.training", "arm_seeds")


@dataclass(frozen=True)
class Setting:
    """One point of the grid.

    Args:
        learning_rate (`float`): peak of the schedule, in (0, 1).
        hidden_dropout (`float`): of embeddings, attention output, feed-forward output and classifier, in [0, 1).
        weight_decay (`float`): of AdamW, in [0, 1).

    Raises:
        ValueError: a value out of range.
    """

    learning_rate: float
    hidden_dropout: float
    weight_decay: float

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"`{name}` must be a number in [0, 1), got {value!r}")
        if self.learning_rate == 0:
            raise ValueError("`learning_rate` must be greater than 0, got 0")

    def __str__(self):
        return f"lr{self.learning_rate:g}-dropout{self.hidden_dropout:g}-decay{self.weight_decay:g}"


@dataclass(frozen=True)
class Search:
    """The grid, which every arm that is searched goes through whole, and how it chooses.

    Successive halving (Jamieson and Talwalkar, arXiv 1502.07943) in two rounds: short runs of all settings, then full ones
    of the few that did best. What wins a short run need not win a long one, the learning rate above all.

    Args:
        learning_rate (sequence of `float`): values to try.
        hidden_dropout (sequence of `float`): values to try.
        weight_decay (sequence of `float`): values to try.
        seed (`int`): seed of these runs; not one of the final runs.
        training (mapping): fields of `TrainingArguments` in which the short runs differ from the final ones, e.g. fewer
            steps.
        finalists (`int`, *optional*, defaults to 0): so many learning rates, each with the dropout and decay that did
            best with it, are trained once more for as long as a final run; 0: the short runs decide.
    """

    learning_rate: Sequence[float]
    hidden_dropout: Sequence[float]
    weight_decay: Sequence[float]
    seed: int
    training: Mapping[str, Any]
    finalists: int = 0

    def __post_init__(self):
        for name in SETTING_KEYS:
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not values:
                raise ValueError(f"`search.{name}` must be a list of at least one number, got {values!r}")

    def settings(self) -> list[Setting]:
        """All points of the grid, the last field changing fastest."""
        return [
            Setting(*point) for point in itertools.product(self.learning_rate, self.hidden_dropout, self.weight_decay)
        ]


@dataclass(frozen=True)
class Pretraining:
    """Masked-LM pretraining on the training inputs of the task.

    Args:
        mlm_probability (`float`): share of tokens to mask.
        hidden_dropout (`float`): dropout while pretraining.
        training (mapping): fields of `TrainingArguments` that differ from the final runs.
    """

    mlm_probability: float
    hidden_dropout: float
    training: Mapping[str, Any]


@dataclass(frozen=True)
class Protocol:
    """How one task is reproduced.

    Args:
        task (`str`): one of `TASKS`.
        name (`str`): one of `PROTOCOLS`.
        arms (sequence of `str`): names as in [`~hkt_hf.experiments.arms.parse_arm`], in the order to run them.
        seeds (sequence of `int`): of the final runs.
        search ([`Search`]): the grid.
        pretraining ([`Pretraining`]): for the arms that are pretrained.
        experiment (mapping): nested values of an [`~hkt_hf.config.ExperimentConfig`] that all runs share.
        arm_seeds (mapping, *optional*): seeds of single arms, where they differ.
        max_run_hours (`float`, *optional*): an arm is not available where its first steps tell that a full run would take
            longer; `None` for no limit.
    """

    task: str
    name: str
    arms: Sequence[str]
    seeds: Sequence[int]
    search: Search
    pretraining: Pretraining
    experiment: Mapping[str, Any]
    arm_seeds: Mapping[str, Sequence[int]]
    max_run_hours: float | None = None

    def __post_init__(self):
        for arm in [*self.arms, *self.arm_seeds]:
            check_arm(arm)
        for seed in (self.search.seed, *self.seeds, *itertools.chain.from_iterable(self.arm_seeds.values())):
            if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
                raise ValueError(f"`seeds` and `search.seed` must be integers of at least 0, got {seed!r}")
        for seeds in (self.seeds, *self.arm_seeds.values()):
            if not seeds or len(set(seeds)) < len(seeds):
                raise ValueError(f"`seeds` must be different ones, at least one, got {list(seeds)}")
            if self.search.seed in seeds:
                raise ValueError(f"`search.seed` ({self.search.seed}) must not be one of `seeds` {list(seeds)}")
        hours = self.max_run_hours
        if hours is not None and (isinstance(hours, bool) or not isinstance(hours, int | float) or not hours > 0):
            raise ValueError(f"`max_run_hours` must be a number greater than 0, or null, got {hours!r}")
        self.search.settings()  # refuses values out of range
        finalists, rates = self.search.finalists, len(set(self.search.learning_rate))
        if isinstance(finalists, bool) or not isinstance(finalists, int) or not 0 <= finalists <= rates:
            raise ValueError(
                f"`search.finalists` must be an integer from 0 to the number of learning rates ({rates}), got {finalists!r}"
            )

    def seeds_of(self, arm: str) -> Sequence[int]:
        """Seeds of an arm's final runs."""
        return self.arm_seeds.get(arm, self.seeds)

    def max_hours_of(self, stage: str) -> float | None:
        """The limit of a run of a stage: short runs of the search have as much less as they are shorter, pretraining none."""
        if self.max_run_hours is None or stage == "pretraining":
            return None
        if stage != "search":
            return self.max_run_hours
        full, short = (self.experiment["training"], {**self.experiment["training"], **self.search.training})
        unit = next((unit for unit in ("max_steps", "num_train_epochs") if full.get(unit, 0) > 0), None)
        return self.max_run_hours * (short[unit] / full[unit] if unit and short[unit] > 0 else 1)

    def base_config(self) -> ExperimentConfig:
        """The experiment that all runs share, checked."""
        return build_experiment({"output_dir": f"runs/reproduce/{self.task}/{self.name}", **self.experiment})


def load_protocol(
    task: str,
    name: str,
    overrides: Sequence[str] = (),
    *,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> Protocol:
    """Read the packaged protocol `configs/reproduce/{task}-{name}.yaml`.

    Args:
        task (`str`): one of `TASKS`.
        name (`str`): `"cpu"` or `"paper"`, of which `"imdb-words"` has the first alone.
        overrides (sequence of `str`): command-line words such as `["--data.path", "data/imdb"]`, for any value of the
            file: `--search.learning_rate "[1e-3]"`.
        arms (sequence of `str`, *optional*): instead of those of the file.
        seeds (sequence of `int`, *optional*): instead of those of the file, for all arms.

    Raises:
        ValueError: an unknown task, protocol, arm or key (with the nearest one), or a bad value.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {list(TASKS)}, got {task!r}")
    if name not in PROTOCOLS:
        raise ValueError(f"`protocol` must be one of {list(PROTOCOLS)}, got {name!r}")
    changes = parse_overrides(overrides)
    _check_not_of_arms(changes)
    values = merge(read_with_bases(f"reproduce/{task}-{name}"), changes)
    own = ("arms", "seeds", "arm_seeds", "search", "pretraining", "max_run_hours")
    check_keys(values, [*own, *(f.name for f in fields(ExperimentConfig) if f.name not in ("seed", "output_dir"))])
    protocol = Protocol(
        task=task,
        name=name,
        arms=values["arms"] if arms is None else arms,
        seeds=values["seeds"] if seeds is None else seeds,
        search=_build(Search, values["search"], "search."),
        pretraining=_build(Pretraining, values["pretraining"], "pretraining."),
        experiment={key: value for key, value in values.items() if key not in own},
        arm_seeds=values.get("arm_seeds", {}) if seeds is None else {},
        max_run_hours=values.get("max_run_hours"),
    )
    protocol.base_config()
    return protocol


def _check_not_of_arms(changes: Mapping[str, Any]) -> None:
    """ValueError for a value that arms or the search give their runs, and for one in place of a section."""
    for path in (*SECTIONS, *ARMS_GIVE):
        value: Any = changes
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None:
            continue
        if path in ARMS_GIVE:
            raise ValueError(
                f"`{path}` can't be changed: the arms and their search (`arms`, `search`) give each run its own, got {value!r}"
            )
        if not isinstance(value, Mapping):
            raise ValueError(f"`{path}` must be a section of values, got {value!r}")
    for arm, seeds in changes.get("arm_seeds", {}).items():
        if not isinstance(seeds, list):
            raise ValueError(f"`arm_seeds.{arm}` must be a list of seeds, got {seeds!r}")


def _build(cls, values: Mapping[str, Any], prefix: str):
    check_keys(values, [f.name for f in fields(cls)], prefix=prefix)
    return cls(**values)
