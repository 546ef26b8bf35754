"""One template of a cluster file for Ray's cluster launcher. What differs between the providers is data."""

from __future__ import annotations

import os
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CHANGE_ME = "CHANGE-ME"
"""Stands where only the user knows the value; `cluster check` refuses it."""

HEAD_FOLDER = "$HOME/studies"
"""Where studies lie: on the head's own disk."""


class _Text(string.Template):
    delimiter = "@"  # a dollar belongs to the shell


_TEMPLATE = _Text("""\
# @headline
# Written by `tune-service cluster init --provider @provider`. `tune-service cluster check FILE` finds what Ray would
# silently ignore. Ray reads relative paths from the folder in which `ray up` is called: the checkout.
#
# Before `ray up`, make the token that every node and every client of this cluster must show, readable by you alone:
#   (umask 077; ray get-auth-token --generate >/dev/null); export RAY_AUTH_MODE=token

cluster_name: @name
max_workers: @max_workers
idle_timeout_minutes: @idle_timeout_minutes

@settings
file_mounts:
  # This source and its pins, so that head, workers and your machine run the same versions.
@{mounts}\
  # A copy keeps its mode, 600. Ray looks for it there.
  ~/.ray/auth_token: ~/.ray/auth_token
  # For private models and data of the hub, after `hf auth login` on your machine: the file reaches every rank, and no
  # command, job or page shows it.
  # ~/.cache/huggingface/token: ~/.cache/huggingface/token
rsync_exclude: [__pycache__]

setup_commands:
  - chmod 600 ~/.ray/auth_token
@prerequisites\
  # The packages of requirements.lock, compiled to bytecode. A torch build for CUDA also runs on the head's CPU.
  - cd ~/tune-service && make install@make_flags
  - >-
    printf 'export %s\\n' 'PATH=$HOME/tune-service/.venv/bin:$PATH' RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1 'TUNE_SERVICE_STORAGE=@storage' > ~/tune-service/env.sh;
    grep -qs tune-service/env.sh ~/.bashrc || echo '. ~/tune-service/env.sh' >> ~/.bashrc
head_setup_commands:@head_setup

# The token guards Ray's own ports, not its metrics (44217, 44227 and 8090): no firewall may open those.
# The dashboard, which is also the way to submit studies, listens on loopback: clients reach it through ssh.
# Ray's ssh sets OMP_NUM_THREADS=1, which would leave a rank one thread however many CPUs it was given.
head_start_ray_commands:
  - ray stop
  - >-
    ulimit -n 65536; unset OMP_NUM_THREADS; RAY_AUTH_MODE=token AUTOSCALER_METRIC_PORT=44217 DASHBOARD_METRIC_PORT=44227
    @{autoscaler}ray start --head @{node_ip}--port=6379 --object-manager-port=8076 --metrics-export-port=8090
    --dashboard-host=127.0.0.1 --dashboard-port=8265 --num-cpus=0 --num-gpus=0 --resources='{"study_head": 1000}'
    --autoscaling-config=~/ray_bootstrap_config.yaml
worker_start_ray_commands:
  - ray stop
  - >-
    ulimit -n 65536; unset OMP_NUM_THREADS; RAY_AUTH_MODE=token
    ray start --address=$RAY_HEAD_IP:6379 --object-manager-port=8076 --metrics-export-port=8090
@after_worker_start""")

MOUNTED = ("Makefile", "pyproject.toml", "requirements.lock", "search_spaces", "trainables", "tune_service")
"""What `make install` needs of the checkout. Ray reads all of what it mounts, so `.venv` must not be among it."""

_UBUNTU = """\
  # Another apt may be at work just after the first boot.
  - sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
  - sudo apt-get -o DPkg::Lock::Timeout=600 -qq -y install make python3.12-venv
"""

_AWS = _Text("""\
provider:
  type: aws
  region: @region
  cache_stopped_nodes: false   # terminate idle workers; Ray's default stops them, and their disks go on costing
  security_group:
    GroupName: @name   # all traffic inside the group, ssh from outside, nothing else
auth:
  ssh_user: ubuntu

head_node_type: head
available_node_types:
  head:
    resources: {CPU: 0, study_head: 1000}   # no trials, only their supervisors
    node_config:
      InstanceType: @head_type
      ImageId: &image @image
      BlockDeviceMappings: &disk
        - DeviceName: /dev/sda1
          Ebs: {VolumeSize: 150, VolumeType: gp3, Encrypted: true}
      MetadataOptions: &metadata {HttpTokens: required}
  # One GPU shape: with two, Ray prefers the one that a request fills better, whatever its price. The on-demand twin is
  # taken while a spot request has just failed.
  gpu_spot:
    min_workers: 0
    max_workers: @max_workers
    priority: 10
    resources: {CPU: @cpus, GPU: @gpus}
    node_config:
      InstanceType: @worker_type
      ImageId: *image
      BlockDeviceMappings: *disk
      MetadataOptions: *metadata
      InstanceMarketOptions: {MarketType: spot}
  gpu_ondemand:
    min_workers: 0
    max_workers: @max_workers
    priority: 0
    resources: {CPU: @cpus, GPU: @gpus}
    node_config:
      InstanceType: @worker_type
      ImageId: *image
      BlockDeviceMappings: *disk
      MetadataOptions: *metadata
""")

