"""A study whose supervisors are played by a test: the driver without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial

from trainables.stores import GIB
from tune_service.driver import USER_STOP, Driver
from tune_service.record import Record, direction_of
from tune_service.searcher import StudySampler
from tune_service.spec import StudySpec, parse_spec
from tune_service.status import TrialStatus
from tune_service.storage import Storage, StudyFolder

PAUSED = "interrupted: the driver was gone"


def toy_spec(folder: Path, **sections: Any) -> StudySpec:
    """A trainable of one's own, 9 epochs, no scheduler; `sections` replace these."""
    spec = {
        "name": "toy",
        "trainable": "toy_module:train",
        "training": {"max_epochs": 9},
        "search_space": {"x": {"uniform": [0.0, 1.0]}, "depth": {"choice": [1, 2, 4]}},
        "objective": {"metric": "score"},
        "scheduler": {"name": "none"},
        "budget": {"trials": 16},
    }
    return parse_spec(spec | sections, folder)


class HandDriven:
    """A study whose supervisors are played by the test."""

    def __init__(self, root: Path, **sections: Any) -> None:
        self.spec = toy_spec(root, **sections)
        self.storage = Storage(root / "studies")
        self.folder = self.storage.create(self.spec.name)
        self.told: list[str] = []
        self._lease = ExitStack()
        self._lease.enter_context(self.folder.driving())
        stored = self.spec.to_mapping() | {"folder": str(root)}
        self.record = Record.create(self.folder, stored, self._sampler())
        self.driver = Driver(self.spec, self.record, self.told.append)

    def _sampler(self) -> StudySampler:
        sampler = self.spec.sampler
        return StudySampler(sampler.name, sampler.seed, direction_of(self.spec.objective.mode))

    def kill(self) -> None:
        """The driver's process is gone, at whatever it was."""
        self._lease.close()

    def end(self, reason: str = USER_STOP) -> None:
        """The driver ends in order."""
        self.record.pause_all(reason)
        self.kill()

    def resume(self, budget: int | None = None) -> None:
        """What `tune-service resume` does before the first trial."""
        self.kill()
        self._lease.enter_context(self.folder.driving())
        self.record = Record.open(self.folder, self._sampler())
        if budget is not None:
            self.record.set_budget(budget)
        self.record.clear_stop()
        self.record.set_failure(None)
        self.record.pause_all(PAUSED)
        self.driver = Driver(self.spec, self.record, self.told.append)

    def begin(self) -> int:
        """Starts the next trial, which must exist."""
        asked = self.driver.ask()
        assert asked is not None
        self.driver.started(asked.number)
        return asked.number

    def report(
        self,
        number: int,
        epoch: int,
        score: float,
        num_bytes: int | None = None,
        resumable: bool = True,
        **others: float,
    ) -> bool:
        """One report; with a checkpoint of `num_bytes` bytes when that is given. Whether the trial goes on."""
        metrics, is_last = {"score": score} | others, epoch >= self.spec.max_epochs
        if num_bytes is not None and is_last:
            self.commit(number, epoch, num_bytes, metrics)
        goes_on = self.driver.result(
            {
                "number": number,
                "next_within_s": 60.0,
                "epoch": epoch,
                "metrics": list(metrics.items()),
                "saves": num_bytes is not None and not is_last,
                "owes": num_bytes is not None and not is_last,
                "checkpoint_bytes": num_bytes if is_last else None,
                "finished": is_last,
            }
        )
        if num_bytes is None or not goes_on:
            return goes_on
        self.commit(number, epoch, num_bytes, metrics, resumable)
        return self.saved(number, epoch, num_bytes, resumable)

    def commit(
        self, number: int, epoch: int, num_bytes: int, metrics: Mapping[str, float], resumable: bool = True
    ) -> None:
        (self.folder.checkpoints.stage(number, epoch) / "weights").write_bytes(b"w" * num_bytes)
        self.folder.checkpoints.commit(number, epoch, metrics, resumable)

    def saved(
        self, number: int, epoch: int, num_bytes: int, resumable: bool = True, whole_bytes: int | None = None
    ) -> bool:
        """The checkpoint of the last report is whole. Whether the trial goes on."""
        result = {"number": number, "next_within_s": 60.0, "finished": False, "owes": not resumable}
        result |= {"saved": epoch, "checkpoint_bytes": num_bytes, "resumable": resumable}
        return self.driver.result(result | {"whole_bytes": num_bytes if whole_bytes is None else whole_bytes})

    def finish(self, number: int) -> bool:
        """The trainable came to its end before its last epoch."""
        return self.driver.result({"number": number, "next_within_s": 60.0, "finished": True})

    def fail(self, number: int, reason: str) -> bool:
        return self.driver.result({"number": number, "next_within_s": 60.0, "failure": reason})

    def run(self, *scores: float, num_bytes: int | None = None) -> int:
        """A whole trial: reports `scores` from epoch 1 on, then ends if it was not stopped."""
        number = self.begin()
        goes_on = True
        for epoch, score in enumerate(scores, start=1):
            assert goes_on
            goes_on = self.report(number, epoch, score, num_bytes)
        if goes_on:
            self.finish(number)
        return number

    def crash(self, reason: str) -> int:
        """A whole trial that fails each time it is started."""
        number = self.begin()
        while self.fail(number, reason):
            pass
        return number

    def trial(self, number: int) -> TrialStatus:
        return self.record.status().trials[number]

    def params(self) -> list[dict[str, Any]]:
        return [trial.params for trial in self.record.trials()]


def optuna_trials(folder: StudyFolder) -> list[FrozenTrial]:
    """The trials as Optuna's own tools read them."""
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder.journal)))
    return optuna.load_study(study_name=folder.name, storage=storage).trials


ASHA = {"name": "asha", "grace_period": 1, "reduction_factor": 3}


def score_of(params: dict[str, Any]) -> float:
    return 1.0 - (params["x"] - 0.3) ** 2 - 0.01 * params["depth"]


def play(study: HandDriven, until: int) -> None:
    """Runs whole trials, one after the other, until the study has `until` of them."""
    while len(study.params()) < until:
        number = study.begin()
        study.report(number, 1, score_of(study.params()[number]))
        study.finish(number)


def play_in_pairs(study: HandDriven, until: int, killed_with: int | None = None) -> None:
    """Two trials at a time, the second one ends first; the driver is killed when trial `killed_with` has begun."""
    while len(study.params()) < until:
        pair = [study.begin(), study.begin()]
        if killed_with in pair:
            study.kill()
            study.resume()
            assert [study.begin(), study.begin()] == pair
        for number in reversed(pair):
            study.report(number, 1, score_of(study.params()[number]))
            study.finish(number)


def budget_of(num_bytes: int) -> dict[str, float]:
    return {"budget_gib": num_bytes / GIB}


def killed(*words: object, **more: object) -> None:
    raise KeyboardInterrupt
