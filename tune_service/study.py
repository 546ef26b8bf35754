"""One study from spec to result: the figure of the README, as code."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from signal import SIG_IGN, SIGHUP, SIGTERM, Signals, getsignal, signal
from types import FrameType
from typing import Any

from search_spaces import SearchSpace
from trainables.errors import BucketError, Problem, StorageUnavailableError, UserError
from trainables.imports import import_large
from trainables.worker import storage_is_away
from tune_service.check import baseline, refuse_faulty
from tune_service.errors import (
    CommandError,
    InterruptedCommandError,
    LeaseLostError,
    RecordHeldError,
    RecordUnavailableError,
    StorageError,
    StudyHaltedError,
    StudyRunningError,
)
from tune_service.home import StudyHome, StudyStorage
from tune_service.lease import Lease
from tune_service.place import Place
from tune_service.record import Record, direction_of
from tune_service.searcher import StudySampler
from tune_service.spec import StudySpec, parse_spec
from tune_service.status import Display, StudyStatus
from tune_service.terminal import output_to
from tune_service.this_machine import ThisMachine

STOP_PATIENCE_S = 3600.0


def run_study(spec: StudySpec, storage: StudyStorage, display: Display, place: Place | None = None) -> StudyStatus:
    """Runs a new study to its end, of a spec that `refuse_faulty` let pass.

    Its trials run at `place`; without one, on this machine.
    """
    place = place or ThisMachine()
    majority = baseline(spec)
    folder = storage.create(spec.name)
    with ExitStack() as driving:
        with _whole_or_absent(folder):
            lease = driving.enter_context(folder.driving())
            driving.enter_context(lease.beating(_abort_of(spec.name, place, display)))
            spec = place.settled(spec, folder)
            record = Record.create(folder, _stored(spec), _sampler(spec), lease, spec.domains.defaults)
            record.set_baseline(majority)
        _drive(spec, folder, record, lease, display, place)
    return Record.open(folder).status(deep=True)


@contextmanager
def _whole_or_absent(folder: StudyHome) -> Iterator[None]:
    """A study that could not be written from its start leaves its name free."""
    try:
        yield
    except BaseException as error:
        folder.abandon()
        if not isinstance(error, OSError) or isinstance(error, BucketError):
            raise
        expected = "a disk with room, or another --storage"
        raise CommandError(Problem("--storage", "takes what a study writes", str(error), expected)) from error


def resume_study(
    name: str, trials: str | None, storage: StudyStorage, display: Display, place: Place | None = None
) -> StudyStatus:
    """Goes on with a study that was stopped or cut off; `trials` adds to its budget (`+20`) or sets it (`80`)."""
    place = place or ThisMachine()
    folder = storage.study(name)
    spec = place.found_again(stored_spec(Record.open(folder)), folder)
    refuse_faulty(spec, storage, place.room)
    with folder.driving(display.tell) as lease, lease.beating(_abort_of(name, place, display)):
        record = Record.open(folder, _sampler(spec), lease)
        if trials is not None:
            record.set_budget(_budget(trials, record))
        record.clear_stop()
        record.set_failure(None)
        record.pause_all("interrupted: the driver was gone")
        _drive(spec, folder, record, lease, display, place)
    return Record.open(folder).status(deep=True)


def stop_study(name: str, now: bool, storage: StudyStorage) -> StudyStatus:
    """Asks the driver to end, and waits until it has."""
    request_stop(name, now, storage)
    folder = storage.study(name)
    end = time.monotonic() + STOP_PATIENCE_S
    while folder.driver_is_alive():
        if time.monotonic() > end:
            found = f"it is still running after {STOP_PATIENCE_S:.0f} s"
            raise CommandError(Problem(name, "a study ends when it is asked to", found, "stop --now"))
        time.sleep(0.1)
    return Record.open(folder).status(deep=True)


def request_stop(name: str, now: bool, storage: StudyStorage) -> None:
    """Asks the driver to end. A study without one is then stopped, not interrupted."""
    record = Record.open(storage.study(name))
    if record.status().state in ("running", "interrupted"):
        record.request_stop(now)


def delete_study(name: str, storage: StudyStorage) -> int:
    """Removes a study whole. Returns its size in bytes. StudyRunningError while it runs."""
    folder = storage.study(name)
    if folder.driver_is_alive():
        found, expected = f"{name} is running", f"`tune-service stop {name}`"
        if folder.is_doomed():
            found, expected = f"another process deletes {name}", "patience"
        raise StudyRunningError(Problem("STUDY", "a study in use is not deleted", found, expected))
    with folder.driving() as lease, lease.beating(lambda why: None):  # without beats it is another deleter's turn
        return folder.remove()


def _stored(spec: StudySpec) -> dict[str, Any]:
    """The spec as the record keeps it, a recipe's domains in full: a later version's may differ, this study's not."""
    space = {name: domain.to_mapping() for name, domain in spec.domains.items()}
    return spec.to_mapping() | {"search_space": space, "folder": str(spec.folder)}


