"""`hkt reproduce`: all runs of a protocol, several side by side; what is finished is kept, what was broken off goes on."""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..config import build_experiment, differences, merge
from ..data import TaskData, load_data
from ..objectives import MaskedLM
from ..training import new_tokenizer
from .arms import model_fields, parse_arm, setting_source
from .protocol import Protocol, Setting
from .records import FAILED, FINISHED, NOT_AVAILABLE, SEARCH_STAGES, best_record, finalists
from .run import RunSpecification, data_fingerprint, record_run, write_specification


logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
IN_SEARCH = "in its search: "


@dataclass(frozen=True)
class Run:
    """One run of a protocol. Its record is `RESULTS/task/protocol/arm/NAME.json`.

    Args:
        arm (`str`): as in [`~hkt_hf.experiments.arms.parse_arm`]; of pretraining, the arm that begins from it.
        stage (`str`): `"pretraining"`, `"search"`, `"finalist"` or `"final"`.
        seed (`int`): of the run.
        setting ([`~hkt_hf.experiments.protocol.Setting`], *optional*): of a short search run; that of a finalist follows
            from those, and that of a final run from the finalists.
        rank (`int`, *optional*): of a finalist, from 1 for the lowest loss of the short runs.
    """

    arm: str
    stage: str
    seed: int
    setting: Setting | None = None
    rank: int | None = None

    @property
    def name(self) -> str:
        """Name of the record's file, without its ending."""
        if self.stage in SEARCH_STAGES:
            return f"{self.stage}-{self.setting or self.rank}"
        return f"{self.stage}-seed{self.seed}"


