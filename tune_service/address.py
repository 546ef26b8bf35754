"""From what `--address` says to the cluster's dashboard: a URL, or a cluster.yaml and then through an ssh tunnel."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainables.errors import Problem
from tune_service.dashboard import Dashboard, UnreachableError
from tune_service.errors import AddressError, CommandError

DASHBOARD_PORT = 8265
TUNNEL_TIMEOUT_S = 30.0
LOOKUP_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Head:
    """How the head of a cluster is reached with ssh."""

    host: str
    user: str | None
    key: str | None
    proxy_command: str | None
    dashboard_port: int


@contextmanager
def connected(address: str) -> Iterator[Dashboard]:
    """The dashboard at `address`, for as long as the block runs. AddressError when it is no address."""
    if re.match(r"https?://", address):
        yield Dashboard(address, token(), address)
    elif Path(address).is_file():
        head = read_head(Path(address))
        with _tunnel(head, address) as port:
            yield Dashboard(f"http://127.0.0.1:{port}", token(), address, head.host)
    elif re.fullmatch(r"[\w.-]+:\d+", address):
        yield Dashboard(f"http://{address}", token(), address)
    else:
        expected = "http://127.0.0.1:8265, or the cluster.yaml that `ray up` was given"
        raise AddressError(Problem("--address", "is a dashboard's URL or a cluster file", address, expected))


def token() -> str | None:
    """The cluster's token, from where Ray looks for it; None: there is none."""
    if value := os.environ.get("RAY_AUTH_TOKEN"):
        return _one_word("RAY_AUTH_TOKEN", value.strip())
    named = os.environ.get("RAY_AUTH_TOKEN_PATH") or None
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    try:
        text = path.read_text(encoding="ascii").strip()
        return _one_word(str(path), text) if text else None
    except FileNotFoundError:
        if named is None:
            return None
        problem = Problem(
            "RAY_AUTH_TOKEN_PATH", "names a file", f"no file {named}", "the file with the cluster's token"
        )
        raise AddressError(problem) from None
    except (OSError, UnicodeDecodeError) as error:
        raise AddressError(Problem(str(path), "can be read as a token", str(error), "a line of text")) from error


def _one_word(place: str, text: str) -> str:
    if not re.fullmatch(r"[!-~]+", text):
        found = f"{len(text.split())} words in {len(text.splitlines())} lines"  # and not what they are
        raise AddressError(Problem(place, "holds the cluster's token and nothing else", found, "one word"))
    return text


def read_head(path: Path) -> Head:
    """The head that a cluster file names, or that Ray finds with it."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AddressError(Problem(str(path), "is a cluster file of Ray's", str(error), "a cluster.yaml")) from error
    if not isinstance(raw, dict) or not isinstance(raw.get("provider"), dict):
        raise AddressError(Problem(str(path), "is a cluster file of Ray's", "no `provider`", "a cluster.yaml"))
    auth = raw.get("auth") or {}
    key = auth.get("ssh_private_key")
    host = raw["provider"].get("head_ip")
    if not host:
        host, made = _looked_up(path)
        key = key or made
    return Head(
        host=str(host),
        user=auth.get("ssh_user"),
        key=str(Path(key).expanduser()) if key else None,
        proxy_command=auth.get("ssh_proxy_command"),
        dashboard_port=_dashboard_port(raw),
    )


def _dashboard_port(raw: dict[str, Any]) -> int:
    """What the start command of the head says, or Ray's own port."""
    commands = " ".join(str(command) for command in raw.get("head_start_ray_commands") or ())
    found = re.search(r"--dashboard-port[= ](\d+)", commands)
    return int(found[1]) if found else DASHBOARD_PORT


def _looked_up(path: Path) -> tuple[str, str | None]:
    """The head's address where only the cloud knows it, and the key that `ray up` made. In a process of its own."""
    command = [sys.executable, "-m", "tune_service.address", str(path)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=LOOKUP_TIMEOUT_S, check=False)
        if run.returncode == 0 and run.stdout.strip():
            host, key = json.loads(run.stdout.splitlines()[-1])  # what stands before is Ray's
            return host, key
        found = (run.stderr.strip() or run.stdout.strip() or f"exit code {run.returncode}").splitlines()[-1]
    except subprocess.TimeoutExpired:
        found = f"no answer in {LOOKUP_TIMEOUT_S:.0f} s"
    expected = "a cluster that `ray up` has started, and the cloud's credentials here"
    raise CommandError(Problem(str(path), "Ray finds the cluster's head", found, expected))


