"""The records of `hkt reproduce`, one JSON file a run: read, checked, and put together by task, protocol and arm."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np


TASK_TITLES = {
    "listops": "ListOps",
    "cifar10": "sequential CIFAR-10",
    "imdb": "character IMDB",
    "imdb-words": "IMDB in subwords",
}
PROTOCOLS = ("cpu", "paper")
POSITION_TITLES = {"absolute": "absolute", "rope": "RoPE", None: ""}
SEARCH_STAGES = ("search", "finalist")
STAGES = ("pretraining", *SEARCH_STAGES, "final")
FINISHED, FAILED, NOT_AVAILABLE = "finished", "failed", "not_available"
SETTING_KEYS = ("learning_rate", "hidden_dropout", "weight_decay")
PRETRAINED = "-pretrained"

_NUMBER = (int, float)
_NONE = type(None)
_TYPES = {
    "task": str,
    "protocol": str,
    "arm": str,
    "num_levels": (int, _NONE),
    "position_embedding_type": (str, _NONE),
    "stage": str,
    "seed": int,
    "setting": (dict, _NONE),
    "status": str,
    "reason": (str, _NONE),
    "validation_accuracy": (*_NUMBER, _NONE),
    "test_accuracy": (*_NUMBER, _NONE),
    "config": dict,
    "pretraining": (dict, _NONE),
    "threads": (int, _NONE),
}
# What is measured: a run that did not finish may lack them.
_MEASURED_TYPES = {
    "curve": dict,
    "seconds": _NUMBER,
    "memory": (int, _NONE),
    "parameters": int,
    "tokens": int,
    "versions": dict,
    "machine": (str, _NONE),
    "commit": (str, _NONE),
}
# Of a classifier.
_CLASSIFIER_TYPES = {"flops": (*_NUMBER, _NONE), "num_test": int, "validation_loss": _NUMBER}
_CHOICES = {
    "task": tuple(TASK_TITLES),
    "protocol": PROTOCOLS,
    "position_embedding_type": tuple(POSITION_TITLES),
    "stage": STAGES,
    "status": (FINISHED, FAILED, NOT_AVAILABLE),
}


def read_records(folder: str | Path) -> list[dict]:
    """All records below a folder, in an order that does not depend on the names of their files.

    Args:
        folder (`str` or `Path`): every `*.json` file in it and in its subfolders is the record of one run.

    Returns:
        `list[dict]`: the records as [`check_record`] describes them.

    Raises:
        FileNotFoundError: no such folder, or no JSON file in it.
        ValueError: a file that is no record; two records of the same run; final runs of one task and protocol with
            test splits of different sizes, or with different data. The message names the files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"`results` {folder} is no folder; `hkt reproduce` writes its records to one")
    paths = sorted(folder.rglob("*.json"))
    if not paths:
        raise FileNotFoundError(f"`results` {folder} holds no record (*.json); `hkt reproduce` writes them")
    found: dict[tuple, tuple[Path, dict]] = {}
    sizes: dict[tuple, tuple[Path, int]] = {}
    fingerprints: dict[tuple, tuple[Path, str]] = {}
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        check_record(record, path)
        run = _run(record)
        if run in found:
            raise ValueError(f"{found[run][0]} and {path} are records of the same run: keep one")
        found[run] = path, record
        if record["test_accuracy"] is not None:
            first, size = sizes.setdefault(run[:2], (path, record["num_test"]))
            if size != record["num_test"]:
                raise ValueError(
                    f"{first} and {path} were tested on {size} and {record['num_test']} examples: runs of one task and "
                    "protocol must share their test split"
                )
        if record.get("data_fingerprint") is not None:
            first, fingerprint = fingerprints.setdefault(run[:2], (path, record["data_fingerprint"]))
            if fingerprint != record["data_fingerprint"]:
                raise ValueError(
                    f"{first} and {path} are of different data or tokenizers: runs of one task and protocol must share them"
                )
    return [record for _, (_, record) in sorted(found.items(), key=lambda item: repr(item[0]))]


