"""A stand-in for AWS, moto, whose instances are the hosts of a lab: who asks it for one can log in there."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from typing import Any

from lab import HOME, SHARED, Lab, Machine, Started
from object_store import install_moto
from program import wait_until

PORT = 5000
_PACKAGES = SHARED / "moto"


class Cloud:
    """Runs on the user's machine of a lab. Instances get hosts in the order in which they are asked for."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._free = list(lab.hosts)
        self.hosts: dict[str, Machine] = {}
        """The host of each instance that ran at some time."""
        install_moto(lab.shared / "moto")
        self.url = f"http://{lab.client.ip}:{PORT}"
        account = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        for machine in (lab.client, *lab.hosts):
            machine.export(account)
        code = f"from moto.server import main; main(['-H', '{lab.client.ip}', '-p', '{PORT}'])"
        environment = {"PYTHONPATH": str(_PACKAGES), "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"}
        log = f'exec python -c "{code}" >{HOME}/moto.log 2>&1'
        self._server: Started = lab.client.start("bash", "-c", log, env=environment)
        wait_until(lambda: lab.client.run("curl", "-s", "-f", self.url).code == 0, 150, "moto")
        lab.client.check("ip", "route", "add", "172.31.0.0/16", "dev", "br0")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._give_hosts, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join(30)

    def instances(self) -> list[dict[str, Any]]:
        """What AWS knows of every instance, terminated ones too."""
        return [
            instance
            for group in self.ec2("ec2.describe_instances()['Reservations']")
            for instance in group["Instances"]
        ]

    def ec2(self, expression: str) -> Any:
        """The value of an expression in which `ec2` is boto3's client."""
        code = (
            f"import boto3, json; ec2 = boto3.client('ec2', 'us-west-2'); print(json.dumps({expression}, default=str))"
        )
        return json.loads(self.lab.client.check("python", "-c", code))

    def _give_hosts(self) -> None:
        """As AWS boots instances: their addresses begin to answer, and let in the key that Ray made for itself."""
        while not self._ended.is_set():
            for pem in self.lab.client.outside(HOME / ".ssh").glob("*.pem"):
                if pem.stat().st_size and not (admitted := pem.with_suffix(".admitted")).exists():
                    public = subprocess.run(
                        ["ssh-keygen", "-y", "-f", str(pem)], capture_output=True, text=True, check=False
                    )
                    if public.returncode == 0:
                        for host in self.lab.hosts:
                            host.admit(public.stdout)
                        admitted.touch()
            for instance in self.instances():
                if instance["State"]["Name"] == "running" and instance["InstanceId"] not in self.hosts:
                    self._give_host(instance)
            time.sleep(0.5)

    def _give_host(self, instance: dict[str, Any]) -> None:
        assert self._free, "more instances were asked for than the lab has hosts"
        host = self._free.pop(0)
        private, public = instance["PrivateIpAddress"], instance["PublicIpAddress"]
        for address in (private, public):
            host.check("ip", "addr", "add", f"{address}/32", "dev", "eth0")
        host.name_address(private)
        host.check("ip", "route", "add", "172.31.0.0/16", "dev", "eth0", "src", private)
        self.lab.client.check("ip", "route", "add", f"{public}/32", "dev", "br0")
        self.hosts[instance["InstanceId"]] = host
