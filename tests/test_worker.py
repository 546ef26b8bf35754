"""One rank, run here: reports in order, and every failure as text that says what happened."""

from __future__ import annotations

import asyncio
import errno
import gc
import math
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from ray._raylet import raise_sys_exit_with_custom_error_message

from trainables import Context, Report
from trainables.errors import InputError, ModelError, Problem, StorageUnavailableError, TrainableError, TrialError
from trainables.far import SCRATCH
from trainables.rank_actor import RankActor
from trainables.worker import LISTENER, LOG_LINES, RankReport, RankWorker, Task, log_tail, resolve, storage_is_away

pytestmark = pytest.mark.usefixtures("as_a_rank")

Trainable = Callable[[Context], Any]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(
        number=3,
        trainable="toy_trainable:counts",
        params={"x": 0.25},
        seed=7,
        max_epochs=2,
        logs=str(tmp_path / "logs"),
        checkpoints=str(tmp_path / "checkpoints"),
    )


@pytest.fixture
def begun(task: Task, monkeypatch: pytest.MonkeyPatch) -> Callable[[Trainable], RankWorker]:
    """A worker that has begun a trial with a trainable given as a function."""

    def begin(trainable: Trainable, rank: int = 0) -> RankWorker:
        monkeypatch.setattr("trainables.worker.resolve", lambda *_: trainable)
        worker = RankWorker(rank, 1, uses_gpu=False)
        worker.begin(task)
        return worker

    return begin


def log(task: Task, rank: int = 0) -> str:
    return task.log_file(rank).read_text()


# ---- reports


def test_reports_come_in_epoch_order_and_then_none(task: Task) -> None:
    worker = RankWorker(0, 1, uses_gpu=False)
    worker.begin(task)
    assert [worker.next_report() for _ in range(4)] == [
        RankReport(1, {"score": 0.25}, saves=True),
        RankReport(2, {"score": 0.5}, saves=True),
        None,
        None,
    ]


def test_a_trainable_is_told_all_that_its_context_promises(
    task: Task, begun: Callable[..., RankWorker], tmp_path: Path
) -> None:
    seen: list[Context] = []

    def train(context: Context) -> Iterator[Report]:
        seen.append(context)
        yield Report(1, {})

    worker = begun(train, rank=2)
    assert seen == []  # begin trains nothing yet
    worker.next_report()
    assert seen == [
        Context(
            params={"x": 0.25}, rank=2, world_size=1, device="cpu", resume_from=None, seed=7, max_epochs=2, settings={}
        )
    ]


def test_numbers_of_any_kind_are_metrics_also_the_ones_that_are_not_finite(
    begun: Callable[..., RankWorker],
) -> None:
    import numpy as np

    metrics = {"whole": 1, "half": np.float32(0.5), "one": np.array(1.0), "nan": math.nan}
    report = begun(lambda context: [Report(1, metrics)]).next_report()
    assert report is not None and not report.saves
    assert {name: type(value) for name, value in report.metrics.items()} == dict.fromkeys(metrics, float)
    assert report.metrics["half"] == 0.5 and math.isnan(report.metrics["nan"])


def test_save_writes_the_moment_of_the_last_report(task: Task, tmp_path: Path) -> None:
    worker = RankWorker(0, 1, uses_gpu=False)
    worker.begin(task)
    worker.next_report()
    worker.save(str(tmp_path))
    assert (tmp_path / "rank-0").read_text() == "1"


