"""One driver at a time in a bucket: claims, of which the highest generation's holder drives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from bucket_double import keep_buckets_in

from trainables.bucket import Bucket
from trainables.bucket_checkpoints import BucketCheckpoints
from trainables.errors import CheckpointError
from trainables.stores import lease_holds
from tune_service import bucket_lease
from tune_service.bucket_lease import is_held, taken
from tune_service.errors import LeaseLostError, StudyRunningError


@pytest.fixture
def claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    keep_buckets_in(tmp_path / "store", monkeypatch)
    monkeypatch.setattr(bucket_lease, "BEAT_S", 0.1)
    monkeypatch.setattr(bucket_lease, "LOOK_S", 0.0)
    monkeypatch.setattr(bucket_lease, "POLL_S", 0.1)
    monkeypatch.setattr(bucket_lease, "SILENT_S", 1.5)
    return Bucket.open("s3://lab/toy/lease")


def nobody(line: str) -> None:
    raise AssertionError(f"nobody was silent: {line}")


def write(claims: Bucket, name: str, **other: object) -> None:
    """A claim of another process."""
    own = json.loads(bucket_lease._claim(0, released=False))
    claims.put(name, json.dumps(own | other).encode())


def test_a_living_driver_keeps_others_out(claims: Bucket) -> None:
    assert not is_held(claims)
    with taken("toy", claims, 0, nobody) as own, own.beating(print):
        time.sleep(2)
        assert is_held(claims), "it beats"
        with pytest.raises(StudyRunningError, match=f"process {os.getpid()} on "), taken("toy", claims, 0, nobody):
            pass
        own.check()
    assert not is_held(claims)


def test_a_driver_that_has_ended_leaves_its_place_at_once(claims: Bucket) -> None:
    with taken("toy", claims, 0, nobody) as first:
        pass
    began = time.monotonic()
    with taken("toy", claims, 0, nobody) as second:
        assert time.monotonic() - began < 1
        assert (first.generation, second.generation) == (1, 2)
        assert list(claims.objects()) == [second.identity[1]], "the claim before is deleted"
        assert first.lost


def test_a_generation_is_higher_than_what_was_written_even_where_the_claims_are_gone(claims: Bucket) -> None:
    with taken("toy", claims, 41, nobody) as own:
        assert own.generation == 42


def test_a_silent_driver_is_taken_over_by_the_own_clock_and_has_lost(claims: Bucket) -> None:
    told: list[str] = []
    with taken("toy", claims, 0, nobody) as silent:
        began = time.monotonic()
        with taken("toy", claims, 0, told.append) as own:
            assert 1.5 <= time.monotonic() - began < 4
            assert told and told[0].endswith(" s: taking the study over")
            with pytest.raises(LeaseLostError):
                silent.check()
            silent._touch()
            assert list(claims.objects()) == [own.identity[1]], "and puts its claim nowhere any more"
            assert lease_holds(own.identity) and not lease_holds(silent.identity)
        assert not is_held(claims)


def test_the_age_of_a_claim_does_not_count_only_that_it_stands_still(claims: Bucket, tmp_path: Path) -> None:
    """Clocks of two machines may differ by hours."""
    write(claims, "000001-a.json", machine="another", pid=1)
    end = threading.Event()

    def beat() -> None:
        beats = 0
        while not end.wait(0.3):
            beats += 1
            write(claims, "000001-a.json", machine="another", pid=1, beats=beats)
            os.utime(tmp_path / "store/lab/toy/lease/000001-a.json", (0, 0))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(StudyRunningError), taken("toy", claims, 0, nobody):
            pass
    finally:
        end.set()
        thread.join()


def test_a_dead_process_of_this_machine_delays_nobody(claims: Bucket) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        started = bucket_lease._started(psutil.Process(other.pid))
        write(claims, "000001-a.json", pid=other.pid, started=started)
        assert is_held(claims)
        other.send_signal(signal.SIGKILL)
        while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert not is_held(claims), "nor while it waits to be buried"
    began = time.monotonic()
    with taken("toy", claims, 0, nobody):
        assert time.monotonic() - began < 1


def test_a_process_that_has_the_number_of_a_dead_one_is_not_taken_for_it(claims: Bucket) -> None:
    write(claims, "000001-a.json", started=bucket_lease._started(psutil.Process()) - 1000)
    assert not is_held(claims)


def test_a_process_that_proc_does_not_show_is_not_taken_for_gone(
    claims: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another user, where /proc is mounted with hidepid."""

    def hidden(pid: int) -> None:
        raise psutil.NoSuchProcess(pid)

    def refused(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    write(claims, "000001-a.json")
    monkeypatch.setattr(psutil, "Process", hidden)
    assert not is_held(claims), "there is none"
    monkeypatch.setattr(os, "kill", refused)
    assert is_held(claims)


def test_a_clock_that_is_set_anew_ends_no_driver(claims: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with taken("toy", claims, 0, nobody):
        booted = psutil.boot_time()
        monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: booted + 37)
        assert is_held(claims)


def test_of_many_that_claim_at_one_moment_at_most_one_drives(claims: Bucket) -> None:
    claims.put("000000-gone.wish", b"")  # the double stumbles over a folder that is just being made
    start, taken_by, refused = threading.Barrier(4), list[int](), list[int]()

    def claim(number: int) -> None:
        start.wait()
        try:
            with taken("toy", claims, 0, print) as own, own.beating(print):
                taken_by.append(number)
                end = time.monotonic() + 60
                while len(refused) < 3 and time.monotonic() < end:  # whoever comes after its end may drive
                    time.sleep(0.1)
                own.check()
        except StudyRunningError:
            refused.append(number)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken_by) <= 1
    assert len(taken_by) + len(refused) == 4


