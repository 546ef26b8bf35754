"""The Ray of a cluster, for the study that a job on its head drives. At the end nothing of the study is left in it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainables.far import own_files
from tune_service.autoscaler import cluster_file, kinds_in, troubles
from tune_service.cluster_room import ClusterRoom, demand, kinds_of
from tune_service.fair_share import Claim, Claims, allowed
from tune_service.home import StudyHome
from tune_service.local_ray import TUNE_ENVIRONMENT, undisturbed
from tune_service.place import Usage
from tune_service.ray_start import interrupts_put_off
from tune_service.spec import StudySpec, moved
from tune_service.words import counted

HEAD_RESOURCE = "study_head"
"""What the cluster file gives its head plenty of, so that supervisors can ask for some."""
ANY_HEAD_RESOURCE = "node:__internal_head__"
"""What Ray gives every head one of."""
SLIVER = 0.001
LOOK_S = 1.0
NODES_S = 5.0
LOST_S = 600.0
"""For so long people are told of a node that was lost."""


@contextmanager
def joined(name: str, came_with: Path | None, working_dir: Path | None = None) -> Iterator[ThisCluster]:
    """Joins the Ray that this job belongs to.

    `came_with` is the folder of what the study came with; None: nothing. Every rank has a copy of it: the job's own
    working directory, or, for a job without one, `working_dir`, which is taken to the nodes now.
    """
    os.environ |= TUNE_ENVIRONMENT
    os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"  # what the study came with is wanted whole
    import ray

    with interrupts_put_off():
        context = ray.init(
            address=os.environ["RAY_ADDRESS"],
            namespace=name,
            log_to_driver=False,
            runtime_env={"working_dir": str(working_dir)} if working_dir is not None else None,
        )
    try:
        yield ThisCluster(came_with, Path(context.address_info["session_dir"]))
    finally:
        with undisturbed():
            ray.shutdown()  # the job's actors and placement groups end with it


class ThisCluster:
    """The cluster that this process has joined, as a place for a study."""

    def __init__(self, came_with: Path | None, session_dir: Path) -> None:
        self._came_with = came_with
        self._session_dir = session_dir
        self._file = cluster_file()

    @property
    def session_name(self) -> str:
        """What Ray calls this run of the cluster; its processes have it on their command lines."""
        return self._session_dir.name

    @property
    def room(self) -> ClusterRoom:
        alive = [node["Resources"] for node in _nodes() if node["Alive"]]
        kinds = kinds_of((each.get("CPU", 0), each.get("GPU", 0)) for each in alive)
        startable, max_workers, is_final = kinds_in(self._file)
        return ClusterRoom(kinds, startable, max_workers, is_final)

    def settled(self, spec: StudySpec, folder: StudyHome) -> StudySpec:
        """Keeps what the job came with in the study's folder: the job's own copy is gone with the job."""
        assert self._came_with is not None, "a new study comes with its spec at least"
        return moved(spec, self._came_with, folder.keep_shipped(self._came_with))

    def found_again(self, spec: StudySpec, folder: StudyHome) -> StudySpec:
        return spec if self._came_with in (None, spec.folder) else moved(spec, spec.folder, self._came_with)

    def sharing(self, spec: StudySpec) -> None:
        """Nothing: here the spec says it."""

    def prepare(self, spec: StudySpec) -> None:
        """Nothing: Ray was joined before."""

    @contextmanager
    def session(self, spec: StudySpec, on_lost: Callable[[str], None]) -> Iterator[ClusterSession]:
        scratch = own_files.emptied("tune")
        root = spec.folder if self._came_with is not None else None
        if root is not None:
            os.chdir(root)  # the job's own copy of it is Ray's, to put anew or away
        claims = Claims(self._session_dir / "tune-service", spec.name)
        try:
            yield ClusterSession(self, spec, root, scratch, claims)
        finally:
            claims.close()
            shutil.rmtree(scratch, ignore_errors=True)

    def end_all(self) -> None:
        """Nothing: what this process waits for is the job's, and ends with it."""


