"""A Ray for one study on this machine: nothing of it can be reached from outside, nothing of it is left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIG_IGN, SIGCONT, SIGHUP, SIGINT, SIGTERM, signal

import psutil

from trainables.errors import MOST_SAID, printed
from trainables.far import SCRATCH, held_folder, left_lock
from trainables.redaction import redacted
from tune_service.errors import StudyHaltedError
from tune_service.prctl import adopt_orphans
from tune_service.ray_start import interrupts_put_off, quick_start
from tune_service.threads import beside

LOCK = ".lock"
"""In a scratch folder; its owner holds it."""
END_S = 5.0
SHUTDOWN_S = 10.0
"""How long Ray may take to end by itself; where its servers are frozen it would take a minute."""
SETTLE_S = 0.02
"""A process that is just being started is there, with its environment, after so long."""
LOOK_S, FIRST_LOOK_S = 1.0, 0.1
STOPPED_S = 20.0
"""Ray's servers may stand still for so long (SIGSTOP) before the study is ended for it."""
SERVERS = ("gcs_server", "raylet")
TUNE_ENVIRONMENT = {
    # The record has every result; Tune's own loggers and state files would cost time and disk.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    # Ctrl-C is ours.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A supervisor that was told to stop and does not is killed after this many seconds.
    "TUNE_FORCE_TRIAL_CLEANUP_S": "20",
    # How many trials may wait for room: as many as the study hands out.
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",
}
ENVIRONMENT = TUNE_ENVIRONMENT | {
    # All of Ray's ports on loopback. The variable's name tells of its origin; it works on Linux.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "AUTOSCALER_METRIC_PORT": "0",  # any free one: two studies may run at once
    "DASHBOARD_METRIC_PORT": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Without it Ray leaves GPUs visible to actors that asked for none.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # Ray tries a socket for ten seconds: so often, and not once a second. In every other start the first try came too
    # early, for the socket is made at that moment.
    "RAY_raylet_client_connect_timeout_milliseconds": "20",
    "RAY_raylet_client_num_connect_attempts": "500",
    # Written once a minute, as they are else, these statistics of Ray's servers are over 100 MB of logs a day.
    "RAY_event_stats_print_interval_ms": "3600000",
}


