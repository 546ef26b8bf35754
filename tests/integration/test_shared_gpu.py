"""A study finds out by itself how many of its trials share a GPU. The GPU is not there: only `nvidia-smi` says so."""

from __future__ import annotations

import os
from typing import Any

import pytest
from program import Program
from toys import Note, read_notes

pytestmark = pytest.mark.slow


def pretend_gpus(program: Program, number: int) -> None:
    """From here on this machine has so many GPUs, by the only program that is asked; on which trials take turns."""
    folder = program.folder / "bin"
    folder.mkdir(exist_ok=True)
    tool = folder / "nvidia-smi"
    lines = "".join(f"GPU {each}: Fake (UUID: GPU-{each}{each}{each})\\n" for each in range(number))
    tool.write_text(f"#!/bin/sh\nprintf '{lines}'\n")
    tool.chmod(0o755)
    service = folder / "nvidia-cuda-mps-control"
    service.write_text("#!/bin/sh\nexit 3\n")
    service.chmod(0o755)
    program.environment |= {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def crowded(program: Program, name: str, **changes: Any) -> str:
    """A study of which a GPU takes two trials, 1 s an epoch; more get less done."""
    training = {"max_epochs": 4, "epoch_s": 1.0, "gpu_takes": 2}
    sections: dict[str, Any] = {
        "trainable": "toys:crowded",
        "training": training,
        "search_space": {"x": {"choice": list(range(24))}},
        "budget": {"trials": 24, "concurrent_trials": None},
        "resources": {"gpus_per_worker": "auto", "cpus_per_worker": 0.1},
    }
    return program.spec(name, sections | changes)


def most_at_once(notes: list[Note]) -> list[int]:
    """How many trials ran when each of them began, in the order in which they did."""
    begun = sorted((note.at, note.x) for note in notes if note.event == "begin")
    ended = {note.x: note.at for note in notes if note.event == "report"}  # the last one
    return [sum(at <= now < ended[x] for at, x in begun) for now, _ in begun]


def test_a_study_settles_at_as_many_trials_as_the_gpu_takes(program: Program) -> None:
    pretend_gpus(program, 1)
    found = program.run("run", crowded(program, "one-gpu"), timeout_s=400)
    assert found.code == 0, found.err
    assert "trials that share a GPU take turns: nvidia-cuda-mps-control ended with 3" in found.out
    assert "2 trials share the GPU: " in found.out and "; trying 4" in found.out
    assert "epochs/s, with 4 it was " in found.out, found.out
    at_once = most_at_once(read_notes(program.notes("one-gpu")))
    assert max(at_once) == 4, at_once
    assert set(at_once[-4:]) <= {1, 2}, at_once


def test_trials_spread_over_the_gpus_that_they_share(program: Program) -> None:
    """Left to Ray, all of them would share the first."""
    pretend_gpus(program, 2)
    faults = [{"x": x, "epoch": 1, "does": "hold"} for x in range(4)]  # each has a worker group of its own then
    training = {"max_epochs": 1, "epoch_s": 0.1, "gpu_takes": 4, "faults": faults}
    spec = crowded(program, "two-gpus", budget={"trials": 4, "concurrent_trials": None}, training=training)
    command = program.start("run", spec)
    for x in range(4):
        program.wait_for_note("two-gpus", "hold", x, 1)
    program.release("two-gpus")
    assert command.wait().code == 0
    cards = [(program.notes("two-gpus") / f"card-{x}").read_text() for x in range(4)]
    assert sorted(cards) == ["0", "0", "1", "1"]
