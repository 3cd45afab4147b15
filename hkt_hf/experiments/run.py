"""One run of `hkt reproduce`, in a process of its own: `python -m hkt_hf.experiments.run SPECIFICATION.json`."""

import fcntl
import hashlib
import json
import logging
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..benchmark.measurement import NotAvailableError
from ..config import build_experiment
from ..data import TaskData
from ..files import write_json, write_record
from ..modeling import HKTConfig
from ..training import METRICS_FILE, check_output_dir, train
from .arms import ROPE_SUFFIX, arm_padding, build_arm, count_flops, parse_arm
from .records import FAILED, FINISHED, NOT_AVAILABLE, SEARCH_STAGES


FIRST_STEPS = 5
"""Of a run: they tell how long it will take."""
CURVE_KEYS = ("step", "loss", "accuracy", "masked_accuracy", "seconds", "level_weights")


@dataclass(frozen=True)
class RunSpecification:
    """What one run is to do.

    Args:
        task (`str`): `"listops"`, `"cifar10"`, `"imdb"` or `"imdb-words"`.
        protocol (`str`): `"cpu"` or `"paper"`.
        arm (`str`): as in [`~hkt_hf.experiments.arms.parse_arm`].
        stage (`str`): `"pretraining"`, `"search"`, `"finalist"` or `"final"`, which alone reads the test split.
        seed (`int`): of the run.
        rank (`int`, *optional*): of a finalist.
        setting (mapping, *optional*): point of the grid; `None` for pretraining.
        config (mapping): nested values of the [`~hkt_hf.config.ExperimentConfig`]; its `output_dir` is the run's folder.
        record (`str`): the JSON file to write.
        pretraining (`str`, *optional*): record of the pretraining that the run begins from.
        threads (`int`): threads of PyTorch.
        command (`str`): the command that asked for it.
        max_hours (`float`, *optional*): of its training steps; where the first ones tell that it would take longer, the arm
            is not available.
    """

    task: str
    protocol: str
    arm: str
    stage: str
    seed: int
    rank: int | None
    setting: Mapping[str, float] | None
    config: Mapping[str, Any]
    record: str
    pretraining: str | None
    threads: int
    command: str
    max_hours: float | None = None


class RecordCallback(TrainerCallback):
    """Adds to each logged evaluation the level weights of an HKT model, and the seconds spent in training steps.

    Args:
        max_hours (`float`, *optional*): the most that all steps may take, at the speed of the first ones.
    """

    def __init__(self, max_hours: float | None = None):
        self.max_hours = max_hours
        self.step_seconds = 0.0
        self.started = 0.0
        self.first_steps: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Called by the Trainer; a resumed run goes on with the seconds in its log."""
        self.step_seconds = max((entry.get("step_seconds", 0.0) for entry in state.log_history), default=0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        """Called by the Trainer before each step."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer after each step.

        Raises:
            NotAvailableError: the run would take longer than `max_hours`.
        """
        seconds = time.perf_counter() - self.started
        self.step_seconds += seconds
        if self.max_hours is not None and len(self.first_steps) < FIRST_STEPS:
            self.first_steps.append(seconds)
            # The fastest of them: what is set up once, or ran beside it, is not the model's.
            hours = min(self.first_steps) * state.max_steps / 3600
            if len(self.first_steps) == FIRST_STEPS and hours > self.max_hours:
                raise NotAvailableError(
                    f"too slow on this machine: at {min(self.first_steps):.1f} s a step its {state.max_steps:,} steps would take "
                    f"{hours:.2g} hours, more than the {self.max_hours:.2g} that `max_run_hours` allows"
                )

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        """Called by the Trainer when the evaluation is in the log."""
        state.log_history[-1]["step_seconds"] = round(self.step_seconds, 2)
        weights = level_weights(model)
        if weights:
            state.log_history[-1]["level_weights"] = weights


def level_weights(model: nn.Module) -> list[list[list[float]]]:
    """Convex level weights by layer, head and level, rounded to 4 digits; empty for a model of one level, or without."""
    modules = [module for module in model.modules() if hasattr(module, "level_weights") and module.num_levels > 1]
    return [[[round(weight, 4) for weight in head] for head in module.level_weights().tolist()] for module in modules]


def execute(specification: RunSpecification) -> dict[str, Any]:
    """Do a run, or go on with it where it was interrupted, and write its record.

    An error of the run is recorded (`status` `"failed"`, with the `reason`), and so is an arm that can't be built here
    (`"not_available"`). An interruption writes nothing. Of two processes with the same run, such as one that outlived a
    killed `hkt reproduce`, the second waits for the first, and takes the record that this one wrote.

    Returns:
        `dict`: the record.
    """
    before = _time_of(specification.record)
    with _alone(Path(specification.config["output_dir"])):
        if _time_of(specification.record) != before:
            return json.loads(Path(specification.record).read_text(encoding="utf-8"))
        return _execute(specification)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds, in the block, the lock of the run with this folder; waits for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _time_of(path: str) -> int | None:
    return Path(path).stat().st_mtime_ns if Path(path).is_file() else None


def _execute(specification: RunSpecification) -> dict[str, Any]:
    try:
        measured = {"status": FINISHED, "reason": None, **_measure(specification)}
    except (NotAvailableError, ValueError, TypeError, RuntimeError, NotImplementedError, ImportError) as error:
        logging.getLogger(__name__).exception("%s failed", specification.record)
        status = NOT_AVAILABLE if isinstance(error, NotAvailableError) else FAILED
        measured = {"status": status, "reason": f"{type(error).__name__}: {error}"}
    return record_run(specification, measured)


def record_run(specification: RunSpecification, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Write the record of a run, as [`~hkt_hf.experiments.records.check_record`] describes it.

    Args:
        specification ([`RunSpecification`]): what was to be done.
        measured (mapping): `status`, `reason`, and what was measured.

    Returns:
        `dict`: the record.
    """
    arm, position = parse_arm(specification.arm)
    levels = {**specification.config["model"], **arm.fields}.get("num_levels", HKTConfig.num_levels)
    pretraining = None
    if specification.pretraining is not None:
        before = json.loads(Path(specification.pretraining).read_text(encoding="utf-8"))
        pretraining = {key: before.get(key) for key in ("steps", "seconds", "masked_accuracy")}
    record = {
        "task": specification.task,
        "protocol": specification.protocol,
        "arm": specification.arm.removesuffix(ROPE_SUFFIX),
        "num_levels": levels if arm.has_levels else None,
        "position_embedding_type": position,
        "stage": specification.stage,
        "seed": specification.seed,
        "rank": specification.rank,
        "setting": specification.setting,
        "validation_accuracy": None,
        "test_accuracy": None,
        **measured,
        "pretraining": pretraining,
        "config": specification.config,
        "threads": specification.threads,
        "command": specification.command,
    }
    path = Path(specification.record)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, record)
    return record


