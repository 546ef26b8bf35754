"""Cluster files: what is written, what is refused, and that the one in this repository is what is written."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainables.errors import UserError
from tune_service.cluster_check import check_cluster_file
from tune_service.cluster_init import CHECKOUT, init_cluster
from tune_service.errors import OutputNotEmptyError, SpecError

ROOT = Path(__file__).resolve().parents[1]
COMPLETE = {
    "aws": {"image": "ami-0123456789abcdef0"},
    "gcp": {"project": "my-project"},
    "local": {"hosts": "10.0.0.10,10.0.0.11,10.0.0.12"},
}
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a token that only its owner can read."""
    folder = tmp_path / "home"
    token = folder / ".ray/auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("a" * 64)
    token.chmod(0o600)
    (folder / ".ssh").mkdir()
    (folder / ".ssh/id_ed25519").touch()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def written(folder: Path, provider: str, **options: Any) -> Path:
    out = folder / f"{provider}-{len(list(folder.iterdir()))}.yaml"
    init_cluster(provider, out, "tune-service", COMPLETE[provider] | options)
    return out


def faults(path: Path) -> dict[str, str]:
    """Key -> what would be right, for everything that the check refuses."""
    try:
        check_cluster_file(path)
    except SpecError as error:
        return {problem.place.partition(" ")[2]: problem.expected for problem in error.problems}
    return {}


def faults_after(folder: Path, provider: str, change: Change) -> dict[str, str]:
    """The same, for a sound file that was changed."""
    path = written(folder, provider)
    file = copy.deepcopy(yaml.safe_load(path.read_text()))  # without anchors
    change(file)
    path.write_text(yaml.safe_dump(file))
    return faults(path)


def refused(provider: str, **options: Any) -> dict[str, str]:
    """Option -> what would be right, for everything that `cluster init` refuses."""
    with pytest.raises(SpecError) as refusal:
        init_cluster(provider, Path("/nowhere/cluster.yaml"), options.pop("name", "tune-service"), options)
    return {problem.place: problem.expected for problem in refusal.value.problems}


# What is written


def test_the_file_in_this_repository_is_what_init_writes_for_aws(tmp_path: Path) -> None:
    init_cluster("aws", tmp_path / "cluster.yaml", "tune-service", {})
    # Outside of the checkout, its files are named by their full path.
    text = (tmp_path / "cluster.yaml").read_text().replace(f": {CHECKOUT}/", ": ")
    assert text == (ROOT / "cluster.yaml").read_text()


@pytest.mark.parametrize("provider", COMPLETE)
def test_ray_and_the_check_accept_what_is_written(provider: str, tmp_path: Path) -> None:
    assert faults(written(tmp_path, provider)) == {}


def test_what_only_the_user_knows_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = faults(ROOT / "cluster.yaml")
    assert list(found) == ["available_node_types.head.node_config.ImageId"]
    assert "aws ssm get-parameter" in found["available_node_types.head.node_config.ImageId"]


