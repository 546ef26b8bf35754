"""What is made of what was found on a cluster. Pure: `doctor.py` goes and looks."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainables.memory import CUDA_BYTES
from trainables.stores import GIB
from tune_service.check import Check
from tune_service.cluster_room import NodeKind
from tune_service.estimate import most_trials
from tune_service.node_look import METRICS, OPEN, REFUSED, SILENT, UNKNOWN
from tune_service.spec import StudySpec
from tune_service.words import counted

FAILED = 1
"""The exit code of a check that failed for a reason that lies with the cluster; what lies with the spec has 2."""
MOST_LISTED = 8
SERVERS = ("gcs_server", "raylet")
"""Programs of Ray's that live as long as their node."""
TOKEN_ADVICE = "RAY_AUTH_MODE=token in every start command, as `cluster init` writes it; then `ray up` again"


@dataclass(frozen=True)
class Node:
    """A living node as Ray has it, and what was found there."""

    id: str
    address: str
    is_head: bool
    cpus: float
    gpus: float
    found: Mapping[str, Any]
    """As `node_look.look` has it, or `error` alone."""

    @property
    def name(self) -> str:
        return f"the head {self.address}" if self.is_head else self.address

    @property
    def is_worker(self) -> bool:
        return self.cpus > 0 or self.gpus > 0


@dataclass(frozen=True)
class Port:
    """A port that Ray's processes listen on, and what it says to who shows no token."""

    address: str
    number: int
    program: str
    is_heads: bool
    says: str = SILENT
    asker: str = ""
    """The node that was to ask it."""

    def __str__(self) -> str:
        return f"{self.address}:{self.number} ({self.program})"

    def at(self, address: str) -> Port:
        """The same port by another address of its node."""
        return replace(self, address=address)


def failed(name: str, found: str, advice: str) -> Check:
    return Check(name, False, found, advice, code=FAILED)


def not_looked_at(name: str, why: str, advice: str = "") -> Check:
    """Nothing is wrong, as far as anybody knows."""
    return Check(name, True, f"not looked at: {why}", advice)


# The head


def token(gcs: str, says: str) -> Check:
    """Whether the GCS refuses who shows no token. `says`: what it said to one."""
    if says == REFUSED:
        return Check("token", True, f"the GCS at {gcs} refuses who shows none")
    if says == OPEN:
        found = f"the GCS at {gcs} takes orders from who shows none: anybody who reaches it runs programs"
        return failed("token", found, TOKEN_ADVICE)
    found = f"the GCS at {gcs} gave no answer to who shows none ({says})"
    return failed("token", found, "look at the head, or `check` again: nobody knows whether it is guarded")


# Versions


def versions(nodes: Sequence[Node], here: Mapping[str, str]) -> Check:
    """Whether all nodes run the same, and the laptop's tune-service is theirs."""
    name, silent = "versions", [node for node in nodes if "error" in node.found]
    if silent:
        found = "; ".join(f"{node.name}: {node.found['error']}" for node in silent)
        return failed(name, found, "look at that node, or take it out of the cluster: it gives no answer")
    told = []
    for package in nodes[0].found["versions"]:
        by_version: dict[str, list[str]] = {}
        for node in nodes:
            by_version.setdefault(node.found["versions"].get(package, "unknown"), []).append(node.name)
        if len(by_version) > 1:
            parts = (f"{version} on {', '.join(names)}" for version, names in by_version.items())
            told.append(f"{package}: {' and '.join(parts)}")
    if told:
        advice = "one source and one requirements.lock on all nodes: `ray up` copies and installs this checkout's"
        return failed(name, "; ".join(told), advice)
    same = nodes[0].found["versions"]
    packages = ", ".join(f"{package} {version}" for package, version in same.items())
    found = f"on {counted(len(nodes), 'node')}: {packages}"
    if same["tune-service"] == here["tune-service"]:
        return Check(name, True, found)
    differs = f"{found}; here: tune-service {here['tune-service']}"
    if same["tune-service"].partition(",")[0] != here["tune-service"].partition(",")[0]:
        return failed(name, differs, "one version here and there, or `submit` is refused: `ray up`, or update here")
    return Check(name, True, differs, "the cluster runs another source than this machine has; `ray up` copies this one")


# Nodes


def nodes_check(nodes: Sequence[Node]) -> Check:
    """What there is, and whether each node has the GPUs that it offers."""
    lacking = [node for node in nodes if "error" not in node.found and node.gpus > len(node.found["gpus"])]
    kinds = Counter(_kind(node) for node in nodes if node.is_worker)
    found = ", ".join(f"{count} x ({kind})" for kind, count in kinds.items()) or "no worker node is up"
    heads = [node.name for node in nodes if node.is_head]
    if lacking:
        parts = (
            f"{node.name} offers {node.gpus:g} GPUs, its driver lists {len(node.found['gpus'])}" for node in lacking
        )
        return failed("nodes", "; ".join(parts), "an image with NVIDIA's driver: `nvidia-smi` must work on the node")
    return Check("nodes", True, "; ".join([*heads, found]))


