"""What every worker group does, and what only one of several processes can be asked: to lose a rank."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from trainables.errors import OutOfMemoryError, StepDeadlineError, TrialError, WorkerLostError
from trainables.worker import RankReport, Task
from trainables.worker_group import InProcessWorkerGroup, RayWorkerGroup, StepDeadline, WorkerGroup
from tune_service.local_ray import local_ray, scratch_folder

pytestmark = pytest.mark.usefixtures("as_a_rank")


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[str]]:
    """A Ray of this module's own, which must leave nothing behind: the names of its processes at its start."""
    with scratch_folder() as scratch:
        others = set(psutil.Process().children(recursive=True))  # of tests before, and the folder's guard
        with local_ray(scratch, cpus=2, gpus=0, study="contract", on_lost=pytest.fail):
            processes = set(psutil.Process().children(recursive=True)) - others
            assert processes
            assert scratch.stat().st_mode & 0o777 == 0o700  # Ray opens its own folder to all users
            yield ["ray::IDLE" if _is_starting(process) else process.name() for process in processes]
    assert not scratch.exists()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def _is_starting(process: psutil.Process) -> bool:
    """One that is to become `ray::IDLE`."""
    return any(part.endswith("/default_worker.py") for part in process.cmdline())


@contextmanager
def ray_group(workers: int = 1, deadline_s: float | None = None, name: str = "toy") -> Iterator[RayWorkerGroup]:
    bundles = ray.util.placement_group([{"CPU": 0.5}] * workers)
    group = RayWorkerGroup(
        name,
        workers,
        cpus_per_worker=0.5,
        gpus_per_worker=0,
        placement_group=bundles,
        deadline=StepDeadline(fixed_s=deadline_s, start_s=900.0),
    )
    try:
        yield group
    finally:
        group.shutdown()
        ray.util.remove_placement_group(bundles)


MakeTask = Callable[..., Task]


@pytest.fixture
def task(tmp_path: Path) -> MakeTask:
    def make(trainable: str = "counts", number: int = 7, **params: Any) -> Task:
        return Task(
            number=number,
            trainable=f"toy_trainable:{trainable}",
            params={"x": 0.25} | params,
            seed=42,
            max_epochs=2,
            logs=str(tmp_path / "logs"),
            checkpoints=str(tmp_path / "checkpoints"),
            import_path=str(Path(__file__).parent),
        )

    return make


def pids(group: RayWorkerGroup) -> list[int]:
    return ray.get([rank.pid.remote() for rank in group._ranks])


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether a process ends within a time. Its parent, which is Ray's, may be slow to collect it."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


# ---- every group


@pytest.fixture(params=["in this process", "ray"])
def make_group(request: pytest.FixtureRequest) -> Iterator[Callable[[], WorkerGroup]]:
    """Makes a group of one rank in the test: only there may a rank take the test's process."""
    with ExitStack() as stack:
        if request.param == "ray":
            request.getfixturevalue("cluster")
            yield lambda: stack.enter_context(ray_group())
        else:
            yield InProcessWorkerGroup


def test_a_group_gives_every_report_in_order_then_none_and_takes_the_next_trial(
    make_group: Callable[[], WorkerGroup], task: MakeTask, tmp_path: Path
) -> None:
    group = make_group()
    group.begin(task())
    assert group.next_report() == RankReport(1, {"score": 0.25}, saves=True)
    group.save(tmp_path)
    assert (tmp_path / "rank-0").read_text() == "1"
    assert group.next_report() == RankReport(2, {"score": 0.5}, saves=True)
    assert group.next_report() is None

    group.begin(task(number=8, x=1.0))
    assert group.next_report() == RankReport(1, {"score": 1.0}, saves=True)
    group.begin(task(number=9, x=2.0))  # in the middle of trial 8: it was stopped early
    assert group.next_report() == RankReport(1, {"score": 2.0}, saves=True)
    assert task(number=8).log_file(0).read_text() == "rank 0 at epoch 1\n"

    group.shutdown()
    group.shutdown()


def test_a_group_that_is_sent_on_gives_the_same_reports_and_can_be_called_off(
    make_group: Callable[[], WorkerGroup], task: MakeTask, tmp_path: Path
) -> None:
    group = make_group()
    group.begin(task())
    group.go_on()
    assert group.next_report() == RankReport(1, {"score": 0.25}, saves=True)
    group.save(tmp_path)
    group.go_on()
    assert (tmp_path / "rank-0").read_text() == "1"
    assert group.next_report() == RankReport(2, {"score": 0.5}, saves=True)
    group.go_on()
    group.begin(task(number=8, x=1.0))
    assert group.next_report() == RankReport(1, {"score": 1.0}, saves=True)
    group.shutdown()


