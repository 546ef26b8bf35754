"""NVIDIA's Multi-Process Service: trials that share a GPU run side by side on it. Without it they take turns.

Its server lasts as long as one study. Whoever inherits the environment takes part: Ray's processes, and no other's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tune_service.local_ray import undisturbed
from tune_service.prctl import end_with_parent

CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
START_S = 60.0
END_S = 10.0
MOST_CLIENTS = 48
"""On one GPU; the next would be refused."""
CLIENT = [
    sys.executable,
    "-S",
    "-c",
    "import ctypes; cuda = ctypes.CDLL('libcuda.so.1'); context = ctypes.c_void_p()\n"
    "error = cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)\n"
    "raise SystemExit(error and f'CUDA error {error}')",
]
"""What a rank does first: makes itself a context on its GPU."""
GPU_FAULT = re.compile(r"CUDA error: (?!device-side assert|out of memory)")
"""Ends every process on the GPU that the server serves, by NVIDIA's words; asserts are known to end their own alone."""
FAULTS_WITHIN_S = 60.0


class SideBySide:
    """Whether trials that share a GPU run side by side, as long as one study runs."""

    def __init__(self, server: subprocess.Popen[bytes] | None, why_not: str | None = None) -> None:
        self._server, self._why_not = server, why_not
        self._fault_at: float | None = None

    @property
    def why_not(self) -> str | None:
        """Why they take turns; None: they do not."""
        if self._why_not is None and self._server is not None and self._server.poll() is not None:
            self._why_not = f"{CONTROL} has ended"
        return self._why_not

    def failed(self, reason: str) -> None:
        """A trial failed. Two for a fault of the GPU, soon after each other, and one may have been the other's.

        Then the server goes: whatever is at fault is alone with it when it comes again.
        """
        if self._server is None or not GPU_FAULT.search(reason):
            return
        now = time.monotonic()
        is_second = self._fault_at is not None and now - self._fault_at < FAULTS_WITHIN_S
        self._fault_at = now
        if is_second and self.why_not is None:
            self._why_not = "a fault of the GPU in one of them ended others"
            _end(self._server)


@contextmanager
def side_by_side(folder: Path, cards: Sequence[str], most: int) -> Iterator[SideBySide]:
    """Starts the server for all processes that are started within, each on one of `cards` by CUDA_VISIBLE_DEVICES.

    `most`: processes on one of them at once. `folder` is made, for this user alone. A server that the environment names
    is used as it is.
    """
    if PIPES in os.environ:
        yield SideBySide(None)
        return
    if any(card.startswith("MIG-") for card in cards):
        yield SideBySide(None, "the service was not tried on slices of a GPU")
        return
    if most > MOST_CLIENTS:
        yield SideBySide(None, f"the service has room for {MOST_CLIENTS}, but {most} may run on a GPU")
        return
    if shutil.which(CONTROL) is None:
        yield SideBySide(None, f"{CONTROL}, which would let them run side by side, is not installed")
        return
    folder.mkdir(mode=0o700)
    own = {PIPES: str(folder), LOGS: str(folder)}
    before = {name: os.environ.get(name) for name in own}
    # It sees every GPU, as the ranks do whose CUDA_VISIBLE_DEVICES says which one is theirs.
    every_gpu = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        server = subprocess.Popen(
            [CONTROL, "-f"],
            env=every_gpu | own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it: its clients end first
            preexec_fn=end_with_parent,
        )
    except OSError as error:
        yield SideBySide(None, f"{CONTROL} cannot be run: {error.strerror}")
        return
    try:
        why_not = _trouble(server, folder, cards, own)
        if why_not is None:
            os.environ |= own
        else:
            _end(server)
        yield SideBySide(server, why_not)
    finally:
        _end(server)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _trouble(server: subprocess.Popen[bytes], folder: Path, cards: Sequence[str], own: dict[str, str]) -> str | None:
    """Waits until the server has served a client on each card; what is wrong if it does not."""
    end = time.monotonic() + START_S
    while not (folder / "control").exists():
        if server.poll() is not None:
            return f"{CONTROL} ended with {server.returncode}"
        if time.monotonic() > end:
            return f"{CONTROL} was not ready after {START_S:.0f} s"
        time.sleep(0.01)
    clients = [
        subprocess.Popen(
            CLIENT,
            env=os.environ | own | {"CUDA_VISIBLE_DEVICES": card},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for card in cards
    ]
    try:
        for card, client in zip(cards, clients, strict=True):
            words = client.communicate(timeout=max(0.0, end - time.monotonic()))[1].strip().splitlines()
            if client.returncode:
                found = words[-1] if words else f"exit code {client.returncode}"
                return f"a first process under {CONTROL} failed on GPU {card}: {found}"
    except subprocess.TimeoutExpired:
        return f"{CONTROL} let a first process wait for {START_S:.0f} s"
    finally:
        for client in clients:
            client.kill()
            client.wait()
    return None


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ends the server and what it started, which serves the GPUs; returns when they are gone."""
    with undisturbed():
        if server.poll() is not None:  # its number may be another's by now
            return
        processes = []
        with suppress(psutil.Error):
            processes = psutil.Process(server.pid).children(recursive=True)
        server.kill()
        server.wait()
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=END_S)
