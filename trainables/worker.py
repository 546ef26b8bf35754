"""One rank of a trial, as a plain object: runs the trainable's generator one report at a time. No Ray, no torch."""

from __future__ import annotations

import errno
import importlib
import os
import random
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainables.errors import (
    InputError,
    OutOfMemoryError,
    Problem,
    StorageUnavailableError,
    TrainableError,
    TrialError,
    UserError,
    WorkerLostError,
    in_words,
    printed,
    text_of,
)
from trainables.imports import import_large
from trainables.log_names import log_name
from trainables.memory import gpu_memory_share, is_out_of_memory
from trainables.redaction import redacted
from trainables.report import Context, Report, Trainable

LISTENER = "TUNE_SERVICE_LISTENER"
"""The variable with the number of the socket that rank 0 holds, so that nobody takes the port of the rendezvous in the
seconds until it is used."""
FIRST_DEADLINE_S = 15 * 60.0
"""How long the first report of a cold group, which may download a model and data, and its first checkpoint may take."""
LARGE_BYTES = 50_000_000
"""A checkpoint that has less is written after every epoch, whole, and nothing else happens meanwhile: where that takes
long the disk is busy.

Where it has more, the ranks train the next epoch while it is hashed and synced; and a whole one is written only once in
KEPT_FREE times as long as it takes, between those the model of each epoch that is the trial's best so far."""
KEPT_FREE = 10.0
"""So at most a tenth of a trial's time goes into what only a crash would need, and a crash costs it no more than the
running epoch and ten times what a checkpoint takes. (The optimum for a known rate of failures would be longer:
J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974.)"""
FAST_BYTES_S = 1e9
"""What a checkpoint writes in a second where that goes fast: by it the time of a first whole one is judged, until a
large model was written."""
MOST_FREE_S = 600.0
"""A whole checkpoint is due after this long in any case: the last one may have met a disk that stood still."""
LOG_LINES = 20
"""Lines of a rank's log that go into the reason of a failure."""
LOG_BYTES = 16_384
"""The most of it, however long its lines are."""


@dataclass(frozen=True)
class Task:
    """One trial, as its ranks are told."""

    number: int
    trainable: str
    """`finetune` or `package.module:function`."""
    params: dict[str, Any]
    """The sampled values, and what the spec's `training` names."""
    seed: int
    max_epochs: int
    logs: str
    """Folder or URL of the log files, one a trial and rank."""
    checkpoints: str
    """Root, a folder or a URL, of the study's checkpoint store."""
    budget_bytes: int | None = None
    """Of all the study's checkpoints."""
    objective: tuple[str, str] = ("eval_accuracy", "max")
    """(metric, mode): the best epoch is saved, however seldom the others are."""
    lease: tuple[str, str] | None = None
    """(path or URL, token) of the driver's lock: while that holds the token, this is the study's one driver's trial."""
    shrinks: bool = False
    """Out of memory, it is tried again with half the micro batch."""
    settings: dict[str, Any] = field(default_factory=dict)
    import_path: str | None = None
    """Folder beside the spec file, where a trainable of the user's own may lie."""
    resume_from: str | None = None

    def log_file(self, rank: int) -> Path:
        return Path(self.logs) / log_name(self.number, rank)


@dataclass(frozen=True)
class RankReport:
    """A Report without its ways to save, which stay in the rank's process."""

    epoch: int
    metrics: dict[str, float]
    saves: bool
    saves_model: bool = False
    num_bytes: int = 0
    took_s: float = field(default=0.0, compare=False)
    """From the report before to this one, by the rank's own clock."""
    memory_share: float = field(default=0.0, compare=False)
    """The most that the rank's process has held of its GPU's memory so far, over all of it; 0: it uses none."""


