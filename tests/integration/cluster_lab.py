"""A cluster in a lab: the file that `cluster init` writes, changed only where a lab has no package index."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import yaml
from lab import HOME, Lab
from program import Run, wait_until

FILE = HOME / "cluster.yaml"
DASHBOARD_PORT = 8265


class LabCluster:
    """`ray up` and the like, called on the user's machine, and looks at what it made."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.head, self.workers = lab.hosts[0], lab.hosts[1:]

    def init(self, *options: str, change: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Writes the cluster file with the product's command, for machines that share this environment."""
        client = self.lab.client
        client.check("bash", "-c", "umask 077; ray get-auth-token --generate >/dev/null")
        client.check("tune-service", "cluster", "init", *options, "--out", str(FILE))
        place = client.outside(FILE)
        file = yaml.safe_load(place.read_text())
        (install,) = (number for number, each in enumerate(file["setup_commands"]) if "make install" in each)
        file["setup_commands"][install] = f"ln -sfn {sys.prefix} ~/tune-service/.venv"
        file["setup_commands"].append("echo 'export PYTHONPATH=$HOME/tune-service' >> ~/tune-service/env.sh")
        file["setup_commands"] = [each for each in file["setup_commands"] if "apt-get" not in each]
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            start = "ray start --object-store-memory=100000000"
            start += " --num-cpus=1" if key.startswith("worker") else ""
            file[key] = [each.replace("ray start", start) for each in file[key]]
        if change is not None:
            change(file)
        place.write_text(yaml.safe_dump(file, sort_keys=False))

    def up(self, *options: str, timeout_s: float = 300) -> None:
        self.lab.client.check("ray", "up", "-y", "--no-config-cache", *options, str(FILE), timeout_s=timeout_s)

    def down(self) -> None:
        self.lab.client.check("ray", "down", "-y", str(FILE), timeout_s=120)

    def on_head(self, *command: str, timeout_s: float = 60) -> Run:
        """Runs a command on the head with what a login there has: the cluster's packages, storage and token."""
        line = 'cd ~; . ~/tune-service/env.sh; exec "$@"'
        return self.head.run("bash", "-c", line, "bash", *command, timeout_s=timeout_s)

    def alive(self) -> set[str]:
        """The addresses of the nodes that Ray takes for alive."""
        code = (
            "import ray; ray.init(address='auto', logging_level='ERROR', log_to_driver=False); "
            "print('ALIVE', *(node['NodeManagerAddress'] for node in ray.nodes() if node['Alive']))"
        )
        out = self.on_head("python", "-c", code).out
        lines = [line.split()[1:] for line in out.splitlines() if line.startswith("ALIVE")]
        return set(lines[0]) if lines else set()

    def wait_for_nodes(self, *ips: str, timeout_s: float = 300) -> None:
        wait_until(lambda: self.alive() == set(ips), timeout_s, f"exactly {', '.join(ips)} to be alive")

    def leftovers(self, within_s: float) -> list[str]:
        """What runs on the hosts beside sshd, as soon as that is nothing or after a while."""
        end = time.monotonic() + within_s
        while (found := [f"{host.name}: {line}" for host in self.lab.hosts for line in host.processes()]) and (
            time.monotonic() < end
        ):
            time.sleep(0.5)
        return found

    def http_status(self, machine: Any, url: str, *headers: str) -> str:
        """The status that curl gets on a machine: three digits, 000 where nobody answers."""
        options = [option for header in headers for option in ("-H", header)]
        return machine.run("curl", "-s", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", *options, url).out
