"""A Ray for one study on this machine: nothing of it can be reached from outside, nothing of it is left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIG_IGN, SIGHUP, SIGINT, SIGTERM, getsignal, signal

import psutil

from tune_service.machine import this_machine
from tune_service.place import Usage
from tune_service.spec import StudySpec
from tune_service.storage import StudyFolder

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
    # How many trials may wait: those that were handed out, which the study itself keeps few.
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
}


def prepare_environment(concurrent: int) -> None:
    """Sets what Ray reads when it is imported: call it before that. Ray's processes inherit it."""
    os.environ |= ENVIRONMENT
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(concurrent)
    os.environ.pop("RAY_ADDRESS", None)


@contextmanager
def local_ray(cpus: int, gpus: int, namespace: str) -> Iterator[Path]:
    """Starts Ray; yields a scratch folder. At the end every process that it started is gone."""
    import ray

    scratch = Path(tempfile.mkdtemp(prefix="tune-", dir=_scratch_root()))
    others = set(psutil.Process().children(recursive=True))
    try:
        with own_answer_to_sigterm():
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                namespace=namespace,
                include_dashboard=False,
                log_to_driver=False,
                object_store_memory=100_000_000,
                _temp_dir=str(scratch),
            )
        yield scratch
    finally:
        with undisturbed():
            processes = set(psutil.Process().children(recursive=True)) - others
            ray.shutdown()
            _, alive = psutil.wait_procs(processes, timeout=5)
            for process in alive:
                process.kill()
            psutil.wait_procs(alive, timeout=5)
            shutil.rmtree(scratch, ignore_errors=True)


class ThisMachine:
    """The place where a study runs when nobody names another: a Ray of its own here."""

    def __init__(self) -> None:
        self.room = this_machine()

    def settled(self, spec: StudySpec, folder: StudyFolder) -> StudySpec:
        return spec

    def prepare(self, spec: StudySpec) -> None:
        prepare_environment(self._concurrent(spec))

    @contextmanager
    def session(self, spec: StudySpec) -> Iterator[LocalSession]:
        with local_ray(self.room.cpus, self.room.gpus, namespace=spec.name) as scratch:
            yield LocalSession(scratch, self._concurrent(spec))

    def end_all(self) -> None:
        end_children()

    def _concurrent(self, spec: StudySpec) -> int:
        return self.room.fit(spec.resources, spec.budget.concurrent_trials)


@dataclass(frozen=True)
class LocalSession:
    """A Ray that serves one study: it has all of it, and nothing to wait for."""

    scratch: Path
    concurrent: int
    supervisor_bundle: Mapping[str, float] = field(default_factory=dict)
    root: Path | None = None

    def slots(self, usage: Usage) -> int:
        return self.concurrent

    def notice(self, waits: bool) -> str | None:
        return None


def end_children() -> None:
    """Ends all that this process has started, frozen or not: whoever waits for an answer of it gets an error."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _scratch_root() -> str:
    """The temporary folder, or /tmp where that one's path is too long: a socket's name has room for 107 bytes."""
    socket = "/tune-12345678/session_2026-11-24_06-00-00_123456_1234567/sockets/plasma_store"
    root = tempfile.gettempdir()
    return root if len(os.fsencode(root + socket)) <= 107 else "/tmp"


@contextmanager
def own_answer_to_sigterm() -> Iterator[None]:
    """Goes round `ray.init`, which puts a handler in the place of ours: one that ends this process there and then."""
    before = getsignal(SIGTERM)
    try:
        yield
    except SystemExit as end:
        raise KeyboardInterrupt(SIGTERM.name) from end
    finally:
        signal(SIGTERM, before)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Passes over Ctrl-C and its kin while the end takes its few seconds: a second Ctrl-C would leave things behind."""
    before = {number: signal(number, SIG_IGN) for number in (SIGINT, SIGTERM, SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal(number, handler)