class Sweep:
    """The runs of a protocol and their records.

    Args:
        protocol ([`~hkt_hf.experiments.protocol.Protocol`]): what to run.
        results (`str` or `Path`): folder of the records, one JSON a run; may hold those of other protocols.
        runs (`str` or `Path`): folder of the checkpoints and logs.
        threads (`int`): threads of a run.
        command (`str`): goes into the records.

    Raises:
        ValueError: data, a configuration or a folder that can't be used, or a record of the same run with other settings or
            data, or that is none.
    """

    def __init__(self, protocol: Protocol, results: str | Path, runs: str | Path, *, threads: int, command: str = ""):
        self.protocol = protocol
        self.results = Path(results) / protocol.task / protocol.name
        self.folders = Path(runs) / protocol.task / protocol.name
        self.threads = threads
        self.command = command
        for name, folder in (("results", self.results), ("runs", self.folders)):
            if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
                raise ValueError(f"`{name}` must be a folder, got a file: {file}")
        # Before anything is run: what can't be used ends it here, and later processes find the data prepared.
        config = protocol.base_config()
        self.task: TaskData = load_data(config.data)
        self.tokenizer = new_tokenizer(config.tokenizer, self.task.tokenizer_kind)
        self.data_fingerprint = data_fingerprint(self.task, self.tokenizer)
        self.check_configurations()
        self.check_records()

    def runs(self) -> list[Run]:
        """All runs, in the order of the protocol's arms."""
        runs: list[Run] = []
        for arm in self.protocol.arms:
            for needed in (setting_source(arm), arm):
                for run in [*self._search(needed), *(self._final(needed) if needed == arm else [])]:
                    for each in [*self._pretraining(run), run]:
                        if each not in runs:
                            runs.append(each)
        return runs

    def _search(self, arm: str) -> list[Run]:
        if setting_source(arm) != arm:
            return []
        search = self.protocol.search
        short = [Run(arm, "search", search.seed, setting) for setting in search.settings()]
        return [*short, *(Run(arm, "finalist", search.seed, rank=rank + 1) for rank in range(search.finalists))]

    def _final(self, arm: str) -> list[Run]:
        return [Run(arm, "final", seed) for seed in self.protocol.seeds_of(arm)]

    def _pretraining(self, run: Run) -> list[Run]:
        if run.stage == "pretraining" or not parse_arm(run.arm)[0].pretrained:
            return []
        return [Run(run.arm, "pretraining", run.seed)]

    def needs(self, run: Run) -> list[Run]:
        """The runs that must be finished before this one."""
        searched = self._search(setting_source(run.arm))
        before = {
            "search": [],
            "finalist": [other for other in searched if other.stage == "search"],
            "final": searched,
        }
        return [*self._pretraining(run), *before.get(run.stage, [])]

    def record_path(self, run: Run) -> Path:
        """File of a run's record."""
        return self.results / run.arm / f"{run.name}.json"

    def folder(self, run: Run) -> Path:
        """Folder of a run's checkpoints."""
        return self.folders / run.arm / run.name

    def record(self, run: Run) -> dict[str, Any] | None:
        """A run's record, or `None` where there is none yet."""
        path = self.record_path(run)
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}): remove it") from None
        if not isinstance(record, dict) or "status" not in record:
            raise ValueError(f"{path} is no record of a run: remove it")
        return record

    def is_finished(self, run: Run) -> bool:
        """Whether a run need not be done (again); one that failed is."""
        record = self.record(run)
        if record is None or record["status"] == FAILED:
            return False
        if run.stage == "pretraining" and not (self.folder(run) / "config.json").is_file():
            # Its weights are gone: it is needed only where a run that begins from them is still to come.
            return all(self.is_finished(other) for other in self.runs() if run in self.needs(other))
        return True

    def setting(self, run: Run) -> Setting | None:
        """The point of the grid that a run has; `None` where no run that could tell it finished, and for pretraining."""
        if run.stage in ("pretraining", "search"):
            return run.setting
        searched = {stage: self._searched(run.arm, stage) for stage in SEARCH_STAGES}
        if run.stage == "finalist":
            found = finalists(searched["search"], run.rank)[run.rank - 1 :]
            best = found[0] if found else None
        else:
            best = best_record(searched["finalist"] if self.protocol.search.finalists else searched["search"])
        return None if best is None else Setting(**best["setting"])

    def _searched(self, arm: str, stage: str) -> list[dict[str, Any]]:
        """Records of the search that an arm takes its setting from."""
        records = [self.record(run) for run in self._search(setting_source(arm)) if run.stage == stage]
        return [record for record in records if record is not None]

    def give_up(self, run: Run) -> str | None:
        """Record a run that can't be done, with the reason.

        Either what would give its setting did not finish, or another run of its search found the arm not available.

        Returns:
            `str` or `None`: its status, that of the search; `None` where there is a setting to run with.
        """
        if run.stage == "search":
            found = [record for record in self._searched(run.arm, "search") if record["status"] == NOT_AVAILABLE]
            if not found:
                return None
            record_run(self.specification(run), {"status": NOT_AVAILABLE, "reason": found[0]["reason"]})
            return NOT_AVAILABLE
        if self.setting(run) is not None:
            return None
        searched = [record for stage in SEARCH_STAGES for record in self._searched(run.arm, stage)]
        diverged = {"status": FAILED, "reason": "no run has a finite validation loss"}
        first = next((record for record in searched if record["status"] != FINISHED), diverged)
        reason = first["reason"].removeprefix(IN_SEARCH)
        specification = replace(self.specification(run), setting=None)
        record_run(specification, {"status": first["status"], "reason": IN_SEARCH + reason})
        return first["status"]

    def specification(self, run: Run) -> RunSpecification:
        """What the process of a run is told; its search must be over."""
        setting = self.setting(run)
        if setting is None and run.stage != "pretraining":  # nothing to run with, but for a record that says so
            setting = self.protocol.search.settings()[0]
        pretraining = self._pretraining(run)
        return RunSpecification(
            task=self.protocol.task,
            protocol=self.protocol.name,
            arm=run.arm,
            stage=run.stage,
            seed=run.seed,
            rank=run.rank,
            setting=None if setting is None else vars(setting),
            config=self._config(run, setting),
            record=str(self.record_path(run)),
            pretraining=str(self.record_path(pretraining[0])) if pretraining else None,
            threads=self.threads,
            command=self.command,
            max_hours=self.protocol.max_hours_of(run.stage),
        )

    def _config(self, run: Run, setting: Setting | None) -> dict[str, Any]:
        protocol = self.protocol
        config = protocol.base_config()
        changes: dict[str, Any] = {"output_dir": str(self.folder(run)), "seed": run.seed}
        if run.stage == "pretraining":
            dropout = protocol.pretraining.hidden_dropout
            changes |= {"objective": MaskedLM.name, "mlm_probability": protocol.pretraining.mlm_probability}
            changes["training"] = dict(protocol.pretraining.training)
        else:
            dropout = setting.hidden_dropout
            changes["training"] = {"learning_rate": setting.learning_rate, "weight_decay": setting.weight_decay}
            if run.stage == "search":
                changes["training"] |= protocol.search.training
        values = merge(config.to_dict(), changes)
        values["tokenizer"]["segments"] = parse_arm(run.arm)[0].segments
        pretraining = self._pretraining(run)
        if pretraining:
            values["model"] = {"checkpoint": str(self.folder(pretraining[0])), "hidden_dropout": dropout}
        elif parse_arm(run.arm)[0].is_peer:
            values["model"] = {**config.model, "hidden_dropout": dropout}
        else:
            values["model"] = model_fields(
                run.arm,
                {**config.model, "hidden_dropout": dropout},
                vocab_size=len(self.tokenizer),
                length=config.tokenizer.max_length,
                num_labels=len(self.task.label_names),
            )
        return build_experiment(values).to_dict()

    def check_configurations(self) -> None:
        """Refuse a protocol of which some run can't be configured.

        Raises:
            ValueError: as in [`~hkt_hf.config.build_experiment`].
        """
        setting = self.protocol.search.settings()[0]
        for run in {(run.arm, run.stage): run for run in self.runs()}.values():
            self._config(run, run.setting or setting)

    def check_records(self) -> None:
        """Refuse finished runs of other data, models or training than the protocol, or its search, now asks for.

        Raises:
            ValueError: names the record and what differs.
        """
        refused = []
        for run in self.runs():
            record = self.record(run)
            if record is None or record["status"] != FINISHED:
                continue
            other = []
            if all(self.record(needed) for needed in self.needs(run)):
                now = self.specification(run)
                found = build_experiment(record["config"]).to_dict()
                other = [
                    name
                    for name in differences(found, dict(now.config))
                    if name not in ("output_dir", "model.checkpoint", "data.path", "tokenizer.path")
                ]
            if record.get("data_fingerprint", self.data_fingerprint) != self.data_fingerprint and not other:
                other = ["the data or the tokenizer"]
            if other:
                refused.append(f"{self.record_path(run)} is of a run with other settings ({', '.join(other)})")
        if refused:
            raise ValueError(
                f"{'; '.join(refused)}: choose another `results` folder, or remove what is named, and the folders of these "
                f"runs in {self.folders}"
            )


