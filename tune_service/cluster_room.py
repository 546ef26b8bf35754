"""How many trials a cluster holds when it has grown as far as it may. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from trainables.errors import Problem
from tune_service.machine import Machine
from tune_service.spec import ResourcesSpec, StudySpec
from tune_service.words import counted


@dataclass(frozen=True)
class NodeKind:
    """Nodes that are alike."""

    cpus: int
    gpus: int
    count: int
    """How many there are, or may be."""

    def ranks(self, resources: ResourcesSpec) -> int:
        """How many ranks one such node holds."""
        one = resources.model_copy(update={"workers": 1})
        return Machine(self.cpus, self.gpus, 0).fit(one)

    def __str__(self) -> str:
        return f"{self.count} x ({self.cpus} CPUs, {self.gpus} GPUs)"


@dataclass(frozen=True)
class ClusterRoom:
    """The nodes that are there, and those that the cluster's autoscaler may start."""

    alive: tuple[NodeKind, ...]
    startable: tuple[NodeKind, ...] = ()
    """What the cluster file allows, nodes that are there among them."""
    max_workers: int | None = None
    """The cluster file's limit over all kinds."""
    is_final: bool = False
    """No other kind of node can come: all that the cluster file allows is known."""

    def offer(self) -> str:
        kinds = ", ".join(str(kind) for kind in self.alive if kind.cpus or kind.gpus) or "no worker node"
        more = ", ".join(str(kind) for kind in self.startable)
        return f"{kinds} now{f'; at most {more}' if more else ''}"

    def fit(self, resources: ResourcesSpec, concurrent_trials: int | None = None) -> int:
        """How many trials run at once when all nodes are there. At least one where other nodes may come."""
        ranks = max(_ranks(self.alive, resources), _ranks(self.startable, resources, self.max_workers))
        trials = ranks // resources.workers
        if not self.is_final:
            trials = max(1, trials)
        return trials if concurrent_trials is None else min(trials, concurrent_trials)

    def fits_now(self, resources: ResourcesSpec) -> int:
        """How many trials the nodes hold that are there."""
        return _ranks(self.alive, resources) // resources.workers

    def problems(self, resources: ResourcesSpec) -> list[Problem]:
        """Empty also where a node may come that nobody knows of yet; the study then waits, and says for what."""
        if resources.finds_share:
            return [_SHARE_PROBLEM]
        if not self.is_final or self.fit(resources):
            return []
        found = f"{counted(resources.workers, 'worker')} of {demand(resources)} each"
        if any(kind.ranks(resources) for kind in (*self.alive, *self.startable)):
            rule, expected = "the cluster holds one trial when it has grown", "fewer workers, or more `max_workers`"
            return [Problem("resources.workers", f"{rule} ({self.offer()})", found, expected)]
        key = "resources.gpus_per_worker" if resources.gpu_share else "resources.cpus_per_worker"
        rule = f"a node of the cluster holds one worker ({self.offer()})"
        return [Problem(key, rule, found, "what a node type of the cluster file has")]


def not_for_clusters(spec: StudySpec) -> list[Problem]:
    """What of a spec has no meaning on a cluster, whatever its nodes are."""
    return [_SHARE_PROBLEM] if spec.resources.finds_share else []


def demand(resources: ResourcesSpec) -> str:
    """What one worker needs, in words."""
    gpus = f", {resources.gpu_share:g} GPUs" if resources.gpu_share else ""
    return f"{resources.cpus_per_worker:g} CPUs{gpus}"


def kinds_of(nodes: Iterable[tuple[float, float]]) -> tuple[NodeKind, ...]:
    """(CPUs, GPUs) of each node, put together by kind."""
    counts = Counter((int(cpus), int(gpus)) for cpus, gpus in nodes)
    return tuple(NodeKind(cpus, gpus, count) for (cpus, gpus), count in sorted(counts.items()))


def _ranks(kinds: Iterable[NodeKind], resources: ResourcesSpec, max_nodes: int | None = None) -> int:
    """Ranks that all nodes hold together; of kinds that may not all be there at once, the roomiest first."""
    left, ranks = math.inf if max_nodes is None else max_nodes, 0
    for kind in sorted(kinds, key=lambda kind: kind.ranks(resources), reverse=True):
        count = int(min(kind.count, left))
        ranks += count * kind.ranks(resources)
        left -= count
    return ranks


_SHARE_PROBLEM = Problem(
    "resources.gpus_per_worker",
    "on a cluster, whose GPUs may differ and come and go, the spec says how many trials share one",
    "auto",
    "1, or a fraction such as 0.25",
)
