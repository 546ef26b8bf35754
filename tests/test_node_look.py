"""What ports say to who shows no token: asked of real servers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from hand_driven import toy_spec

from tune_service import node_look
from tune_service.node_look import METRICS, OPEN, OTHER, REFUSED, SILENT, UNKNOWN, probed, problems, source_digest


@contextmanager
def http_server(status: int, body: bytes) -> Iterator[int]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@contextmanager
def grpc_server(service: str, code: grpc.StatusCode | None) -> Iterator[int]:
    """Has one of Ray's services; None: its calls are answered."""

    def answer(request: bytes, context: Any) -> bytes:
        if code is not None:
            context.abort(code, "no")
        return b""

    class Service(grpc.GenericRpcHandler):
        def service(self, call: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(answer) if service in call.method else None

    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Service(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None)


def said(port: int) -> str:
    return probed([("127.0.0.1", port)])[0]


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, b"no token", REFUSED),
        (403, b"wrong token", REFUSED),
        (200, b"# HELP ray_nodes Number of nodes", METRICS),
        (200, b"[]", OPEN),
        (404, b"", OPEN),
    ],
)
def test_over_http(status: int, body: bytes, says: str) -> None:
    with http_server(status, body) as port:
        assert said(port) == says


@pytest.mark.parametrize("service", ["InternalKVGcsService", "NodeManagerService", "CoreWorkerService", "RayletDriver"])
def test_over_grpc(service: str) -> None:
    with grpc_server(service, grpc.StatusCode.UNAUTHENTICATED) as port:
        assert said(port) == REFUSED
    with grpc_server(service, None) as port:
        assert said(port) == OPEN


def test_grpc_of_no_known_service_and_a_socket_that_says_nothing_and_nobody_at_all() -> None:
    with grpc_server("Somebody's", None) as port:
        assert said(port) == OTHER
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert said(port) == OTHER
    assert said(port) == SILENT


def test_many_slow_ports_do_not_take_longer_than_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def says(host: str, port: int) -> str:
        time.sleep(0.0 if port == 1 else 0.5)
        return REFUSED

    monkeypatch.setattr(node_look, "_says", says)
    monkeypatch.setattr(node_look, "PROBED_S", 0.3)
    began = time.monotonic()
    found = probed([("10.0.0.2", port) for port in range(1, 1001)])
    assert (found[0], found[-1]) == (REFUSED, UNKNOWN)
    assert time.monotonic() - began < 8.0  # not 1000 / 32 * 0.5 = 16


def test_problems_of_a_node_are_the_missing_folders_and_the_module_that_cannot_be_imported(tmp_path: Path) -> None:
    nothing = {"model": None, "data": None, "trainable": None}
    assert problems(nothing) == []
    (missing,) = problems(nothing | {"model": {"name": "/no/model"}})
    assert "no folder /no/model" in missing
    (missing,) = problems(nothing | {"data": {"path": "/no/data", "text": ["a"]}})
    assert "no folder /no/data" in missing
    (unknown,) = problems(nothing | {"trainable": "no_such_module:train"})
    assert "No module named 'no_such_module'" in unknown


def test_a_node_whose_tune_service_does_not_know_a_key_has_one_problem_and_no_error() -> None:
    (told,) = problems({"model": {"name": "gpt2", "a_key_of_tomorrow": 1}, "data": None, "trainable": None})
    assert "another one" in told and "ValidationError" in told and "a_key_of_tomorrow" in told
    assert "\n" not in told


def test_the_digest_is_of_the_source_and_of_nothing_else() -> None:
    assert len(source_digest()) == 8 and source_digest() == source_digest()


def test_the_largest_of_a_space_is_its_longest_rows_in_its_biggest_batch(tmp_path: Path) -> None:
    spec = toy_spec(tmp_path)
    assert spec.largest_params() == {"x": 0.0, "depth": 1}  # of one's own: its first point, which nobody runs
    finetune = {
        "name": "s",
        "model": {"name": "gpt2"},
        "data": {"task": "mrpc"},
        "search_space": {
            "batch_size": {"choice": [16, 64, 32]},
            "micro_batch_size": {"choice": [8, None]},
            "max_length": {"int_uniform": [64, 128]},
            "learning_rate": {"log_uniform": [1e-5, 1e-4]},
        },
    }
    from tune_service.spec import parse_spec

    found = parse_spec(finetune, tmp_path).largest_params()
    assert found == {"batch_size": 64, "micro_batch_size": None, "max_length": 128, "learning_rate": 2.4e-5}
