"""Which GPU a process takes, where several processes share each of several."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from pathlib import Path

from trainables.cards import is_crowded

TAKES = """
import sys, pathlib, trainables.cards
print(trainables.cards.take_card(["3", "GPU-5ab"], pathlib.Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def taken(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that takes a GPU and lives until its input is closed; and the GPU."""
    command = [sys.executable, "-c", TAKES, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def end(taken: tuple[subprocess.Popen[str], str]) -> None:
    taken[0].kill()
    taken[0].communicate()


def taken_by(folder: Path, found: list[tuple[subprocess.Popen[str], str]]) -> str:
    found.append(taken(folder))
    return found[-1][1]


def test_a_gpu_is_crowded_where_another_has_two_fewer(tmp_path: Path) -> None:
    found = [taken(tmp_path) for _ in range(4)]
    cards = ["3", "GPU-5ab"]
    try:
        assert not any(is_crowded(card, cards, tmp_path) for card in cards), "two and two"
        end(found[0])
        assert not any(is_crowded(card, cards, tmp_path) for card in cards), "one and two: to move changes nothing"
        end(found[2])
        assert [is_crowded(card, cards, tmp_path) for card in cards] == [False, True]
    finally:
        for each in found:
            end(each)


def test_processes_take_gpus_in_turn_and_a_killed_ones_place_is_taken_next(tmp_path: Path) -> None:
    found = [taken(tmp_path) for _ in range(5)]
    try:
        assert [card for _, card in found] == ["3", "GPU-5ab", "3", "GPU-5ab", "3"]
        found[1][0].kill()
        found[1][0].wait()
        found.append(taken(tmp_path))
        assert found[-1][1] == "GPU-5ab"
        found.append(taken(tmp_path))
        assert found[-1][1] == "GPU-5ab"
        for process, card in found:
            if card == "3":
                process.kill()
                process.wait()
        assert [taken_by(tmp_path, found) for _ in range(4)] == ["3", "3", "3", "3"], "three are on the other"
    finally:
        for process, _ in found:
            process.communicate()


def test_a_process_that_is_frozen_while_it_looks_holds_up_nobody(tmp_path: Path) -> None:
    first = taken(tmp_path)
    with (tmp_path / "gpus").open("w") as turn, (tmp_path / "gpu-1-0").open("w") as place:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(place, fcntl.LOCK_EX)  # it was just looking at this one
        began = time.monotonic()
        second = taken(tmp_path)
        assert time.monotonic() - began < 30
    try:
        assert [first[1], second[1]] == ["3", "3"], "what it looks at counts as taken"
    finally:
        end(first)
        end(second)
