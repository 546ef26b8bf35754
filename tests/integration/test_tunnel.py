"""A cluster.yaml as the address: an ssh tunnel to the head's loopback, for as long as the call. With a real sshd."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from debian import install
from free_port import free_port
from program import wait_until

from tune_service.address import connected
from tune_service.dashboard import UnreachableError

PIPE = "import os, socket, sys, threading as t; s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n\
def copy(read, write):\n while d := read(65536): write(d)\n os._exit(0)\n\
t.Thread(target=copy, args=(lambda n: os.read(0, n), s.sendall)).start(); copy(s.recv, lambda d: os.write(1, d))"
"""What `nc` does, for ssh's ProxyCommand: a cluster file has no key for ssh's port."""


class Version(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": "of the head"}).encode())

    def log_message(self, *words: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def dashboard_port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Version) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(scope="module")
def sshd_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """An sshd that takes the key `key` of its folder alone."""
    path = "/usr/sbin:/usr/bin"
    is_there = shutil.which("sshd", path=path) and shutil.which("ssh-keygen", path=path)
    why_not = None if is_there else install("openssh-server", "openssh-client")
    program = shutil.which("sshd", path=path)
    if program is None or why_not is not None:
        pytest.skip(f"there is no sshd: {why_not}")
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "key", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "key.pub", folder / "authorized")
    port = free_port()
    Path("/run/sshd").mkdir(exist_ok=True)
    options = {"ListenAddress": f"127.0.0.1:{port}", "HostKey": folder / "host", "PidFile": "none", "UsePAM": "no"}
    options |= {"AuthorizedKeysFile": folder / "authorized", "StrictModes": "no"}
    command = [program, "-D", "-e", "-f", "/dev/null"]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            wait_until(lambda: _is_open(port), 60.0, f"sshd; see {folder / 'log'}")
            Sshd.folder = folder
            yield port
        finally:
            process.kill()


class Sshd:
    folder: Path


def cluster_file(folder: Path, key: str, sshd_port: int, dashboard_port: int) -> str:
    pipe = folder / "pipe.py"
    pipe.write_text(PIPE)
    file = folder / "cluster.yaml"
    document = {
        "cluster_name": "c",
        "provider": {"type": "local", "head_ip": "127.0.0.1"},
        "auth": {
            "ssh_user": getpass.getuser(),
            "ssh_private_key": str(Sshd.folder / key),
            "ssh_proxy_command": f"{sys.executable} {pipe} {sshd_port}",
        },
        "head_start_ray_commands": [f"ray start --head --dashboard-port={dashboard_port}"],
    }
    file.write_text(yaml.safe_dump(document))
    return str(file)


def test_the_tunnel_is_there_for_the_call_and_no_longer(
    sshd_port: int, dashboard_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with connected(cluster_file(tmp_path, "key", sshd_port, dashboard_port)) as dashboard:
        assert dashboard.ray_version() == "of the head"
        assert any(child.name() == "ssh" for child in psutil.Process().children())
    assert not any(child.name() == "ssh" for child in psutil.Process().children())
    with pytest.raises(UnreachableError):
        dashboard.ray_version()


def test_a_head_that_does_not_take_the_key_is_said_in_sshs_words(
    sshd_port: int, dashboard_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with (
        pytest.raises(UnreachableError, match="Permission denied") as caught,
        connected(cluster_file(tmp_path, "other", sshd_port, dashboard_port)),
    ):
        raise AssertionError("a tunnel")
    assert "takes the key" in caught.value.problems[0].expected


def _is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True
