"""Every process of a study, hit at every moment, killed and frozen: what is lost is one epoch of one trial.

A trial a cell: its x is the cell's number. Ranks and supervisors are hit within a study that ends by itself; the driver
and all of Ray end with what hits them, and the study goes on by `resume`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_points import FaultPoints
from program import RANK, SUPERVISOR, Command, Program, opened, wait_until
from toys import curve, read_notes

from trainables.checkpoint import verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

EPOCHS = 4
STEP_TIMEOUT_S = 12
KILL, FREEZE = signal.SIGKILL, signal.SIGSTOP
TOLD = {
    ("rank", KILL): "rank 0 died",
    ("rank", FREEZE): f"rank 0 gave no report in {STEP_TIMEOUT_S} s",
    ("supervisor", KILL): "the trial's supervisor was lost",
    ("supervisor", FREEZE): "the trial's supervisor was lost",
}
"""What a study says of a hit."""
MOMENTS = ("before the first report", "inside an epoch", "writing a checkpoint", "being stopped", "between trials")


@dataclass(frozen=True)
class Cell:
    x: int
    """The trial's parameter, and its number."""
    target: str
    moment: str
    way: signal.Signals

    @property
    def point(self) -> str | None:
        """The fault point at which something is held meanwhile; None: the rank waits in its own code."""
        return {
            "writing a checkpoint": f"committing-{self.x}-2",
            "being stopped": f"ending-{self.x}",
            "between trials": f"resetting-{self.x}",
        }.get(self.moment)

    @property
    def fault(self) -> dict[str, Any] | None:
        """Where the rank waits by itself."""
        epoch = {"before the first report": 1, "inside an epoch": 3}.get(self.moment)
        return {"x": self.x, "epoch": epoch, "does": "hold"} if epoch else None

    @property
    def curve(self) -> list[float | None]:
        """What the trial reports, whatever hits it. One that is being stopped has diverged in epoch 3."""
        return [*curve(self.x, 2), None] if self.moment == "being stopped" else list(curve(self.x, EPOCHS))


def cells(targets: tuple[str, ...], moments: tuple[str, ...] = MOMENTS, first: int = 0) -> list[Cell]:
    found = [(target, moment, way) for target in targets for moment in moments for way in (KILL, FREEZE)]
    return [Cell(first + index, *each) for index, each in enumerate(found)]


class Matrix:
    """A study whose trial x=0 and all that no cell names are left alone."""

    def __init__(
        self,
        program: Program,
        name: str,
        cells: list[Cell],
        num_trials: int,
        concurrent: int,
        epoch_s: float = 0.1,
        start_timeout_s: float = 900.0,
    ) -> None:
        self.program, self.name, self.cells, self.num_trials = program, name, cells, num_trials
        self.points = FaultPoints(program.folder / f"points-{name}")
        diverging = [{"x": cell.x, "epoch": 3, "metric": "score"} for cell in cells if cell.moment == "being stopped"]
        self._spec = program.spec(
            name,
            {
                "training": {
                    "max_epochs": EPOCHS,
                    "epoch_s": epoch_s,
                    "faults": [cell.fault for cell in cells if cell.fault is not None],
                    "diverge": diverging,
                },
                "search_space": {"x": {"choice": list(range(num_trials))}},
                "budget": {"trials": num_trials, "concurrent_trials": concurrent},
                "faults": {"step_timeout_s": STEP_TIMEOUT_S, "start_timeout_s": start_timeout_s},
            },
        )
        for cell in cells:
            if cell.point is not None:
                self.points.arm(cell.point)

    def run(self) -> Command:
        return self.program.start("run", self._spec, "--json", env=self.points.env)

    def resume(self) -> Command:
        return self.program.start("resume", self.name, "--json", env=self.points.env)

    def reach(self, cell: Cell) -> int:
        """Waits for the cell's moment. Returns the process that is held then."""
        if cell.point is not None:
            return self.points.reached(cell.point, timeout_s=200)
        assert cell.fault is not None
        return self.program.wait_for_note(self.name, "hold", cell.x, cell.fault["epoch"], timeout_s=200).pid

    def rank_of(self, x: int) -> int:
        """The last process that trained a trial."""
        return [note.pid for note in read_notes(self.program.notes(self.name)) if note.x == x][-1]

    def repeats(self, x: int) -> int:
        """Epochs of a trial that were begun again."""
        epochs = self.program.epochs(self.name, x)
        return len(epochs) - len(set(epochs))

    def check_end(self, status: Any) -> None:
        """The study is completed, and its record says what an undisturbed run's would."""
        assert status["state"] == "completed"
        assert [trial["number"] for trial in status["trials"]] == list(range(self.num_trials))
        by_x = {cell.x: cell for cell in self.cells}
        for trial in status["trials"]:
            x, where = trial["params"]["x"], by_x.get(trial["number"], "no cell")
            assert x == trial["number"], "trials come as the grid has them"
            values = [report["metrics"]["score"] for report in trial["reports"]]
            assert values == (by_x[x].curve if x in by_x else curve(x, EPOCHS)), where
            stopped = x in by_x and by_x[x].moment == "being stopped"
            assert trial["state"] == ("pruned" if stopped else "completed"), (where, trial)
            assert (trial["reason"] is not None) == stopped and trial["ended_at"] is not None, (where, trial)
            assert self.repeats(x) <= (x in by_x), (where, self.program.epochs(self.name, x))
        store = self.program.storage / self.name / "checkpoints"
        folders = list(store.glob("trial-*/*"))
        assert folders and all(verify(folder) for folder in folders)
        assert self.program.json("status", self.name) == status


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    with opened(tmp_path / "program") as found:
        yield found


