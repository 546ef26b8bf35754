"""What a supervisor makes of its ranks' reports and failures. Its group is one rank in this process."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from trainables import Context, Report
from trainables.checkpoint import CheckpointStore
from trainables.errors import OutOfMemoryError, RankNotStartedError, StepDeadlineError, TrialError, WorkerLostError
from trainables.trial import TrialSupervisor, halved
from trainables.worker import Task
from trainables.worker_group import InProcessWorkerGroup, WorkerGroup

MAX_EPOCHS = 2


def learns(context: Context) -> Iterator[Report]:
    """Saves 100 bytes an epoch. Micro batches above `fits` take more memory than this process may have."""
    micro_batch_size = context.settings.get("training", {}).get("micro_batch_size")
    begin = 0
    if context.resume_from is not None:
        begin = json.loads((context.resume_from / "state.json").read_text())["epoch"]
    for epoch in range(begin + 1, context.max_epochs + 1):
        if (micro_batch_size or 32) > context.params.get("fits", 32):
            _ask_for_too_much()
        yield Report(epoch, {"score": float(micro_batch_size or 0)}, partial(_save, epoch, context.params.get("errno")))


def climbs(context: Context) -> Iterator[Report]:
    """Reports the given scores. A model is 10 bytes, a whole checkpoint 20 and some."""
    begin = 0
    if context.resume_from is not None:
        begin = int((context.resume_from / "epoch").read_text())

    def save_model(folder: Path) -> None:
        (folder / "model").write_bytes(bytes(10))

    def save(folder: Path, epoch: int) -> None:
        save_model(folder)
        (folder / "optimizer").write_bytes(bytes(10))
        (folder / "epoch").write_text(str(epoch))

    for epoch, score in enumerate(context.params["scores"][begin:], start=begin + 1):
        parts = save_model if context.params["in_parts"] else None
        yield Report(epoch, {"score": score}, partial(save, epoch=epoch), parts, context.params.get("num_bytes", 0))


def cleans_up(context: Context) -> Iterator[Report]:
    try:
        for epoch in range(1, context.max_epochs + 1):
            yield Report(epoch, {"score": 0.0})
    finally:
        if context.params.get("badly"):
            raise ValueError("the cleaning failed")


def leads_elsewhere(context: Context) -> Iterator[Report]:
    """Its checkpoint holds a link, a file of the given name, or neither."""

    def save(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "manifest.json").write_text("{}")  # the folder's own alone is ours
        if "link" in context.params:
            (folder / "deep" / context.params["link"]).symlink_to("manifest.json")
        if "pipe" in context.params:
            os.mkfifo(folder / "deep" / context.params["pipe"])
        if "file" in context.params:
            (folder / context.params["file"]).write_text("{}")

    for epoch in range(1, context.max_epochs + 1):
        yield Report(epoch, {"score": 0.0}, save)


def _ask_for_too_much() -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**36, limits[1]))
    try:
        bytearray(2**37)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _save(epoch: int, errno: int | None, folder: Path) -> None:
    if errno is not None:
        raise OSError(errno, os.strerror(errno))
    (folder / "state.json").write_text(json.dumps({"epoch": epoch}))
    (folder / "weights").write_bytes(bytes(100))


class Supervisor(TrialSupervisor):
    """The real one, without Ray."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.setup(config)

    def _new_group(self) -> WorkerGroup:
        return InProcessWorkerGroup()