def test_the_head_runs_no_trials_and_gpu_workers_of_one_shape_come_and_go(tmp_path: Path) -> None:
    file = yaml.safe_load(written(tmp_path, "aws", worker_type="g6.12xlarge", max_workers=3).read_text())
    types = file["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0, "study_head": 1000}
    assert file["head_node_type"] == "head"
    assert {name: kind["resources"] for name, kind in types.items() if name != "head"} == {
        "gpu_spot": {"CPU": 48, "GPU": 4},
        "gpu_ondemand": {"CPU": 48, "GPU": 4},
    }
    assert all((kind.get("min_workers", 0), kind.get("max_workers", 3)) == (0, 3) for kind in types.values())
    assert types["gpu_spot"]["priority"] > types["gpu_ondemand"]["priority"]
    spot = types["gpu_spot"]["node_config"].pop("InstanceMarketOptions")
    assert spot == {"MarketType": "spot"}
    assert types["gpu_spot"]["node_config"] == types["gpu_ondemand"]["node_config"]
    assert (file["max_workers"], file["idle_timeout_minutes"]) == (3, 10)


@pytest.mark.parametrize("provider", COMPLETE)
def test_every_start_of_ray_says_token_and_the_dashboard_is_on_loopback(provider: str, tmp_path: Path) -> None:
    file = yaml.safe_load(written(tmp_path, provider).read_text())
    starts = [each for kind in ("head", "worker") for each in file[f"{kind}_start_ray_commands"] if "ray start" in each]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in each for each in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "chmod 600 ~/.ray/auth_token" in file["setup_commands"]


@pytest.mark.parametrize(
    ("provider", "options", "storage"),
    [
        ("aws", {}, "HOME/studies"),
        ("gcp", {}, "HOME/studies"),
        ("local", {}, "HOME/studies"),
        ("aws", {"storage": "/nfs/studies"}, "/nfs/studies"),
        ("aws", {"bucket": "my-studies"}, "s3://my-studies/studies"),
        ("gcp", {"bucket": "my-studies"}, "gs://my-studies/studies"),
        ("local", {"storage": "s3://my-studies/mine"}, "s3://my-studies/mine"),
    ],
)
def test_the_nodes_know_the_storage_and_where_their_packages_are(
    provider: str, options: dict[str, str], storage: str, tmp_path: Path
) -> None:
    file = yaml.safe_load(written(tmp_path, provider, **options).read_text())
    (line,) = (each for each in file["setup_commands"] if "env.sh" in each)
    home = tmp_path / "node"
    (home / "tune-service").mkdir(parents=True)
    for _ in range(2):  # the second time changes nothing
        subprocess.run(["bash", "-c", line], env={"HOME": str(home), "PATH": "/usr/bin:/bin"}, check=True)
    assert (home / ".bashrc").read_text() == ". ~/tune-service/env.sh\n"
    shown = subprocess.run(
        ["bash", "-c", ". ~/.bashrc; echo $TUNE_SERVICE_STORAGE $RAY_AUTH_MODE $PATH"],
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    packages = f"{home}/tune-service/.venv/bin:/usr/bin:/bin"
    assert shown.stdout.split() == [storage.replace("HOME", str(home)), "token", packages]


def test_what_is_mounted_is_all_that_make_install_needs(tmp_path: Path) -> None:
    mounts = yaml.safe_load(written(tmp_path, "local").read_text())["file_mounts"]
    node = tmp_path / "node"
    for remote, local in mounts.items():
        place = node / remote.removeprefix("~/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(Path(local).expanduser())
    plan = subprocess.run(
        ["make", "--dry-run", "install"], cwd=node / "tune-service", capture_output=True, text=True, check=False
    )
    assert plan.returncode == 0, plan.stderr
    assert "requirements.lock" in plan.stdout


def test_ssh_is_narrowed_on_the_head_itself(tmp_path: Path) -> None:
    file = yaml.safe_load(written(tmp_path, "aws", ssh_from="203.0.113.7/32").read_text())
    assert file["head_setup_commands"] == [
        "tune-service cluster firewall ~/ray_bootstrap_config.yaml --ssh-from 203.0.113.7/32"
    ]


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    path = written(tmp_path, "local")
    before = path.read_text()
    with pytest.raises(OutputNotEmptyError):
        init_cluster("local", path, "tune-service", {"hosts": "10.0.0.1,10.0.0.2"})
    assert path.read_text() == before


# What init refuses


def test_options_of_another_provider_are_refused() -> None:
    found = refused("local", hosts="a,b", region="us-west-2", max_workers=3)
    assert found == {"--region": "aws, gcp", "--max-workers": "as many --hosts as there shall be"}
    assert list(refused("aws", hosts="a,b", project="my-project")) == ["--hosts", "--project"]
    assert "gcloud compute firewall-rules" in refused("gcp", ssh_from="203.0.113.7/32")["--ssh-from"]


def test_a_value_that_cannot_be_right_is_refused_with_all_others() -> None:
    found = refused(
        "aws",
        name="My Cluster",
        region="us west 2",
        bucket="My Studies",
        storage="studies",
        image="ubuntu",
        worker_type="t3.micro",
        max_workers=0,
        ssh_from="203.0.113.7/8",
    )
    assert list(found) == [
        *("--name", "--region", "--bucket", "--storage", "--image", "--worker-type", "--max-workers", "--ssh-from"),
    ]
    assert found["--bucket"] == "one of the two"
    assert found["--worker-type"].startswith("one of g4dn.xlarge, ")


def test_a_bucket_is_one_of_the_providers_own() -> None:
    assert refused("aws", bucket="s3://my-studies") == {"--bucket": "the bare name of a bucket that exists"}
    assert refused("local", hosts="a,b", bucket="my-studies") == {"--bucket": "--storage s3://BUCKET/FOLDER"}


def test_hosts_are_a_head_and_workers_each_of_them_once() -> None:
    assert refused("local") == {"--hosts": "HEAD,WORKER,WORKER"}
    assert refused("local", hosts="10.0.0.1") == {"--hosts": "HEAD,WORKER,WORKER"}
    assert refused("local", hosts="a,b,a") == {"--hosts": "every host once, the head first"}
    assert list(refused("local", hosts="a,b;reboot")) == ["--hosts"]
    assert refused("azure") == {"--provider": "aws, gcp or local"}


# What the check refuses


def _set(place: str, value: Any) -> Change:
    """Puts a value at a dotted place of a file."""

    def change(file: dict[str, Any]) -> None:
        *around, last = place.split(".")
        for name in around:
            file = file[name]
        file[last] = value

    return change


WORKER = "available_node_types.gpu_spot"


@pytest.mark.parametrize(
    ("provider", "place", "value", "expected"),
    [
        ("aws", "provider.regionn", "us-west-2", "region"),
        ("aws", "provider.security_group.GroupNme", "x", "GroupName"),
        ("aws", f"{WORKER}.node_config.InstanceTyp", "g5.2xlarge", "InstanceType"),
        ("aws", f"{WORKER}.node_config.InstanceMarketOptions.MarketTyp", "spot", "MarketType"),
        ("aws", f"{WORKER}.node_config.InstanceMarketOptions.MarketType", "spott", "spot"),
        ("aws", f"{WORKER}.node_config.KeyName", 7, "text"),
        ("aws", f"{WORKER}.min_worker", 1, "min_workers"),
        ("aws", "min_workers", 1, "min_workers of a node type"),
        ("aws", "idle_timeout_minute", 1, "idle_timeout_minutes"),
        ("gcp", "provider.project", "x", "project_id"),
        ("gcp", f"{WORKER}.node_config.machine_type", "g2-standard-8", "machineType"),
        ("gcp", f"{WORKER}.node_config.scheduling.provisioningModel", "SPOTT", "SPOT"),
        ("local", "provider.workers_ips", [], "worker_ips"),
        ("local", "auth.ssh_usr", "root", "ssh_user"),
    ],
)
def test_a_key_that_ray_would_pass_over_is_refused_with_the_nearest_one(
    provider: str, place: str, value: Any, expected: str, tmp_path: Path
) -> None:
    assert faults_after(tmp_path, provider, _set(place, value)) == {place: expected}


def test_a_typo_deep_in_a_list_is_found(tmp_path: Path) -> None:
    disks = [{"DeviceName": "/dev/sda1", "Ebs": {"VolumSize": 150, "VolumeType": "gp9"}}]
    place = "available_node_types.head.node_config.BlockDeviceMappings"
    found = faults_after(tmp_path, "aws", _set(place, disks))
    assert found == {f"{place}[0].Ebs.VolumSize": "VolumeSize", f"{place}[0].Ebs.VolumeType": "gp3"}


def test_what_ray_itself_refuses_is_told_in_the_same_way(tmp_path: Path) -> None:
    assert list(faults_after(tmp_path, "aws", _set("head_node_type", "heda"))) == [""]
    assert list(faults_after(tmp_path, "aws", _set("available_node_types.head.resources", {"CPU": 0.5}))) == [
        "available_node_types.head.resources.CPU"
    ]
    assert len(faults_after(tmp_path, "local", _set("available_node_types", {"x": {}}))) == 1


def test_an_image_or_packages_of_rays_own_choice_are_refused(tmp_path: Path) -> None:
    def change(file: dict[str, Any]) -> None:
        del file["setup_commands"]
        del file["available_node_types"]["gpu_spot"]["node_config"]["ImageId"]

    assert list(faults_after(tmp_path, "aws", change)) == ["setup_commands", f"{WORKER}.node_config"]


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_a_start_without_the_token_is_refused(kind: str, tmp_path: Path) -> None:
    key = f"{kind}_start_ray_commands"
    assert list(faults_after(tmp_path, "local", _set(key, ["ray stop", "ray start"]))) == [f"{key}[1]"]
    assert list(faults_after(tmp_path, "local", lambda file: file.pop(key))) == [key]


def test_a_dashboard_for_everybody_is_refused(tmp_path: Path) -> None:
    for host in ("--dashboard-host=0.0.0.0", "--dashboard-host 0.0.0.0"):
        command = f"RAY_AUTH_MODE=token ray start --head {host} --port=6379"
        found = faults_after(tmp_path, "local", _set("head_start_ray_commands", [command]))
        assert found == {"head_start_ray_commands[0]": "--dashboard-host=127.0.0.1"}


def test_a_port_open_to_the_world_is_refused_unless_it_is_ssh(tmp_path: Path) -> None:
    def rule(port: int, cidr: str) -> dict[str, Any]:
        return {"IpProtocol": "tcp", "FromPort": port, "ToPort": port, "IpRanges": [{"CidrIp": cidr}]}

    rules = [rule(22, "0.0.0.0/0"), rule(8265, "0.0.0.0/0"), rule(8265, "203.0.113.0/24")]
    place = "provider.security_group.IpPermissions"
    assert list(faults_after(tmp_path, "aws", _set(place, rules))) == [f"{place}[1]"]


def test_a_token_that_others_can_read_is_refused(home: Path, tmp_path: Path) -> None:
    token = home / ".ray/auth_token"
    token.chmod(0o644)
    path = written(tmp_path, "local")
    assert faults(path) == {"file_mounts.~/.ray/auth_token": "chmod 600 ~/.ray/auth_token"}
    token.unlink()
    assert "ray get-auth-token --generate" in faults(path)["file_mounts.~/.ray/auth_token"]


def test_a_key_that_is_not_there_is_refused(home: Path, tmp_path: Path) -> None:
    path = written(tmp_path, "local")
    (home / ".ssh/id_ed25519").unlink()
    assert faults(path) == {"auth.ssh_private_key": "ssh-keygen -t ed25519 -f ~/.ssh/id_ed25519"}


def test_a_fault_has_its_line_and_a_key_written_twice_is_one(tmp_path: Path) -> None:
    path = written(tmp_path, "local")
    lines = path.read_text().splitlines()
    number = lines.index("max_workers: 2") + 1
    path.write_text("\n".join([*lines[:number], "max_workers: 3", *lines[number:]]))
    with pytest.raises(SpecError, match=f"^{path}:{number + 1} max_workers: a key stands once"):
        check_cluster_file(path)


@pytest.mark.parametrize(
    "text", ["", "- a", "provider: aws", "provider: {type: azure}", "provider: {type: [aws]}", "a: ["]
)
def test_a_file_of_another_kind_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        check_cluster_file(path)
    with pytest.raises(UserError):
        check_cluster_file(tmp_path / "missing.yaml")


# The commands


def program(*arguments: str, folder: Path) -> tuple[int, Any, str]:
    command = [sys.executable, "-m", "tune_service.cli", "cluster", *arguments]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout, run.stderr


def test_the_commands_print_one_document_and_end_with_the_code_of_their_outcome(tmp_path: Path) -> None:
    init = ("init", "--provider", "local", "--hosts", "10.0.0.10,10.0.0.11", "--json")
    code, out, err = program(*init, folder=tmp_path)
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert (document["path"], document["provider"]) == (str(tmp_path / "cluster.yaml"), "local")
    assert "ray up -y cluster.yaml" in document["next"]
    code, out, _ = program(*init, folder=tmp_path)
    assert (code, json.loads(out)["error"]["place"]) == (2, "cluster.yaml")
    code, out, err = program("check", "cluster.yaml", "--json", folder=tmp_path)
    assert (code, json.loads(out), err) == (0, {"file": "cluster.yaml", "ok": True}, "")
    (tmp_path / "cluster.yaml").write_text((tmp_path / "cluster.yaml").read_text().replace("head_ip", "head-ip"))
    code, out, _ = program("check", "cluster.yaml", "--json", folder=tmp_path)
    (problem,) = json.loads(out)["errors"]
    assert (code, problem["expected"]) == (2, "head_ip")