class RankWorker:
    """Runs one rank of one trial after the other. Every failure comes out as a TrialError that is plain text."""

    def __init__(self, rank: int, world_size: int, uses_gpu: bool) -> None:
        self._rank, self._world_size = rank, world_size
        self._device = "cuda" if uses_gpu else "cpu"
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
        os.environ["TUNE_SERVICE_DEVICE"] = self._device
        if not uses_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything imports torch
        self._reports: Iterator[Report] | None = None
        self._report: Report | None = None

    def listen(self, host: str) -> int:
        """A port of this host's address for the rendezvous; rank 0 is asked, and holds it where others come to it."""
        server = socket.create_server((host, 0))
        port = int(server.getsockname()[1])
        if self._world_size > 1:
            os.environ[LISTENER] = str(server.detach())
        else:
            server.close()
        return port

    def rendezvous(self, host: str, port: int) -> None:
        """Where rank 0 will listen, in the variables that torch.distributed reads."""
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}

    def begin(self, task: Task) -> None:
        """Leaves the trial before and gets ready for this one: log file, import, generator. Trains nothing yet.

        WorkerLostError when the trial before cannot be left: this one needs another process, and has no part in it.
        """
        try:
            self.end()
        except TrialError as error:
            raise WorkerLostError(f"the trial before was not left: {error}") from None
        with _plain_errors(self._rank):
            _log_to(task.log_file(self._rank))
            trainable = resolve(task.trainable, task.import_path)
            if not _full_name(task.trainable).startswith("trainables.") and LISTENER in os.environ:
                os.close(int(os.environ.pop(LISTENER)))  # it will listen by itself
            context = Context(
                params=task.params,
                rank=self._rank,
                world_size=self._world_size,
                device=self._device,
                resume_from=Path(task.resume_from) if task.resume_from else None,
                seed=task.seed,
                max_epochs=task.max_epochs,
                settings=task.settings,
            )
            _seed(task)
            reports: object = trainable(context)
            if not isinstance(reports, Iterable):
                found = f"{task.trainable} returned {type(reports).__name__} {reports!r:.50}"
                raise TrainableError(Problem("trainable", "is a generator function", found, "one that yields Reports"))
            self._reports = iter(reports)

    def next_report(self) -> RankReport | None:
        """Runs up to the next report; None when the trainable has come to its end."""
        assert self._reports is not None, "begin comes first"
        started = time.monotonic()
        with _plain_errors(self._rank):
            yielded = next(self._reports, _END)
            self._report = None if yielded is _END else _checked(yielded, self._report)
            if self._report is None:
                return None
            metrics = {str(name): _number(str(name), value) for name, value in self._report.metrics.items()}
        report, took_s = self._report, time.monotonic() - started
        saves, saves_model = report.save is not None, report.save_model is not None
        return RankReport(report.epoch, metrics, saves, saves_model, report.num_bytes, took_s, gpu_memory_share())

    def save(self, folder: str, model_alone: bool = False) -> None:
        """Writes this rank's part of the last report's checkpoint; nothing when its report has no way to."""
        assert self._report is not None, "a report comes first"
        save = self._report.save_model if model_alone else self._report.save
        with _plain_errors(self._rank):
            if save is not None:
                save(Path(folder))

    def end(self) -> None:
        """Closes the trial's generator, wherever it stands."""
        reports, self._reports, self._report = self._reports, None, None
        if reports is not None and hasattr(reports, "close"):
            with _plain_errors(self._rank):
                reports.close()

    def pid(self) -> int:
        return os.getpid()


def _full_name(trainable: str) -> str:
    """`package.module:function`, of which a spec may say `finetune` for short."""
    return "trainables.finetune:finetune" if trainable == "finetune" else trainable


def resolve(trainable: str, import_path: str | None) -> Trainable:
    """The generator function that a spec's `trainable` names. Imports it, and so whatever it imports."""
    if import_path is not None and import_path not in sys.path:
        sys.path.append(import_path)
    module_name, _, name = _full_name(trainable).partition(":")
    # Of a user's own module nobody knows what it leaves behind.
    load = import_large if module_name.startswith("trainables.") else importlib.import_module
    function = getattr(load(module_name), name, None)
    if not callable(function):
        found = f"module {module_name} has no function {name!r}"
        raise TrainableError(Problem("trainable", "names a generator function", found, "package.module:function"))
    found_function: Trainable = function
    return found_function


