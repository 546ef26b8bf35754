"""A record in a PostgreSQL database: Optuna's RDBStorage, with a fence, few reads, and patience.

The fence: the token of a study's driver stands in a row of it. Every transaction of the driver ends with a look at that
row, and has it until it commits. Whoever takes the study over puts its own token there, after the transaction that has
the row; what comes later finds the other token and is undone. So the database keeps out a driver that was silent.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from optuna.storages._cached_storage import _CachedStorage, _StudyInfo
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState
from sqlalchemy import event, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, scoped_session, selectinload, sessionmaker

from trainables.errors import Problem
from tune_service.database import DATABASE_ERRORS, may_pass, opened, refusal, shared
from tune_service.errors import LeaseLostError, StorageError
from tune_service.lease import Lease
from tune_service.record_url import Pointer

PATIENCE_S = 10.0
"""How long what failed is tried again: a server that is started anew is back by then."""
PAUSE_S = 0.25
ATTRS_AGE_S = 0.25
"""The driver looks at the study's attributes at every step; all that others write there is the request to stop."""
_DRIVER = "driver"
"""The attribute with the driver's token."""
T = TypeVar("T")


class Database(_CachedStorage):
    """One study in a database. What it writes, every tool of Optuna's reads.

    A trial is a new object after every change of it, and the same one as long as there is none.
    """

    def __init__(self, path: Path, lease: Lease | None = None) -> None:
        """Opens what the pointer at `path` says, and with a lease takes it over from whoever drove it before."""
        pointer = Pointer.read(path)
        self.study_name, self._url, self._lease, self._name = pointer.study, pointer.url, lease, path.parent.name
        super().__init__(shared(pointer.url) if lease is None else opened(pointer.url))
        self._patience_s = PATIENCE_S
        self._attrs: tuple[float, dict[str, Any]] | None = None
        self._written: set[int] = set()
        """Trials that are to be read again, for this driver has written them; nobody else writes any."""
        self._study_id = self._again(self._find)
        self._sessions = sessionmaker(self._backend.engine)
        """For what writes."""
        if lease is not None:
            self._again(lambda: self._claim(lease))
            event.listen(self._sessions, "before_commit", self._keep_fence)
            self._backend.scoped_session = scoped_session(self._sessions)

    def update_trial(
        self, trial_id: int, attrs: Mapping[str, Any], intermediate_values: Mapping[int, float] | None = None
    ) -> None:
        """Sets attributes and intermediate values of a trial: all of them, or none."""

        steps = [
            {"trial_id": trial_id, "step": step, "intermediate_value": stored, "intermediate_value_type": kind}
            for step, value in (intermediate_values or {}).items()
            for stored, kind in [models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)]
        ]
        texts = {name: json.dumps(value) for name, value in attrs.items()}
        named = [{"trial_id": trial_id, "key": name, "value_json": text} for name, text in texts.items()]

        def write() -> None:
            with self._sessions.begin() as session:
                _put(session, models.TrialIntermediateValueModel, ("trial_id", "step"), steps)
                _put(session, models.TrialUserAttributeModel, ("trial_id", "key"), named)

        trial = copy.copy(self.get_trial(trial_id))
        self.check_trial_is_updatable(trial_id, trial.state)
        self._written.add(trial_id)
        self._again(write)
        if self._lease is not None:  # what the rows say now, without another look at them
            trial.user_attrs = trial.user_attrs | {name: json.loads(text) for name, text in texts.items()}
            trial.intermediate_values = trial.intermediate_values | dict(intermediate_values or {})
            self._add_trials_to_cache(self._study_id, [trial])
            self._written.discard(trial_id)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.update_trial(trial_id, {key: value})

    def set_trial_state_values(self, trial_id: int, state: OptunaState, values: Sequence[float] | None = None) -> bool:
        def write() -> bool:
            with self._sessions.begin() as session:
                if models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True).state == state:
                    return True  # by an attempt whose answer was lost
            return self._backend.set_trial_state_values(trial_id, state, values)

        self._written.add(trial_id)
        return self._again(write)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        number = len(self.get_all_trials(study_id, deepcopy=False))

        def write() -> int:
            with self._sessions.begin() as session:
                models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
                trials = select(models.TrialModel.trial_id).where(models.TrialModel.study_id == study_id)
                made = session.scalar(trials.where(models.TrialModel.number == number))
                if made is None:  # else by an attempt whose answer was lost
                    trial = self._backend._get_prepared_new_trial(study_id, template_trial, session)
                    session.flush()
                    made = trial.trial_id
                return int(made)

        trial_id = self._again(write)
        self._written.add(trial_id)
        return trial_id

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._attrs = None
        self._again(lambda: self._backend.set_study_user_attr(study_id, key, value))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        now = time.monotonic()
        if self._attrs is None or now - self._attrs[0] > ATTRS_AGE_S:
            self._attrs = now, self._again(lambda: self._read_attrs(study_id))
        return self._attrs[1]

    def _read_attrs(self, study_id: int) -> dict[str, Any]:
        kind = models.StudyUserAttributeModel
        with Session(self._backend.engine) as session:
            rows = session.execute(select(kind.key, kind.value_json).where(kind.study_id == study_id))
            return {key: json.loads(value) for key, value in rows}

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        if (study_id, trial_number) not in self._study_id_and_number_to_trial_id:
            self._read_trials_from_remote_storage(study_id)
        return self._study_id_and_number_to_trial_id[study_id, trial_number]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        trial = self._get_cached_trial(trial_id)  # only of one that has ended
        if trial is not None and trial_id not in self._written:
            return trial
        self._read_trials_from_remote_storage(self._study_id)
        return self._studies[self._study_id].trials[self._number(trial_id)]

    def _number(self, trial_id: int) -> int:
        return self._trial_id_to_study_id_and_number[trial_id][1]

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        """Reads what may have changed: of a study that others drive the open and the new trials."""
        study = self._studies.setdefault(study_id, _StudyInfo())
        open_ids = {trial._trial_id for trial in study.trials.values() if not trial.state.is_finished()}
        changed = open_ids if self._lease is None else self._written
        if self._lease is not None and study.trials and not changed:
            return
        last = max(self._trial_id_to_study_id_and_number, default=-1)
        found = self._again(lambda: self._read(study_id, changed, last))
        self._written.clear()
        # One that is as it was stays the object it was.
        self._add_trials_to_cache(study_id, [trial for trial in found if trial != study.trials.get(trial.number)])

    def _read(self, study_id: int, ids: set[int], last: int) -> list[FrozenTrial]:
        model = models.TrialModel
        with Session(self._backend.engine) as session:
            query = session.query(model).filter(model.study_id == study_id)
            parts = (model.params, model.values, model.user_attributes, model.system_attributes)
            query = query.options(*(selectinload(part) for part in (*parts, model.intermediate_values)))
            if last >= 0:
                query = query.filter(or_(model.trial_id.in_(ids), model.trial_id > last))
            found = query.order_by(model.trial_id).all()
            return [self._backend._build_frozen_trial_from_trial_model(trial) for trial in found]

    def _find(self) -> int:
        try:
            return self._backend.get_study_id_from_name(self.study_name)
        except KeyError as error:
            found = f"none named {self.study_name} in {self._url}"
            rule = "has its record in the database that it names"
            raise StorageError(Problem(self._name, rule, found, "a backup of it")) from error

    # The fence

    def _claim(self, lease: Lease) -> None:
        with Session(self._backend.engine) as session, session.begin():
            row = session.scalar(_driver_of(self._study_id).with_for_update())
            if row is None:
                row = models.StudyUserAttributeModel(study_id=self._study_id, key=_DRIVER)
                session.add(row)
            row.value_json = json.dumps(lease.identity[1])
            session.flush()
            lease.check()

    def _keep_fence(self, session: Session) -> None:
        assert self._lease is not None
        self._lease.check()
        row = session.scalar(_driver_of(self._study_id).with_for_update(read=True))
        if row is None or row.value_json != json.dumps(self._lease.identity[1]):
            found = "another one has taken the study over" if row is not None else "the study is gone"
            expected = "one of the two; this one ends and writes nothing more"
            raise LeaseLostError(Problem(self._name, "a study has one driver", found, expected))

    def _again(self, work: Callable[[], T]) -> T:
        """Does it, and after a failure that may pass does it again for a while. RecordUnavailableError.

        Whatever is done so must be right to do twice: a cut connection does not tell whether a commit came through.
        """
        end = None
        while True:
            try:
                found = work()
            except DATABASE_ERRORS as error:
                end = end or time.monotonic() + self._patience_s  # not before: the process may have stood still
                if not may_pass(error) or time.monotonic() > end:
                    self._patience_s = 0.0  # until it has worked once: whoever ends now has something to say
                    raise refusal(self._url, error) from error
                time.sleep(PAUSE_S)
            else:
                self._patience_s = PATIENCE_S
                return found


def _put(session: Session, model: Any, names: tuple[str, str], rows: list[dict[str, Any]]) -> None:
    """Inserts rows, or puts their values in the place of those that have the same names."""
    if rows:
        values = insert(model).values(rows)
        news = {key: values.excluded[key] for key in rows[0] if key not in names}
        session.execute(values.on_conflict_do_update(index_elements=names, set_=news))


def _driver_of(study_id: int) -> Any:
    kind = models.StudyUserAttributeModel
    return select(kind).where(kind.study_id == study_id, kind.key == _DRIVER)