_GCP = _Text("""\
provider:
  type: gcp
  project_id: @project
  region: @region
  availability_zone: @region-@zone
auth:
  ssh_user: ubuntu

head_node_type: head
available_node_types:
  head:
    resources: {CPU: 0, study_head: 1000}   # no trials, only their supervisors
    node_config:
      machineType: @head_type
      disks: &disk
        - boot: true
          autoDelete: true
          type: PERSISTENT
          initializeParams:
            diskSizeGb: 150
            sourceImage: @image
  # One GPU shape: with two, Ray prefers the one that a request fills better, whatever its price. The on-demand twin is
  # taken while a spot request has just failed.
  gpu_spot:
    min_workers: 0
    max_workers: @max_workers
    priority: 10
    resources: {CPU: @cpus, GPU: @gpus}
    node_config:
      machineType: @worker_type
      disks: *disk
      scheduling: {provisioningModel: SPOT, instanceTerminationAction: DELETE, onHostMaintenance: TERMINATE}
  gpu_ondemand:
    min_workers: 0
    max_workers: @max_workers
    priority: 0
    resources: {CPU: @cpus, GPU: @gpus}
    node_config:
      machineType: @worker_type
      disks: *disk
      scheduling: {onHostMaintenance: TERMINATE}   # a machine with a GPU cannot move
""")

_LOCAL = _Text("""\
# These hosts must be for this cluster alone: Ray starts with `ray stop`, which ends every Ray of the same user. And
# `ray down` stops the head; the workers' Ray ends by itself a minute later. Without `--num-cpus=0 --num-gpus=0` below
# the head takes trials too.
provider:
  type: local
  head_ip: @head_ip
  worker_ips: [@worker_ips]
auth:
  ssh_user: @ssh_user
  # Ray copies it to the head, which reaches the workers with it: make one for this cluster alone.
  ssh_private_key: @ssh_key
""")


@dataclass(frozen=True)
class Provider:
    """What one provider fills into the template, and what its options are when they are not given."""

    headline: str
    settings: string.Template
    defaults: Mapping[str, Any]
    worker_types: Mapping[str, tuple[int, int]]
    """Machine type -> its CPUs and GPUs."""
    prerequisites: str = _UBUNTU
    after_worker_start: str = ""
    autoscaler: str = ""
    """What the head's autoscaler is told in the environment."""


PROVIDERS = {
    "aws": Provider(
        "A tuning cluster on AWS: a small head that runs no trials; GPU workers that come and go with demand.",
        _AWS,
        {
            "region": "us-west-2",
            "head_type": "m6i.xlarge",
            "worker_type": "g5.2xlarge",
            "image": CHANGE_ME,
            "storage": HEAD_FOLDER,
            "max_workers": 4,
        },
        {
            "g4dn.xlarge": (4, 1),
            "g4dn.2xlarge": (8, 1),
            "g5.xlarge": (4, 1),
            "g5.2xlarge": (8, 1),
            "g5.12xlarge": (48, 4),
            "g6.xlarge": (4, 1),
            "g6.2xlarge": (8, 1),
            "g6.12xlarge": (48, 4),
            "g6e.2xlarge": (8, 1),
            "p4d.24xlarge": (96, 8),
            "p5.48xlarge": (192, 8),
        },
    ),
    "gcp": Provider(
        "A tuning cluster on GCP: a small head that runs no trials; GPU workers that come and go with demand.",
        _GCP,
        {
            "region": "us-central1",
            "zone": "a",
            "project": CHANGE_ME,
            "head_type": "n2-standard-4",
            "worker_type": "g2-standard-8",
            "image": "projects/ubuntu-os-accelerator-images/global/images/"
            "ubuntu-accelerator-2404-amd64-with-nvidia-580-v20260225",
            "storage": HEAD_FOLDER,
            "max_workers": 4,
        },
        {
            "g2-standard-4": (4, 1),
            "g2-standard-8": (8, 1),
            "g2-standard-48": (48, 4),
            "a2-highgpu-1g": (12, 1),
            "a2-highgpu-8g": (96, 8),
            "a3-highgpu-1g": (26, 1),
            "a3-highgpu-8g": (208, 8),
        },
    ),
    "local": Provider(
        "A tuning cluster of hosts that one can ssh to: the head runs no trials.",
        _LOCAL,
        {"ssh_user": os.environ.get("USER") or "root", "ssh_key": "~/.ssh/id_ed25519", "storage": HEAD_FOLDER},
        {},
        prerequisites="",
        after_worker_start="""\
  # After `ray down` a worker's raylet ends by itself; what Ray would then leave behind ends with it.
  - >-
    setsid -f sh -c 'tail --pid=$(pgrep -nx raylet) -f /dev/null; pkill -f ray/_private/log_monitor.py'
    >/dev/null 2>&1 </dev/null
""",
        # Ray's autoscaler v2 counts the head of such a cluster among its workers and never starts the last of them.
        autoscaler="RAY_enable_autoscaler_v2=0 ",
    ),
}


def render(provider: str, values: Mapping[str, Any]) -> str:
    """The file's text. `values` holds everything that the template and the provider's part name."""
    kind = PROVIDERS[provider]
    filled = {
        **values,
        "provider": provider,
        "headline": kind.headline,
        "prerequisites": kind.prerequisites,
        "after_worker_start": kind.after_worker_start,
        "autoscaler": kind.autoscaler,
    }
    return _TEMPLATE.substitute(filled, settings=kind.settings.substitute(filled))
