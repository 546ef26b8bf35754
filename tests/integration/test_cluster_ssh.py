"""A cluster of three machines that one can ssh to, from nothing to the best model and down again, with all that fails.

The tests share one cluster and one study and run in the order in which they stand. The study lies on the head's own
disk, which no other machine sees.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from cluster_lab import DASHBOARD_PORT, FILE, LabCluster
from lab import HOME, KEY, Lab, Machine, require_lab
from program import wait_until

from tune_service.demo import write_pairs, write_tokenizer
from tune_service.record import Record
from tune_service.storage import StudyFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TOKEN = HOME / ".ray/auth_token"
NUM_EPOCHS = 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabCluster]:
    require_lab()
    with Lab(tmp_path_factory.mktemp("lab") / "ssh", num_hosts=3) as lab:
        found = LabCluster(lab)
        hosts = ",".join(host.ip for host in lab.hosts)
        found.init("--provider", "local", "--hosts", hosts, "--ssh-user", "root", "--ssh-key", str(KEY))
        found.up()
        found.wait_for_nodes(*(host.ip for host in lab.hosts))
        yield found


def write_spec(client: Machine) -> None:
    """A study whose trials take both workers' machines, which offer one CPU each."""
    folder = client.outside(HOME / "inputs")
    write_pairs(folder / "data", num_train=512)
    write_tokenizer(folder / "tokenizer")
    size = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64}
    spec = {
        "name": "films",
        "model": {"name": "./tokenizer", "from_scratch": True, "config": {"model_type": "gpt2", **size}},
        "data": {"path": "data", "text": ["sentence1", "sentence2"]},
        "training": {"max_epochs": NUM_EPOCHS, "batch_size": 32, "max_length": 32, "precision": "fp32"},
        "search_space": {"learning_rate": {"choice": [1e-3, 3e-3]}},
        "sampler": {"name": "grid"},
        "scheduler": {"name": "none"},
        "budget": {"trials": 2},
        "resources": {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 1},
        "faults": {"restarts_per_trial": 8},
    }
    (folder / "films.yaml").write_text(yaml.safe_dump(spec))


def tune(cluster: LabCluster, *arguments: str, timeout_s: float = 120) -> Any:
    """The document of one of the product's commands, called on the user's machine."""
    return json.loads(
        cluster.lab.client.check("tune-service", *arguments, "--address", str(FILE), "--json", timeout_s=timeout_s)
    )


def num_reports(cluster: LabCluster) -> int:
    """The reports of all trials so far, read off the head's disk: no command disturbs the machines that train."""
    folder = StudyFolder(cluster.head.outside(HOME / "studies/films"))
    return sum(len(trial.reports) for trial in Record.open(folder).status().trials)


def is_rank(command: str) -> bool:
    """Ray names a process by the actor in it, or by what that does at the moment."""
    return command.startswith("ray::") and ("RankActor" in command or " rank " in command)