def prepare_environment(concurrent: int) -> None:
    """Sets what Ray reads when it is imported: call it before that. Ray's processes inherit it."""
    os.environ |= ENVIRONMENT
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(concurrent)
    os.environ.pop("RAY_ADDRESS", None)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder, for this user and this study alone. Processes that are started within know it by SCRATCH.

    Removes those whose owner was killed, and ends what is left of its processes: nobody holds their lock.
    """
    adopt_orphans()
    root = Path(_scratch_root())
    for lock in root.glob(f"tune-*/{LOCK}"):
        _clear(lock.parent)
    scratch, descriptor = held_folder(root, "tune-", LOCK)
    os.environ[SCRATCH] = str(scratch)
    _guards[scratch] = _guard(scratch)
    try:
        yield scratch
    finally:
        with undisturbed():
            os.environ.pop(SCRATCH, None)
            with contextlib.suppress(OSError):
                _remove(scratch)
            os.close(descriptor)
            with _guards_turn:
                guard = _guards.pop(scratch)
            guard.kill()
            guard.communicate()


def _guard(scratch: Path) -> subprocess.Popen[bytes]:
    """A process that waits for the end of this one, however it comes, and ends what is left of its Ray at once.

    Ray's own processes see that theirs is gone where orphans become children of process 1: not where a user's session
    or a container has an init of its own. There ranks would hold their GPUs until the next study comes.
    """
    package = Path(__file__).resolve().parent.parent
    wait = "import sys; sys.stdin.read(); sys.path.insert(0, sys.argv[1])"
    code = f"{wait}; from tune_service.local_ray import clear_up; clear_up(sys.argv[2])"
    environment = {name: value for name, value in os.environ.items() if name != SCRATCH}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(package), str(scratch)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd="/",
        start_new_session=True,  # Ctrl-C is not for it
    )


def clear_up(scratch: str) -> None:
    """Clears up behind a driver that has just ended, as the guard."""
    end = time.monotonic() + END_S
    while (Path(scratch) / LOCK).exists() and time.monotonic() < end:
        _clear(Path(scratch))
        time.sleep(SETTLE_S)  # the driver's lock goes a moment after the pipe to it


def _clear(scratch: Path) -> None:
    """Ends what is left of a driver that is gone, and removes its scratch folder; nothing while somebody holds that."""
    with contextlib.suppress(OSError), left_lock(scratch / LOCK):
        _end_processes_of(scratch)
        _remove(scratch)


@contextmanager
def local_ray(scratch: Path, cpus: int, gpus: int, study: str, on_lost: Callable[[str], None]) -> Iterator[None]:
    """Starts Ray, with its files in `scratch`. At the end every process that it started is gone. StudyHaltedError: it
    does not start.

    `on_lost` is called, in a thread, with what is wrong when Ray itself has died or hangs: whatever the caller waits
    for then, it waits a minute for and is ended by Ray, without a word.
    """
    import ray

    others, told = _children(), list[int]()
    try:
        with _watched(scratch, on_lost, others, told):
            with interrupts_put_off(told), quick_start(told):
                _start(cpus, gpus, study, scratch / "ray")
            yield
    finally:
        with undisturbed():
            processes = _children() - others
            patience_s = END_S if ray.is_initialized() else 0.0  # what was just starting nobody tells to end
            try:
                with _no_longer_than(SHUTDOWN_S, lambda: _end_all(lambda: _children() - others)):
                    ray.shutdown()
            finally:
                psutil.wait_procs(processes, timeout=patience_s)
                _end_all(lambda: _children() - others)


def _start(cpus: int, gpus: int, study: str, folder: Path) -> None:
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            namespace=study,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100_000_000,
            _temp_dir=str(folder),  # which Ray opens to all users, but not what it lies in
        )
    except Exception as error:  # the errors of its start have no class in common
        traceback.print_exc()  # into the driver's log
        words = str(error).strip() or type(error).__name__
        found = f"Ray did not start: {printed(words.splitlines()[-1])[:MOST_SAID]}"
        raise StudyHaltedError.of(study, "a study has a Ray of its own", found) from error


@contextmanager
def _no_longer_than(seconds: float, end: Callable[[], None]) -> Iterator[None]:
    """Calls `end`, in a thread, where the block takes longer: it waits for what that ends."""
    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _end_processes_of(scratch: Path) -> None:
    """Ends what is left of a killed driver's Ray: of one that was just starting nobody else does."""

    def find() -> list[psutil.Process]:
        psutil.process_iter.cache_clear()  # it passes over a process whose number another one had at its last look
        return [each for each in psutil.process_iter() if _is_of(each, scratch)]

    _end_all(find)


def _end_all(find: Callable[[], Collection[psutil.Process]]) -> None:
    """Kills what `find` finds until it finds nothing twice: one that is just being started is passed over."""
    end = time.monotonic() + END_S
    seen = True
    while ((processes := find()) or seen) and time.monotonic() < end:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if processes:
            psutil.wait_procs(processes, timeout=0.2)  # one whose parent does not bury it is never seen to end
        else:
            time.sleep(SETTLE_S)
        seen = bool(processes)


def _is_of(process: psutil.Process, scratch: Path) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if process.environ().get(SCRATCH) == str(scratch):
            return True
        # Ray's agents write the names that they give themselves over their environment.
        is_rays = process.name().startswith("ray::")
        return is_rays and any(Path(each.path).is_relative_to(scratch) for each in process.open_files())
    except psutil.Error:
        return False