def _kind(node: Node) -> str:
    gpus = Counter(f"{name} {mib / 1024:.0f} GiB" for name, mib in node.found.get("gpus", ()))
    listed = "".join(f", {count} x {name}" for name, count in gpus.items()) if node.gpus else ""
    memory = node.found.get("memory_bytes", 0) / GIB
    return f"{node.cpus:g} CPUs{listed}, {memory:.0f} GiB of memory"


def opened(nodes: Sequence[Node]) -> Check:
    """Whether every worker node opens what its ranks will."""
    workers = [node for node in nodes if node.is_worker and "error" not in node.found]
    told = [f"{node.name}: {problem}" for node in workers for problem in node.found["problems"]]
    if told:
        advice = "a folder of this machine, which is shipped, or one that lies on every node; a network for the hub"
        return Check("inputs", False, "; ".join(told), advice, code=2)
    return Check("inputs", True, f"can be opened on {counted(len(workers), 'node')}")


# Ports


def ports(found: Sequence[Port]) -> Check:
    """The rule: without the token nothing answers but Ray's metrics, and from another node Ray's servers are reached.

    A port that nobody has asked may be open: that fails too.

    Whether the world reaches them is `reach`'s.
    """
    by_says = {says: [port for port in found if port.says == says] for says in {port.says for port in found}}
    told = f"{len(by_says.get(REFUSED, ()))} refuse who shows no token"
    if metrics := by_says.get(METRICS):
        told += f", {len(metrics)} tell Ray's metrics: {_listed(metrics)}"
    if others := [port for port in found if port.says not in (REFUSED, METRICS, OPEN, SILENT, UNKNOWN)]:
        told += f", {len(others)} speak something else: {_listed(others)}"
    if unknown := by_says.get(UNKNOWN):
        by_asker = {asker: [port for port in unknown if port.asker == asker] for asker in {p.asker: 0 for p in unknown}}
        parts = (f"node {asker} gave no answer about {_listed(each)}" for asker, each in by_asker.items())
        told = f"not looked at: {'; '.join(parts)}; {told}"
    if opened := by_says.get(OPEN):
        return failed("ports", f"without the token answers {_listed(opened)}; {told}", TOKEN_ADVICE)
    if unknown:
        return failed(
            "ports", told, "look at that node, or `check` again: nobody knows whether those ports are guarded"
        )
    if blocked := [port for port in by_says.get(SILENT, ()) if port.program in SERVERS]:  # others have just ended
        found_blocked = f"from another node nobody reaches {_listed(blocked)}; {told}"
        advice = "between the nodes all ports open: README, What is guarded, and what is not"
        return failed("ports", found_blocked, advice)
    return Check("ports", True, told)


def reach(host: str | None, reached: Sequence[Port]) -> Check:
    """What the laptop could connect to. The rule: at an address of the internet, none of Ray's ports."""
    if host is None:
        return not_looked_at("reach", "the address leads through this machine's own loopback")
    public = [port for port in reached if is_public(port.address)]
    if public:
        found = f"anybody can connect to {_listed(public)}"
        return failed("reach", found, "a firewall that opens ssh alone: README, What is guarded, and what is not")
    if reached:
        return Check("reach", True, f"from here, over a private network: {_listed(reached)}")
    return Check("reach", True, f"none of Ray's ports of {host} can be reached from here")


def is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:  # a name: nobody knows
        return False


def _listed(some: Sequence[Port]) -> str:
    shown = ", ".join(map(str, some[:MOST_LISTED]))
    return f"{shown} and {len(some) - MOST_LISTED} more" if len(some) > MOST_LISTED else shown


# Memory


def memory(spec: StudySpec, step: Mapping[str, float], nodes: Sequence[Node]) -> Check:
    """Whether as many ranks as share a GPU, or a node, have memory for the largest step."""
    peak, resources = step["peak_bytes"], spec.resources
    trials = most_trials(spec)
    most = min(spec.budget.concurrent_trials or trials, trials) * resources.workers
    if step["gpu_bytes"]:
        peak += CUDA_BYTES
        rooms = [(resources.ranks_on_a_gpu, step["gpu_bytes"], "the GPU")]
    else:
        rooms = [
            (NodeKind(int(node.cpus), int(node.gpus), 1).ranks(resources), node.found["memory_bytes"], node.name)
            for node in nodes
            if node.is_worker and "error" not in node.found
        ]
    rooms = [(min(count, most), total, where) for count, total, where in rooms if count]
    if not rooms:
        return not_looked_at("memory", "no node told its own")
    count, total, where = max(rooms, key=lambda room: room[0] / room[1])
    sums = f"{count * peak / GIB:.2g} of {total / GIB:.2g} GiB of {where}"
    told = f"{peak / GIB:.2g} GiB at most in a rank, {count} at once: {sums}"
    if count * peak > total:
        key = "gpus_per_worker" if step["gpu_bytes"] else "cpus_per_worker"
        advice = f"more resources.{key}, training.micro_batch_size, or smaller largest batch_size and max_length"
        return Check("memory", False, told, advice, code=2)
    return Check("memory", True, told)
