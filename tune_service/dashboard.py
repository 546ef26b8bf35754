"""The dashboard of a Ray cluster over plain HTTP: jobs, packages, files beside the head's logs. No Ray in this process.

Only documented paths of the Jobs and State APIs are used, and the one that Ray's own client uploads a package with.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trainables.errors import Problem
from tune_service.errors import CommandError

TIMEOUT_S = 30.0
PATIENCE_S = 45.0
"""How long a connection may be broken before a command gives up on it. The study does not notice."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
MAX_PACKAGE_BYTES = 100 * 1024**2
"""The largest request that a Ray dashboard takes (its DASHBOARD_CLIENT_MAX_SIZE)."""

Answer = TypeVar("Answer")


class DashboardError(CommandError):
    """The dashboard said no: the request as such was answered."""

    def __init__(self, problem: Problem, status: int) -> None:
        super().__init__(problem)
        self.status = status


class UnreachableError(CommandError):
    """Nobody answered, or the connection broke."""


@dataclass(frozen=True)
class Job:
    """A job as the dashboard lists it."""

    id: str
    status: str
    message: str
    metadata: dict[str, str]
    node_id: str | None
    """Of the node that its entrypoint runs on."""
    started_s: float
    ended_s: float | None
    """By the head's clock; None: it has not ended."""

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