def _remove(scratch: Path) -> None:
    """The lock last: whatever is left beside it is found again by the next study."""
    for each in [each for each in scratch.iterdir() if each.name != LOCK]:
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each, ignore_errors=True)
        else:
            each.unlink(missing_ok=True)
    if [each.name for each in scratch.iterdir()] == [LOCK]:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _watched(
    scratch: Path, on_lost: Callable[[str], None], others: set[psutil.Process], told: Collection[int]
) -> Iterator[None]:
    """Looks every second whether Ray's two servers live, from when they are there, as Ray itself does not while it
    starts. `others`: children that were there before, orphans perhaps. `told`: signals, which end the servers too where
    a whole group got them.
    """
    servers: dict[psutil.Process, str] = {}

    def look(end: threading.Event) -> None:
        stopped_s = 0.0
        look_s = FIRST_LOOK_S
        while not end.wait(look_s):
            _tend_guards()
            if len(servers) == len(SERVERS):
                look_s = LOOK_S
            else:
                servers.update(_servers(others))
            states = {name: _state(server) for server, name in servers.items()}
            gone = [name for name, state in states.items() if state in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)]
            stopped_s = stopped_s + look_s if psutil.STATUS_STOPPED in states.values() else 0.0
            if (gone or stopped_s > STOPPED_S) and not told and not end.is_set():
                died = "; ".join(f"Ray's {name} died{_first_words(scratch, name)}" for name in gone)
                on_lost(died or f"Ray was stopped for {stopped_s:.0f} s")
                return

    with beside(look, "ray-watch"):
        yield


def _servers(others: set[psutil.Process]) -> dict[psutil.Process, str]:
    """Ray's two, as far as they have been started, and their names: of one that has died nothing tells it."""
    found = {}
    for each in set(psutil.Process().children()) - others:
        with contextlib.suppress(psutil.Error):
            if (name := each.name()) in SERVERS:
                found[each] = name
    return found


def _first_words(scratch: Path, server: str) -> str:
    """What it says of its end, if anything; the addresses below it tell nobody anything, and go with the folder."""
    try:
        with (scratch / "ray/session_latest/logs" / f"{server}.err").open(errors="replace") as log:
            words = printed(redacted(log.readline(2 * MOST_SAID)).strip())[:MOST_SAID]
    except OSError:
        return ""
    return words and f": {words}"


def _state(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_DEAD)


_guards: dict[Path, subprocess.Popen[bytes]] = {}
"""Each scratch folder of this process and its guard."""
_guards_turn = threading.Lock()


def _tend_guards() -> None:
    """One that has ended has a successor, one that was frozen goes on: behind whom else would clear up?"""
    with _guards_turn:
        for scratch, guard in list(_guards.items()):
            with contextlib.suppress(OSError, psutil.Error):
                if guard.poll() is not None:
                    _guards[scratch] = _guard(scratch)
                elif psutil.Process(guard.pid).status() == psutil.STATUS_STOPPED:
                    guard.send_signal(SIGCONT)


def _children() -> set[psutil.Process]:
    """All that this process has started, and what they have, but for its guards: those end after it."""
    with _guards_turn:
        guards = {guard.pid for guard in _guards.values()}
        return {each for each in psutil.Process().children(recursive=True) if each.pid not in guards}


def end_children() -> None:
    """Ends all that this process has started, frozen or not: whoever waits for an answer of it gets an error."""
    _tend_guards()  # it may have been frozen with the others; where this process ends too, it clears up
    for process in _children():
        with contextlib.suppress(psutil.Error):
            process.kill()


def _scratch_root() -> str:
    """The temporary folder, or /tmp where that one's path is too long: a socket's name has room for 107 bytes."""
    socket = "/tune-12345678/ray/session_2026-11-24_06-00-00_123456_1234567/sockets/plasma_store"
    root = tempfile.gettempdir()
    return root if len(os.fsencode(root + socket)) <= 107 else "/tmp"


@contextmanager
def undisturbed() -> Iterator[None]:
    """Passes over Ctrl-C and its kin while the end takes its few seconds: a second Ctrl-C would leave things behind."""
    before = {number: signal(number, SIG_IGN) for number in (SIGINT, SIGTERM, SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal(number, handler)
