"""What a study does at each event: writes the record and decides. No Ray.

`tuner.py` calls it from Ray Tune's hooks, always from one thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tune_service.failures import Failures, first_line
from tune_service.kept import KeptCheckpoints, least_bytes
from tune_service.record import AskedTrial, Record
from tune_service.scheduler import Asha
from tune_service.searcher import distributions, grid_points
from tune_service.sharing import Sharing, of_largest
from tune_service.spec import StudySpec
from tune_service.status import diverged_in

OVERDUE_MARGIN_S = 30.0
"""How much longer the driver waits than the supervisor, whose own deadline says more about what went wrong."""
STOP_POLL_S = 0.5
STANDSTILL_S = 10.0
"""A driver that polls as seldom as this was stopped, or its machine slept."""
USER_STOP = "stopped by the user"


class Driver:
    """Drives one study by its record. `tell` is given one line for people at each event worth one."""

    def __init__(
        self, spec: StudySpec, record: Record, tell: Callable[[str], None], sharing: Sharing | None = None
    ) -> None:
        """`sharing` finds out how many trials share a GPU, where the spec leaves that open."""
        self._sharing = sharing
        self._spec = spec
        self._record = record
        self._tell = tell
        self._objective = record.objective
        self._distributions = distributions(spec.domains)
        self._asha = _asha(spec)
        self._store = record.folder.checkpoints
        trials = record.trials()
        self._kept = KeptCheckpoints(
            self._store, record.objective, spec.checkpoints.budget_bytes, least_bytes(spec), trials
        )
        if self._asha is not None:
            self._asha.refill(trials)
        self._due: dict[int, float] = {}
        self._failures = Failures(spec.faults)
        self._values: dict[int, float] = {}
        """The objective in each trial's last report."""
        self._groups: dict[int, int] = {}
        """Trial -> the worker group that it reported from, as `sharing` knows it."""
        self._begun: set[int] = set()
        """Trials that their present supervisor has taken."""
        self._stop: Mapping[str, Any] | None = None
        self.halted: str | None = None
        """Why the study cannot go on for now, through no fault of its trials."""
        self._next_poll = 0.0
        self._last_poll = time.monotonic()
        self._noticed = record.notice
        self._grid: list[dict[str, Any]] | None = None
        if spec.sampler.name == "grid":
            self._grid = grid_points(spec.domains, spec.first_params(), record.budget_trials)
            if len(self._grid) < record.budget_trials:
                record.set_budget(len(self._grid))

    # Events

    def ask(self) -> AskedTrial | None:
        """The next trial to start or to go on with; None when there is none, or the study is to end."""
        if self.stopping:
            return None
        asked = self._record.ask(self._distributions, self._plan)
        if asked is not None:
            status = self._record.trial(asked.number)
            self._kept.hand_out(status)
            if status.reports and self._kept.last_resumable(asked.number) is None:
                self._tell(f"trial {asked.number} begins again at epoch 1: it has no checkpoint to go on from")
            self._begun.discard(asked.number)
            if self._sharing is not None:
                smaller = {"micro_batch_size": asked.micro_batch_size} if asked.micro_batch_size is not None else {}
                self._sharing.handed_out(asked.number, of_largest(self._spec, asked.params | smaller))
        return asked

    @property
    def most_at_once(self) -> float:
        """How many trials may run at once by what was found out about sharing GPUs."""
        return math.inf if self._sharing is None else self._sharing.number

    @property
    def has_running(self) -> bool:
        """Whether some trial was handed out and has not been left."""
        return bool(self._kept.out)

    @property
    def has_room(self) -> bool:
        """Whether the checkpoints' budget lets one more trial run beside those that do."""
        return self._kept.has_room

    @property
    def num_open(self) -> int:
        """Trials that could run now: those without an end, and those that the budget still allows."""
        known = max(self._record.budget_trials, self._kept.num_trials)
        return 0 if self.stopping else known - self._kept.num_ended

    def notice(self, text: str | None) -> None:
        """What people should know of the place where the trials run."""
        if text != self._noticed:
            self._noticed = text
            self._record.set_notice(text)

    def started(self, number: int) -> None:
        """A supervisor has taken the trial, for the first time or again."""
        self._begun.add(number)
        self._record.start(number)
        # Twice: a supervisor whose warm ranks do not answer starts others.
        self._due[number] = time.monotonic() + 2 * self._spec.faults.start_timeout_s + OVERDUE_MARGIN_S

    def result(self, result: Mapping[str, Any]) -> bool:
        """Applies one result of a supervisor. Whether the trial goes on."""
        number = result["number"]
        if self._has_ended(number):
            return False
        self._due[number] = time.monotonic() + result["next_within_s"] + OVERDUE_MARGIN_S
        if self._sharing is not None:
            self._learn(number, result, self._sharing)
        if "failure" in result:
            return self._failed(number, result)
        if "saved" in result:
            self._kept.expect(number, result["whole_bytes"])
            self._saw_checkpoint(number, result["saved"], result["checkpoint_bytes"], result["resumable"])
        goes_on = self._report(number, result) if "epoch" in result else True
        if goes_on and result["finished"]:
            self._complete(number)
            goes_on = False
        elif goes_on and self.stopping:
            # Stays without an end; the study's end puts it back in line, after a whole checkpoint where one is owed.
            goes_on = result.get("owes", False) and not self.stopping_now
        if not goes_on:
            self._leave(number)
        return goes_on

    def handed_over(self, number: int, is_warm: bool) -> None:
        """A supervisor is to take the trial: one that is warm, which costs it no time, or one whose process starts."""
        start_s = 0.0 if is_warm else self._spec.faults.start_timeout_s
        due = time.monotonic() + start_s + OVERDUE_MARGIN_S
        self._due[number] = min(due, self._due.get(number, due))  # it is said again and again

    def supervisor_lost(self, number: int, why: str) -> None:
        """The supervisor's process is gone, and with it Tune's trial. Ours is next in line, for another supervisor."""
        if self._sharing is not None and number in self._groups:
            self._sharing.lost(self._groups[number])
        if not self._has_ended(number):
            reason = f"the trial's supervisor was lost: {why}"
            if self.stopping:
                self._record.pause(number, reason)
            elif (self._failures.may_restart if number in self._begun else self._failures.may_hand_on)(number):
                self._tell(f"trial {number}: {reason}; starting again")
                self._record.pause(number, reason)
            else:
                self._give_up(number, reason)
        self._kept.lost(number)
        self._leave(number)

    def poll(self) -> list[int]:
        """Looks for a request to stop. Returns the trials whose supervisor is overdue and must be ended."""
        now = time.monotonic()
        if now - self._last_poll > STANDSTILL_S:  # this process stood still, and with it the news of all others
            self._due = {number: due + now - self._last_poll for number, due in self._due.items()}
        self._last_poll = now
        if now >= self._next_poll:
            self._next_poll = now + STOP_POLL_S
            stop = self._record.stop_request
            if stop is not None and self._stop is None:
                self._tell("stopping: running trials end " + ("at once" if stop["now"] else "at their next report"))
            self._stop = stop
        return [number for number, due in self._due.items() if now > due]

    @property
    def stopping(self) -> bool:
        """No trial is started any more."""
        return self._stop is not None or self.halted is not None or self._record.failure is not None

    @property
    def stopping_now(self) -> bool:
        """Running trials end at once."""
        is_hurried = self._stop is not None and bool(self._stop["now"])
        return is_hurried or self.halted is not None or self._record.failure is not None

    def _has_ended(self, number: int) -> bool:
        return self._record.end_of(number) is not None

    # Decisions

    def _plan(self, number: int) -> Mapping[str, Any]:
        """The given values of a new trial: the spec's own first, then a grid's points; the sampler does the rest."""
        if self._grid is None:
            return self._spec.first_params() if number == 0 else {}
        return self._grid[number]

    def _report(self, number: int, result: Mapping[str, Any]) -> bool:
        epoch, metrics = int(result["epoch"]), dict(result["metrics"])
        metric = self._objective.metric
        if metric not in metrics:
            has = ", ".join(sorted(metrics)) or "none"
            self._give_up(number, f"the report of epoch {epoch} has no objective {metric!r}; its metrics: {has}")
            return False
        fault = diverged_in(metrics, metric)
        value = metrics[metric] if fault is None else math.nan
        if self._asha is not None and fault is None:
            self._asha.add(number, epoch, value)
        may_stop = self._asha is not None and not result["finished"]
        reason = self._record.report(number, epoch, metrics, partial(self._verdict, number, epoch, may_stop))
        num_bytes = result["checkpoint_bytes"]
        if result["saves"] or num_bytes is not None:
            self._record.set_saves(number)
        self._values[number] = value
        if num_bytes is not None:
            self._saw_checkpoint(number, epoch, num_bytes, resumable=True)
        elif not result["saves"]:
            self._kept.saw(number, epoch, value, None)
        if fault is not None:
            self._record.prune(number, f"diverged: {fault} is {metrics[fault]} at epoch {epoch}", diverged=True)
            return False
        if reason is not None:
            self._record.prune(number, reason)
            return False
        return True

    def _saw_checkpoint(self, number: int, epoch: int, num_bytes: int, resumable: bool) -> None:
        self._kept.saw(number, epoch, self._values[number], num_bytes, resumable)

    def _verdict(self, number: int, epoch: int, may_stop: bool) -> str | None:
        return self._asha.stop_reason(number, epoch) if self._asha is not None and may_stop else None

    def _complete(self, number: int) -> None:
        if self._kept.has_value(number):
            self._record.complete(number)
        else:
            why = f"no finite {self._objective.metric} was reported"
            is_silent = not self._record.trial(number).reports
            self._give_up(number, f"{why}: its trainable ended without any report" if is_silent else why)

    def _failed(self, number: int, result: Mapping[str, Any]) -> bool:
        """A rank failed. Whether the supervisor is to begin the trial again."""
        reason, fault = result["failure"], result.get("fault")
        if fault == "storage" and self.halted is None:
            self.halted = first_line(reason)
            self._tell(f"ending for now: {self.halted}")
        if self.stopping:
            self._leave(number)
            return False
        if fault == "memory" and self._sharing is not None and (line := self._sharing.ran_out(number)) is not None:
            self._tell(line)
            self._record.pause(number, reason)
            self._leave(number)
            return False
        if "micro_batch_size" in result:
            size = result["micro_batch_size"]
            self._tell(f"trial {number}: {first_line(reason)}; trying again with a micro batch of {size}")
            self._record.set_micro_batch_size(number, size)
            self._kept.begins_again(self._record.trial(number))
            self._record.start(number)
            return True
        if fault == "budget" and self._kept.too_many(number):  # with fewer side by side it may fit
            self._tell(f"trial {number}: {first_line(reason)}; it waits until fewer run")
            self._record.pause(number, reason)
            self._leave(number)
            return False
        if fault is not None:  # to try the same again would end the same
            self._give_up(number, reason)
            self._leave(number)
            return False
        if self._failures.may_restart(number):
            self._kept.begins_again(self._record.trial(number))
            epoch = self._kept.last_resumable(number)
            where = f"after epoch {epoch}" if epoch else "at epoch 1: it has no checkpoint to go on from"
            self._tell(f"trial {number}: {first_line(reason)}; starting again {where}")
            self._record.start(number)
            return True
        self._give_up(number, reason)
        self._leave(number)
        return False

    def _learn(self, number: int, result: Mapping[str, Any], sharing: Sharing) -> None:
        """Of what sharing GPUs costs, from one result."""
        # Tune's word for the supervisor's process, which has one worker group at a time.
        group = self._groups[number] = result["pid"]
        if "failure" in result:
            sharing.lost(group)
        elif "memory_share" in result:
            line = sharing.reported(number, group, time.monotonic(), result["memory_share"])
            if line is not None:
                self._tell(line)

    def _give_up(self, number: int, reason: str) -> None:
        """Ends a trial as failed; the study too, when too many have failed alike."""
        self._record.fail(number, reason)
        alike = self._failures.too_many_alike(reason)
        if alike is not None:
            self._record.set_failure(f"{alike} trials failed alike: {reason}")
            self._tell(f"ending the study: {alike} trials failed alike: {first_line(reason)}")

    def _leave(self, number: int) -> None:
        """No supervisor holds the trial any more."""
        self._due.pop(number, None)
        self._values.pop(number, None)
        self._groups.pop(number, None)
        self._kept.left(number, self._record.end_of(number))


def _asha(spec: StudySpec) -> Asha | None:
    scheduler = spec.scheduler
    if scheduler.name != "asha":
        return None
    return Asha(
        scheduler.grace_period,
        scheduler.reduction_factor,
        spec.max_epochs,
        spec.objective.mode == "max",
        spec.objective.metric,
    )