def test_a_failure_is_text_that_ends_with_the_log_of_its_rank(
    make_group: Callable[[], WorkerGroup], task: MakeTask
) -> None:
    group = make_group()
    group.begin(task("fails"))
    report = group.next_report()
    assert report is not None and (report.epoch, report.saves) == (1, False)
    with pytest.raises(TrialError) as failure:
        group.next_report()
    assert type(failure.value) is TrialError
    said = str(failure.value).splitlines()
    assert said[:2] == ["rank 0 raised ValueError: row 8 is no row", "Last lines of trial-00007-rank-0.log:"]
    assert said[2] == "reading row 7"
    assert said[-1] == "ValueError: row 8 is no row"
    group.shutdown()


def test_a_failure_to_begin_is_a_failure_of_the_trial(make_group: Callable[[], WorkerGroup], task: MakeTask) -> None:
    group = make_group()
    with pytest.raises(TrialError, match=r"rank 0 raised TrainableError: .*no function 'nothing'"):
        group.begin(task("nothing"))
    group.shutdown()


def test_an_exception_that_cannot_be_pickled_is_text_like_any_other(
    make_group: Callable[[], WorkerGroup], task: MakeTask
) -> None:
    group = make_group()
    group.begin(task("raises_unpicklable"))
    group.next_report()
    with pytest.raises(TrialError) as failure:
        group.next_report()
    assert str(failure.value).startswith("rank 0 raised UnpicklableError: one line\nand another")
    group.shutdown()


# ---- two ranks, as processes


@pytest.fixture
def two(cluster: None) -> Iterator[RayWorkerGroup]:
    with ray_group(workers=2, deadline_s=20.0) as group:
        yield group


def test_ranks_that_leave_a_trial_at_a_report_do_what_it_does_at_its_end(cluster: None, task: MakeTask) -> None:
    with ray_group(workers=2) as group:
        group.begin(task("tidies"))
        group.next_report()
        group.leave()
    assert [task().log_file(rank).read_text() for rank in (0, 1)] == ["tidied\n", "tidied\n"]


def test_ranks_that_train_are_not_waited_for(cluster: None, task: MakeTask) -> None:
    with ray_group() as group:
        group.begin(task("sleeps"))
        group.go_on()
        began = time.monotonic()
        group.leave()
        assert time.monotonic() - began < 1


def test_two_ranks_run_as_one_stay_warm_and_are_gone_after_shutdown(
    two: RayWorkerGroup, task: MakeTask, tmp_path: Path
) -> None:
    two.begin(task("environment"))
    two.next_report()
    logs = [dict(re.findall(r"(.*)=(.*)", task().log_file(rank).read_text())) for rank in (0, 1)]
    assert [log["RANK"] for log in logs] == ["0", "1"]
    assert logs[0]["MASTER_PORT"] == logs[1]["MASTER_PORT"]
    for log in logs:
        assert (log["WORLD_SIZE"], log["LOCAL_RANK"], log["CUDA_VISIBLE_DEVICES"]) == ("2", "0", "")
        assert log["MASTER_ADDR"] == "127.0.0.1"
    assert task().log_file(1).read_text().endswith("1 of 2 on cpu\n")

    before = pids(two)
    two.begin(task(number=8))
    # Rank 0's metrics; rank 1 knows how large a checkpoint is.
    assert two.next_report() == RankReport(1, {"score": 0.25}, saves=True, num_bytes=10)
    two.save(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("rank-*")) == ["rank-0", "rank-1"]
    two.next_report()
    assert two.next_report() is None
    assert pids(two) == before and len(set(before)) == 2

    two.shutdown()
    assert all(gone(pid) for pid in before)


def test_ranks_that_disagree_on_the_epoch_are_a_failure(two: RayWorkerGroup, task: MakeTask) -> None:
    two.begin(task("disagrees"))
    with pytest.raises(TrialError, match=re.escape("the ranks disagree on the epoch of their report: [1, 2]")):
        two.next_report()


def test_the_failure_of_one_rank_does_not_wait_for_the_others(two: RayWorkerGroup, task: MakeTask) -> None:
    two.begin(task("fails", rank=1))
    two.next_report()
    started = time.monotonic()
    with pytest.raises(TrialError) as failure:
        two.next_report()
    assert time.monotonic() - started < 10  # the other one sleeps, and the deadline is 20 s
    assert str(failure.value).startswith("rank 1 raised ValueError: row 8 is no row\nLast lines of trial-00007-rank-1")


