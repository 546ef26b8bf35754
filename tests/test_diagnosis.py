"""What is made of what was found on a cluster's nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hand_driven import toy_spec

from trainables.stores import GIB
from tune_service import doctor_nodes
from tune_service.diagnosis import Node, Port, memory, nodes_check, opened, ports, reach, token, versions
from tune_service.node_look import METRICS, OPEN, OTHER, REFUSED, SILENT, UNKNOWN

HERE = {"python": "3.12.1", "tune-service": "0.1.0, source aaaa"}


def node(address: str, gpus: float = 0.0, listed: int = 0, **found: Any) -> Node:
    usual = {"versions": HERE, "gpus": [("A10G", 23028)] * listed, "memory_bytes": 16 * GIB, "problems": []}
    return Node(address, address, address == "10.0.0.1", 0.0 if address == "10.0.0.1" else 8.0, gpus, usual | found)


HEAD = node("10.0.0.1")


def test_a_gcs_that_gives_no_answer_is_not_told_as_one_that_takes_orders() -> None:
    assert token("10.0.0.1:6379", REFUSED).ok
    assert "takes orders from who shows none" in token("10.0.0.1:6379", OPEN).found
    for says in (SILENT, OTHER, UNKNOWN):
        check = token("10.0.0.1:6379", says)
        assert (check.ok, check.code) == (False, 1)
        assert check.found == f"the GCS at 10.0.0.1:6379 gave no answer to who shows none ({says})"


def test_the_node_that_differs_is_named_with_both_versions() -> None:
    odd = node("10.0.0.3", versions=HERE | {"python": "3.11.9"})
    check = versions([HEAD, node("10.0.0.2"), odd], HERE)
    assert (check.ok, check.code) == (False, 1)
    assert check.found == "python: 3.12.1 on the head 10.0.0.1, 10.0.0.2 and 3.11.9 on 10.0.0.3"


def test_a_node_that_gives_no_answer_is_named() -> None:
    check = versions([HEAD, Node("2", "10.0.0.2", False, 8.0, 0.0, {"error": "no answer in 180 s"})], HERE)
    assert (check.ok, check.found) == (False, "10.0.0.2: no answer in 180 s")


def test_another_version_here_fails_and_another_source_of_the_same_version_is_a_word() -> None:
    assert not versions([HEAD], HERE | {"tune-service": "0.2.0, source bbbb"}).ok
    same = versions([HEAD], HERE | {"tune-service": "0.1.0, source bbbb"})
    assert same.ok and "another source" in same.advice
    assert versions([HEAD], HERE).advice == ""


def test_nodes_are_told_by_kind_and_one_whose_driver_lacks_its_gpus_fails() -> None:
    good, bad = node("10.0.0.2", gpus=1, listed=1), node("10.0.0.3", gpus=1)
    check = nodes_check([HEAD, good, good])
    assert check.found == "the head 10.0.0.1; 2 x (8 CPUs, 1 x A10G 22 GiB, 16 GiB of memory)"
    check = nodes_check([HEAD, good, bad])
    assert (check.ok, check.found) == (False, "10.0.0.3 offers 1 GPUs, its driver lists 0")
    assert nodes_check([HEAD]).found == "the head 10.0.0.1; no worker node is up"


def test_what_a_worker_cannot_open_is_told_with_its_node() -> None:
    check = opened([HEAD, node("10.0.0.2", problems=["model.name: no folder /m"])])
    assert (check.ok, check.code, check.found) == (False, 2, "10.0.0.2: model.name: no folder /m")
    assert opened([node("10.0.0.1", problems=["the head runs no ranks"]), node("10.0.0.2")]).ok


def port(number: int, says: str, program: str = "raylet", address: str = "10.0.0.2") -> Port:
    return Port(address, number, program, False, says)


def test_metrics_and_what_is_no_server_of_rays_may_be_open_and_nothing_else() -> None:
    usual = [port(6379, REFUSED), port(8090, METRICS), port(40001, OTHER, "ray::RankActor")]
    assert ports(usual).ok
    check = ports([*usual, port(8265, OPEN, "dashboard")])
    assert (check.ok, check.code) == (False, 1)
    assert check.found.startswith("without the token answers 10.0.0.2:8265 (dashboard); 1 refuse who shows no token")


def test_a_server_that_no_other_node_reaches_fails_and_a_process_that_has_ended_does_not() -> None:
    assert ports([port(6379, REFUSED), port(10002, SILENT, "ray::IDLE")]).ok
    check = ports([port(6379, REFUSED), port(10003, SILENT, "raylet")])
    assert not check.ok and check.found.startswith("from another node nobody reaches 10.0.0.2:10003 (raylet)")


def test_ports_that_nobody_asked_are_told_and_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node is asked by the one after it; the third of three is silent."""
    nodes = [node(f"10.0.0.{number}", listening=[("0.0.0.0", 6379, "raylet")]) for number in (1, 2, 3)]
    answers: list[Any] = [[REFUSED], {"error": "no answer in 60 s"}, [REFUSED]]
    monkeypatch.setattr(doctor_nodes, "_on_nodes", lambda function, calls, patience_s: answers)
    found = doctor_nodes.try_ports(nodes)
    assert [(port.address, port.says, port.asker) for port in found] == [
        ("10.0.0.1", REFUSED, "10.0.0.2"),
        ("10.0.0.2", UNKNOWN, "10.0.0.3"),
        ("10.0.0.3", REFUSED, "10.0.0.1"),
    ]
    check = ports(found)
    assert (check.ok, check.code) == (False, 1)
    assert check.found.startswith("not looked at: node 10.0.0.3 gave no answer about 10.0.0.2:6379 (raylet); 2 refuse")
    opened_too = ports([*found, port(8265, OPEN, "dashboard")])
    assert opened_too.found.startswith("without the token answers 10.0.0.2:8265 (dashboard); not looked at: node")