def _seed(task: Task) -> None:
    """Each trial of a process draws the same numbers, whatever came before it. `finetune` does so by itself."""
    if _full_name(task.trainable).startswith("trainables."):
        return
    random.seed(task.seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(task.seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(task.seed)


def log_tail(path: Path) -> str:
    """The last lines of a rank's log; empty when there is none."""
    try:
        with path.open("rb") as file:
            # Some more at first, so that no secret is cut in two before it is found.
            file.seek(max(0, path.stat().st_size - 2 * LOG_BYTES))
            lines = redacted(file.read().decode(errors="replace"))[-LOG_BYTES:].splitlines()
    except OSError:
        return ""
    return printed("\n".join(lines[-LOG_LINES:]))


def _checked(report: object, before: Report | None) -> Report:
    """What the trainable yielded, when it keeps the contract."""
    if not isinstance(report, Report):
        found = f"a {type(report).__name__}"
        raise TrainableError(Problem("trainable", "yields trainables.Report", found, "Report(epoch, metrics)"))
    last = before.epoch if before is not None else 0
    if not isinstance(report.epoch, int) or report.epoch <= last:
        found = f"epoch {report.epoch!r} after epoch {last}"
        expected = f"epoch {last + 1}, or a later one"
        raise TrainableError(Problem("trainable", "counts its epochs up from 1", found, expected))
    if not isinstance(report.num_bytes, int) or report.num_bytes < 0:
        found, expected = f"num_bytes {report.num_bytes!r:.50}", "a number of bytes, or 0 where it is not known"
        raise TrainableError(Problem("trainable", "says how large a checkpoint is as a whole number", found, expected))
    if report.save_model is not None and report.save is None:
        rule, found = "`save_model` writes a part of what `save` writes", "`save_model` without `save`"
        raise TrainableError(Problem("trainable", rule, found, "both, or `save` alone"))
    return report


def _number(name: str, value: object) -> float:
    """A metric; a tensor or an array of one number is one."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):  # others are a GPU's that come to light here
        pass
    found = f"{name} is {_shown(value)}"
    raise TrainableError(
        Problem("trainable", "reports metrics that are numbers", found, "a float, or what float() takes")
    )


def _shown(value: object) -> str:
    try:
        return f"{value!r:.50}"
    except Exception:
        return f"a {type(value).__name__}"


def _log_to(path: Path) -> None:
    """Sends this process's standard output and error, of C libraries too, to a log file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # the trial before may have closed or replaced it
            stream.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


class _plain_errors:  # noqa: N801  (reads as a statement)
    """Turns any exception, a SystemExit too, into a TrialError of text: the driver need not have its class."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Ctrl-C and what Ray ends this process by say nothing of the trial.
        is_of_it = not isinstance(error, KeyboardInterrupt) and not hasattr(error, "ray_terminate_msg")
        if error is not None and is_of_it:
            with suppress(OSError, ValueError, AttributeError):  # the log's own disk may be full
                text = redacted("".join(traceback.format_exception(error)))
                sys.stderr.write(text.encode(errors="backslashreplace").decode())
                sys.stderr.flush()
            said = in_words(error)
            if is_out_of_memory(error):
                raise OutOfMemoryError(f"out of memory: rank {self._rank} raised {said}") from None
            if storage_is_away(error):
                raise StorageUnavailableError(f"rank {self._rank} raised {said}") from None
            if isinstance(error, UserError) and not _may_pass(error):
                raise InputError(f"rank {self._rank} raised {said}") from None
            raise TrialError(f"rank {self._rank} raised {said}") from None


def storage_is_away(error: BaseException) -> bool:
    """Whether something failed for a reason that lies with a disk, which is full or gone, and not with the trial.

    By the words too: libraries in other languages hand on the system's message in an error of their own.
    """
    if isinstance(error, OSError) and error.errno is not None:
        is_sockets = error.errno == errno.ENOTCONN and error.filename is None
        return error.errno in _STORAGE_ERRORS and not is_sockets
    text = text_of(error)
    found = re.search(r"os error (\d+)|errno (\d+)", text, re.IGNORECASE)
    number = int(found[1] or found[2]) if found else None
    return number in _STORAGE_ERRORS or any(os.strerror(each) in text for each in _STORAGE_ERRORS)


def _may_pass(error: BaseException | None) -> bool:
    """Whether a disk or a network, such as the hub's, has a part in an error: then the same may succeed later."""
    while error is not None:
        is_of_network = type(error).__module__.partition(".")[0] in _NETWORK
        is_of_config = any(base.__name__ == "StrictDataclassError" for base in type(error).__mro__)
        if isinstance(error, OSError) or (is_of_network and not is_of_config):
            return True
        error = error.__cause__ or error.__context__
    return False


_END = object()
_NETWORK = {"httpx", "httpx2", "httpcore", "requests", "urllib3", "huggingface_hub", "aiohttp"}
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN}
_STORAGE_ERRORS.add(errno.EREMOTEIO)  # an object store, by `BucketError`
