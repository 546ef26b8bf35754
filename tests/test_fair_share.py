"""Studies share a cluster: parts are dealt evenly, what one has no use for goes to others, nobody goes without."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tune_service.fair_share import Claim, Claims, allowed


def claim(running: int = 0, wants: int = 100, room: int = 8, study: str = "a", since_s: float = 0.0) -> Claim:
    return Claim(study, running, wants, room, since_s)


def test_a_study_alone_has_the_whole_cluster() -> None:
    assert allowed(claim(), []) == 8


def test_two_studies_that_want_all_have_half_each() -> None:
    assert allowed(claim(running=8), [claim(running=0)]) == 4
    assert allowed(claim(running=0), [claim(running=8)]) == 4


def test_what_a_small_study_leaves_goes_to_the_large_one() -> None:
    assert allowed(claim(), [claim(wants=2)]) == 6
    assert allowed(claim(wants=2), [claim()]) == 2


def test_a_part_is_a_part_of_the_cluster_whatever_the_trials_size() -> None:
    # The other's trials take four times as much: half of the cluster is 1 of its 2.
    assert allowed(claim(room=8), [claim(room=2)]) == 4
    assert allowed(claim(room=2), [claim(room=8)]) == 1


def test_with_more_studies_than_slots_one_that_runs_makes_room_for_one_that_has_none() -> None:
    others = [claim(running=1, room=2), claim(running=0, room=2, since_s=5.0)]
    assert allowed(claim(running=1, room=2), others) == 0
    # Its trial has ended: who has had none for longer comes first.
    assert allowed(claim(running=0, room=1, since_s=7.0), [claim(running=0, room=1, since_s=5.0, wants=0)]) == 1
    assert allowed(claim(running=0, room=2, since_s=7.0), [*others, claim(running=1, room=2)]) == 0
    assert allowed(claim(running=0, room=2, since_s=3.0), [*others, claim(running=1, room=2)]) == 1


def test_a_slot_that_nobody_holds_goes_to_the_one_that_waits_longest() -> None:
    first, second = claim(room=1, since_s=1.0), claim(room=1, since_s=2.0, study="b")
    assert (allowed(first, [second]), allowed(second, [first])) == (1, 0)
    second = claim(room=2, since_s=2.0, study="b")  # half as large: both have room in a cluster twice as large
    assert (allowed(claim(room=2), [second]), allowed(second, [claim(room=2)])) == (1, 1)
    busy = claim(running=1, room=1, study="c")
    assert (allowed(first, [second, busy]), allowed(second, [first, busy])) == (1, 0)


@pytest.mark.parametrize("other", [claim(running=0, wants=0), claim(running=0, room=0), claim(running=0, room=8)])
def test_nobody_makes_room_for_a_study_that_has_nothing_to_run_fits_nowhere_or_has_room_as_it_is(other: Claim) -> None:
    assert allowed(claim(running=2, wants=2, room=8), [other]) >= 2


def test_a_trial_as_large_as_the_cluster_gets_its_turn() -> None:
    large = claim(running=0, wants=3, room=1)
    assert allowed(claim(running=5, room=8), [large]) == 4  # starts none until the large one runs
    assert allowed(claim(running=0, room=8), [claim(running=1, wants=3, room=1)]) == 4


def test_each_driver_sees_the_others_that_live(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tune_service.fair_share import Claim, Claims\n"
        "print(Claims(Path(sys.argv[1]), 'b').exchange(Claim('b', 1, 2, 3)), flush=True); time.sleep(60)"
    )
    own = Claims(tmp_path, "a")
    own.exchange(claim(running=5))
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == str([claim(running=5)])
        assert own.exchange(claim()) == [Claim("b", 1, 2, 3)]
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    assert own.exchange(claim()) == []
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{os.getpid()}"]
    own.close()
    assert list(tmp_path.iterdir()) == []


def test_a_frozen_driver_that_holds_no_room_keeps_none_free(tmp_path: Path) -> None:
    own, waits, runs = (Claims(tmp_path, name) for name in "abc")
    waits.exchange(Claim("b", running=0, wants=2, room=3))
    runs.exchange(Claim("c", running=1, wants=2, room=3))
    mine = Claim("a", running=0, wants=1, room=3)
    assert [each.study for each in own.exchange(mine)] == ["b", "c"]
    for claims in (waits, runs):
        os.utime(claims._path, (0, 0))
    assert [each.study for each in own.exchange(mine)] == ["c"], "its trials run on"
    for claims in (own, waits, runs):
        claims.close()


def test_a_claim_is_read_whole_whatever_was_there_before(tmp_path: Path) -> None:
    one, other = Claims(tmp_path, "a"), Claims(tmp_path, "b")
    one.exchange(claim(running=123456))
    one.exchange(claim(running=1))
    assert [each.running for each in other.exchange(claim(study="b"))] == [1]
    assert json.loads((tmp_path / f"a.{os.getpid()}").read_text())["running"] == 1