def stored_spec(record: Record) -> StudySpec:
    """The spec that a study was made from."""
    stored = record.spec
    folder = str(stored.pop("folder"))
    spec = parse_spec(stored, folder, here=False)
    domains = dict(spec.domains)
    found = record.defaults.items()
    defaults = {name: value for name, value in found if name in domains and domains[name].contains(value)}
    return replace(spec, search_space=SearchSpace(domains, defaults))


def _drive(spec: StudySpec, folder: StudyHome, record: Record, lease: Lease, display: Display, place: Place) -> None:
    """Runs trials until there are no more. However it ends, no trial is left as if it still ran."""
    from tune_service.driver import USER_STOP, Driver

    driver = Driver(spec, record, display.tell, place.sharing(spec))
    if not driver.num_open:
        points = spec.domains.num_points if spec.sampler.name == "grid" else None
        is_all = points is not None and record.budget_trials >= points
        more = "the grid has no more points" if is_all else "--trials +20 adds some"
        display.tell(f"nothing to do: all {len(record.trials())} trials have ended; {more}")
        return

    def tick() -> None:
        lease.sign_of_life()
        display.show(record)

    reason = USER_STOP
    try:
        with _terminate_as_interrupt():
            place.prepare(spec)
            import_large("tune_service.tuner")  # and with it Ray, which reads the environment then
            from tune_service.tuner import run_trials  # with its types

            with folder.driver_log() as log, output_to(log):
                on_lost = _abort_of(spec.name, place, display)
                run_trials(spec, folder, driver, lease.identity, place, tick, on_lost)
        if driver.halted is not None:
            raise StorageUnavailableError(driver.halted)
        if record.failure is not None:
            reason = "the study failed"
    except BaseException as error:
        with suppress(BucketError):  # a store that is away says nothing of other drivers
            lease.check()
        away = _record_away(error)
        if away is not None:
            found = away.problems[0].found
            reason = f"interrupted: {found}"
            raise StudyHaltedError.of(spec.name, "a study's record takes what it writes", found) from error
        if isinstance(error, KeyboardInterrupt):
            reason = "interrupted by the user"
            goes_on = f"`tune-service resume {spec.name}` goes on"
            raise InterruptedCommandError(goes_on, str(error) or "Ctrl-C") from error
        if isinstance(error, StudyHaltedError):
            reason = f"interrupted: {error.problems[0].found}"
            raise
        what = (str(error).strip() or type(error).__name__).splitlines()[-1]  # Tune puts a traceback before it
        reason = f"interrupted: {what}"
        if isinstance(error, StorageUnavailableError) or storage_is_away(error):
            raise StudyHaltedError.of(spec.name, "a study's storage takes what it writes", what) from error
        raise
    finally:
        with suppress(OSError, BucketError, LeaseLostError):
            lease.sign_of_life()  # a record that took nothing before may take as long again
        _put_in_line(record, reason, display)


def _record_away(error: BaseException) -> RecordUnavailableError | RecordHeldError | None:
    """What Tune made an error of its own of, when it was that the record's database is away, or its lock held."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, RecordUnavailableError | RecordHeldError):
        found = found.__cause__ or found.__context__
    return found


def _abort_of(name: str, place: Place, display: Display) -> Callable[[str], None]:
    """What ends this process when it, or its Ray, hangs or has died: nothing that is waited for comes then."""

    def abort(why: str) -> None:
        place.end_all()
        display.abort(StudyHaltedError.of(name, "a study's driver and its Ray run as long as the study", why))

    return abort


def _put_in_line(record: Record, reason: str, display: Display) -> None:
    """Trials without an end wait for `resume`. Where the record cannot say so, it is true all the same."""
    try:
        record.pause_all(reason)
    except (OSError, StorageError, RecordUnavailableError, LeaseLostError):
        return  # what went wrong before is what is to be told
    display.show(record)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that is closed, end a study as Ctrl-C does; not a SIGHUP that nohup ignores."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(Signals(number).name)

    before = {number: handler for number in (SIGTERM, SIGHUP) if (handler := getsignal(number)) != SIG_IGN}
    for number in before:
        signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal(number, handler)


def _sampler(spec: StudySpec) -> StudySampler:
    return StudySampler(spec.sampler.name, spec.sampler.seed, direction_of(spec.objective.mode))


def _budget(trials: str, record: Record) -> int:
    """The new budget: `+20` on top of the old one, or `80` in all; never less than the trials that there are."""
    number = trials.removeprefix("+")
    if not number.isdecimal() or int(number) == 0:
        raise UserError(Problem("--trials", "adds to the budget (+20) or sets it (80)", repr(trials), "+20"))
    known = len(record.trials())
    if trials.startswith("+"):
        return max(record.budget_trials, known) + int(number)
    return max(int(number), known)
