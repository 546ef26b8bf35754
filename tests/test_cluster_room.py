"""How many trials a cluster holds, now and when it has grown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tune_service.autoscaler import kinds_in
from tune_service.checkup import check_cluster
from tune_service.cluster_room import ClusterRoom, NodeKind, kinds_of
from tune_service.errors import SpecError
from tune_service.spec import ResourcesSpec
from tune_service.submit import submit_study

TWO_SMALL = kinds_of([(0, 0), (8, 1), (8, 1)])


def resources(workers: int = 1, gpus: float = 1.0, cpus: float = 1.0) -> ResourcesSpec:
    return ResourcesSpec(workers=workers, gpus_per_worker=gpus, cpus_per_worker=cpus)


def test_nodes_that_are_alike_are_one_kind() -> None:
    assert kinds_of([(8, 1), (0, 0), (8, 1)]) == (NodeKind(0, 0, 1), NodeKind(8, 1, 2))


def test_ranks_of_a_trial_may_lie_on_several_nodes() -> None:
    room = ClusterRoom(TWO_SMALL, is_final=True)
    assert [room.fit(resources(workers)) for workers in (1, 2, 3)] == [2, 1, 0]


def test_a_share_of_a_gpu_lies_on_one_gpu() -> None:
    assert ClusterRoom(TWO_SMALL).fit(resources(gpus=0.4)) == 4
    assert ClusterRoom(TWO_SMALL).fit(resources(gpus=0.4), concurrent_trials=3) == 3


def test_nodes_that_may_be_started_count_up_to_the_limit_over_all_kinds() -> None:
    startable = (NodeKind(8, 1, 10), NodeKind(96, 8, 2))
    assert ClusterRoom(TWO_SMALL, startable, max_workers=None).fit(resources()) == 26
    assert ClusterRoom(TWO_SMALL, startable, max_workers=4).fit(resources()) == 18  # 2 x 8 and 2 x 1
    assert ClusterRoom(TWO_SMALL, startable, max_workers=4).fits_now(resources()) == 2


def test_a_demand_that_no_node_type_meets_is_refused_where_all_types_are_known() -> None:
    known = ClusterRoom(TWO_SMALL, (NodeKind(8, 1, 10),), is_final=True)
    (problem,) = known.problems(resources(gpus=2))
    assert problem.place == "resources.gpus_per_worker"
    assert problem.rule.endswith("(2 x (8 CPUs, 1 GPUs) now; at most 10 x (8 CPUs, 1 GPUs))")
    assert problem.found == "1 worker of 1 CPUs, 2 GPUs each"
    (problem,) = known.problems(resources(workers=11))
    assert problem.place == "resources.workers"
    assert known.problems(resources(workers=10)) == []


def test_on_a_cluster_the_spec_says_how_many_trials_share_a_gpu() -> None:
    auto = ResourcesSpec(gpus_per_worker="auto")
    for room in (ClusterRoom(TWO_SMALL), ClusterRoom(TWO_SMALL, is_final=True)):
        (problem,) = room.problems(auto)
        assert (problem.place, problem.found) == ("resources.gpus_per_worker", "auto")
        assert problem.expected == "1, or a fraction such as 0.25"


def test_that_is_said_on_the_laptop_before_anything_is_shipped(tmp_path: Path) -> None:
    spec = tmp_path / "study.yaml"
    spec.write_text(
        "name: s\ntrainable: a.b:c\nsearch_space: {x: {uniform: [0, 1]}}\nresources: {gpus_per_worker: auto}\n"
    )
    nobody: Any = None
    for command in (
        lambda: submit_study(spec, (), None, nobody, wait=True),
        lambda: next(check_cluster(spec, (), None, nobody, start_nodes=False)),
    ):
        with pytest.raises(SpecError) as caught:
            command()
        (problem,) = caught.value.problems
        assert problem.place == f"{spec}:4 resources.gpus_per_worker"
        assert problem.expected == "1, or a fraction such as 0.25"


def test_what_may_not_be_meant_is_told_before_a_study_is_handed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def train(context): ...\n")
    spec = tmp_path / "study.yaml"
    spec.write_text(
        "name: s\ntrainable: mine:train\ntraining: {x: 7}\nsearch_space: {x: {uniform: [0, 1]}}\n"
        "resources: {gpus_per_worker: 0}\n"
    )
    told = "trial 0 does not start at x 7: that lies outside its domain"

    class Cluster:
        def submit(self, *_: object) -> str:
            return "s-1"

    cluster: Any = Cluster()
    assert submit_study(spec, (), None, cluster, wait=True) == ("s", "s-1")
    assert capsys.readouterr().err == f"{told}\n"
    first = next(check_cluster(spec, (), None, cluster, start_nodes=False))
    assert (first.name, first.ok, first.advice) == ("spec", True, told)


def test_a_study_waits_where_other_nodes_may_come() -> None:
    empty = ClusterRoom(kinds_of([(0, 0)]))
    assert (empty.problems(resources()), empty.fit(resources()), empty.fits_now(resources())) == ([], 1, 0)


def test_a_cluster_file_says_what_may_be_started() -> None:
    file = {
        "max_workers": 6,
        "provider": {"type": "aws"},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 4}},
            "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 4},
            "off": {"resources": {"CPU": 96, "GPU": 8}, "max_workers": 0},
        },
    }
    assert kinds_in(file) == ((NodeKind(8, 1, 4),), 6, True)
    unknown = file | {"available_node_types": {"gpu": {"max_workers": 4}}}
    assert kinds_in(unknown) == ((), 6, False)
    assert kinds_in(None) == ((), None, False)
