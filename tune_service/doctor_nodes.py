"""Asks all nodes of a cluster at once: what is there, what is open."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from tune_service import node_look
from tune_service.cluster_ray import is_head
from tune_service.diagnosis import Node, Port
from tune_service.node_look import UNKNOWN

NODE_S = 180.0
"""How long a node may take to answer: a process starts there, and perhaps imports the user's module."""
PORTS_S = 60.0
ANYWHERE = ("0.0.0.0", "::")


def look_at_nodes(session: str, inputs: Mapping[str, Any]) -> list[Node]:
    """What `node_look.look` finds on each living node."""
    import ray

    ray.cloudpickle.register_pickle_by_value(node_look)
    alive = [node for node in ray.nodes() if node["Alive"]]
    calls = [(node["NodeID"], (session, os.environ["RAY_ADDRESS"], inputs)) for node in alive]
    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            is_head=is_head(node),
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            found=found,
        )
        for node, found in zip(alive, _on_nodes(node_look.look, calls, NODE_S), strict=True)
    ]


def try_ports(nodes: Sequence[Node]) -> list[Port]:
    """Every port that is not on loopback, as the node after it sees it; UNKNOWN where that one gives no answer."""
    listed = [_callable_at(node) for node in nodes]
    askers = [*nodes[1:], *nodes[:1]]
    calls = [
        (asker.id, ([(address, port) for address, port, _ in ports],))
        for asker, ports in zip(askers, listed, strict=True)
    ]
    answers = _on_nodes(node_look.probed, calls, PORTS_S)
    found: dict[tuple[str, int], Port] = {}
    for node, asker, ports, answer in zip(nodes, askers, listed, answers, strict=True):
        says = answer if isinstance(answer, list) else [UNKNOWN] * len(ports)
        for (address, number, program), said in zip(ports, says, strict=True):
            port = Port(address, number, program, node.is_head, said, asker.address)
            if (before := found.get((address, number))) is None or before.says == UNKNOWN:
                found[address, number] = port
    return list(found.values())


def _callable_at(node: Node) -> list[tuple[str, int, str]]:
    """(address, port, program): what listens on every address is called at the node's."""
    listed = node.found.get("listening", ())
    return [(node.address if place in ANYWHERE else place, port, program) for place, port, program in listed]


def _on_nodes(function: Any, calls: Sequence[tuple[str, Sequence[Any]]], patience_s: float) -> list[Any]:
    """What `function` gives on each node, or {"error": why nothing}. Whoever is silent is waited for no longer."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*arguments)
        for node, arguments in calls
    ]
    _, silent = ray.wait(asked, num_returns=len(asked), timeout=patience_s)
    answers = []
    for reference in asked:
        if reference in silent:
            ray.cancel(reference, force=True)
            answers.append({"error": f"no answer in {patience_s:.0f} s"})
            continue
        try:
            answers.append(ray.get(reference))
        except RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            answers.append({"error": lines[-1] if lines else type(error).__name__})
    return answers