def test_the_next_trial_begins_when_the_one_before_has_cleaned_up(
    task: Task, begun: Callable[..., RankWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    held = []  # so that it is closed by whoever leaves the trial, not by chance

    def generator() -> Iterator[Report]:
        happened.append("begin")
        try:
            yield Report(1, {})
            yield Report(2, {})
        finally:
            happened.append("cleaned up")

    def train(context: Context) -> Iterator[Report]:
        held.append(generator())
        return held[-1]

    worker = begun(train)
    worker.next_report()
    worker.begin(task)
    worker.next_report()
    worker.end()
    worker.end()
    assert happened == ["begin", "cleaned up"] * 2


# ---- failures


def failure(worker: RankWorker) -> TrialError:
    """The error of the next report that is one."""
    with pytest.raises(TrialError) as raised:
        while worker.next_report() is not None:
            pass
    assert type(raised.value) in (TrialError, InputError)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)  # noqa: S301  (Ray sends it so)
    return raised.value


def test_an_exception_becomes_text_with_its_rank_class_and_message_and_its_traceback_is_in_the_log(
    task: Task,
) -> None:
    worker = RankWorker(1, 2, uses_gpu=False)
    worker.begin(Task(**{**vars(task), "trainable": "toy_trainable:fails"}))
    assert str(failure(worker)) == "rank 1 raised ValueError: row 8 is no row"
    text = log(task, rank=1)
    assert text.startswith("reading row 7\nTraceback")
    assert 'toy_trainable.py", line' in text and text.endswith("ValueError: row 8 is no row\n")


def test_a_traceback_in_the_log_holds_no_secret_of_the_environment(
    begun: Callable[..., RankWorker], task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "Zq8-plain-key-4417")

    def asks(context: Context) -> Iterator[Report]:
        raise ValueError(f"no answer for {os.environ['SOME_API_KEY']}")
        yield Report(1, {})

    with pytest.raises(TrialError):
        begun(asks).next_report()
    assert "ValueError: no answer for ***" in log(task) and "Zq8" not in log(task)


def test_an_exception_that_cannot_be_pickled_becomes_text_too(task: Task) -> None:
    worker = RankWorker(0, 1, uses_gpu=False)
    worker.begin(Task(**{**vars(task), "trainable": "toy_trainable:raises_unpicklable"}))
    assert str(failure(worker)) == "rank 0 raised UnpicklableError: one line\nand another"


class MuteError(Exception):
    """Has no text, and fails when it is asked for it."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError(), "rank 0 raised ValueError"),
        (KeyError("x"), "rank 0 raised KeyError: 'x'"),
        (StopIteration("early"), "rank 0 raised RuntimeError: generator raised StopIteration"),
        (MuteError(), "rank 0 raised MuteError"),
        (TrialError("rank 9 raised it"), "rank 0 raised TrialError: rank 9 raised it"),
    ],
)
def test_every_exception_has_a_text(begun: Callable[..., RankWorker], error: Exception, text: str) -> None:
    def train(context: Context) -> Iterator[Report]:
        yield Report(1, {})
        raise error

    assert str(failure(begun(train))) == text


@pytest.mark.parametrize("metrics", [{"score": "high"}, {"score": None}, {"score": [1, 2]}, [0.5], None])
def test_metrics_that_are_no_numbers_are_a_failure_of_the_rank(begun: Callable[..., RankWorker], metrics: Any) -> None:
    assert str(failure(begun(lambda context: [Report(1, metrics)]))).startswith("rank 0 raised ")


@pytest.mark.parametrize(
    ("epochs", "found"),
    [
        ([1, 1], "epoch 1 after epoch 1; expected epoch 2"),
        ([3, 2], "epoch 2 after epoch 3; expected epoch 4"),
        ([0], "epoch 0 after epoch 0; expected epoch 1"),
        (["1"], "epoch '1' after epoch 0"),
        ([1.0], "epoch 1.0 after epoch 0"),
    ],
)
def test_epochs_must_count_up_from_1(begun: Callable[..., RankWorker], epochs: list[Any], found: str) -> None:
    error = failure(begun(lambda context: [Report(epoch, {}) for epoch in epochs]))
    assert found in str(error) and "TrainableError" in str(error)


def test_a_trial_that_goes_on_may_begin_at_a_later_epoch(begun: Callable[..., RankWorker]) -> None:
    report = begun(lambda context: [Report(5, {})]).next_report()
    assert report is not None and report.epoch == 5


@pytest.mark.parametrize("yielded", [{"score": 0.5}, 0.5, "report", (1, {})])
def test_anything_else_than_a_report_is_refused_with_what_is_right(
    begun: Callable[..., RankWorker], yielded: object
) -> None:
    text = str(failure(begun(lambda context: [yielded])))
    assert f"yields trainables.Report; found a {type(yielded).__name__}" in text


def test_a_trainable_that_is_no_generator_fails_when_it_begins(begun: Callable[..., RankWorker]) -> None:
    with pytest.raises(InputError, match=r"is a generator function; found \S+ returned int 7"):
        begun(lambda context: 7)


def test_what_the_user_wrote_is_told_from_a_hub_that_is_away(begun: Callable[..., RankWorker]) -> None:
    """The first would end the same again; the second may be there when the trial is tried again."""

    def train(context: Context, cause: Exception | None) -> Iterator[Report]:
        raise ModelError(Problem("model", "can be opened", "nothing", "a model")) from cause
        yield

    deep = ValueError("not fetched")
    deep.__context__ = OSError("no connection")
    silent = type("ReadTimeout", (Exception,), {"__module__": "httpx2._exceptions"})("silent")
    strict = type("StrictDataclassError", (Exception,), {"__module__": "huggingface_hub.errors"})
    typed = type("StrictDataclassFieldValidationError", (strict,), {"__module__": "huggingface_hub.errors"})
    for cause, kind in (
        (None, InputError),
        (ValueError("n_head"), InputError),
        (typed("n_layer is no number"), InputError),
        (OSError("no connection"), TrialError),
        (deep, TrialError),
        (silent, TrialError),
    ):
        with pytest.raises(TrialError, match="rank 0 raised ModelError: model: can be opened") as raised:
            begun(partial(train, cause=cause)).next_report()
        assert type(raised.value) is kind


def test_a_failed_save_is_a_failure_of_the_rank(begun: Callable[..., RankWorker], tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    worker = begun(lambda context: [Report(1, {}, full)])
    worker.next_report()
    with pytest.raises(StorageUnavailableError, match=r"rank 0 raised OSError.*No space left"):
        worker.save(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (asyncio.CancelledError(), "CancelledError"),
        (GeneratorExit(), "GeneratorExit"),
        (SystemExit(2), "SystemExit: 2"),
        (type("Own", (BaseException,), {})("its words"), "Own: its words"),
        (ValueError("\x1b[2J and \ud800"), r"ValueError: \x1b[2J and \ud800"),
        (ValueError("x" * 3_000), f"ValueError: {'x' * 2_000}... (3000 characters)"),
    ],
    ids=["CancelledError", "GeneratorExit", "SystemExit", "a class of its own", "odd characters", "a long text"],
)
def test_whatever_a_trainable_raises_fails_its_trial_in_words_that_a_terminal_takes(
    begun: Callable[..., RankWorker], task: Task, error: BaseException, said: str
) -> None:
    def train(context: Context) -> Iterator[Report]:
        raise error
        yield

    with pytest.raises(TrialError) as raised:
        begun(train).next_report()
    assert str(raised.value) == f"rank 0 raised {said}"
    assert type(error).__name__ in log(task), "its traceback is in the log"


def test_a_process_that_ray_ends_is_no_failure_of_a_trial(begun: Callable[..., RankWorker]) -> None:
    def train(context: Context) -> Iterator[Report]:
        raise_sys_exit_with_custom_error_message("The process receives a SIGTERM.", exit_code=1)
        yield

    with pytest.raises(SystemExit):
        begun(train).next_report()


def test_a_socket_that_is_not_connected_is_no_storage_that_is_away(begun: Callable[..., RankWorker]) -> None:
    def train(context: Context) -> Iterator[Report]:
        socket.socket().getpeername()
        yield

    with pytest.raises(TrialError) as raised:
        begun(train).next_report()
    assert type(raised.value) is TrialError
    gone = OSError(errno.ENOTCONN, "Transport endpoint is not connected", "/mnt/studies")
    assert storage_is_away(gone), "a file system's server is gone"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "None"), ("0.5", "'0.5'"), ([1.0, 2.0], "[1.0, 2.0]"), (10**400, "1000")],
    ids=["None", "text", "two numbers", "more than a float holds"],
)
def test_a_metric_that_is_no_number_is_named(begun: Callable[..., RankWorker], value: object, shown: str) -> None:
    with pytest.raises(InputError, match=f"reports metrics that are numbers; found loss is {re.escape(shown)}"):
        begun(lambda context: [Report(1, {"loss": value})]).next_report()  # type: ignore[dict-item]


def test_a_fault_of_a_gpu_that_a_metric_brings_to_light_is_none_of_the_users(begun: Callable[..., RankWorker]) -> None:
    class Faulty:
        def __float__(self) -> float:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(TrialError, match="rank 0 raised RuntimeError: CUDA error: an illegal memory access") as raised:
        begun(lambda context: [Report(1, {"loss": Faulty()})]).next_report()  # type: ignore[dict-item]
    assert type(raised.value) is TrialError


@pytest.mark.parametrize("value", [numpy.float32(0.5), numpy.array(0.5), torch.tensor([0.5]), 1])
def test_whatever_is_one_number_is_a_metric(begun: Callable[..., RankWorker], value: Any) -> None:
    report = begun(lambda context: [Report(1, {"loss": value})]).next_report()
    assert report is not None and report.metrics == {"loss": float(value)}


def test_a_report_that_is_none_is_not_the_end(begun: Callable[..., RankWorker]) -> None:
    with pytest.raises(InputError, match=r"yields trainables\.Report; found a NoneType"):
        begun(lambda context: [None, Report(1, {})]).next_report()


def test_a_model_is_saved_alone_only_where_a_whole_checkpoint_can_be(begun: Callable[..., RankWorker]) -> None:
    with pytest.raises(InputError, match="found `save_model` without `save`"):
        begun(lambda context: [Report(1, {}, save_model=lambda folder: None)]).next_report()


def test_each_trial_of_a_process_draws_the_same_numbers(begun: Callable[..., RankWorker], task: Task) -> None:
    def train(context: Context) -> Iterator[Report]:
        drawn = {"python": random.random(), "numpy": numpy.random.random(), "torch": float(torch.rand(()))}
        yield Report(1, drawn)

    worker = begun(train)
    first = worker.next_report()
    worker.begin(task)
    assert worker.next_report() == first
    worker.begin(replace(task, seed=8))
    assert worker.next_report() != first


def test_ctrl_c_is_no_failure_of_a_trial(begun: Callable[..., RankWorker]) -> None:
    def train(context: Context) -> Iterator[Report]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        begun(train).next_report()


# ---- what the dashboard shows of a log


def shown_of_two_reports(task: Task, ray_log: Path) -> str:
    """What a rank writes into the log that Ray keeps of its process."""
    descriptor = os.open(ray_log, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.close(descriptor)
    rank = RankActor(0, 1, uses_gpu=False)
    rank.begin(task)
    rank.next_report(), rank.next_report()
    return ray_log.read_text()


@pytest.mark.parametrize(
    ("is_own_ray", "expected"),
    [
        (False, "trial 3 rank 0 | rank 0 at epoch 1\ntrial 3 rank 0 | rank 0 at epoch 2\n"),
        (True, ""),
    ],
    ids=["a cluster's", "none on one machine"],
)
def test_the_dashboard_has_a_copy_of_the_log_lines(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_own_ray: bool, expected: str
) -> None:
    if is_own_ray:
        monkeypatch.setenv(SCRATCH, str(tmp_path))
    assert shown_of_two_reports(task, tmp_path / "shown") == expected
    assert log(task) == "rank 0 at epoch 1\nrank 0 at epoch 2\n"


def test_of_very_many_lines_the_dashboard_has_the_last_whole_ones(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainables.rank_actor.MOST_SHOWN_BYTES", 30)
    monkeypatch.setattr("trainables.worker.resolve", lambda *_: chatty)
    expected = "trial 3 rank 0 | epoch 1, last line\ntrial 3 rank 0 | epoch 2\n"
    assert shown_of_two_reports(task, tmp_path / "shown") == expected


def chatty(context: Context) -> Iterator[Report]:
    print(*(f"epoch 1, {which} line" for which in ("first", "second", "last")), sep="\n")
    yield Report(1, {"loss": 0.5})
    print("epoch 2")
    yield Report(2, {"loss": 0.5})


# ---- which trainable


def test_a_trainable_is_found_beside_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", ["/nowhere"])
    (tmp_path / "beside_the_spec.py").write_text("def train(context): yield")
    assert resolve("beside_the_spec:train", str(tmp_path)).__name__ == "train"


def test_what_lies_beside_the_spec_takes_no_other_modules_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (tmp_path / "colorsys.py").write_text("def train(context): yield")
    with pytest.raises(TrainableError, match="module colorsys has no function 'train'"):
        resolve("colorsys:train", str(tmp_path))


def test_garbage_is_looked_for_while_a_module_of_the_users_own_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "drops", raising=False)
    (tmp_path / "drops.py").write_text(
        "import gc, weakref\n"
        "class Held:\n    def __init__(self): self.own = self\n"
        "dropped, found = weakref.ref(Held()), gc.get_threshold()\n"
        "def train(context): yield"
    )
    train: Any = resolve("drops:train", None)
    gc.collect()
    assert train.__globals__["dropped"]() is None and train.__globals__["found"] == gc.get_threshold()


def test_no_garbage_is_looked_for_while_finetune_is_imported() -> None:
    code = (
        "import gc; from trainables.worker import resolve; before, seen = gc.get_threshold(), []\n"
        "gc.callbacks.append(lambda phase, info: seen.append(phase)); resolve('finetune', None)\n"
        "print(len(seen), gc.get_threshold() == before, gc.get_freeze_count() > 100_000)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["0", "True", "True"]


def test_what_a_trial_left_is_collected_after_the_next_one_has_found_its_trainable() -> None:
    class Learner:
        """Holds itself, as a model with hooks does."""

        def __init__(self) -> None:
            self.own = self

    resolve("finetune", None)
    learner = weakref.ref(Learner())
    resolve("finetune", None)
    gc.collect()
    assert learner() is None


def test_a_module_without_the_function_is_refused(tmp_path: Path) -> None:
    for name in ("toy_trainable:nothing", "toy_trainable:__doc__"):
        with pytest.raises(TrainableError, match="module toy_trainable has no function"):
            resolve(name, None)


# ---- logs and environment


def test_each_trial_and_rank_has_a_log_of_its_own_with_what_c_code_writes_too(
    task: Task, begun: Callable[..., RankWorker]
) -> None:
    def train(context: Context) -> Iterator[Report]:
        print("printed")
        os.write(1, b"written\n")
        os.write(2, b"an error\n")
        yield Report(1, {})

    worker = begun(train)
    worker.next_report()
    worker.begin(Task(**{**vars(task), "number": 4}))
    worker.next_report()
    print("after")
    assert log(task) == "printed\nwritten\nan error\n"
    assert log(Task(**{**vars(task), "number": 4})).endswith("an error\nafter\n")


def test_a_restart_adds_to_the_log(task: Task) -> None:
    for _ in range(2):
        worker = RankWorker(0, 1, uses_gpu=False)
        worker.begin(task)
        worker.next_report()
    assert log(task) == "rank 0 at epoch 1\n" * 2


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert log_tail(path) == ""
    path.write_text("".join(f"line {number}\n" for number in range(10_000)))
    assert log_tail(path).splitlines() == [f"line {number}" for number in range(10_000 - LOG_LINES, 10_000)]
    path.write_bytes(b"\xff\xfe binary\n" + b"x" * 100_000)
    assert log_tail(path) == "x" * 16_384
    path.write_bytes(b"a\n\xff\n")
    assert log_tail(path) == "a\n\N{REPLACEMENT CHARACTER}"


def test_a_rank_on_the_cpu_sees_no_gpu_and_one_on_a_gpu_sees_the_one_it_was_given() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    RankWorker(1, 2, uses_gpu=True)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    RankWorker(1, 2, uses_gpu=False).rendezvous("127.0.0.1", 4000)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    assert [os.environ[name] for name in names] == ["1", "2", "0", "127.0.0.1", "4000", ""]


def test_rank_0_of_two_holds_the_port_of_the_rendezvous_until_a_trainable_of_the_users_own_listens(task: Task) -> None:
    worker = RankWorker(0, 2, uses_gpu=False)
    port = worker.listen("127.0.0.1")
    with pytest.raises(OSError, match="Address already in use"):
        socket.create_server(("127.0.0.1", port))
    worker.begin(task)
    socket.create_server(("127.0.0.1", port)).close()
    assert LISTENER not in os.environ


def test_a_rank_alone_holds_no_port() -> None:
    port = RankWorker(0, 1, uses_gpu=False).listen("127.0.0.1")
    socket.create_server(("127.0.0.1", port)).close()
    assert LISTENER not in os.environ