@pytest.fixture
def task(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Task:
    return Task(
        number=0,
        trainable="test_trial:learns",
        params={},
        seed=1,
        max_epochs=MAX_EPOCHS,
        logs=str(tmp_path / "logs"),
        checkpoints=str(tmp_path / "checkpoints"),
        settings={"training": {"batch_size": 32, "micro_batch_size": None}},
        import_path=str(Path(__file__).parent),
    )


@pytest.fixture(autouse=True)
def own_output() -> Iterator[None]:
    """A rank sends its process's output to its log, and this process is the rank."""
    saved = [os.dup(number) for number in (1, 2)]
    yield
    for number, descriptor in zip((1, 2), saved, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def supervisor(task: Task) -> Supervisor:
    shape = {
        "name": "toy",
        "workers": 1,
        "cpus_per_worker": 1,
        "gpus_per_worker": 0,
        "step_timeout_s": None,
        "start_timeout_s": 900.0,
    }
    return Supervisor({"task": asdict(task), "group": shape})


def steps(task: Task, number: int) -> list[dict[str, Any]]:
    """The first results, without what every one has."""
    found = supervisor(task)
    results = [found.step() for _ in range(number)]
    return [{key: value for key, value in each.items() if key not in ("number", "next_within_s")} for each in results]


def test_a_trial_is_ready_then_reports_then_saves_when_it_is_to_go_on(task: Task) -> None:
    ready, first, saved, last = steps(task, 4)
    assert ready == {"finished": False}
    report = {
        "metrics": [("score", 0.0)],
        "saves": True,
        "owes": True,
        "checkpoint_bytes": None,
        "finished": False,
        "memory_share": 0.0,
    }
    assert first == {"epoch": 1} | report
    assert saved == {
        "saved": 1,
        "owes": False,
        "checkpoint_bytes": 112,
        "whole_bytes": 112,
        "resumable": True,
        "finished": False,
    }
    assert last == {"epoch": 2} | report | {
        "saves": False,
        "owes": False,
        "checkpoint_bytes": 112,
        "finished": True,
    }


def test_a_trial_that_is_stopped_at_a_report_writes_no_checkpoint_of_it(task: Task) -> None:
    found = supervisor(task)
    found.step(), found.step()
    found.reset_config({"task": asdict(replace(task, number=1))})
    found.step(), found.step(), found.step()
    assert CheckpointStore(Path(task.checkpoints)).kept() == {1: [1]}


def test_a_trial_that_cannot_be_left_costs_the_next_one_a_new_group_and_nothing_else(task: Task) -> None:
    task = replace(task, trainable="test_trial:cleans_up", params={"badly": True})
    found = supervisor(task)
    found.step(), found.step()
    group = found._group
    found.reset_config({"task": asdict(replace(task, number=1, params={}))})
    assert found.step()["finished"] is False and found._group is not group
    assert found.step()["epoch"] == 1


@pytest.mark.parametrize("lost", [WorkerLostError, OutOfMemoryError, StepDeadlineError])
def test_a_warm_group_that_was_lost_between_two_trials_fails_neither(task: Task, lost: type[TrialError]) -> None:
    found = supervisor(task)
    found.step(), found.step()
    group = found._group
    assert group is not None

    def begin(task: Task) -> None:
        raise lost("rank 0 was killed")

    group.begin = begin  # type: ignore[method-assign]
    found.reset_config({"task": asdict(replace(task, number=1))})
    assert found.step()["finished"] is False and found._group is not group


def test_a_group_that_was_put_on_a_node_that_is_going_is_put_elsewhere_once(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainables.trial.NODE_NEWS_S", 0.0)

    class Doomed(InProcessWorkerGroup):
        def begin(self, task: Task) -> None:
            raise RankNotStartedError("rank 0 died: its node was lost")

    found, sound = supervisor(task), InProcessWorkerGroup()
    groups: list[WorkerGroup] = [Doomed(), sound]
    monkeypatch.setattr(found, "_new_group", lambda: groups.pop(0))
    assert found.step()["finished"] is False and found._group is sound
    found._drop_group()
    found._begun, groups = False, [Doomed(), Doomed()]
    assert "its node was lost" in found.step()["failure"]


@pytest.mark.parametrize(
    ("large_bytes", "events"),
    [(1000, "report save report save report save"), (100, "report save report save go_on report save")],
)
def test_ranks_train_on_while_a_large_checkpoint_is_synced(
    task: Task, monkeypatch: pytest.MonkeyPatch, large_bytes: int, events: str
) -> None:
    """By the one before: of the first nobody knows how large it is."""
    monkeypatch.setattr("trainables.trial.LARGE_BYTES", large_bytes)
    found, seen = supervisor(replace(task, max_epochs=3)), []
    found.step()
    assert found._group is not None
    for name in ("next_report", "save", "go_on"):
        real = getattr(found._group, name)
        monkeypatch.setattr(
            found._group, name, lambda *given, real=real, name=name: (seen.append(name), real(*given))[1]
        )
    while not found.step()["finished"]:
        found._whole_at -= 600.0
    assert " ".join(seen).replace("next_report", "report") == events


SCORES = [0.5, 0.6, 0.55, 0.58, 0.7, 0.65]


def climbing(
    task: Task, whole_s: float | None, scores: list[float] = SCORES, in_parts: bool = True, num_bytes: int = 0
) -> Supervisor:
    """A trial whose supervisor has seen a whole checkpoint take `whole_s`; None: it has seen none."""
    params = {"scores": scores, "in_parts": in_parts, "num_bytes": num_bytes}
    trial = replace(task, trainable="test_trial:climbs", params=params, max_epochs=len(scores))
    found = supervisor(replace(trial, objective=("score", "max")))
    if whole_s is not None:
        found._whole_s, found._whole_bytes = whole_s, 1
    return found


def saves(found: Supervisor, epochs: int | None = None) -> dict[int, tuple[int, bool]]:
    """Epoch -> (bytes, whether the trial can go on from it), up to that epoch's checkpoint or the trial's end."""
    seen: dict[int, tuple[int, bool]] = {}
    while True:
        result = found.step()
        if "saved" in result:
            seen[result["saved"]] = result["checkpoint_bytes"], result["resumable"]
        elif result.get("checkpoint_bytes") is not None:
            seen[result["epoch"]] = result["checkpoint_bytes"], True
        if result["finished"] or (epochs in seen):
            return seen


def test_small_checkpoints_are_written_whole_after_every_epoch(task: Task) -> None:
    """But for the last, from which nobody goes on."""
    assert saves(climbing(task, whole_s=None)) == dict.fromkeys(range(1, 6), (21, True)) | {6: (10, True)}


def test_where_a_checkpoint_takes_long_only_the_models_of_best_epochs_are_saved(task: Task) -> None:
    assert saves(climbing(task, whole_s=100.0)) == {1: (10, False), 2: (10, False), 5: (10, False)}
    as_good = climbing(replace(task, number=1), 100.0, [0.5, 0.5, 0.4])
    assert saves(as_good) == {1: (10, False)}, "of equals the first is the best"


def test_the_model_of_a_last_epoch_that_is_the_best_is_saved(task: Task) -> None:
    assert saves(climbing(task, 100.0, [0.5, 0.4, 0.6])) == {1: (10, False), 3: (10, True)}
    least = climbing(replace(task, number=1), 100.0, [0.5, 0.4, 0.6])
    least._task = replace(least._task, objective=("score", "min"))
    assert saves(least) == {1: (10, False), 2: (10, False)}


def test_a_whole_checkpoint_is_due_when_ten_times_what_one_takes_have_passed(task: Task) -> None:
    found = climbing(task, whole_s=40.0)
    assert saves(found, epochs=2) == {1: (10, False), 2: (10, False)}
    found._whole_at = time.monotonic() - 395.0
    assert "saved" not in found.step() | found.step()
    found._whole_at = time.monotonic() - 400.0
    assert saves(found, epochs=5) == {5: (21, True)}
    assert found._whole_s is None, "small ones are never left out"


def test_after_a_whole_checkpoint_as_much_time_passes_again_before_the_next(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainables.trial.LARGE_BYTES", 20)
    found = climbing(task, 40.0, [0.9, 0.5, 0.4, 0.3])
    assert saves(found, epochs=1) == {1: (10, False)}
    found._whole_at -= 400.0
    assert saves(found, epochs=2) == {2: (21, True)}
    found._whole_s = 40.0
    assert saves(found) == {}


def test_a_trial_that_begins_again_knows_no_best_epoch_from_before(task: Task) -> None:
    """The driver has removed what came after the last whole checkpoint. A little worse, it is the best there is."""
    found = climbing(task, whole_s=None)
    saves(found, epochs=1)
    found._whole_s = 100.0
    saves(found, epochs=2)
    assert found._group is not None

    def next_report() -> None:
        raise WorkerLostError("rank 0 died")

    found._group.next_report = next_report  # type: ignore[method-assign]
    assert "failure" in found.step()
    found._store.delete(0, 2)
    found._task = replace(found._task, params=found._task.params | {"scores": [0.5, 0.59, 0.55, 0.58, 0.57, 0.56]})
    assert saves(found) == {1: (21, True), 2: (10, False)}


GB = 10**9


def test_a_first_checkpoint_that_is_small_or_of_no_known_size_is_whole(task: Task) -> None:
    for number, num_bytes in enumerate((0, 21)):
        first = climbing(replace(task, number=number), None, num_bytes=num_bytes)
        assert saves(first, epochs=1) == {1: (21, True)}


def test_a_first_checkpoint_that_is_large_is_of_the_model_alone_until_the_trial_has_run_ten_times_as_long(
    task: Task,
) -> None:
    for number, (ran_s, saved) in enumerate([(0.0, (10, False)), (35.0, (10, False)), (40.0, (21, True))]):
        found = climbing(replace(task, number=number), None, num_bytes=4 * GB)
        found.step()
        found._whole_at = time.monotonic() - ran_s
        assert saves(found, epochs=1) == {1: saved}


def test_the_time_of_a_first_whole_checkpoint_is_judged_by_a_large_model_and_its_deadline_by_nothing(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = climbing(task, None, num_bytes=4 * GB)
    commit, commit_s = found._store.commit, [0.1, 0.1, 0.1, 0.5, 0.0]
    monkeypatch.setattr(found._store, "commit", lambda *given: (time.sleep(commit_s.pop(0)), commit(*given))[1])
    saves(found, epochs=1), found.step()
    assert found._whole_s == 4.0, "a model of 10 bytes tells nothing"
    monkeypatch.setattr("trainables.trial.LARGE_BYTES", 10)
    began = time.monotonic()
    saved = found.step()
    assert (saved["saved"], saved["checkpoint_bytes"], saved["whole_bytes"]) == (2, 10, 4 * GB)
    found.step(), found.save_whole()
    assert found._whole_s is not None and 0.1 < found._whole_s / (4 * GB / 10) < time.monotonic() - began
    assert found._deadline.save_seconds == 900.0
    whole = found.step()
    assert (whole["saved"], whole["whole_bytes"]) == (3, 21)
    assert found._deadline.save_seconds == 60.0


def test_what_one_trial_says_of_its_checkpoints_is_not_thought_of_the_next(task: Task) -> None:
    found = climbing(task, None, num_bytes=40 * GB)
    assert saves(found, epochs=1) == {1: (10, False)}
    small = replace(found._task, number=1, budget_bytes=GB, params=found._task.params | {"num_bytes": 21})
    found.reset_config({"task": asdict(small)})
    assert saves(found, epochs=1) == {1: (21, True)}


@pytest.mark.parametrize("num_bytes", [-1, 4e9, float("nan"), None, "many"])
def test_num_bytes_that_is_no_number_of_bytes_is_told(task: Task, num_bytes: Any) -> None:
    found = climbing(task, None, num_bytes=num_bytes)
    found.step()
    failure = found.step()
    assert failure["fault"] == "input"
    assert "rank 0 raised TrainableError" in failure["failure"] and f"num_bytes {num_bytes!r}" in failure["failure"]


def test_a_trial_that_is_to_be_left_saves_its_last_report_whole_after_all(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = climbing(task, whole_s=100.0)
    saves(found, epochs=2)
    third = found.step()
    assert (third["epoch"], third["saves"], third["owes"]) == (3, False, True)
    found.save_whole()
    saved = found.step()
    assert (saved["saved"], saved["checkpoint_bytes"], saved["resumable"]) == (3, 21, True)
    assert found.step()["epoch"] == 4
    best = climbing(replace(task, number=1), whole_s=100.0)
    best.step(), best.step()
    assert best._group is not None
    monkeypatch.setattr(best._group, "go_on", pytest.fail)  # nobody waits for the next report
    best.save_whole()
    assert best.step()["resumable"], "in the place of the model alone"


def test_after_a_model_alone_a_whole_checkpoint_is_owed_and_comes_with_the_next_report(task: Task) -> None:
    found = climbing(task, whole_s=100.0)
    found.step(), found.step()
    saved = found.step()
    assert (saved["saved"], saved["resumable"], saved["owes"]) == (1, False, True)
    found.save_whole()
    assert found.step()["saves"]
    saved = found.step()
    assert (saved["saved"], saved["resumable"], saved["owes"]) == (2, True, False)


def test_a_whole_checkpoint_is_due_after_ten_minutes_whatever_the_last_one_took(task: Task) -> None:
    found = climbing(task, whole_s=1000.0)
    saves(found, epochs=2)
    found._whole_at -= 600.0
    assert saves(found, epochs=3) == {3: (21, True)}


def test_a_trainable_that_knows_no_model_alone_saves_best_epochs_whole(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainables.trial.LARGE_BYTES", 20)
    found = climbing(task, 1.0, [0.5, 0.4, 0.6], in_parts=False)
    commit = found._store.commit
    monkeypatch.setattr(found._store, "commit", lambda *given: (time.sleep(0.1), commit(*given))[1])
    assert saves(found) == {1: (21, True), 3: (21, True)}


def test_a_trial_goes_on_after_its_last_whole_checkpoint_and_replaces_the_models_that_came_after(task: Task) -> None:
    found = climbing(task, whole_s=None)
    saves(found, epochs=1)
    found._whole_s = 100.0
    assert saves(found, epochs=5) == {2: (10, False), 5: (10, False)}
    again = climbing(task, 100.0, [0.5, 0.4, 0.45, 0.42, 0.41, 0.3])
    resumed = again.step()
    assert (resumed["epoch"], resumed["checkpoint_bytes"]) == (1, 21)
    assert saves(again) == {2: (10, False), 3: (10, False), 5: (10, False)}, "2 and 5 have new values, 3 is the best"


def test_the_next_trial_of_one_epoch_has_time_for_its_checkpoint_too(task: Task) -> None:
    """Its checkpoint comes with its only report; that of the trial before told that there will be one."""
    found = supervisor(replace(task, max_epochs=1))
    found.step(), found.step()
    found._deadline.saw(1.0)
    found._deadline.saved(100.0)
    found.reset_config({"task": asdict(replace(task, number=1, max_epochs=1))})
    assert found.step()["next_within_s"] == 60.0 + 500.0


@pytest.mark.parametrize(
    ("params", "found"),
    [
        ({"link": "last"}, "the link deep/last"),
        ({"pipe": "first"}, "the pipe or device deep/first"),
        ({"file": "manifest.json"}, "a file manifest.json, which is the name of what lists them"),
        ({"file": "other.json"}, None),
    ],
)
def test_a_checkpoint_that_nobody_could_vouch_for_fails_its_trial_at_the_first_save(
    task: Task, params: dict[str, str], found: str | None
) -> None:
    supervised = supervisor(replace(task, trainable="test_trial:leads_elsewhere", params=params))
    supervised.step(), supervised.step()
    result = supervised.step()
    if found is None:
        assert result["saved"] == 1 and supervised._store.is_whole(0, 1, deep=True)
    else:
        assert result["fault"] == "input"
        assert f"trainable: a checkpoint is files of its own; found {found}; expected" in result["failure"]
        assert supervised._store.total_bytes() == 0


def test_a_trial_that_goes_on_hands_in_its_last_checkpoints_report_first(task: Task) -> None:
    steps(task, 3)
    again, last = steps(task, 2)
    assert (again["epoch"], again["checkpoint_bytes"], again["finished"]) == (1, 112, False)
    assert (last["epoch"], last["finished"]) == (2, True)


def test_out_of_memory_is_told_as_that_and_leaves_no_group(task: Task) -> None:
    _, failure = steps(replace(task, params={"fits": 10}), 2)
    assert failure["failure"].startswith("out of memory: rank 0 raised MemoryError")
    assert failure["fault"] == "memory" and "micro_batch_size" not in failure


def test_a_trial_that_may_shrink_halves_its_micro_batch_until_it_fits(task: Task) -> None:
    found = supervisor(replace(task, params={"fits": 10}, shrinks=True))
    results = [found.step() for _ in range(6)]
    assert [result.get("micro_batch_size") for result in results] == [None, 16, None, 8, None, None]
    assert results[-1]["metrics"] == [("score", 8.0)], "the third try has it"


def test_a_micro_batch_of_one_row_is_not_halved(task: Task) -> None:
    training = {"batch_size": 8, "micro_batch_size": None}
    sizes = []
    smaller: Task | None = replace(task, settings={"training": training})
    while (smaller := halved(smaller, workers=2)) is not None:
        sizes.append(smaller.settings["training"]["micro_batch_size"])
    assert sizes == [2, 1]
    assert halved(replace(task, settings={}), workers=1) is None, "a trainable of the user's own"
    wide = halved(replace(task, settings={"training": training | {"micro_batch_size": 64}}), workers=2)
    assert wide is not None and wide.settings["training"]["micro_batch_size"] == 2, "a rank has four rows"


@pytest.mark.parametrize(("number", "fault"), [(28, "storage"), (30, "storage"), (2, None)])
def test_a_failed_save_is_the_storages_fault_only_when_that_takes_nothing(
    task: Task, number: int, fault: str | None
) -> None:
    """ENOSPC, EROFS; ENOENT is the trainable's own."""
    results = steps(replace(task, params={"errno": number}), 3)
    assert results[2].get("fault") == fault and os.strerror(number) in results[2]["failure"]
    assert list(Path(task.checkpoints).glob("trial-*/.*")) == [], "half a checkpoint would take the record's room"


def test_room_is_asked_for_before_a_checkpoint_is_written(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    found = supervisor(task)
    found.step(), found.step(), found.step()
    usage = type("usage", (), {"free": 1_000_050})()
    monkeypatch.setattr("trainables.checkpoint.shutil.disk_usage", lambda path: usage)
    failure = found.step()
    assert failure["fault"] == "storage"
    assert "No space left on device: 1.0 MB free at" in failure["failure"]
    assert CheckpointStore(Path(task.checkpoints)).epochs(0) == [1]


def test_a_checkpoint_that_the_budget_does_not_hold_is_not_kept(task: Task) -> None:
    results = steps(replace(task, budget_bytes=111), 3)
    assert results[2]["fault"] == "budget"
    assert "checkpoints.budget_gib is too small" in results[2]["failure"]
    store = CheckpointStore(Path(task.checkpoints))
    assert store.kept() == {} and store.total_bytes() == 0


def test_a_trial_of_a_driver_that_lost_its_lease_commits_nothing(task: Task, tmp_path: Path) -> None:
    lock = tmp_path / "driver.lock"
    lock.write_text("1 on here abc\n")
    found = supervisor(replace(task, lease=(str(lock), "abc")))
    found.step(), found.step(), found.step()
    lock.write_text("2 on here def\n")
    assert "another driver has taken the study over" in found.step()["failure"]
    assert CheckpointStore(Path(task.checkpoints)).epochs(0) == [1]
