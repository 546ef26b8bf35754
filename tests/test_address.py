"""From `--address` to a cluster's dashboard: tokens, cluster files, tunnels."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tune_service import address
from tune_service.address import Head, connected, read_head, token
from tune_service.dashboard import Dashboard, DashboardError, UnreachableError
from tune_service.errors import AddressError, CommandError, exit_code


@pytest.fixture(autouse=True)
def nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


class Asked(BaseHTTPRequestHandler):
    """A dashboard that knows one token and says what it was asked."""

    def do_GET(self) -> None:
        found = {None: 401, "Bearer right": 200}.get(self.headers.get("Authorization"), 403)
        body = json.dumps({"ray_version": "2.60.0", "path": self.path}).encode() if found == 200 else b"Unauthorized"
        self.send_response(found)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Asked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_token_is_looked_for_where_ray_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("of-home\n")
    assert token() == "of-home"
    (tmp_path / "other").write_text("of-path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert token() == "of-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-variable")
    assert token() == "of-variable"


def test_the_dashboard_takes_the_right_token_alone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, found in (("", "no token here"), ("wrong", f"{url} knows another token")):
        monkeypatch.setenv("RAY_AUTH_TOKEN", value)
        with connected(url) as dashboard, pytest.raises(DashboardError) as caught:
            dashboard.ray_version()
        assert (caught.value.problems[0].found, exit_code(caught.value)) == (found, 1)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    with connected(url.removeprefix("http://")) as dashboard:
        assert dashboard.ray_version() == "2.60.0"


def test_a_proxy_of_the_environment_is_not_asked_for_this_machines_ports(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert Dashboard(url, "right", url).ray_version() == "2.60.0"


def test_nobody_there_is_a_failure_and_no_address_is_wrong_input() -> None:
    with connected("http://127.0.0.1:9") as dashboard, pytest.raises(UnreachableError, match="refused") as caught:
        dashboard.ray_version()
    assert exit_code(caught.value) == 1
    with pytest.raises(AddressError) as wrong, connected("nowhere"):
        raise AssertionError("an address")
    assert exit_code(wrong.value) == 2


def test_a_cluster_file_says_how_its_head_is_reached(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "cluster_name: c\nprovider: {type: local, head_ip: 10.0.0.1}\n"
        "auth: {ssh_user: ubuntu, ssh_private_key: ~/key, ssh_proxy_command: nc gate}\n"
        "head_start_ray_commands: [ray stop, ray start --head --dashboard-port=8888]\n"
    )
    head = read_head(file)
    assert head == Head("10.0.0.1", "ubuntu", str(tmp_path / "key"), "nc gate", 8888)
    command = address._ssh(head, 5000)
    assert command[:4] == ["ssh", "-T", "-L", "127.0.0.1:5000:127.0.0.1:8888"]
    assert command[-2:] == ["ubuntu@10.0.0.1", "cat"], "it ends with its input, and that with the process that has it"
    assert {"ProxyCommand=nc gate", "ExitOnForwardFailure=yes", "BatchMode=yes"} <= set(command)


@pytest.mark.parametrize("kept", ["variable", "file"])
def test_a_token_that_is_none_is_refused_without_being_shown(
    kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kept == "variable":
        monkeypatch.setenv("RAY_AUTH_TOKEN", "abcd1234\nefgh5678")
    else:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text("abcd1234\nefgh5678\n")
    with pytest.raises(AddressError, match="2 words in 2 lines") as refusal:
        token()
    assert "abcd1234" not in str(refusal.value) and "efgh5678" not in str(refusal.value)


class Redirects(BaseHTTPRequestHandler):
    """Sends whoever asks to another place."""

    to = ""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.to)
        self.end_headers()

    def log_message(self, *words: Any) -> None:
        """Nothing."""


def test_the_token_does_not_follow_a_redirect(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Redirects, "to", f"{url}/login")
    with ThreadingHTTPServer(("127.0.0.1", 0), Redirects) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        gate = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(DashboardError, match=r"asked with its token"):  # as whoever shows none
            Dashboard(gate, "right", gate).ray_version()
        server.shutdown()


def test_what_answers_and_is_no_dashboard_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dashboard, "_request", lambda *words, **more: b"<html>welcome</html>")
    with pytest.raises(CommandError, match="no JSON: '<html>welcome"):
        Dashboard("http://x", None, "http://x").ray_version()


CLOUD_FILES = {
    "aws": "cluster_name: c\nprovider: {type: aws, region: us-west-2}\nauth: {ssh_user: ubuntu}\n",
    "gcp": "cluster_name: c\nprovider: {type: gcp, region: r, project_id: p}\nauth: {ssh_user: ubuntu}\n",
}
NODE_TYPES = "available_node_types: {head: {node_config: {}, resources: {CPU: 1}}}\nhead_node_type: head\n"


def cloud_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Whoever is started to ask the cloud runs this in its place."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_of_a_head_in_a_cloud_its_address_and_the_key_that_ray_made_are_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cluster.yaml"
    cloud_says(tmp_path, monkeypatch, """echo 'a warning of Ray'; echo '["198.51.100.7", "/home/me/.ssh/made.pem"]'""")
    file.write_text(CLOUD_FILES["aws"])
    head = read_head(file)
    assert head == Head("198.51.100.7", "ubuntu", "/home/me/.ssh/made.pem", None, 8265)
    assert address._ssh(head, 5000)[-6:] == [
        *("-i", "/home/me/.ssh/made.pem", "-o", "IdentitiesOnly=yes", "ubuntu@198.51.100.7", "cat"),
    ]
    file.write_text(CLOUD_FILES["aws"].replace("ubuntu", "ubuntu, ssh_private_key: ~/mine"))
    assert read_head(file).key == str(tmp_path / "mine")


def test_a_head_that_is_not_found_is_a_failure_in_the_clouds_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(CLOUD_FILES["aws"])
    cloud_says(tmp_path, monkeypatch, "echo 'Traceback'; echo 'RuntimeError: no head of c' >&2; exit 1")
    with pytest.raises(CommandError, match="RuntimeError: no head of c"):
        read_head(file)


@pytest.mark.parametrize(
    ("provider", "first", "second"),
    [
        ("aws", "ray-autoscaler_us-west-2.pem", "ray-autoscaler_1_us-west-2.pem"),
        ("gcp", "ray-autoscaler_gcp_r_p_ubuntu_0", "ray-autoscaler_gcp_r_p_ubuntu_1"),
    ],
)
def test_without_rays_cache_the_key_is_the_first_that_is_there_by_rays_names_and_nothing_is_made(
    provider: str, first: str, second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where Ray's cache is
    config = yaml.safe_load(CLOUD_FILES[provider] + NODE_TYPES)
    assert address._made_key(copy.deepcopy(config)) is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".ssh").mkdir()
    for name in (second, first):
        (tmp_path / ".ssh" / name).touch()
        assert address._made_key(copy.deepcopy(config)) == str(tmp_path / ".ssh" / name)


def test_the_key_in_rays_cache_goes_before_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private import commands

    class Cloud:
        """Completes a file as a provider of Ray's does in `ray up`."""

        @staticmethod
        def fillout_available_node_types_resources(config: dict[str, Any]) -> dict[str, Any]:
            return config

        @staticmethod
        def bootstrap_config(config: dict[str, Any]) -> dict[str, Any]:
            return config | {"auth": config["auth"] | {"ssh_private_key": "/home/me/.ssh/third.pem"}}

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/ray-autoscaler_us-west-2.pem").touch()
    config = yaml.safe_load(CLOUD_FILES["aws"] + NODE_TYPES)
    with monkeypatch.context() as patch:
        patch.setattr(commands, "_NODE_PROVIDERS", {"aws": lambda provider: Cloud})
        commands._bootstrap_config(copy.deepcopy(config))
    assert address._made_key(config) == "/home/me/.ssh/third.pem"


@pytest.mark.parametrize("text", ["- a", "provider: 1", "a: [", "cluster_name: c"])
def test_a_file_that_is_no_cluster_file_is_wrong_input(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(AddressError), connected(str(tmp_path / "file.yaml")):
        raise AssertionError("an address")


@pytest.mark.parametrize(("status", "refuses"), [(401, True), (403, True), (200, False)])
def test_a_dashboard_refuses_strangers_with_401_and_with_403(status: int, refuses: bool) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"ray_version": "2.60.0"}')

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert Dashboard(f"http://127.0.0.1:{server.server_port}", "any", "here").refuses_strangers() is refuses
        server.shutdown()