def test_a_rank_that_died_is_named_though_another_one_complained_first(
    two: RayWorkerGroup, task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainables.worker_group.ECHO_S", 60.0)
    two.begin(task("dies"))
    two.next_report()
    with pytest.raises(WorkerLostError) as failure:
        two.next_report()
    said = str(failure.value).splitlines()
    assert said[0].startswith("rank 1 died: ")
    assert said[1:] == ["Last lines of trial-00007-rank-1.log:", "rank 1 is well"]


def test_a_rank_that_was_killed_from_outside_is_named(two: RayWorkerGroup, task: MakeTask) -> None:
    two.begin(task())
    two.next_report()
    os.kill(pids(two)[1], signal.SIGKILL)
    with pytest.raises(WorkerLostError, match=r"^rank 1 died: .*\nLast lines of trial-00007-rank-1.log:\n"):
        two.next_report()


def test_a_rank_that_the_kernel_killed_for_want_of_memory_is_told_so(
    two: RayWorkerGroup, task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.begin(task())
    two.next_report()
    # One more at each look: at the last, after the rank's death, there are more than when it was asked.
    monkeypatch.setattr("trainables.worker_group.num_oom_kills", itertools.count().__next__)
    os.kill(pids(two)[1], signal.SIGKILL)
    with pytest.raises(OutOfMemoryError, match=r"^out of memory: rank 1 was killed: "):
        two.next_report()


def test_what_the_kernel_killed_here_says_nothing_of_a_rank_on_another_node(
    two: RayWorkerGroup, task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.begin(task())
    two.next_report()
    monkeypatch.setattr("trainables.worker_group.num_oom_kills", itertools.count().__next__)
    assert two._elsewhere == set()
    two._elsewhere = {1}
    os.kill(pids(two)[1], signal.SIGKILL)
    with pytest.raises(WorkerLostError, match=r"^rank 1 died: "):
        two.next_report()


def test_a_rank_that_ends_its_process_is_lost_too(cluster: None, task: MakeTask) -> None:
    with ray_group() as group:
        group.begin(task("exits"))
        group.next_report()
        with pytest.raises(WorkerLostError, match=r"^rank 0 died: "):
            group.next_report()


def test_a_frozen_rank_is_found_within_the_deadline_and_its_process_is_ended(cluster: None, task: MakeTask) -> None:
    with ray_group(workers=2, deadline_s=5.0) as group:
        group.begin(task())
        group.next_report()
        ranks = pids(group)
        os.kill(ranks[1], signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(StepDeadlineError) as failure:
            group.next_report()
        assert 4.9 < time.monotonic() - started < 9.0
        assert str(failure.value).splitlines()[0] == "rank 1 gave no report in 5 s; silent: [1]"
        assert "rank 1 at epoch 1" in str(failure.value)
        group.shutdown()
        assert all(gone(pid) for pid in ranks)


def test_the_deadline_of_ranks_that_were_sent_on_counts_from_then(cluster: None, task: MakeTask) -> None:
    with ray_group(workers=1, deadline_s=6.0) as group:
        group.begin(task("fails", rank=1))
        group.next_report()
        group.go_on()  # sleeps for ten minutes
        time.sleep(5)
        started = time.monotonic()
        with pytest.raises(StepDeadlineError):
            group.next_report()
        assert time.monotonic() - started < 5


def test_two_groups_of_the_same_name_run_side_by_side(cluster: None, task: MakeTask) -> None:
    with ray_group() as first, ray_group() as second:
        for group, x in ((first, 1.0), (second, 2.0)):
            group.begin(task(x=x))
            report = group.next_report()
            assert report is not None and report.metrics == {"score": x}
        assert pids(first) != pids(second)


def test_nothing_of_ray_can_be_reached_from_another_machine(two: RayWorkerGroup, task: MakeTask) -> None:
    two.begin(task())
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [
        ip_address(connection.laddr.ip.removeprefix("::ffff:"))
        for process in family
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 3
    assert [address for address in listening if not address.is_loopback] == []


def test_a_study_s_own_ray_is_two_servers_and_two_agents_and_no_dashboard(cluster: list[str]) -> None:
    others = [name for name in cluster if name != "ray::IDLE"]
    assert sorted(others) == ["gcs_server", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "raylet"]


# ---- deadlines


def test_a_cold_group_has_longer_for_its_first_report_and_then_5_times_its_slowest_epoch() -> None:
    deadline = StepDeadline(fixed_s=None, start_s=900.0)
    assert deadline.seconds == 900.0
    deadline.saw(10.0)
    assert deadline.seconds == 60  # never less
    deadline.saw(30.0)
    deadline.saw(20.0)
    assert deadline.seconds == 150


def test_a_checkpoint_has_a_deadline_of_its_own() -> None:
    """An epoch of 5 s may be followed by a checkpoint that takes minutes to reach its storage."""
    deadline = StepDeadline(fixed_s=None, start_s=900.0)
    deadline.saw(5.0)
    assert (deadline.seconds, deadline.save_seconds) == (60.0, 900.0)
    deadline.saved(40.0)
    deadline.saved(3.0)
    assert (deadline.seconds, deadline.save_seconds) == (60.0, 200.0)
    assert StepDeadline(fixed_s=7.0, start_s=900.0).save_seconds == 7.0


def test_a_report_that_lay_waiting_makes_no_epoch_long(cluster: None, task: MakeTask) -> None:
    with ray_group() as group:
        group.begin(task())
        group.go_on()
        time.sleep(2.0)
        group.next_report()
        assert group._deadline.slowest_s is not None and group._deadline.slowest_s < 1.0


def test_a_step_deadline_of_the_spec_holds_from_the_first_epoch_on() -> None:
    deadline = StepDeadline(fixed_s=7.0, start_s=900.0)
    deadline.saw(100.0)
    assert deadline.seconds == dataclasses.replace(deadline, slowest_s=None).seconds == 7.0