def reproduce(sweep: Sweep, jobs: int = 1) -> dict[str, list[Run]]:
    """Do all runs that are not finished.

    A run is a process; its output goes to `RUNS/.../NAME.log`. One that is killed goes on, once. One that fails is recorded so,
    and the others go on: a search chooses among what it finished, final runs without any such setting get the search's
    reason, and those whose pretraining failed are left out.

    Args:
        sweep ([`Sweep`]): the runs.
        jobs (`int`, *optional*, defaults to 1): runs side by side, at least 1.

    Returns:
        `dict[str, list[Run]]`: runs by `"finished"`, `"failed"` and `"left_out"`.

    Raises:
        ValueError: `jobs` below 1, or a final run kept from before whose setting is not the one that the search, which has
            now been finished, chose.
    """
    if jobs < 1:
        raise ValueError(f"`jobs` must be at least 1, got {jobs}")
    waiting = [run for run in sweep.runs() if not sweep.is_finished(run)]
    outcome: dict[str, list[Run]] = {FINISHED: [], FAILED: [], "left_out": []}
    outcome[FINISHED] = [run for run in sweep.runs() if run not in waiting]
    processes: dict[Run, subprocess.Popen] = {}
    killed: set[Run] = set()
    total = len(waiting) + len(outcome[FINISHED])
    with (
        tqdm(total=total, initial=total - len(waiting), desc=sweep.protocol.task, unit="run") as progress,
        logging_redirect_tqdm(),
    ):
        try:
            while waiting or processes:
                for run in _ready(waiting, outcome, sweep):
                    if run.stage != "pretraining" and (status := sweep.give_up(run)) is not None:
                        waiting.remove(run)
                        outcome[FAILED if status == FAILED else FINISHED].append(run)
                        progress.update()
                    elif len(processes) < jobs:
                        waiting.remove(run)
                        processes[run] = _start(sweep, run)
                for run in _hopeless(waiting, outcome, sweep):
                    waiting.remove(run)
                    outcome["left_out"].append(run)
                    logger.error("%s %s is left out: a run that it needs failed", run.arm, run.name)
                for run in _wait(processes):
                    returncode = processes.pop(run).returncode
                    if returncode < 0 and run not in killed:
                        # Once more before others choose without it: a sweep is to have one table, interrupted or not.
                        killed.add(run)
                        waiting.insert(0, run)
                        logger.warning("%s %s was killed by signal %d: it goes on", run.arm, run.name, -returncode)
                        continue
                    status = _finish(sweep, run, returncode)
                    outcome[FAILED if status == FAILED else FINISHED].append(run)
                    progress.update()
        except BaseException:
            for process in processes.values():
                process.terminate()
            for process in processes.values():
                process.wait()
            raise
    sweep.check_records()
    return outcome


