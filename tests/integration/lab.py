"""A few machines on one: Linux namespaces, each with its own processes, network, /tmp, home, name and sshd.

One of them is the user's own machine: it holds the cable of every other, and nothing in a lab has a way out. What
`ray stop` sees on a machine is that machine's alone. All namespaces end with the process that made them, however that
ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from debian import install
from program import ROOT, Run, wait_until

HOME = Path("/tmp/home")
"""The home of root on every machine."""
KEY = Path("/tmp/etc/key")
"""The private key, on the user's machine, that every machine lets in."""
SHARED = Path("/tmp/shared")
"""The one folder that all machines share."""
_PACKAGES = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync", "curl": "curl"}
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NETWORK = "10.77.0"


def require_lab() -> None:
    """Skips the test where namespaces cannot be made or the programs cannot be had."""
    if os.geteuid() != 0:
        pytest.skip("a lab of machines needs root, to make namespaces")
    missing = [package for name, package in _PACKAGES.items() if not shutil.which(name, path=_SYSTEM_PATH)]
    if missing and (why_not := install(*missing)) is not None:
        pytest.skip(f"a lab of machines: {why_not}")
    probe = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--mount-proc"]
    run = subprocess.run([*probe, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        pytest.skip(f"a lab of machines needs namespaces, which are refused here: {run.stderr.strip()}")


class Machine:
    """One machine, on once it is booted. Paths of its own /tmp are seen from outside with `outside`."""

    def __init__(self, folder: Path, name: str, ip: str, kept: Sequence[Path]) -> None:
        self.name, self.ip = name, ip
        self._folder, self._kept = folder, kept
        self._process: subprocess.Popen[bytes] | None = None
        etc = self.outside(Path("/tmp/etc"))
        etc.mkdir(parents=True)
        self.outside(HOME / "bin").mkdir(parents=True)
        program = self.outside(HOME / "bin/tune-service")  # of this tree, wherever another one is installed
        program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tune_service.cli "$@"\n')
        program.chmod(0o755)
        self.outside(HOME / ".bashrc").write_text(f"export PATH={HOME}/bin:$PATH\n")
        self.outside(HOME / ".bash_profile").write_text(". ~/.bashrc\n")
        self.environment = {"RAY_USAGE_STATS_ENABLED": "0"}
        for kind in ("host_key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(etc / kind)], check=True)
        (etc / "authorized_keys").touch()
        (etc / "sshd_config").write_text(
            "HostKey /tmp/etc/host_key\nAuthorizedKeysFile /tmp/etc/authorized_keys\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 100\nPidFile none\n"
        )
        passwd = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
        # Also by the name that images of Ubuntu have.
        ours = [f"{name}:x:0:0:{name}:{HOME}:/bin/bash" for name in ("root", "ubuntu")]
        (folder / "passwd").write_text("\n".join([*ours, *passwd, ""]))
        self.name_address(ip)

    def outside(self, path: Path) -> Path:
        """Where a path of this machine's /tmp lies for everybody else."""
        return self._folder / "tmp" / path.relative_to("/tmp")

    def name_address(self, ip: str) -> None:
        """Says by which of its addresses the machine knows itself."""
        (self._folder / "hosts").write_text(f"127.0.0.1 localhost\n{ip} {self.name}\n")

    def admit(self, public_key: str) -> None:
        """Lets the owner of a key log in."""
        with self.outside(Path("/tmp/etc/authorized_keys")).open("a") as file:
            file.write(public_key.strip() + "\n")

    def export(self, environment: dict[str, str]) -> None:
        """Sets variables for every login and for `run`."""
        self.environment |= environment
        with self.outside(HOME / ".bashrc").open("a") as file:
            file.writelines(f"export {name}={value}\n" for name, value in environment.items())

    @property
    def pid(self) -> int:
        """The machine's first process, as everybody else sees it."""
        assert self._process is not None, f"{self.name} is off"
        (child,) = psutil.Process(self._process.pid).children()
        return child.pid

    def boot(self) -> None:
        log = (self._folder / "console.log").open("ab")
        spaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = [str(Path(__file__).with_name("lab_machine.sh")), str(self._folder), self.name, *map(str, self._kept)]
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, *script]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        process = self._process
        wait_until(lambda: len(psutil.Process(process.pid).children()) == 1, 60, f"{self.name} to boot")
        wait_until(self._answers, 60, f"sshd of {self.name}")

    def power_off(self) -> None:
        """As when its plug is pulled: every process is gone at once, the network too."""
        if self._process is not None:
            if self._process.poll() is None:
                psutil.Process(self.pid).kill()
            self._process.wait(20)
            self._process = None

    def run(self, *command: str, timeout_s: float = 60, env: dict[str, str] | None = None) -> Run:
        """Runs a command on this machine, with the environment's programs on its path."""
        return self.start(*command, env=env).wait(timeout_s)

    def check(self, *command: str, timeout_s: float = 60) -> str:
        """What a command on this machine prints; it must succeed."""
        done = self.run(*command, timeout_s=timeout_s)
        assert done.code == 0, f"{' '.join(command)}: exit code {done.code}\n{done.out[-3000:]}\n{done.err[-3000:]}"
        return done.out

    def start(self, *command: str, env: dict[str, str] | None = None) -> Started:
        environment = {
            "HOME": str(HOME),
            "USER": "root",
            "PATH": f"{HOME}/bin:{sys.prefix}/bin:{_SYSTEM_PATH}",
            "PYTHONPATH": str(ROOT),
            **self.environment,
            **(env or {}),
        }
        enter = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p"]
        enter += ["env", "-i", f"--chdir={HOME}"]
        return Started([*enter, *(f"{name}={value}" for name, value in environment.items()), *command])

    def processes(self) -> list[str]:
        """The command lines of all that runs on the machine beside its sshd."""
        try:
            children = psutil.Process(self.pid).children(recursive=True)
        except (psutil.Error, ValueError):
            return []
        found = []
        for child in children:
            try:
                line = " ".join(child.cmdline())
            except psutil.Error:
                continue
            if line and not line.startswith("sshd"):
                found.append(line)
        return found

    def _answers(self) -> bool:
        enter = ["nsenter", "-t", str(self.pid), "-n", "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/22"]
        return subprocess.run(enter, capture_output=True, check=False).returncode == 0


class Started:
    """A command that runs on a machine."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait(self, timeout_s: float) -> Run:
        try:
            out, err = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, err = self._process.communicate()
            said = f"{out[-3000:]}\n{err[-3000:]}"
            raise AssertionError(f"still running after {timeout_s} s: {self._command[-8:]}\n{said}") from None
        return Run(self._process.returncode, out, err)


class Lab:
    """The user's machine and `num_hosts` others: `hosts[0]` is 10.77.0.10, and so on."""

    def __init__(self, folder: Path, num_hosts: int) -> None:
        (folder / "shared").mkdir(parents=True)
        self.shared = folder / "shared"
        inside_tmp = [path for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix)) if path.is_relative_to("/tmp")]
        self.client = Machine(folder / "client", "client", f"{_NETWORK}.1", inside_tmp)
        self.hosts = [
            Machine(folder / f"host{number}", f"host{number}", f"{_NETWORK}.{10 + number}", inside_tmp)
            for number in range(num_hosts)
        ]
        key = self.client.outside(KEY.with_suffix(".pub")).read_text()
        for host in self.hosts:
            host.admit(key)

    def __enter__(self) -> Lab:
        try:
            self.client.boot()
            for command in ("link add br0 type bridge", f"addr add {self.client.ip}/24 dev br0", "link set br0 up"):
                self.client.check("ip", *command.split())
            for host in self.hosts:
                self.boot(host)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for machine in (*self.hosts, self.client):
            machine.power_off()

    def boot(self, host: Machine) -> None:
        """Switches a host on and plugs its cable in."""
        host.boot()
        port = f"to-{host.name}"
        self.client.check("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0")
        # The other end goes to the host, whose first process is not seen from the client's: it is named from outside.
        netns = str(host.pid)
        enter = ["nsenter", "-t", str(self.client.pid), "-n", "ip", "link", "set", "eth0", "netns", netns]
        subprocess.run(enter, check=True)
        self.client.check("ip", "link", "set", port, "master", "br0", "up")
        for command in (f"addr add {host.ip}/24 dev eth0", "link set eth0 up"):
            host.check("ip", *command.split())

    def pull_cable(self, host: Machine) -> None:
        self.client.check("ip", "link", "set", f"to-{host.name}", "down")

    def plug_in(self, host: Machine) -> None:
        self.client.check("ip", "link", "set", f"to-{host.name}", "up")