def test_a_claim_that_came_meanwhile_counts_whatever_its_generation(
    claims: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of a lower generation too, by somebody who had not seen the claim that this one waited for."""
    claims.put("000005-gone.json", b"{")
    monkeypatch.setattr(bucket_lease, "TRIES", 1)
    monkeypatch.setattr(
        bucket_lease, "_wait_for_silence", lambda study, claims, name, tell: claims.put("000003-drives.json", b"{}")
    )
    with pytest.raises(StudyRunningError, match="several processes"), taken("toy", claims, 0, nobody):
        pass


def test_two_wishes_of_one_moment_both_step_back(claims: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Bucket.put

    def put_with_another(self: Bucket, name: str, data: bytes) -> None:
        put(self, name, data)
        if name.endswith(".wish"):
            put(self, f"{name.partition('-')[0]}-other.wish", data)

    monkeypatch.setattr(Bucket, "put", put_with_another)
    monkeypatch.setattr(bucket_lease, "TRIES", 1)
    with pytest.raises(StudyRunningError, match="several processes"), taken("toy", claims, 0, nobody):
        pass
    assert list(claims.objects()) == ["000001-other.wish"], "its own is taken back"


def test_a_wish_that_was_there_first_may_become_a_claim_and_is_waited_for(claims: Bucket) -> None:
    claims.put("000001-other.wish", b"")
    end = threading.Event()

    def claim_then_beat() -> None:
        beats = 0
        while not end.wait(0.5):
            beats += 1
            write(claims, "000001-other.json", machine="another", pid=1, beats=beats)
            if beats == 1:
                claims.delete("000001-other.wish")

    thread = threading.Thread(target=claim_then_beat)
    thread.start()
    try:
        with pytest.raises(StudyRunningError, match="process 1 on "), taken("toy", claims, 0, nobody):
            pass
    finally:
        end.set()
        thread.join()
    assert list(claims.objects()) == ["000001-other.json"]


def test_a_wish_of_a_process_that_has_ended_delays_for_a_while_only(claims: Bucket) -> None:
    claims.put("000001-gone.wish", b"")
    began = time.monotonic()
    with taken("toy", claims, 0, nobody) as own:
        assert 1.5 <= time.monotonic() - began < 15
        assert list(claims.objects()) == [own.identity[1]]


def test_a_driver_that_slept_while_its_study_was_deleted_puts_no_claim_back(
    claims: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However young its last look seems, and also where another study has got its name."""
    monkeypatch.setattr(bucket_lease, "LOOK_S", 60.0)
    with taken("toy", claims, 0, nobody) as slept:
        claims.delete_all()
        slept._touch()
        assert claims.objects() == {} and slept.lost


def test_of_two_claims_of_one_generation_at_most_one_holds(claims: Bucket) -> None:
    """The one of a study that was deleted, the other of a new one of its name."""
    for token in ("a", "b"):
        write(claims, f"000001-{token}.json")
    assert [lease_holds((claims.url, f"000001-{token}.json")) for token in ("a", "b")] == [False, True]


def test_a_driver_that_slept_with_its_machine_is_alive_when_it_wakes(
    claims: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_lease, "BEAT_S", 1.0)
    with taken("toy", claims, 0, nobody) as own:
        claim = tmp_path / "store/lab/toy/lease" / own.identity[1]
        hours_ago = time.time() - 8 * 3600
        os.utime(claim, (hours_ago, hours_ago))
        assert not is_held(claims), "no beat comes"
        with own.beating(print):
            os.utime(claim, (hours_ago, hours_ago))
            assert is_held(claims)


def test_a_claim_that_is_none_of_ours_is_a_silent_strangers(claims: Bucket) -> None:
    claims.put("000007-x.json", b"{")
    told: list[str] = []
    with taken("toy", claims, 0, told.append) as own:
        assert own.generation == 8
    assert told[0].startswith("process 0 on a machine unknown has been silent")


def test_a_supervisor_of_a_lost_driver_commits_nothing(claims: Bucket) -> None:
    store = Bucket.open("s3://lab/toy/checkpoints")
    with taken("toy", claims, 0, nobody) as silent:
        supervised = BucketCheckpoints(store, lease=silent.identity)
        (supervised.stage(0, 1) / "weights").write_text("1")
        with taken("toy", claims, 0, print):
            with pytest.raises(CheckpointError, match="another driver"):
                supervised.commit(0, 1, {})
            with pytest.raises(CheckpointError, match="another driver"):
                supervised.check_room(0)
    assert BucketCheckpoints(store).kept() == {}