class ClusterSession:
    """A cluster's Ray while one study runs on it, perhaps beside others."""

    def __init__(self, cluster: ThisCluster, spec: StudySpec, root: Path | None, scratch: Path, claims: Claims) -> None:
        self.scratch = scratch
        self.root = root
        self.cards = ()
        self.supervisor_bundle: Mapping[str, float] = {_head_resource(): SLIVER}
        self._cluster, self._spec, self._claims = cluster, spec, claims
        self._room = cluster.room
        self._others: list[Claim] = []
        self._slots = 1
        self._none_since = time.monotonic()
        self._next_look, self._next_nodes = 0.0, time.monotonic() + NODES_S
        self._notice: str | None = None
        self._next_notice = 0.0
        self._alive: dict[str, str] = {}
        self._lost: list[tuple[float, str]] = []

    def slots(self, usage: Usage) -> int:
        now = time.monotonic()
        if now >= self._next_nodes:
            self._next_nodes = now + NODES_S
            self._room = self._cluster.room
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            cap = self._spec.budget.concurrent_trials
            room = self._room.fit(self._spec.resources)
            wants = usage.wants if cap is None else min(cap, usage.wants)
            # A study that waits for nodes nobody has seen yet holds up no other.
            counts = room if self._room.is_final or self._room.fits_now(self._spec.resources) else 0
            if usage.running:
                self._none_since = now
            own = Claim(self._spec.name, usage.running, wants, counts, self._none_since)
            self._others = self._claims.exchange(own)
            self._slots = allowed(own, self._others) if cap is None else min(cap, allowed(own, self._others))
        return self._slots

    def notice(self, waits: bool) -> str | None:
        now = time.monotonic()
        if now >= self._next_notice:
            self._next_notice = now + NODES_S
            sentences = [*self._losses(now), *(self._waits_for() if waits else ())]
            self._notice = "; ".join(sentences) or None
        return self._notice

    def failed(self, reason: str) -> None:
        """Nothing: nodes that were lost are looked for in any case."""

    def _losses(self, now: float) -> list[str]:
        """Nodes that went away while the study ran."""
        for node in _nodes():
            number, address = node["NodeID"], node["NodeManagerAddress"]
            if node["Alive"]:
                self._alive[number] = address
            elif self._alive.pop(number, None):
                stamp = time.strftime("%H:%M", time.gmtime())
                why = str(node.get("DeathReasonMessage") or "").strip().splitlines()
                reason = f": {why[0]}" if why else ""
                text = f"node {address} was lost at {stamp} UTC{reason}; its trials go on from their last checkpoints"
                self._lost.append((now, text))
        self._lost = [(since, text) for since, text in self._lost if now - since < LOST_S]
        return [text for _, text in self._lost]

    def _waits_for(self) -> Iterator[str]:
        """Why there is no room for a trial."""
        resources, room = self._spec.resources, self._room
        if not room.fits_now(resources):
            what = f"{counted(resources.workers, 'worker')} of {demand(resources)} each"
            yield f"trials wait for nodes: a trial needs {what}, the cluster has {room.offer()}"
        elif self._others:
            names = ", ".join(sorted(claim.study for claim in self._others))
            yield f"trials wait for room, which is shared with {names}"
        else:
            yield f"trials wait for room: the cluster has {room.offer()}"
        yield from troubles()


def _head_resource() -> str:
    has_plenty = any(HEAD_RESOURCE in node["Resources"] for node in _nodes() if node["Alive"])
    return HEAD_RESOURCE if has_plenty else ANY_HEAD_RESOURCE


def is_head(node: dict[str, Any]) -> bool:
    return ANY_HEAD_RESOURCE in node["Resources"]


def _nodes() -> list[dict[str, Any]]:
    import ray

    found: list[dict[str, Any]] = ray.nodes()
    return found