def _print_head(file: str) -> None:
    """That process: the last line that it prints is [address, path of the key or null]."""
    from ray.autoscaler.sdk import get_head_node_ip

    host = get_head_node_ip(file)
    if not host:
        sys.exit("the head has no address that can be reached")
    print(json.dumps([host, _made_key(yaml.safe_load(Path(file).read_text(encoding="utf-8")))]))


def _made_key(config: dict[str, Any]) -> str | None:
    """The private key that `ray up` made for a cluster whose file names none.

    Ray keeps the file that it completed in a cache, on the machine of that `ray up`. Where it is gone: the first key
    that is there, in the order in which Ray looks for one and makes it. A second cloud account in one region can make
    that the wrong one. None: no such key is here.
    """
    from ray.autoscaler._private import commands, util

    known, commands._NODE_PROVIDERS = commands._NODE_PROVIDERS, {}  # else it makes keys, roles and groups
    try:
        return str(commands._bootstrap_config(config)["auth"]["ssh_private_key"])
    except (NotImplementedError, KeyError):  # not in the cache
        pass
    finally:
        commands._NODE_PROVIDERS = known
    provider, paths = config["provider"], []
    if provider["type"] == "aws":
        from ray.autoscaler._private.aws.config import key_pair

        name = provider.get("key_pair", {}).get("key_name")
        paths = [key_pair(number, provider["region"], name)[1] for number in range(10)]
    elif provider["type"] == "gcp":
        which = (provider["region"], provider["project_id"], config["auth"]["ssh_user"])
        names = [util.generate_ssh_key_name("gcp", number, *which) for number in range(10)]
        paths = [util.generate_ssh_key_paths(each)[1] for each in names]
    return next((path for path in paths if Path(path).exists()), None)


@contextmanager
def _tunnel(head: Head, address: str) -> Iterator[int]:
    """A port of this machine that leads to the head's own dashboard port, which is closed to the world."""
    port = _free_port()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        try:
            # Its input ends with this process, however that ends, and with the input the tunnel. In a session of its
            # own, Ctrl-C in a terminal leaves it open for what is still to be said then.
            process = subprocess.Popen(
                _ssh(head, port), stdin=subprocess.PIPE, stdout=said, stderr=said, start_new_session=True
            )
        except FileNotFoundError as error:
            raise CommandError(Problem("ssh", "is installed", "no program ssh", "an OpenSSH client")) from error
        try:
            end = time.monotonic() + TUNNEL_TIMEOUT_S
            while not _is_open(port):
                if process.poll() is not None or time.monotonic() > end:
                    said.seek(0)
                    lines = said.read().strip().splitlines() or [f"no answer in {TUNNEL_TIMEOUT_S:.0f} s"]
                    expected = (
                        "a head that runs and takes the key of the cluster file's `auth`; "
                        f"of a new head at an old address: `ssh-keygen -R {head.host}`"
                    )
                    rule = f"an ssh tunnel to the head ({head.host}) of {address} opens"
                    raise UnreachableError(Problem("--address", rule, lines[-1], expected))
                time.sleep(0.05)
            yield port
        finally:
            process.terminate()  # it ends what it started for a proxy
            try:
                process.communicate(timeout=2)
            except subprocess.TimeoutExpired:  # it is frozen
                process.kill()
                process.communicate()


def _ssh(head: Head, port: int) -> list[str]:
    known = Path.home() / ".ssh" / "known_hosts"
    known.parent.mkdir(mode=0o700, exist_ok=True)
    command = ["ssh", "-T", "-L", f"127.0.0.1:{port}:127.0.0.1:{head.dashboard_port}"]
    options = {
        "BatchMode": "yes",
        "ExitOnForwardFailure": "yes",
        "StrictHostKeyChecking": "accept-new",  # a head that was seen before must be the same one
        "UserKnownHostsFile": str(known),
        "ConnectTimeout": "15",
        "ServerAliveInterval": "10",
        "ServerAliveCountMax": "3",
        "ControlMaster": "no",  # the tunnel is to end with its call
        "ControlPath": "none",
    }
    if head.proxy_command:
        options["ProxyCommand"] = head.proxy_command
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    if head.key:
        command += ["-i", head.key, "-o", "IdentitiesOnly=yes"]
    return [*command, f"{head.user}@{head.host}" if head.user else head.host, "cat"]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    _print_head(sys.argv[1])