def check_record(record: object, path: str | Path) -> None:
    """Check that what a file holds is the record of a run.

    Keys of all: `task`, `protocol`, `arm`, `num_levels`, `position_embedding_type` (`None` for models of other kinds),
    `stage` (`"pretraining"`; `"search"` and `"finalist"`: the short and the full runs that choose the setting; `"final"`),
    `seed`, `setting` (learning_rate, hidden_dropout, weight_decay; `None` for pretraining, and where the search gave none),
    `status` with `reason`,
    `validation_accuracy`, `test_accuracy` (of finished final runs alone), `config`, `pretraining` (steps, seconds and
    masked_accuracy of what the run began from) and `threads`.

    Keys of those that finished: `curve` (`train`: step, loss; `validation`: step, loss, accuracy, seconds, and for HKT
    level_weights as `[layer][head][level]`), `seconds` of the run, `memory` (peak bytes), `parameters`, `tokens`
    (trained on, without padding), `versions`, `machine`, `commit`; but for pretraining also `flops` (forward, one
    sequence of the longest length), `num_test` and `validation_loss`. Used where they are: `step_seconds` (those of training
    steps alone), `rank` (of a finalist) and `data_fingerprint` ([`~hkt_hf.experiments.run.data_fingerprint`]). Others are let
    pass.

    Args:
        record (`object`): what the file holds.
        path (`str` or `Path`): its name, for messages.

    Raises:
        ValueError: not a record; the message names the file, the key, its value and what would be right.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{path} is no record of `hkt reproduce`: it holds {type(record).__name__}, not an object")
    _check_types(record, path, _TYPES)

    def refuse(key: str, wanted: str) -> None:
        raise ValueError(f"{path}: `{key}` must be {wanted}, got {str(record[key])[:80]!r}")

    for key, choices in _CHOICES.items():
        if record[key] not in choices:
            refuse(key, f"one of {', '.join(map(str, choices))}")
    stage, is_finished = record["stage"], record["status"] == FINISHED
    if is_finished:
        _check_types(record, path, _MEASURED_TYPES | ({} if stage == "pretraining" else _CLASSIFIER_TYPES))
        if not all(isinstance(record["curve"].get(part), list) for part in ("train", "validation")):
            refuse("curve", "an object with the lists `train` and `validation`")
    elif not record["reason"]:
        refuse("reason", f"a text for a run that is {record['status']}")
    setting = record["setting"]
    if stage == "pretraining":
        if setting is not None:
            refuse("setting", "null for pretraining")
    elif setting is None and not is_finished:
        pass  # nothing gave it one
    elif (
        setting is None
        or set(setting) != set(SETTING_KEYS)
        or not all(isinstance(value, _NUMBER) for value in setting.values())
    ):
        refuse("setting", f"numbers for {_names(SETTING_KEYS)}")
    for key, wanted in (
        ("validation_accuracy", is_finished and stage != "pretraining"),
        ("test_accuracy", is_finished and stage == "final"),
    ):
        if wanted and (record[key] is None or not 0 <= record[key] <= 1):
            refuse(key, f"between 0 and 1 for a finished {stage} run")
    if record["test_accuracy"] is not None and not (is_finished and stage == "final"):
        refuse("test_accuracy", "null but for a finished final run: the test split is read once, at the end")
    for key in ("seconds", "tokens", "parameters", "num_test"):
        if is_finished and key in record and not record[key] > 0:
            refuse(key, "greater than 0 for a finished run")


def _check_types(record: dict, path: str | Path, wanted: dict) -> None:
    missing = [key for key in wanted if key not in record]
    if missing:
        raise ValueError(f"{path} is no record of `hkt reproduce`: it lacks {_names(missing)}")
    for key, types in wanted.items():
        if not isinstance(record[key], types) or isinstance(record[key], bool):
            types = types if isinstance(types, tuple) else (types,)
            names = " or ".join("null" if kind is _NONE else kind.__name__ for kind in types)
            raise ValueError(f"{path}: `{key}` must be {names}, got {str(record[key])[:80]!r}")


def best_record(records: Iterable[dict]) -> dict | None:
    """The finished run of a search with the lowest finite validation loss, the first of equal ones; `None` if there is none.

    Not by accuracy: after the few steps of a search run its noise is larger than what tells the settings apart.
    """
    finished = [
        record for record in records if record["status"] == FINISHED and math.isfinite(record["validation_loss"])
    ]
    return min(finished, key=lambda record: record["validation_loss"], default=None)


def finalists(records: Iterable[dict], count: int) -> list[dict]:
    """Of the `count` learning rates whose [`best_record`] has the lowest loss that record, the lowest loss first."""
    by_rate: dict[float, list[dict]] = {}
    for record in records:
        by_rate.setdefault(record["setting"]["learning_rate"], []).append(record)
    best = [record for record in map(best_record, by_rate.values()) if record is not None]
    return sorted(best, key=lambda record: record["validation_loss"])[:count]


def setting_of(record: dict) -> tuple[float, ...]:
    """The values of a record's setting, in the order of `SETTING_KEYS`."""
    return tuple(record["setting"][key] for key in SETTING_KEYS)