def _measure(specification: RunSpecification) -> dict[str, Any]:
    config = build_experiment(specification.config)
    folder = Path(config.output_dir)
    check_output_dir(folder, config)
    (folder / METRICS_FILE).unlink(missing_ok=True)  # of a run that was interrupted before its record was written
    pretrains, is_final = specification.stage == "pretraining", specification.stage == "final"
    length = config.tokenizer.max_length
    multiple = None if pretrains else arm_padding(specification.arm, length)
    sizes: dict[str, Any] = {}

    def build(config, task):
        model, tokenizer = build_arm(specification.arm, config, task)
        if not pretrains:
            sizes["flops"] = count_flops(model, -(-length // (multiple or 1)) * (multiple or 1))
            sizes["num_test"] = len(task.splits["test"])
            sizes["data_fingerprint"] = data_fingerprint(task, tokenizer)
        return model, tokenizer

    clock = RecordCallback(specification.max_hours)
    report = train(
        config,
        build=build,
        pad_to_multiple_of=multiple,
        callbacks=[clock],
        measure=("validation", "test") if is_final else ("validation",),
        save_model=pretrains or (is_final and parse_arm(specification.arm)[0].is_checkpoint),
    )
    curves = json.loads((folder / "curves.json").read_text(encoding="utf-8"))
    if specification.stage in SEARCH_STAGES:
        # Renamed first: a folder that is half removed is no run that could go on.
        removed = folder.with_name(f"{folder.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        shutil.rmtree(folder.rename(removed))
    return {
        "validation_accuracy": report["validation"].get("accuracy"),
        "validation_loss": report["validation"]["loss"],
        "masked_accuracy": report["validation"].get("masked_accuracy"),
        "test_accuracy": report["test"]["accuracy"] if is_final else None,
        "test_loss": report["test"]["loss"] if is_final else None,
        "curve": {
            split: [{key: entry[key] for key in CURVE_KEYS if key in entry} for entry in entries]
            for split, entries in curves.items()
        },
        "steps": report["steps"],
        "tokens": report["tokens"],
        "seconds": report["seconds"],
        "step_seconds": round(clock.step_seconds, 2),
        "memory": peak_memory(),
        "parameters": report["parameters"],
        **sizes,
        **{key: report[key] for key in ("versions", "machine", "commit")},
    }


def data_fingerprint(task: TaskData, tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells data and tokenizers of one task apart, wherever they lie.

    Args:
        task ([`~hkt_hf.data.TaskData`]): data with labels.
        tokenizer (`PreTrainedTokenizerBase`): of the models.

    Returns:
        `str`: 16 hexadecimal digits, a hash of each split's labels and the token ids of its first text, and of the size of the
        vocabulary.
    """
    seen = [
        [name, split["label"][:], tokenizer(split["text"][0], truncation=True)["input_ids"]]
        for name, split in task.splits.items()
    ]
    return hashlib.blake2b(json.dumps([len(tokenizer), seen]).encode(), digest_size=8).hexdigest()


def peak_memory() -> int:
    """Bytes: the most that PyTorch held on the GPU, or without one the largest resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # Linux: `getrusage` also counts what the parent held when it forked
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))):
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Execute the specification in the file that the command line names."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    specification = RunSpecification(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    torch.set_num_threads(specification.threads)
    execute(specification)


def write_specification(specification: RunSpecification, path: Path) -> None:
    """Write what [`main`] reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(specification))


if __name__ == "__main__":
    main()
