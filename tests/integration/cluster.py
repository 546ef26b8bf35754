"""A Ray cluster of real processes for tests: a head with a token, and workers that do not see its disk."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from free_port import free_port
from program import ROOT, wait_until


class Cluster:
    """One head without CPUs, as the cluster file makes it. Ends all that it started, by its mark."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(environment or {})
        self.folder = Path(tempfile.mkdtemp(prefix="tc-", dir="/tmp"))  # Ray's sockets need a short path
        self.storage = self.folder / "studies"
        self.storage.mkdir()
        self.token = secrets.token_hex(32)
        self._mark = uuid.uuid4().hex
        self._port, dashboard = free_port(), free_port()
        self.url = f"http://127.0.0.1:{dashboard}"
        # A worker in a mount namespace of its own sees neither the studies nor the head's unpacked packages.
        self.is_divided = _run("unshare", "--mount", "true") == 0
        self._start(
            "head",
            f"--head --port={self._port} --dashboard-host=127.0.0.1 --dashboard-port={dashboard} --num-cpus=0 "
            f"--temp-dir={self.folder / 'ray'}",
            {"study_head": 1000},
        )
        try:
            wait_until(lambda: self.num_nodes() == 1, 120.0, "the head")
        except BaseException:
            self.close()
            raise

    def add_worker(self, cpus: int, path: str = "") -> int:
        """Another node, with modules that come first there. Returns the pid of its first process."""
        before = self.num_nodes()
        pid = self._start("worker", f"--address=127.0.0.1:{self._port} --num-cpus={cpus}", {}, self.is_divided, path)
        log = self.folder / "worker.log"
        wait_until(lambda: self.num_nodes() == before + 1, 180.0, f"a worker; see {log}")
        return pid

    def end_node(self, pid: int) -> None:
        """Power off: all processes of a worker at once."""
        first = psutil.Process(pid)
        for process in [first, *first.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):  # it ended with one before
                process.kill()

    def num_nodes(self) -> int:
        try:
            nodes = self.get("/api/v0/nodes?limit=100")["data"]["result"]["result"]
        except OSError:
            return 0
        return sum(node["state"] == "ALIVE" for node in nodes)

    def actors(self, state: str = "ALIVE") -> list[dict[str, Any]]:
        """What the dashboard lists, but for Ray's own."""
        found = self.get("/api/v0/actors?limit=1000&detail=1")["data"]["result"]["result"]
        return [each for each in found if each["state"] == state and each["class_name"] != "JobSupervisor"]

    def jobs(self) -> dict[str, Any]:
        return {each["submission_id"]: each for each in self.get("/api/jobs/") if each["submission_id"]}

    def get(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def env(self) -> dict[str, str]:
        """What a laptop needs to talk to it."""
        return {"RAY_AUTH_TOKEN": self.token}

    def driver(self, study: str) -> psutil.Process:
        """The process that drives a study."""
        return next(
            each
            for each in self.processes()
            if "tune_service.head" in each.cmdline() and f'"study": "{study}"' in each.cmdline()[-1]
        )

    def processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def close(self) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.processes(), timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(
        self, name: str, options: str, resources: dict[str, int], is_divided: bool = False, path: str = ""
    ) -> int:
        command = (
            f"exec {sys.executable} -m ray.scripts.scripts start {options} --node-ip-address=127.0.0.1 "
            f"--dashboard-agent-listen-port=0 --object-store-memory=100000000 --block "
            f"--resources={shlex.quote(json.dumps(resources))}"
        )
        before: list[str] = []
        if is_divided:
            packages = (self.folder / "ray" / "session_latest").resolve() / "runtime_resources"
            command = f"mount -t tmpfs tmpfs {self.storage} && mount -t tmpfs tmpfs {packages} && {command}"
            before = ["unshare", "--mount", "--propagation", "private"]
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{path}{os.pathsep if path else ''}{ROOT}",
            "RAY_TMPDIR": str(self.folder / "ray"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "TUNE_SERVICE_STORAGE": str(self.storage),
            "TUNE_TEST_MARK": self._mark,
            **self._environment,
        }
        for name_of_one_machine in ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
            environment.pop(name_of_one_machine, None)
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [*before, "sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return process.pid

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get("TUNE_TEST_MARK") == self._mark
        except psutil.Error:
            return False


def _run(*command: str) -> int:
    return subprocess.run(command, capture_output=True, check=False).returncode
