"""The file for AWS, brought up against a stand-in for EC2: what it makes there, and that workers come and go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from cloud import Cloud
from cluster_lab import LabCluster
from lab import Lab, require_lab
from program import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

IMAGE = "ami-03cf127a"
"""Any that the stand-in knows."""
CIDR = "10.77.0.0/24"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    require_lab()
    with Lab(tmp_path_factory.mktemp("lab") / "aws", num_hosts=2) as lab:
        found = Cloud(lab)
        try:
            yield found
        finally:
            found.close()


@pytest.fixture(scope="module")
def cluster(cloud: Cloud) -> LabCluster:
    def change(file: dict[str, Any]) -> None:
        file["idle_timeout_minutes"] = 0.3
        command = file["worker_start_ray_commands"][1]
        file["worker_start_ray_commands"][1] = command.replace("ray start", "ray start --num-gpus=1")

    found = LabCluster(cloud._lab)
    found.init("--provider", "aws", "--bucket", "my-studies", "--image", IMAGE, "--ssh-from", CIDR, change=change)
    found.up()
    return found


def running(cloud: Cloud) -> list[dict[str, Any]]:
    return [each for each in cloud.instances() if each["State"]["Name"] == "running"]


def test_ray_up_makes_the_head_alone_which_is_small_and_on_demand(cloud: Cloud, cluster: LabCluster) -> None:
    (head,) = running(cloud)
    assert (head["InstanceType"], head.get("InstanceLifecycle"), head["ImageId"]) == ("m6i.xlarge", None, IMAGE)
    assert cluster.alive() == {head["PrivateIpAddress"]}


def test_from_outside_only_ssh_is_open_and_only_to_whom_it_was_opened(cloud: Cloud, cluster: LabCluster) -> None:
    (group,) = cloud.ec2("ec2.describe_security_groups(GroupNames=['tune-service'])['SecurityGroups']")
    inside, ssh = sorted(group["IpPermissions"], key=lambda rule: str(rule["IpProtocol"]))
    assert [pair["GroupId"] for pair in inside["UserIdGroupPairs"]] == [group["GroupId"]]
    assert inside["IpRanges"] == []
    assert (ssh["IpProtocol"], ssh["FromPort"], ssh["ToPort"]) == ("tcp", 22, 22)
    assert [each["CidrIp"] for each in ssh["IpRanges"]] == [CIDR]
    for instance in running(cloud):
        assert [each["GroupId"] for each in instance["SecurityGroups"]] == [group["GroupId"]]


def test_a_demand_for_a_gpu_brings_a_spot_worker_which_goes_when_it_is_idle(cloud: Cloud, cluster: LabCluster) -> None:
    code = "import ray; ray.init(); print(ray.get(ray.remote(num_gpus=1)(lambda: 6 * 7).remote()))"
    submit = ("ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--", "python", "-c", code)
    done = cluster.on_head(*submit, timeout_s=240)
    assert done.code == 0 and "\n42\n" in done.out, done
    (worker,) = [each for each in cloud.instances() if each["InstanceType"] == "g5.2xlarge"]
    assert worker["InstanceLifecycle"] == "spot"
    wait_until(lambda: len(running(cloud)) == 1, 120, "the idle worker to be terminated")
    assert running(cloud)[0]["InstanceType"] == "m6i.xlarge"


def test_ray_down_terminates_every_instance(cloud: Cloud, cluster: LabCluster) -> None:
    cluster.down()
    assert running(cloud) == []
