"""When a study's trials began and ended, to the microsecond; `status` says it to the second."""

from __future__ import annotations

from pathlib import Path

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend


def trial_times(record: Path) -> list[tuple[float, float]]:
    """(handed out, ended) of each trial, by number, as time.time() has it. `record` is a study's record.journal."""
    storage = JournalStorage(JournalFileBackend(str(record)))
    times = []
    for trial in storage.get_all_trials(storage.get_all_studies()[0]._study_id):
        assert trial.datetime_start is not None and trial.datetime_complete is not None, "the study has come to its end"
        times.append((trial.datetime_start.timestamp(), trial.datetime_complete.timestamp()))
    return times