def _ready(waiting: list[Run], outcome: dict[str, list[Run]], sweep: Sweep) -> list[Run]:
    """Runs of which all that they need is over; of a search, some may have failed."""
    over = {*outcome[FINISHED], *(run for run in outcome[FAILED] if run.stage in SEARCH_STAGES)}
    return [run for run in waiting if over.issuperset(sweep.needs(run))]


def _hopeless(waiting: list[Run], outcome: dict[str, list[Run]], sweep: Sweep) -> list[Run]:
    """Runs that need one that failed or was left out."""
    lost = {*outcome["left_out"], *(run for run in outcome[FAILED] if run.stage not in SEARCH_STAGES)}
    return [run for run in waiting if not lost.isdisjoint(sweep.needs(run))]


def _start(sweep: Sweep, run: Run) -> subprocess.Popen:
    folder = sweep.folder(run)
    specification = folder.with_name(f"{run.name}.json")
    write_specification(sweep.specification(run), specification)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(sweep.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    with open(folder.with_name(f"{run.name}.log"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "hkt_hf.experiments.run", str(specification)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _wait(processes: dict[Run, subprocess.Popen]) -> list[Run]:
    """The processes that have ended, at least one if there is any."""
    while processes:
        ended = [run for run, process in processes.items() if process.poll() is not None]
        if ended:
            return ended
        time.sleep(POLL_SECONDS)
    return []


def _finish(sweep: Sweep, run: Run, returncode: int) -> str:
    log = sweep.folder(run).with_name(f"{run.name}.log")
    record = sweep.record(run)
    if record is None or (returncode and not sweep.is_finished(run)):
        reason = f"the process ended with exit status {returncode}"
        record = record_run(sweep.specification(run), {"status": FAILED, "reason": reason})
    if record["status"] != FINISHED:
        logger.error("%s %s: %s (%s)", run.arm, run.name, record["reason"], log)
    else:
        found = (record.get(name) for name in ("test_accuracy", "validation_accuracy", "masked_accuracy"))
        accuracy = next(value for value in found if value is not None)
        logger.info("%s %s: %.2f%% in %.0f s", run.arm, run.name, 100 * accuracy, record["seconds"])
    return record["status"]
