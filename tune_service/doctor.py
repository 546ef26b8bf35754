"""The doctor of a cluster: a job on its head that tries what a study of a spec needs, piece by piece.

Every wait has a deadline, and what was taken is given back: the job's actors and its placement group end with it in any
case. Where its laptop has gone away, it goes on to its end.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread, Timer
from typing import TYPE_CHECKING, Any

from trainables.errors import BucketError, Problem
from trainables.stores import GIB
from tune_service import diagnosis, node_look
from tune_service.autoscaler import cluster_file, troubles
from tune_service.check import Check, looked_at, room_for_checkpoints, run_checks
from tune_service.cluster_ray import ThisCluster, joined
from tune_service.cluster_room import demand
from tune_service.diagnosis import Port
from tune_service.doctor_nodes import look_at_nodes, try_ports
from tune_service.doctor_trial import TRIED, try_trial
from tune_service.errors import CommandError
from tune_service.home import StudyStorage
from tune_service.parcel import SPEC
from tune_service.spec import StudySpec, beside, parse_spec
from tune_service.words import counted

if TYPE_CHECKING:
    from tune_service.head import Answer

ROOM_S = 30.0
"""How long room that seems to be free may take to be given."""
START_NODES_S = 1800.0
"""How long nodes may take that were asked for: machines start, and install what they need."""
TOLD_S = 5.0
WRITTEN_BYTES = 64 * 1024**2
STORAGE_S = 60.0
ALL_S = 7200.0
"""The last resort, for a wait that nobody foresaw."""


def check_here(storage: StudyStorage, start_nodes: bool, versions: Mapping[str, str], answer: Answer) -> None:
    """Sends each check as soon as it is done. The spec lies in the working directory, as for a study.

    `versions`: the laptop's.
    """
    root = Path.cwd()
    spec = parse_spec(
        json.loads((root / SPEC).read_text(encoding="utf-8")), root, here=False
    )  # a check says what lacks
    last_resort = Timer(ALL_S, lambda: os._exit(1))
    last_resort.daemon = True
    last_resort.start()
    with joined(f"check {spec.name}", came_with=root) as place:
        doctor = _Doctor(spec, root, storage, place, lambda line: answer.send({"tell": line}))
        for check in doctor.checks(start_nodes, versions):
            answer.send({"check": check.to_json(), "code": check.code})
        answer.send({"ports": [[port.address, port.number, port.program, port.is_heads] for port in doctor.ports]})


class _Doctor:
    def __init__(
        self, spec: StudySpec, root: Path, storage: StudyStorage, place: ThisCluster, tell: Callable[[str], None]
    ) -> None:
        self._spec, self._root, self._storage, self._place, self._tell = spec, root, storage, place, tell
        self._bytes_s = 0.0
        """What the storage takes in a second; 0: unknown."""
        self.ports: list[Port] = []

    def checks(self, start_nodes: bool, versions: Mapping[str, str]) -> Iterator[Check]:
        yield self._token()
        for check in run_checks(self._spec, self._storage, self._place.room):
            if check.ok and check.name == "storage":
                check = looked_at("storage", self._storage_speed)
            elif check.ok and check.name == "resources":
                check = self._resources(check)
            yield check
        with self._room(start_nodes) as (group, why_not):
            nodes = look_at_nodes(self._place.session_name, self._inputs())
            yield diagnosis.versions(nodes, versions)
            yield diagnosis.nodes_check(nodes)
            if any(node.is_worker for node in nodes):
                yield diagnosis.opened(nodes)
            if group is None:
                can_start = not start_nodes and cluster_file() is not None
                advice = "--start-nodes has the autoscaler start what one trial needs" if can_start else ""
                yield diagnosis.not_looked_at(TRIED[0], why_not, advice)
                yield from (diagnosis.not_looked_at(name, why_not) for name in TRIED[1:])
            else:
                yield from try_trial(beside(self._spec, self._root), group, self._place.room, nodes, self._checkpoints)
            self.ports = try_ports(nodes)
            yield diagnosis.ports(self.ports)

    # The head

    def _token(self) -> Check:
        """Whether the one port that leads to everything, the GCS, refuses who shows no token."""
        host, _, port = os.environ["RAY_ADDRESS"].rpartition(":")
        return diagnosis.token(f"{host}:{port}", node_look.probed([(host, int(port))])[0])

    def _storage_speed(self) -> str:
        """Writes, reads and deletes a file where studies lie; a disk that hangs is not waited for."""
        found: list[tuple[float, float] | OSError] = []

        def look() -> None:
            try:
                found.append(self._storage.speeds(WRITTEN_BYTES))
            except OSError as error:
                found.append(error)

        looking = Thread(target=look, daemon=True)
        looking.start()
        looking.join(STORAGE_S)
        speeds = found[0] if found else TimeoutError(f"{WRITTEN_BYTES / 1e6:.0f} MB took more than {STORAGE_S:.0f} s")
        if isinstance(speeds, BucketError):
            raise speeds
        if isinstance(speeds, OSError):
            expected = "a disk with room, or another --storage"
            raise CommandError(Problem("--storage", "takes and gives back a file", str(speeds), expected)) from speeds
        self._bytes_s = speeds[0]
        told = f"writes {speeds[0] / 1e6:.0f} MB/s, synced, reads {speeds[1] / 1e6:.0f} MB/s"
        return f"{self._storage.where}: {told}, {self._storage.free_bytes() / GIB:.3g} GiB free"

    def _resources(self, check: Check) -> Check:
        """Adds how many fit now; where none does and no autoscaler is there, waiting would not end."""
        resources, room = self._spec.resources, self._place.room
        if not room.fits_now(resources) and cluster_file() is None:
            needed = f"{counted(resources.workers, 'worker')} of {demand(resources)} each"
            found = f"a trial needs {needed}, the cluster has {room.offer()}"
            advice = "nodes that hold it, or less in `resources`: nodes come by hand here, no autoscaler was found"
            return Check("resources", False, found, advice, code=2)
        return replace(check, found=f"{check.found}, {room.fits_now(resources)} now")

    # Room for one trial

    @contextmanager
    def _room(self, start_nodes: bool) -> Iterator[tuple[Any, str]]:
        """(placement group with a trial's bundles, ""), or (None, why there is none)."""
        resources = self._spec.resources
        room = self._place.room
        if room.is_final and not room.fit(resources):
            yield None, "no node meets the demand"
            return
        if not start_nodes and not room.fits_now(resources):
            yield None, "no worker node is up" if not any(kind.cpus for kind in room.alive) else "no node up holds it"
            return
        import ray

        bundle = {"CPU": resources.cpus_per_worker}
        if resources.gpu_share:
            bundle["GPU"] = resources.gpu_share
        group = ray.util.placement_group([dict(bundle) for _ in range(resources.workers)])
        try:
            patience_s = START_NODES_S if start_nodes else ROOM_S
            came = self._comes(group, patience_s)
            others = "" if start_nodes else ": others have it"
            yield (group, "") if came else (None, f"no room came in {patience_s:.0f} s{others}")
        finally:
            ray.util.remove_placement_group(group)

    def _comes(self, group: Any, patience_s: float) -> bool:
        """Waits for the group; says what the autoscaler is at."""
        end, told = time.monotonic() + patience_s, ""
        while not group.wait(TOLD_S):
            if time.monotonic() > end:
                return False
            line = "; ".join(troubles())
            if line != told:
                self._tell(line or "waiting for nodes")
                told = line
        return True

    # What a trial takes

    def _checkpoints(self, num_bytes: int) -> tuple[Check, float]:
        """Room for checkpoints of so many bytes, and how many bytes the storage takes in a second."""
        check = looked_at("checkpoint size", lambda: room_for_checkpoints(self._spec, self._storage, num_bytes))
        return check, self._bytes_s

    def _inputs(self) -> dict[str, Any]:
        """What ranks open, as plain values and as they see it."""
        spec = beside(self._spec, self._root)
        return {
            "model": spec.model.model_dump(mode="json") if spec.is_finetune and spec.model else None,
            "data": spec.data.model_dump(mode="json") if spec.is_finetune and spec.data else None,
            "trainable": None if spec.is_finetune else spec.trainable,
        }
