"""Who drives a study in a bucket: the holder of the claim of the highest generation.

A claim is an object `lease/GGGGGG-TOKEN.json`, which its holder writes anew every few seconds. Who wants the study
waits till the holder's says that it was released, or its process is gone from this very machine, or it has not changed
for some time by the waiter's own clock; puts a wish, `GGGGGG-TOKEN.wish` of the next generation; and claims when a list
then shows nobody else who came meanwhile. A wish takes nothing from anybody, and is waited for too: it becomes a claim
in no time, or its process is gone. What a driver writes carries its generation, and only the highest is read: whoever
wakes up late may write, but is not read.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from trainables.bucket import Bucket
from trainables.errors import BucketError, Problem
from trainables.stores import CLAIM, claim_holds, generation_of, newest_claim
from tune_service.errors import StudyRunningError
from tune_service.lease import SILENT, SILENT_S, Lease

DELETED = "deleted"
"""An object of the record, put by a deleter: no list shows the study any more, and `delete` goes on with it."""
BEAT_S = 3.0
LOOK_S = 1.0
"""For so long a look at the claims is good for."""
LONG_S = 24 * 3600.0
"""A machine that has slept for longer is told as gone when it wakes, until its next beat."""
POLL_S = 1.0
TRIES = 4
"""Claims, when others claim at the same moment."""


class BucketLease(Lease):
    """This process's claim."""

    def __init__(self, study: str, claims: Bucket, name: str) -> None:
        super().__init__(study)
        self.generation = generation_of(name)
        self.token = name.partition("-")[2].removesuffix(".json")
        self._claims, self._name = claims, name
        self.rolls = count()
        """Numbers what this driver writes whole."""
        self._beats = 0
        self._is_lost, self._looked_s = False, _now()
        self._writes = threading.Lock()

    @property
    def beat_s(self) -> float:
        return BEAT_S

    @property
    def identity(self) -> tuple[str, str]:
        return self._claims.url, self._name

    @property
    def lost(self) -> bool:
        if _now() - self._looked_s >= LOOK_S:
            self._look()
        return self._is_lost

    def _look(self) -> None:
        if not self._is_lost:
            now = _now()
            self._is_lost = not claim_holds(self._claims, self._name)
            self._looked_s = now

    def sign_of_life(self) -> None:
        """Asks the store nothing: the beats do."""
        self._sign = time.monotonic()
        if self._is_lost:
            self.check()

    def _found(self) -> str:
        return SILENT

    def _touch(self) -> None:
        with self._writes:
            self._look()
            if not self._is_lost:  # a claim that somebody has removed is not put back
                self._beats += 1
                self._claims.put(self._name, _claim(self._beats, released=False))

    def give_up(self) -> None:
        """Takes the claim away: of a study that is gone. No beat puts it back."""
        with self._writes:
            self._is_lost = True
            self._claims.delete_all()

    def close(self) -> None:
        """Says that the study is free. Where that cannot be said, the next driver finds out."""
        with self._writes, suppress(BucketError):
            self._look()
            if not self._is_lost:
                self._claims.put(self._name, _claim(self._beats, released=True))
                self._is_lost = True


def is_held(claims: Bucket) -> bool:
    """Whether some process drives the study and is not silent, by the store's time of its last beat.

    One of this machine may have slept with it: its next beat says so.
    """
    found = claims.objects()
    newest = newest_claim(found)
    silent_s = 0.0 if newest is None else time.time() - found[newest].written_s
    holder = None if newest is None or silent_s > LONG_S else _read(claims, newest)
    if newest is None or holder is None or holder["released"] or _is_gone(holder):
        return False
    if silent_s <= SILENT_S:
        return True
    end = time.monotonic() + 2 * BEAT_S
    while holder["machine"] == _machine() and time.monotonic() < end:
        time.sleep(BEAT_S / 3)
        if _read(claims, newest) not in (holder, None):
            return True
    return False


@contextmanager
def taken(study: str, claims: Bucket, least: int, tell: Callable[[str], None]) -> Iterator[BucketLease]:
    """Makes this process the study's driver. StudyRunningError while another one is, and is not silent.

    `least`: the generation is higher than this one, whatever claims there are.
    """
    lease = _take(study, claims, least, tell)
    try:
        yield lease
    finally:
        lease.close()