def wait_for_report_after(cluster: LabCluster, count: int, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while num_reports(cluster) <= count:
        assert time.monotonic() < end, f"no report after the first {count} in {timeout_s} s"
        time.sleep(0.2)


def test_the_check_passes_the_file_that_ray_took(cluster: LabCluster) -> None:
    cluster.lab.client.check("tune-service", "cluster", "check", str(FILE))


def test_the_token_lies_on_every_node_and_only_its_owner_can_read_it(cluster: LabCluster) -> None:
    token = cluster.lab.client.check("cat", str(TOKEN))
    for machine in (cluster.lab.client, *cluster.lab.hosts):
        assert machine.check("cat", str(TOKEN)) == token
        assert machine.check("stat", "-c", "%a", str(TOKEN)) == "600\n"


def test_nobody_gets_in_without_the_token(cluster: LabCluster) -> None:
    client, head = cluster.lab.client, cluster.head
    token = client.check("cat", str(TOKEN))
    jobs = f"http://127.0.0.1:{DASHBOARD_PORT}/api/jobs/"
    assert cluster.http_status(client, f"http://{head.ip}:{DASHBOARD_PORT}/api/jobs/") == "000"  # on loopback alone
    assert cluster.http_status(head, jobs) == "401"
    assert cluster.http_status(head, jobs, "Authorization: Bearer wrong") == "403"
    assert cluster.http_status(head, jobs, f"Authorization: Bearer {token}") == "200"
    for path in ("api/v0/nodes", "nodes?view=summary", "api/version", "logs/", "metrics"):
        assert cluster.http_status(head, f"http://127.0.0.1:{DASHBOARD_PORT}/{path}") == "401", path
    gcs = f"{head.ip}:6379"
    refused = client.run("ray", "status", "--address", gcs, env={"RAY_AUTH_MODE": "disabled"})
    assert refused.code != 0 and "InvalidAuthToken" in refused.out + refused.err, refused
    let_in = client.run("ray", "status", "--address", gcs, env={"RAY_AUTH_MODE": "token"})
    assert let_in.code == 0, let_in


def test_the_ports_that_answer_without_the_token_are_the_three_that_are_named(cluster: LabCluster) -> None:
    head, worker = cluster.head, cluster.workers[0]
    listening = {
        int(line.split()[3].rpartition(":")[2])
        for line in head.check("ss", "-Hltn").splitlines()
        if not line.split()[3].startswith(("127.", "[::1]"))
    }
    open_ports = {
        port for port in listening if cluster.http_status(worker, f"http://{head.ip}:{port}/metrics") == "200"
    }
    assert open_ports == {44217, 44227, 8090}


def test_the_doctor_finds_nothing_wrong_and_tells_those_ports(cluster: LabCluster) -> None:
    write_spec(cluster.lab.client)
    checks = {each["name"]: each for each in tune(cluster, "check", str(HOME / "inputs/films.yaml"))["checks"]}
    assert [check for check in checks.values() if not check["ok"]] == []
    assert "2 ranks by gloo" in checks["all-reduce"]["found"]
    metrics = checks["ports"]["found"].partition("tell Ray's metrics: ")[2]
    assert {44217, 44227, 8090} == {int(port) for port in re.findall(r":(\d+) \(", metrics.partition(" speak ")[0])}
    reached = checks["reach"]["found"]
    assert reached.startswith("from here, over a private network") and f":{DASHBOARD_PORT} " not in reached


def test_a_trial_takes_both_machines_and_goes_on_when_one_of_them_comes_back(cluster: LabCluster) -> None:
    write_spec(cluster.lab.client)
    submitted = tune(cluster, "submit", str(HOME / "inputs/films.yaml"))
    assert submitted["study"] == "films"
    wait_for_report_after(cluster, 0, timeout_s=300)  # the next epoch has just begun
    for worker in cluster.workers:
        assert sum(is_rank(line) for line in worker.processes()) == 1, worker.processes()
    cluster.workers[1].power_off()
    before = num_reports(cluster)
    cluster.lab.boot(cluster.workers[1])
    wait_for_report_after(cluster, before, timeout_s=420)
    assert tune(cluster, "status", "films")["trials"][0]["restarts"] >= 1


def test_a_trial_goes_on_when_a_cable_was_out(cluster: LabCluster) -> None:
    worker = cluster.workers[0]
    restarts = sum(trial["restarts"] for trial in tune(cluster, "status", "films")["trials"])
    cluster.lab.pull_cable(worker)
    wait_until(lambda: worker.ip not in cluster.alive(), 240, "the machine without a cable to be missed")
    before = num_reports(cluster)
    cluster.lab.plug_in(worker)
    wait_for_report_after(cluster, before, timeout_s=420)
    assert sum(trial["restarts"] for trial in tune(cluster, "status", "films")["trials"]) > restarts


def test_a_study_goes_on_after_its_head_was_lost_and_brought_up_again(cluster: LabCluster) -> None:
    cluster.head.power_off()
    cluster.lab.boot(cluster.head)
    cluster.up()
    cluster.wait_for_nodes(*(host.ip for host in cluster.lab.hosts))
    assert tune(cluster, "status", "films")["state"] == "interrupted"
    status = tune(cluster, "resume", "films", timeout_s=600)
    assert status["state"] == "completed"
    for trial in status["trials"]:
        assert trial["state"] == "completed"
        assert [report["epoch"] for report in trial["reports"]] == list(range(1, NUM_EPOCHS + 1))


def test_the_best_model_comes_back_and_scores_what_the_study_says(cluster: LabCluster) -> None:
    best = tune(cluster, "best", "films", "--out", str(HOME / "best"))
    model, data = str(HOME / "best/model"), str(HOME / "inputs/data")
    score = cluster.lab.client.check("python", "-m", "trainables.score", model, data, "sentence1", "sentence2")
    assert float(score) == pytest.approx(best["value"], abs=1e-6)


def test_ray_down_leaves_nothing_running(cluster: LabCluster) -> None:
    cluster.down()
    assert cluster.leftovers(within_s=150) == []