# ---- ranks and supervisors: the study ends by itself


def hit(matrix: Matrix, cell: Cell) -> None:
    """Waits for the cell's moment and hits its target then; what is held for that goes on."""
    held = matrix.reach(cell)
    if cell.target == "rank":
        pid = held if cell.point is None else matrix.rank_of(cell.x)
    else:
        pid = (
            held if cell.moment == "writing a checkpoint" else matrix.program.supervisor_of(matrix.rank_of(cell.x)).pid
        )
    matrix.program.process(pid).send_signal(cell.way)
    if cell.point is not None:
        matrix.points.release(cell.point)


def test_a_hit_rank_or_supervisor_costs_its_trial_one_epoch_at_most(program: Program) -> None:
    """While a trial is being stopped it is the driver that is held, between the decision and its record."""
    plan = cells(("rank", "supervisor"), MOMENTS[:4], first=1)
    matrix = Matrix(program, "parts", plan, num_trials=len(plan) + 2, concurrent=6)
    command = matrix.run()
    with ThreadPoolExecutor(len(plan)) as pool:
        for done in as_completed([pool.submit(hit, matrix, cell) for cell in plan]):
            if done.exception() is not None:
                matrix.points.give_up()
            done.result()
    found = command.wait(timeout_s=500)
    assert found.code == 0, found.out + found.err
    matrix.check_end(found.json)
    for cell in plan:
        if cell.fault is not None:  # it trained, or waited to be hit
            assert f"trial {cell.x}: {TOLD[cell.target, cell.way]}" in found.err, cell


def test_a_warm_group_that_is_hit_between_trials_costs_the_next_trial_nothing_but_time(program: Program) -> None:
    """One slot: each cell's trial is handed to the group of the plain trial before it."""
    hits = [(target, way) for target in ("rank", "supervisor") for way in (KILL, FREEZE)]
    plan = [Cell(2 * index + 1, target, "between trials", way) for index, (target, way) in enumerate(hits)]
    matrix = Matrix(program, "between", plan, num_trials=2 * len(plan) + 1, concurrent=1)
    command = matrix.run()
    for cell in plan:
        supervisor, rank = matrix.reach(cell), matrix.rank_of(cell.x - 1)
        program.process(rank if cell.target == "rank" else supervisor).send_signal(cell.way)
        matrix.points.release(cell.point or "")
    found = command.wait(timeout_s=200)
    assert found.code == 0, found.out + found.err
    matrix.check_end(found.json)
    restarts = {trial["number"]: trial["restarts"] for trial in found.json["trials"]}
    assert all(restarts[cell.x] == 0 for cell in plan if cell.target == "rank")
    assert sum(matrix.repeats(x) for x in range(matrix.num_trials)) == 0, "no epoch had begun"


# ---- the driver: `resume` goes on


def test_a_driver_that_is_killed_or_frozen_at_any_moment_loses_one_epoch_at_most(program: Program) -> None:
    """A frozen one is taken over, and writes nothing more when it wakes up."""
    plan = cells(("driver",))
    matrix = Matrix(program, "drivers", plan, num_trials=len(plan), concurrent=1)
    command = matrix.run()
    for cell in plan:
        matrix.reach(cell)
        command.send(cell.way)
        if cell.way == KILL:
            assert command.wait().code == -KILL
            command = matrix.resume()
        else:
            before, command = command, resume_when_silent(matrix)
            release(matrix, cell)
            matrix.program.process(before.pid).send_signal(signal.SIGCONT)
            late = before.wait(timeout_s=60)
            assert late.code == 1 and "has taken the study over" in json.dumps(late.json), late
        release(matrix, cell)
    found = command.wait(timeout_s=120)
    assert found.code == 0, found.out + found.err
    matrix.check_end(found.json)