def _take(study: str, claims: Bucket, least: int, tell: Callable[[str], None]) -> BucketLease:
    for _ in range(TRIES):
        before = _settled(claims)
        newest = newest_claim(before)
        if newest is not None:
            _wait_for_silence(study, claims, newest, tell)
        own = f"{max(least, *map(generation_of, before), 0) + 1:06d}-{secrets.token_hex(8)}"
        wish = own + ".wish"
        claims.put(wish, b"")
        # Whoever wished or claimed since the first look counts: nobody has waited for its silence. Of two, the one that
        # looks later sees the other, for a wish stays until its claim is there.
        if claims.objects().keys() - {wish} <= before:
            claims.put(own + CLAIM, _claim(0, released=False))
            for other in (*before, wish):
                claims.delete(other)
            return BucketLease(study, claims, own + CLAIM)
        claims.delete(wish)  # at the same moment as another process: both may step back, and try again
        time.sleep(random.uniform(0.2, 2.0))
    raise _refusal(study, "several processes want to run it at this moment")


def _settled(claims: Bucket) -> set[str]:
    """What is there, once no wish in it can be one that its process is just about to claim by."""
    since_s = dict[str, float]()
    while True:
        found, now = set(claims.objects()), time.monotonic()
        since_s = {name: since_s.get(name, now) for name in found if not name.endswith(CLAIM)}
        if all(now - wished_s >= SILENT_S for wished_s in since_s.values()):
            return found
        time.sleep(POLL_S)


def _wait_for_silence(study: str, claims: Bucket, name: str, tell: Callable[[str], None]) -> None:
    """Waits until the holder of a claim does not count any more. StudyRunningError at its first beat."""
    first = _read(claims, name)
    if first is None or first["released"] or _is_gone(first):
        return
    holder = f"process {first['pid']} on {first['host']}"
    began = time.monotonic()
    while (silent_s := time.monotonic() - began) < SILENT_S:
        time.sleep(POLL_S)
        now = _read(claims, name)
        if now is None or now["released"] or _is_gone(now):
            return
        if now != first:
            raise _refusal(study, f"{holder} runs it")
    tell(f"{holder} has been silent for {silent_s:.0f} s: taking the study over")


def _refusal(study: str, found: str) -> StudyRunningError:
    expected = f"wait for it, or stop it; it is taken over when it is silent for {SILENT_S:.0f} s"
    return StudyRunningError(Problem(study, "a study has one driver", found, expected))


def _claim(beats: int, released: bool) -> bytes:
    own = {"pid": os.getpid(), "started": _started(psutil.Process()), "host": os.uname().nodename}
    return json.dumps(own | {"machine": _machine(), "beats": beats, "released": released}).encode()


def _read(claims: Bucket, name: str) -> dict[str, Any] | None:
    """A claim; None when it is gone. One that is no claim of ours counts as a silent stranger's."""
    try:
        raw = json.loads(claims.get(name))
        return {
            "pid": int(raw["pid"]),
            "started": float(raw["started"]),
            "host": str(raw["host"])[:100],
            "machine": str(raw["machine"]),
            "beats": int(raw["beats"]),
            "released": bool(raw["released"]),
        }
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return {"pid": 0, "started": 0.0, "host": "a machine unknown", "machine": "", "beats": 0, "released": False}


def _is_gone(claim: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine and does not live any more."""
    if claim["machine"] != _machine():
        return False
    try:
        process = psutil.Process(claim["pid"])
        return bool(_started(process) != claim["started"] or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return not _is_hidden(claim["pid"])


def _is_hidden(pid: int) -> bool:
    """Whether it is another user's process, which /proc may not show (`hidepid`)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _started(process: psutil.Process) -> float:
    """Seconds after the machine's boot: the time of day may be set anew while the process lives."""
    return round(process.create_time() - psutil.boot_time(), 2)


def _now() -> float:
    """Seconds, those included in which the machine slept: what was seen before is old then."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _machine() -> str:
    """This boot of this machine, and its view of processes: in another container a pid means another process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
