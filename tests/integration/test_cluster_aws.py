"""The file for AWS, brought up against a stand-in for EC2: what it makes there, and that workers come and go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from cloud import Cloud
from cluster_lab import FILE, LabCluster
from lab import HOME, Lab, require_lab
from program import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

IMAGE = "ami-03cf127a"
"""Any that the stand-in knows."""
CIDR = "10.77.0.0/24"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    require_lab()
    # The head, and a worker each for the doctor and for a demand: a host that was given back is not given again.
    with Lab(tmp_path_factory.mktemp("lab") / "aws", num_hosts=3) as lab:
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

    found = LabCluster(cloud.lab)
    found.init("--provider", "aws", "--image", IMAGE, "--ssh-from", CIDR, change=change)
    found.up()
    return found


def running(cloud: Cloud) -> list[dict[str, Any]]:
    return [each for each in cloud.instances() if each["State"]["Name"] == "running"]


def test_ray_up_makes_the_head_alone_which_is_small_and_on_demand(cloud: Cloud, cluster: LabCluster) -> None:
    (head,) = running(cloud)
    assert (head["InstanceType"], head.get("InstanceLifecycle"), head["ImageId"]) == ("m6i.xlarge", None, IMAGE)
    assert cluster.alive() == {head["PrivateIpAddress"]}


def open_to_outside(cloud: Cloud, group_name: str) -> list[tuple[Any, ...]]:
    """(protocol, first port, last port, who) of every rule of a security group that is not for its own members."""
    (group,) = cloud.ec2(f"ec2.describe_security_groups(GroupNames=['{group_name}'])['SecurityGroups']")
    members = [rule for rule in group["IpPermissions"] if rule["UserIdGroupPairs"]]
    assert [pair["GroupId"] for rule in members for pair in rule["UserIdGroupPairs"]] == [group["GroupId"]]
    return [
        (rule["IpProtocol"], rule.get("FromPort"), rule.get("ToPort"), each["CidrIp"])
        for rule in group["IpPermissions"]
        for each in rule["IpRanges"]
    ]


def test_from_outside_only_ssh_is_open_and_only_to_whom_it_was_opened(cloud: Cloud, cluster: LabCluster) -> None:
    assert open_to_outside(cloud, "tune-service") == [("tcp", 22, 22, CIDR)]
    for instance in running(cloud):
        assert [each["GroupName"] for each in instance["SecurityGroups"]] == ["tune-service"]


def test_ssh_is_moved_to_another_address_and_closed_before_ray_up(cloud: Cloud, cluster: LabCluster) -> None:
    client = cluster.lab.client
    other = client.outside(FILE.with_name("other.yaml"))
    other.write_text(client.outside(FILE).read_text().replace(": tune-service", ": other"))
    for file, group in ((FILE, "tune-service"), (FILE.with_name("other.yaml"), "other")):
        for _ in range(2):  # the second time changes nothing
            client.check("tune-service", "cluster", "firewall", str(file), "--ssh-from", "10.77.0.1/32")
        assert open_to_outside(cloud, group) == [("tcp", 22, 22, "10.77.0.1/32")]


def doctor(cluster: LabCluster, *options: str, code: int) -> dict[str, dict[str, Any]]:
    """What `check` says on the head, of a study that needs a GPU."""
    folder = HOME / "check"
    place = cluster.head.outside(folder)
    place.mkdir(exist_ok=True)
    (place / "oven.py").write_text("def bake(context):\n    yield from ()\n")
    spec = "{name: oven, trainable: 'oven:bake', search_space: {x: {choice: [1]}}, objective: {metric: score}}"
    (place / "oven.yaml").write_text(spec)
    command = ("tune-service", "check", str(folder / "oven.yaml"), "--address", "http://127.0.0.1:8265", "--json")
    run = cluster.on_head(*command, *options, timeout_s=600)
    assert run.code == code, run
    return {each["name"]: each for each in run.json["checks"]}


def test_the_doctor_of_a_cluster_without_workers_starts_one_only_when_it_is_told_to(
    cloud: Cloud, cluster: LabCluster
) -> None:
    checks = doctor(cluster, code=0)
    assert checks["resources"]["found"].startswith("no worker node now; at most 4 x (8 CPUs, 1 GPUs)")
    assert checks["step"]["found"] == "not looked at: no worker node is up"
    assert checks["all-reduce"]["advice"].startswith("--start-nodes")
    assert len(cloud.instances()) == 1
    checks = doctor(cluster, "--start-nodes", code=1)
    # The stand-in's machines have no GPU, whatever they offer.
    assert {name for name, check in checks.items() if not check["ok"]} == {"nodes", "all-reduce"}
    assert checks["nodes"]["found"].endswith("offers 1 GPUs, its driver lists 0")
    wait_until(lambda: len(running(cloud)) == 1, 300, "the idle worker to be terminated")


def test_a_demand_for_a_gpu_brings_a_spot_worker_which_goes_when_it_is_idle(cloud: Cloud, cluster: LabCluster) -> None:
    code = "import ray; ray.init(); print(ray.get(ray.remote(num_gpus=1)(lambda: 6 * 7).remote()))"
    submit = ("ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--", "python", "-c", code)
    done = cluster.on_head(*submit, timeout_s=480)
    assert done.code == 0 and "\n42\n" in done.out, done
    workers = [each for each in cloud.instances() if each["InstanceType"] == "g5.2xlarge"]
    assert {worker["InstanceLifecycle"] for worker in workers} == {"spot"}
    wait_until(lambda: len(running(cloud)) == 1, 300, "the idle worker to be terminated")
    assert running(cloud)[0]["InstanceType"] == "m6i.xlarge"


def test_ray_down_terminates_every_instance(cloud: Cloud, cluster: LabCluster) -> None:
    cluster.down()
    assert running(cloud) == []
