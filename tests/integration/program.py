"""Runs the program as its users do, in processes of its own, and looks at what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import toys
import yaml

from trainables.rank_actor import RankActor
from trainables.trial import TrialSupervisor

Found = TypeVar("Found")
ROOT = Path(__file__).parents[2]
SUPERVISOR = ("ray::ResourceTrainable", f"ray::{TrialSupervisor.__name__}")
"""A supervisor's process while it works, and while it waits."""
RANK = (f"ray::{RankActor.__name__}",)


@dataclass(frozen=True)
class Run:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on standard output; anything beside it is an error."""
        return json.loads(self.out)


class Command:
    """A command that runs, the leader of a process group as it is in a shell."""

    def __init__(self, process: subprocess.Popen[str], out: Path, err: Path) -> None:
        self._process, self._out, self._err = process, out, err
        self.pid = process.pid

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def ctrl_c(self) -> None:
        """What a terminal does: every process of the group gets SIGINT."""
        os.killpg(self.pid, signal.SIGINT)

    def hang_up(self) -> None:
        """What a terminal does that is closed."""
        os.killpg(self.pid, signal.SIGHUP)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float = 240.0) -> Run:
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s; on standard error:\n{self.err}") from None
        return Run(code, self._out.read_text(), self._err.read_text())


class Program:
    """`tune-service` in a working folder of its own. All that it starts can be told by a mark in the environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage = folder / "studies"
        self.specs = folder / "specs"
        self.specs.mkdir(parents=True)
        shutil.copy(toys.__file__, self.specs)
        # Ray's sockets need a short path.
        self.scratch = Path(tempfile.mkdtemp(prefix="ts-", dir="/tmp"))
        self.environment: dict[str, str] = {}
        """More variables for every command."""
        self._mark = uuid.uuid4().hex
        self._num_commands = 0

    # Commands

    def start(self, *arguments: str, env: Mapping[str, str] | None = None) -> Command:
        self._num_commands += 1
        out, err = (self.folder / f"command-{self._num_commands}.{kind}" for kind in ("out", "err"))
        environment = os.environ | {
            "TUNE_SERVICE_STORAGE": str(self.storage),
            "TUNE_TEST_MARK": self._mark,
            "TMPDIR": str(self.scratch),
            "PYTHONPATH": str(ROOT),  # the program of this tree, wherever another one is installed
            **self.environment,
            **(env or {}),
        }
        command = [sys.executable, "-m", "tune_service.cli", *arguments]
        with out.open("w") as out_file, err.open("w") as err_file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                text=True,
                cwd=self.folder,
                env=environment,
                start_new_session=True,
                preexec_fn=_take_signals,
            )
        return Command(process, out, err)

    def run(self, *arguments: str, timeout_s: float = 240.0, env: Mapping[str, str] | None = None) -> Run:
        """Runs a command to its end, which is never a traceback."""
        found = self.start(*arguments, env=env).wait(timeout_s)
        assert "Traceback" not in found.err, found.err
        return found

    def json(self, *arguments: str, code: int = 0, timeout_s: float = 240.0) -> Any:
        """The document that a command prints with --json; it must end with `code`."""
        found = self.run(*arguments, "--json", timeout_s=timeout_s)
        assert found.code == code, f"exit code {found.code}\n{found.out}\n{found.err}"
        return found.json

    # Specs and what their trials do

    def spec(self, name: str, changes: Mapping[str, Any] | None = None) -> str:
        """Writes a spec of `toys.steady` beside its module; `changes` replaces sections' keys. Returns its path."""
        self.notes(name).mkdir(exist_ok=True)
        spec: dict[str, Any] = {
            "name": name,
            "trainable": "toys:steady",
            "training": {"max_epochs": 4, "notes": str(self.notes(name))},
            "search_space": {"x": {"choice": [0, 1]}},
            "objective": {"metric": "score"},
            "sampler": {"name": "grid"},
            "scheduler": {"name": "none"},
            "budget": {"trials": 2, "concurrent_trials": 2},
            "resources": {"workers": 1, "gpus_per_worker": 0, "cpus_per_worker": 0.25},
        }
        for key, value in (changes or {}).items():
            merges = isinstance(value, dict) and key not in ("search_space", "sampler", "scheduler")
            spec[key] = spec.get(key, {}) | value if merges else value
        return self.write_spec(spec)

    def write_spec(self, spec: Mapping[str, Any]) -> str:
        """Writes a spec as it is. Returns its path."""
        path = self.specs / f"{Path(spec['name']).name}.yaml"
        path.write_text(yaml.safe_dump(dict(spec), sort_keys=False))
        return str(path)

    def notes(self, name: str) -> Path:
        """The folder in which the ranks of a study write down what they do."""
        return self.folder / f"notes-{name}"

    def wait_for_note(
        self, name: str, event: str, x: float, epoch: int, rank: int = 0, timeout_s: float = 180.0
    ) -> toys.Note:
        wanted = (event, x, epoch, rank)

        def look() -> toys.Note | None:
            notes = toys.read_notes(self.notes(name))
            return next((note for note in notes if (note.event, note.x, note.epoch, note.rank) == wanted), None)

        return wait_until(look, timeout_s, f"{event} of epoch {epoch} of x={x} on rank {rank}")

    def release(self, name: str) -> None:
        """Lets all trials of a study go on that wait, now and later."""
        (self.notes(name) / toys.GO).touch()

    def epochs(self, name: str, x: float, rank: int = 0) -> list[int]:
        """The epochs that a rank of a trial began, repeated ones too."""
        notes = toys.read_notes(self.notes(name))
        return [note.epoch for note in notes if (note.event, note.x, note.rank) == ("epoch", x, rank)]

    # Processes

    def processes(self) -> list[psutil.Process]:
        """Every living process that a command of this program started, however far down."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def names(self) -> set[str]:
        """What they are called."""
        return {process.info["name"] for process in psutil.process_iter(["name"]) if self._is_ours(process)}

    def named(self, prefixes: str | tuple[str, ...]) -> list[psutil.Process]:
        """Those whose name begins with one of these. One that ends meanwhile is no error."""
        found = psutil.process_iter(["name"])
        return [each for each in found if str(each.info["name"]).startswith(prefixes) and self._is_ours(each)]

    def process(self, pid: int) -> psutil.Process:
        """One of them by its pid; never a stranger's."""
        return next(process for process in self.processes() if process.pid == pid)

    def supervisor_of(self, rank: int) -> psutil.Process:
        """The supervisor's process of the trial that the rank with this pid runs: the one that is connected to it."""
        connections = self.process(rank).net_connections(kind="tcp")
        ports = {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}

        def is_connected(process: psutil.Process) -> bool:
            try:
                return process.name().startswith(SUPERVISOR) and bool(
                    ports & {each.raddr.port for each in process.net_connections(kind="tcp") if each.raddr}
                )
            except psutil.Error:  # it has ended meanwhile
                return False

        (found,) = filter(is_connected, self.processes())
        return found

    def leftovers(self) -> list[str]:
        """Processes and scratch files that are still there, as soon as there are none or after a few seconds."""

        def look() -> list[str]:
            commands = [f"{each.pid} {each.info['name']}" for each in self.named("")]
            return commands + [str(path) for path in self.scratch.glob("tune-*")]  # torch has a cache beside them

        end = time.monotonic() + 5
        while (left := look()) and time.monotonic() < end:
            time.sleep(0.2)
        return left

    def close(self) -> None:
        """Ends whatever a failed test left running."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get("TUNE_TEST_MARK") == self._mark
        except psutil.Error:
            return False


@contextmanager
def opened(folder: Path) -> Iterator[Program]:
    """A program which must leave nothing running, nor in its scratch folder, where the block does not fail."""
    found = Program(folder)
    try:
        yield found
        left = found.leftovers()
        assert not left, left
    finally:
        found.close()


def _take_signals() -> None:
    """In a new process: what a background job or nohup, round the tests, has told to ignore is taken again."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_until(look: Callable[[], Found | None], timeout_s: float, what: str) -> Found:
    """What `look` finds, as soon as it finds something."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = look()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {timeout_s} s in vain for {what}")


def scores(trial: Mapping[str, Any]) -> list[float | None]:
    """A trial's curve, out of `status --json`; its epochs must count up from 1."""
    assert [report["epoch"] for report in trial["reports"]] == list(range(1, len(trial["reports"]) + 1))
    return [report["metrics"]["score"] for report in trial["reports"]]
