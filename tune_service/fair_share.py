"""How studies share one cluster: each takes its fair share, and none goes without while another has it all.

The rule. A study's share is the part of the cluster that it may fill. Shares are dealt evenly; what one study has no
use for goes to the others (max-min fairness). A study with more than its share starts no trial until it is within it
again; no trial is ended for it. Where a study has no trial at all and the cluster has no room left for one, no study
that has some, or has had none for less long, starts another until it has got one: with more studies than slots they
take turns.

Every driver is on the head. Each keeps a file there with what it takes and could take, locked as long as it lives.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_EPSILON = 1e-9
SILENT_S = 15.0
"""A driver says every second or so what it claims."""


@dataclass(frozen=True)
class Claim:
    """What one study takes of the cluster, and could take."""

    study: str
    running: int
    """Trials that hold room."""
    wants: int
    """Trials that it could run now if there were room for all."""
    room: int
    """Trials like its own that the whole cluster holds; 0: not even one."""
    since_s: float = 0.0
    """Since when it has none that hold room, by the head's monotonic clock."""

    @property
    def wanted_part(self) -> float:
        return min(1.0, self.wants / self.room) if self.room else 0.0

    @property
    def held_part(self) -> float:
        return self.running / self.room if self.room else 0.0


def allowed(own: Claim, others: Sequence[Claim]) -> int:
    """How many trials the study may run at once."""
    claims = [own, *others]
    share = _parts([claim.wanted_part for claim in claims])[0]
    number = max(1, int(share * own.room + _EPSILON))
    held = sum(claim.held_part for claim in claims)
    without = [each for each in others if each.wants and each.room and not each.running]
    if own.running:
        is_full = bool(without) and held + _one_of_each(without) > 1 + _EPSILON
        return min(number, own.running - 1) if is_full else number
    ahead = [each for each in without if (each.since_s, each.study) < (own.since_s, own.study)]
    is_next = not ahead or held + _one_of_each([*ahead, own]) <= 1 + _EPSILON
    return number if is_next else 0


def _one_of_each(claims: Sequence[Claim]) -> float:
    """The part of the cluster that one trial of each study takes."""
    return sum(1 / claim.room for claim in claims if claim.room)


def _parts(wanted: Sequence[float]) -> list[float]:
    """Deals out 1 evenly; nobody gets more than wanted, and what that leaves goes to the others."""
    parts = [0.0] * len(wanted)
    left = 1.0
    for place, index in enumerate(sorted(range(len(wanted)), key=lambda index: wanted[index])):
        parts[index] = min(wanted[index], left / (len(wanted) - place))
        left -= parts[index]
    return parts


class Claims:
    """The claims of all studies that are driven on this head, one file each. The kernel's lock ends with its driver."""

    def __init__(self, folder: Path, study: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{study}.{os.getpid()}"
        new = self._path.with_name(f".{self._path.name}")
        self._descriptor = os.open(new, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        new.rename(self._path)  # others, who remove what nobody holds, see it only when it is held

    def exchange(self, own: Claim) -> list[Claim]:
        """Says what this study claims; returns what the others do."""
        data = json.dumps(asdict(own)).encode()
        os.pwrite(self._descriptor, data.ljust(4096), 0)  # one block: whoever reads meanwhile has the old or the new
        others = (self._living(path) for path in sorted(self._path.parent.glob("[!.]*")) if path != self._path)
        return [claim for claim in others if claim is not None]

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _living(self, path: Path) -> Claim | None:
        """Another study's claim. What a killed driver left is removed."""
        try:
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    claim = Claim(**json.loads(file.read()))
                    is_silent = time.time() - path.stat().st_mtime > SILENT_S
                    return None if is_silent and not claim.running else claim  # a frozen driver waits for nothing
                path.unlink(missing_ok=True)
        except (FileNotFoundError, ValueError):  # it has just ended, or begun
            pass
        return None