def test_a_port_reached_at_an_address_of_the_internet_fails_and_on_a_private_network_it_is_told() -> None:
    assert reach("head", []).found == "none of Ray's ports of head can be reached from here"
    private = reach("10.0.0.2", [port(6379, REFUSED)])
    assert private.ok and "10.0.0.2:6379" in private.found
    public = reach("8.8.8.8", [port(6379, REFUSED, address="8.8.8.8")])
    assert (public.ok, public.found) == (False, "anybody can connect to 8.8.8.8:6379 (raylet)")
    assert reach(None, []).found.startswith("not looked at")


def test_memory_counts_all_that_share_a_gpu_or_a_node(tmp_path: Path) -> None:
    step = {"peak_bytes": 6.0 * GIB, "gpu_bytes": 22.0 * GIB}
    quarter = toy_spec(tmp_path, resources={"gpus_per_worker": 0.25})
    check = memory(quarter, step, [HEAD])
    assert (check.ok, check.code) == (False, 2)
    # With half a GiB for CUDA itself.
    assert check.found == "6.5 GiB at most in a rank, 4 at once: 26 of 22 GiB of the GPU"
    assert memory(toy_spec(tmp_path, resources={"gpus_per_worker": 1 / 3}), step, [HEAD]).ok
    assert memory(toy_spec(tmp_path, resources={"gpus_per_worker": 0.25}, budget={"trials": 3}), step, [HEAD]).ok
    no_gpu = step | {"gpu_bytes": 0.0}
    on_cpu = [toy_spec(tmp_path, resources={"gpus_per_worker": 0, "cpus_per_worker": cpus}) for cpus in (4, 2)]
    nodes = [HEAD, node("10.0.0.2")]  # 8 CPUs, 16 GiB
    assert memory(on_cpu[0], no_gpu, nodes).found == "6 GiB at most in a rank, 2 at once: 12 of 16 GiB of 10.0.0.2"
    assert not memory(on_cpu[1], no_gpu, nodes).ok
    # Each node with its own CPUs and memory: a big one beside a small one is no fault.
    big = Node("3", "10.0.0.3", False, 64.0, 0.0, {"memory_bytes": 256 * GIB})
    assert memory(on_cpu[0], no_gpu, [*nodes, big]).ok