def resume_when_silent(matrix: Matrix) -> Command:
    """The first `resume` that is not refused."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        command = matrix.resume()
        wait_until(lambda c=command: "taking the study over" in c.err or not c.is_running, 30, "an answer of resume")
        if command.is_running:
            return command
        assert command.wait().code == 2, "a living driver keeps others out"
        time.sleep(2)
    raise AssertionError("a frozen driver was not taken over within 60 s")


# ---- the whole of Ray: the driver ends, with a word, and `resume` goes on


@pytest.mark.parametrize("way", [KILL, FREEZE], ids=["killed", "frozen"])
def test_a_ray_that_is_lost_at_any_moment_loses_one_epoch_at_most(program: Program, way: signal.Signals) -> None:
    plan = [cell for cell in cells(("ray",)) if cell.way == way]
    plan = [Cell(x, cell.target, cell.moment, cell.way) for x, cell in enumerate(plan)]
    matrix = Matrix(program, "rays", plan, num_trials=len(plan), concurrent=1)
    command = matrix.run()
    for cell in plan:
        matrix.reach(cell)
        for process in rays_processes(program, command):
            with suppress(psutil.NoSuchProcess):  # it ended with one before
                process.send_signal(way)
        release(matrix, cell)
        found = command.wait(timeout_s=60)
        assert (found.code, list(found.json)) == (1, ["error"]), found
        assert "Ray" in found.json["error"]["found"]
        wait_until(lambda: not program.processes(), 60, "the end of Ray's processes")
        assert program.json("status", "rays")["state"] == "interrupted"
        command = matrix.resume()
    found = command.wait(timeout_s=120)
    assert found.code == 0, found.out + found.err
    matrix.check_end(found.json)


def rays_processes(program: Program, command: Command) -> list[psutil.Process]:
    return [process for process in program.processes() if process.pid != command.pid]


def release(matrix: Matrix, cell: Cell) -> None:
    if cell.point is not None:
        matrix.points.release(cell.point)


# ---- a storm


def test_a_storm_of_kills_and_freezes_loses_nothing(program: Program, request: pytest.FixtureRequest) -> None:
    """Hits at random moments, from a seed that is printed; STORM_SEED repeats one as far as processes can."""
    seed = int(os.environ.get("STORM_SEED", random.SystemRandom().randrange(10**6)))
    print(f"STORM_SEED={seed}")
    rng = random.Random(seed)
    # Left alone it would take 16 s at the least, so that no seed sees its end before five hits.
    matrix = Matrix(program, "storm", [], num_trials=12, concurrent=3, epoch_s=1.0, start_timeout_s=30.0)
    command, num_hits = matrix.run(), 0
    seen: set[tuple[str, ...]] = set()
    program.wait_for_note("storm", "epoch", 0, 1)
    end = time.monotonic() + 60
    while time.monotonic() < end and command.is_running:
        time.sleep(rng.uniform(0.5, 3.0))
        target, way = rng.choice(("rank", "supervisor", "driver")), rng.choice((KILL, FREEZE))
        seen |= {names for names in (RANK, SUPERVISOR) if program.named(names)}
        if target == "driver":
            command.send(KILL)
            command.wait()
            command = matrix.resume()  # ends what is left of the Ray before, were it killed as it started
            num_hits += 1
            continue
        running = program.named(RANK if target == "rank" else SUPERVISOR)
        if running:
            with suppress(psutil.NoSuchProcess):  # it ended by itself
                rng.choice(sorted(running, key=lambda each: each.pid)).send_signal(way)
                num_hits += 1
    found = command.wait(timeout_s=400)
    assert num_hits >= 5
    assert seen == {RANK, SUPERVISOR}, "the names by which they are found are the ones that they have"
    status = found.json
    for trial in status["trials"]:
        assert trial["state"] in ("completed", "failed") and trial["ended_at"] is not None
        assert trial["state"] == "completed" or trial["reason"], trial
        values = [report["metrics"]["score"] for report in trial["reports"]]
        assert values == curve(trial["params"]["x"], EPOCHS)[: len(values)]
    kept = list((program.storage / "storm" / "checkpoints").glob("trial-*/*"))
    assert kept and all(verify(folder) for folder in kept)
    assert [trial["params"]["x"] for trial in status["trials"]] == list(range(12)), "no trial is lost or tried twice"
    assert program.json("status", "storm") == status
