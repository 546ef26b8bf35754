"""What is looked at on one node of a cluster. Its source travels there: a node with another version answers too.

So it imports only what every node of a Ray cluster has, and the rest inside the functions that need it.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.metadata
import importlib.util
import ipaddress
import os
import platform
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import grpc
import psutil

PACKAGES = ("ray", "torch", "colossalai", "transformers", "optuna")
OWN_PACKAGES = ("search_spaces", "trainables", "tune_service")
TIMEOUT_S = 3.0
PROBED_S = 30.0
"""How long all ports of a node may take."""
REFUSED, METRICS, OPEN, OTHER, SILENT, UNKNOWN = "refused", "metrics", "open", "other", "silent", "unknown"
"""What a port says to who shows no token: no; Ray's metrics; an answer; something of its own (the connections of a
trial's ranks); nothing, for nobody could connect; nobody has asked."""
_CALLS = (
    "InternalKVGcsService/InternalKVKeys",
    "NodeManagerService/GetNodeStats",
    "CoreWorkerService/GetCoreWorkerStats",
    "RayletDriver/ClusterInfo",
    "ReporterService/HealthCheck",
)
"""One call of each of Ray's services that changes nothing."""


def look(session: str, gcs_address: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """All that is asked of a node. `spec`: what its ranks will open, as plain values."""
    return {
        "versions": versions(),
        "gpus": gpus(),
        "memory_bytes": _memory_bytes(),
        "listening": sorted(listening(session, gcs_address)),
        "problems": problems(spec),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    try:
        from tune_service import __version__
    except ImportError:
        return found | {"tune-service": "not installed"}
    return found | {"tune-service": f"{__version__}, source {source_digest()}"}


def source_digest() -> str:
    """Tells one source of tune-service from another, whatever version both say they are."""
    digest = hashlib.sha256()
    for package in OWN_PACKAGES:
        found = importlib.util.find_spec(package)
        for place in (found.submodule_search_locations or ()) if found else ():
            for path in sorted(Path(place).glob("*.py")):
                digest.update(f"{package}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def gpus() -> list[tuple[str, int]]:
    """(name, MiB) of each, as the driver lists them."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        pairs = (line.rpartition(",") for line in run.stdout.splitlines() if line.strip())
        return [(name.strip(), int(memory)) for name, _, memory in pairs]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def listening(session: str, gcs_address: str) -> Iterator[tuple[str, int, str]]:
    """(address, port, program) of each socket of this Ray on which others can call, loopback left out."""
    names = {each.pid: each.info["name"] for each in _of_ray(session, gcs_address) if each.pid != os.getpid()}
    for each in psutil.net_connections("tcp"):
        if each.status != psutil.CONN_LISTEN or each.pid not in names or not each.laddr:
            continue
        address = ipaddress.ip_address(each.laddr.ip)
        address = getattr(address, "ipv4_mapped", None) or address
        if not address.is_loopback:
            yield str(address), each.laddr.port, names[each.pid]


def probed(ports: Sequence[tuple[str, int]]) -> list[str]:
    """What each port says to who shows no token; UNKNOWN of those that the time was too short for."""
    threads = ThreadPoolExecutor(32)
    asked = [threads.submit(_says, *port) for port in ports]
    in_time, _ = wait(asked, PROBED_S)
    threads.shutdown(wait=False, cancel_futures=True)
    return [each.result() if each in in_time else UNKNOWN for each in asked]


def problems(spec: Mapping[str, Any]) -> list[str]:
    """What keeps a rank here from opening what the study names, in sentences."""
    try:
        from trainables.config import DataConfig, ModelConfig
        from trainables.errors import UserError
        from trainables.model_files import check_model_files
        from trainables.tables import check_reachable
        from tune_service.check import import_trainable

        found: list[object] = []
        if spec["model"] is not None:
            found += check_model_files(ModelConfig(**spec["model"]))
        if spec["data"] is not None:
            found += check_reachable(DataConfig(**spec["data"]))
        if spec["trainable"] is not None:
            try:
                import_trainable(spec["trainable"], Path.cwd())
            except UserError as error:
                found += error.problems
        return [str(each) for each in found]
    except Exception as error:  # of another version anything: a key it does not know, a name it does not have
        text = " ".join(str(error).split())
        return [f"tune-service there is another one, or fails: {type(error).__name__}: {text}"]


def _of_ray(session: str, gcs_address: str) -> list[psutil.Process]:
    """Processes of this cluster on this machine: they name its session or its head, or are children of such a one."""
    processes = list(psutil.process_iter(["cmdline", "name", "ppid"]))
    found = {
        each.pid: each
        for each in processes
        if any(session in word or f"address={gcs_address}" in word for word in each.info["cmdline"] or ())
    }
    children = {each.pid: each for each in processes if each.info["ppid"] in found}  # Ray's workers, of a raylet
    return list((found | children).values())


def _memory_bytes() -> int:
    """Of the machine, or of the container that this is."""
    try:
        from tune_service.machine import this_machine
    except ImportError:  # no tune-service of this version here, as `versions` tells
        return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return this_machine().memory_bytes


def _says(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), timeout=TIMEOUT_S).close()
    except OSError:
        return SILENT
    return _says_http(host, port) or _says_grpc(host, port)


def _says_http(host: str, port: int) -> str | None:
    """None: it speaks no HTTP. Metrics count only where every other path is metrics too: nothing else answers there."""
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/api/jobs/")
        answer = connection.getresponse()
        if answer.status in (401, 403):
            return REFUSED
        is_metrics = answer.status == 200 and answer.read(6) == b"# HELP"
        return METRICS if is_metrics else OPEN
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _says_grpc(host: str, port: int) -> str:
    """Stops at the first service that is there."""
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        for call in _CALLS:
            try:
                channel.unary_unary(f"/ray.rpc.{call}")(b"", timeout=TIMEOUT_S)
            except grpc.RpcError as error:
                code = error.code()
                if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                    return REFUSED
                if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    return OTHER
                if code == grpc.StatusCode.UNIMPLEMENTED:
                    continue
            return OPEN
    return OTHER