class Dashboard:
    """One cluster's dashboard. `address` is what the user wrote, for messages."""

    def __init__(self, url: str, token: str | None, address: str, host: str | None = None) -> None:
        """`host`: the head's address, where the URL leads through a tunnel."""
        self._url = url.rstrip("/")
        self._token = token
        self.address = address
        named = urllib.parse.urlsplit(url).hostname or ""
        is_loopback = named in ("localhost", "127.0.0.1", "::1")
        self.host = host or (None if is_loopback else named)
        """The head's address as this machine knows it; None: nothing but a port of its own loopback is known."""
        # A proxy that the environment names leads to the world outside, not to this machine's own ports.
        proxies: dict[str, str] | None = {} if is_loopback else None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))

    def ray_version(self) -> str:
        """Also the first look at the cluster: whether it is there and takes the token."""
        return str(self._json("GET", "/api/version")["ray_version"])

    def refuses_strangers(self) -> bool:
        """Whether it says no to who shows no token."""
        stranger = Dashboard(self._url, None, self.address, self.host)
        try:
            stranger.ray_version()
        except DashboardError as error:
            return error.status in (401, 403)
        return False

    def submit(self, job: str, entrypoint: str, metadata: dict[str, str], package: str | None = None) -> None:
        """Starts a job of this id. DashboardError when the id is taken."""
        body: dict[str, Any] = {"submission_id": job, "entrypoint": entrypoint, "metadata": metadata}
        if package is not None:
            body["runtime_env"] = {"working_dir": package}
        self._json("POST", "/api/jobs/", body)

    def job(self, job: str) -> Job | None:
        """None when the cluster knows no such job."""
        try:
            return _job(self._json("GET", f"/api/jobs/{urllib.parse.quote(job)}"))
        except DashboardError as error:
            if error.status == 404:
                return None
            raise

    def jobs(self) -> list[Job]:
        """All submitted jobs, of others too."""
        return [_job(raw) for raw in self._json("GET", "/api/jobs/") if raw.get("submission_id")]

    def log(self, job: str) -> str:
        """All that a job has printed so far."""
        return str(self._json("GET", f"/api/jobs/{urllib.parse.quote(job)}/logs")["logs"] or "")

    def tail(self, job: Job, lines: int) -> str:
        """The last lines of what a job has printed so far."""
        name = f"job-driver-{job.id}.log"
        query = {"node_id": str(job.node_id), "filename": name, "lines": str(lines)}
        return self._request("GET", f"/api/v0/logs/file?{urllib.parse.urlencode(query)}").decode(errors="replace")

    def stop(self, job: str) -> None:
        self._json("POST", f"/api/jobs/{urllib.parse.quote(job)}/stop")

    def delete(self, job: str) -> None:
        """Takes an ended job off the list."""
        self._json("DELETE", f"/api/jobs/{urllib.parse.quote(job)}")

    def upload(self, package: Path) -> str:
        """Puts a zip file where the nodes fetch it. Returns its URI."""
        data = package.read_bytes()
        name = f"_ray_pkg_{hashlib.sha256(data).hexdigest()[:32]}.zip"
        path = f"/api/packages/gcs/{name}"
        try:
            self._request("GET", path)  # also has the package kept for some minutes, until the job has begun
        except DashboardError as error:
            if error.status != 404:
                raise
            self._request("PUT", path, data, timeout_s=600.0)
        return f"gcs://{name}"

    def download(self, node_id: str, name: str, to: Path, num_bytes: int) -> str:
        """Fetches a file beside the logs of a node. Returns its sha256. CommandError when it is not whole."""
        query = {"node_id": node_id, "filename": name, "lines": "-1", "timeout": "7200"}
        path = f"/api/v0/logs/file?{urllib.parse.urlencode(query)}"
        digest, size = hashlib.sha256(), 0
        try:
            with self._open("GET", path, None, TIMEOUT_S) as answer, to.open("wb") as file:
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
        except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        if size != num_bytes:
            found = f"{size} of {num_bytes} bytes"
            raise CommandError(Problem(name, "a download is whole", found, "another try"))
        return digest.hexdigest()

    def patiently(self, ask: Callable[[], Answer]) -> Answer:
        """Asks again while the connection is broken, for PATIENCE_S. Only for what may be asked twice."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return ask()
            except UnreachableError:
                if time.monotonic() > end:
                    raise
                time.sleep(1.0)

    def _json(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        answer = self._request(method, path, data)
        try:
            return json.loads(answer or b"null")
        except ValueError as error:
            found = f"what is no JSON: {answer[:60].decode(errors='replace')!r}"
            expected = "the address of a Ray dashboard"
            raise CommandError(Problem("--address", f"{self.address} is a Ray dashboard", found, expected)) from error

    def _request(self, method: str, path: str, data: bytes | None = None, timeout_s: float = TIMEOUT_S) -> bytes:
        try:
            with self._open(method, path, data, timeout_s) as answer:
                found: bytes = answer.read()
                return found
        except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error

    def _open(self, method: str, path: str, data: bytes | None, timeout_s: float) -> Any:
        request = urllib.request.Request(self._url + path, data=data, method=method)
        if self._token is not None:
            # To nobody else: a redirect may lead to another host.
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        request.add_header("Content-Type", "application/json" if method == "POST" else "application/octet-stream")
        try:
            return self._opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code, error.read().decode(errors="replace").strip()) from error
        except urllib.error.URLError as error:
            raise self._unreachable(error.reason) from error
        except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error

    def _refused(self, status: int, text: str) -> DashboardError:
        where = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token with the cluster's token"
        if status == 401:
            rule = "a cluster is asked with its token"
            found = "no token here" if self._token is None else "a token that the cluster did not take"
            return DashboardError(Problem("token", rule, found, where), status)
        if status == 403:
            rule = "the token here is the cluster's"
            return DashboardError(Problem("token", rule, f"{self.address} knows another token", where), status)
        last = text.splitlines()[-1] if text else "nothing more"
        expected = "the dashboard of a Ray cluster"
        found = f"HTTP status {status}: {last}"
        return DashboardError(Problem(self.address, "the cluster's dashboard does it", found, expected), status)

    def _unreachable(self, reason: object) -> UnreachableError:
        expected = "a cluster that runs, and the URL of its dashboard or its cluster.yaml"
        return UnreachableError(Problem("--address", f"{self.address} answers", str(reason), expected))


def _job(raw: dict[str, Any]) -> Job:
    return Job(
        id=str(raw["submission_id"]),
        status=str(raw["status"]),
        message=str(raw.get("message") or ""),
        metadata=dict(raw.get("metadata") or {}),
        node_id=raw.get("driver_node_id"),
        started_s=(raw.get("start_time") or 0) / 1000,
        ended_s=raw["end_time"] / 1000 if raw.get("end_time") else None,
    )