def _run(record: dict) -> tuple:
    """What tells a run from the others. A final run is known by its seed: its setting has been chosen."""
    setting = setting_of(record) if record["stage"] in SEARCH_STAGES and record["setting"] else ()
    keys = ("task", "protocol", "arm", "position_embedding_type", "stage", "seed")
    return (*(record[key] for key in keys), setting, record.get("rank"))


def _names(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


@dataclass(frozen=True)
class ArmRuns:
    """All runs of one arm with one type of positions, on one task under one protocol.

    Args:
        name (`str`): as in the records, e.g. `"hkt"`.
        positions (`str`, *optional*): `"absolute"` or `"rope"`; `None` for models of other kinds.
        final (`dict[int, dict]`): seed to record, in the order of seeds.
        search (`list[dict]`): records of the short runs of the search.
        finalists (`list[dict]`): records of its full runs.
        pretraining (`list[dict]`): records of masked-LM pretraining that runs of this arm began from.
    """

    name: str
    positions: str | None
    final: dict[int, dict] = field(default_factory=dict)
    search: list[dict] = field(default_factory=list)
    finalists: list[dict] = field(default_factory=list)
    pretraining: list[dict] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Name and positions, e.g. `hkt (RoPE)`."""
        return self.name if self.positions is None else f"{self.name} ({POSITION_TITLES[self.positions]})"

    @property
    def slug(self) -> str:
        """[`label`] for a file name."""
        return re.sub(r"[^a-zA-Z0-9]+", "-", self.name if self.positions is None else f"{self.name}-{self.positions}")

    @cached_property
    def finished(self) -> dict[int, dict]:
        """Seed to record of the final runs that finished."""
        return {seed: record for seed, record in self.final.items() if record["status"] == FINISHED}

    @property
    def kind(self) -> str:
        """`flat`, `flat variant`, `hkt`, `hkt ablation`, `hsa`, `pretrained` or `peer`."""
        if self.name.endswith(PRETRAINED):
            return "pretrained"
        if self.name in ("flat", "hkt"):
            return self.name
        return {"flat": "flat variant", "hkt": "hkt ablation", "hsa": "hsa"}.get(self.name.partition("-")[0], "peer")

    def mean(self, key: str) -> float | None:
        """Mean over the seeds that finished of a numeric key; `None` if there are none, or one of them has no value."""
        values = [record[key] for record in self.finished.values()]
        return None if not values or None in values else sum(values) / len(values)

    @property
    def tokens_per_second(self) -> float:
        """Tokens without padding a second of training, over all seeds that finished (at least one).

        Seconds of training steps alone, where they were recorded; else those of the runs with their evaluations.
        """
        records = self.finished.values()
        seconds = sum(record.get("step_seconds") or record["seconds"] for record in records)
        return sum(record["tokens"] for record in records) / seconds

    @property
    def chosen(self) -> dict | None:
        """The run whose setting the search chose: the [`best_record`] of the full runs, or without any of the short ones."""
        return best_record(self.finalists or self.search)

    @cached_property
    def level_weights(self) -> tuple[list[int], np.ndarray] | None:
        """Level weights over training.

        Returns:
            `tuple[list[int], np.ndarray]` or `None`: the steps that all finished seeds have, and `float64` weights of
            shape `(seeds, steps, layers, heads, levels)`; `None` if no seed, or not every one, has any, and if training
            leaves them as they were, e.g. of a single level.

        Raises:
            ValueError: steps or seeds with weights of different shapes.
        """
        by_seed = [
            {
                entry["step"]: entry["level_weights"]
                for entry in record["curve"]["validation"]
                if entry.get("level_weights") is not None
            }
            for record in self.finished.values()
        ]
        steps = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
        if not steps:
            return None
        try:
            weights = np.array([[of_seed[step] for step in steps] for of_seed in by_seed], dtype=float)
        except ValueError:  # ragged
            weights = np.empty(0)
        if weights.ndim != 5:
            raise ValueError(
                f"{self.label}: `level_weights` must be [layer][head][level], of one shape in all steps and seeds"
            )
        is_fixed = weights.shape[-1] == 1 or (len(steps) > 1 and np.ptp(weights, axis=1).max() < 1e-6)
        return None if is_fixed else (steps, weights)

    def pretraining_seconds(self) -> float | None:
        """Mean seconds of pretraining over the seeds that finished; 0 without any, `None` if there are none."""
        seconds = [(record["pretraining"] or {}).get("seconds") or 0.0 for record in self.finished.values()]
        return sum(seconds) / len(seconds) if seconds else None

    @property
    def records(self) -> list[dict]:
        """Records of all stages."""
        return [*self.pretraining, *self.search, *self.finalists, *self.final.values()]


@dataclass(frozen=True)
class Section:
    """The arms of one task under one protocol."""

    task: str
    protocol: str
    arms: Sequence[ArmRuns]

    @property
    def title(self) -> str:
        """Task and protocol, for people."""
        return f"{TASK_TITLES[self.task]}, protocol {self.protocol}"

    @property
    def slug(self) -> str:
        """[`title`] for a file name."""
        return f"{self.task}_{self.protocol}"

    @property
    def records(self) -> list[dict]:
        """Records of all arms."""
        return [record for arm in self.arms for record in arm.records]

    def arm(self, name: str, positions: str | None) -> ArmRuns:
        """The arm of this name and positions; one without runs if there is none."""
        return next(
            (arm for arm in self.arms if (arm.name, arm.positions) == (name, positions)), ArmRuns(name, positions)
        )

    def distinct(self, key: str) -> list:
        """The different values of a key in the records that have one, the most frequent first."""
        counts = Counter(record[key] for record in self.records if record.get(key) is not None)
        return [value for value, _ in sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))]


_ORDER = ("flat", "flat variant", "hkt", "hkt ablation", "hsa", "pretrained", "peer")


def sections(records: Sequence[dict]) -> list[Section]:
    """Put records together: tasks and protocols in a fixed order, in each the flat arms first and the peers last."""
    found: dict[tuple[str, str], dict[tuple[str, str | None], ArmRuns]] = {}
    for record in sorted(records, key=lambda record: (record["seed"], repr(_run(record)))):
        arms = found.setdefault((record["task"], record["protocol"]), {})
        key = record["arm"], record["position_embedding_type"]
        arm = arms.setdefault(key, ArmRuns(*key))
        if record["stage"] == "final":
            arm.final[record["seed"]] = record
        else:
            {"search": arm.search, "finalist": arm.finalists, "pretraining": arm.pretraining}[record["stage"]].append(
                record
            )
    return [
        Section(task, protocol, sorted(found[task, protocol].values(), key=_arm_order))
        for task in TASK_TITLES
        for protocol in PROTOCOLS
        if (task, protocol) in found
    ]


def _arm_order(arm: ArmRuns) -> tuple:
    natural = [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", arm.name)]
    return _ORDER.index(arm.kind), natural, str(arm.positions)
