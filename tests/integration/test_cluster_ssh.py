"""A cluster of three machines that one can ssh to, from nothing to the best model and down again, with their failures.

The tests of this file share one cluster and run in the order in which they stand.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster_lab import DASHBOARD_PORT, FILE, LabCluster
from lab import KEY, SHARED, Lab, require_lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabCluster]:
    require_lab()
    with Lab(tmp_path_factory.mktemp("lab") / "ssh", num_hosts=3) as lab:
        found = LabCluster(lab)
        hosts = ",".join(host.ip for host in lab.hosts)
        found.init(
            *("--provider", "local", "--hosts", hosts, "--ssh-user", "root", "--ssh-key", str(KEY)),
            *("--storage", str(SHARED / "studies")),
        )
        found.up()
        found.wait_for_nodes(*(host.ip for host in lab.hosts))
        yield found


def test_the_check_passes_the_file_that_ray_took(cluster: LabCluster) -> None:
    cluster.lab.client.check("tune-service", "cluster", "check", str(FILE))


def test_the_token_lies_on_every_node_and_only_its_owner_can_read_it(cluster: LabCluster) -> None:
    token = cluster.lab.client.check("cat", "/tmp/home/.ray/auth_token")
    for machine in (cluster.lab.client, *cluster.lab.hosts):
        assert machine.check("cat", "/tmp/home/.ray/auth_token") == token
        assert machine.check("stat", "-c", "%a", "/tmp/home/.ray/auth_token") == "600\n"


def test_nobody_gets_in_without_the_token(cluster: LabCluster) -> None:
    client, head = cluster.lab.client, cluster.head
    token = client.check("cat", "/tmp/home/.ray/auth_token")
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


def test_ray_down_leaves_nothing_running(cluster: LabCluster) -> None:
    cluster.down()
    assert cluster.leftovers(within_s=150) == []
