"""An S3 server in a process of its own, moto, and a door before it that a test can close, slow down or spoil."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import pytest
from free_port import free_port
from pyarrow import fs

KEYS: dict[str, Any] = {"access_key": "someone", "secret_key": "secret", "region": "us-east-1", "scheme": "http"}
ROOT = Path(__file__).resolve().parents[1]
BUCKET = "lab"
Way = Literal["open", "slow", "silent", "cut", "503", "403"]
SLOW_S = 0.3
_CODES = {"503": ("Service Unavailable", "SlowDown"), "403": ("Forbidden", "InvalidAccessKeyId")}


def install_moto(folder: Path) -> None:
    """Installs the pins of requirements.lock; skips the test where that cannot be."""
    pins = re.findall(r"^#moto (.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", "--no-compile"]
    run = subprocess.run([*pip, "--target", str(folder), *pins], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        pytest.skip(f"moto, the stand-in for AWS, cannot be installed: {run.stderr.strip()[-300:]}")


@contextmanager
def running_moto(folder: Path) -> Iterator[int]:
    """Runs the server that lies in `folder`, with an empty bucket. Yields its port on loopback."""
    port = free_port()
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); from moto.server import main; "
    code += f"main(['-H', '127.0.0.1', '-p', '{port}'])"
    with (folder.parent / "moto.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 150
        while not _answers(port):
            assert process.poll() is None and time.monotonic() < end, "moto does not start"
            time.sleep(0.1)
        fs.S3FileSystem(endpoint_override=f"127.0.0.1:{port}", allow_bucket_creation=True, **KEYS).create_dir(BUCKET)
        yield port
    finally:
        process.kill()
        process.wait()


class Door:
    """Listens on loopback and hands every connection through, in the way that the test has set."""

    def __init__(self, to: int) -> None:
        self._to = to
        self.way: Way = "open"
        self._open: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def set(self, way: Way) -> None:
        """For new connections; those that there are end."""
        self.way = way
        for each in self._open:
            _end(each)
        self._open.clear()

    def close(self) -> None:
        _end(self._server)
        self.set("cut")

    def environment(self) -> dict[str, str]:
        """What a program is told of the store."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "not-for-the-eyes-of-others",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                self._open.append(client)
                threading.Thread(target=self._hand_through, args=(client, self.way), daemon=True).start()

    def _hand_through(self, client: socket.socket, way: Way) -> None:
        with suppress(OSError):
            if way == "silent":
                while client.recv(1 << 16):
                    pass
            elif way in _CODES:
                self._refuse(client, way)
            else:
                server = socket.create_connection(("127.0.0.1", self._to))
                self._open.append(server)
                threading.Thread(target=_copy, args=(server, client, way), daemon=True).start()
                _copy(client, server, way)
        _end(client)

    def _refuse(self, client: socket.socket, way: str) -> None:
        words, code = _CODES[way]
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}, says the door</Message></Error>'
        while head := client.recv(1 << 16):
            text = "" if head.startswith(b"HEAD") else body
            answer = f"HTTP/1.1 {way} {words}\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n"
            client.sendall(f"{answer}Connection: close\r\n\r\n{text}".encode())
            return


class Store:
    """The store as the program reaches it, through the door, and as the test looks into it, beside the door."""

    def __init__(self, port: int) -> None:
        self.door = Door(port)
        self._filesystem = fs.S3FileSystem(endpoint_override=f"127.0.0.1:{port}", **KEYS)

    def names(self, study: str) -> list[str]:
        """Of all objects of a study, those too that only stand for a folder."""
        root = f"{BUCKET}/studies/{study}"
        found = self._filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        return sorted(info.path.removeprefix(f"{root}/") for info in found)

    def read(self, study: str, name: str) -> bytes:
        return bytes(self._filesystem.open_input_stream(f"{BUCKET}/studies/{study}/{name}").read())


def _copy(source: socket.socket, target: socket.socket, way: Way) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            if way == "slow":
                time.sleep(SLOW_S)
            if way == "cut":
                target.sendall(data[: len(data) // 2])
                break
            target.sendall(data)
    _end(source)
    _end(target)


def _end(which: socket.socket) -> None:
    with suppress(OSError):
        which.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        which.close()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
