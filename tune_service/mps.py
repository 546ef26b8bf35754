"""NVIDIA's Multi-Process Service: trials that share a GPU run side by side on it. Without it they take turns.

Its server lasts as long as one study. Whoever inherits the environment takes part: Ray's processes, and no other's.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL

CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
USUAL_PIPES = Path("/tmp/nvidia-mps")
"""Where CUDA looks for a server when nothing names another place."""
START_S = 10.0
CLIENT = [
    sys.executable,
    "-S",
    "-c",
    "import ctypes; cuda = ctypes.CDLL('libcuda.so.1'); context = ctypes.c_void_p()\n"
    "error = cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)\n"
    "raise SystemExit(error and f'CUDA error {error}')",
]
"""What a rank does first: makes itself a context on a GPU."""
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@contextmanager
def multi_process_service(folder: Path) -> Iterator[str | None]:
    """Starts it for all processes that are started within. Yields why trials take turns, if they do.

    `folder` is made, for this user alone. A server of the user's own is used as it is.
    """
    if PIPES in os.environ or (USUAL_PIPES / "control").exists():
        yield None
        return
    if shutil.which(CONTROL) is None:
        yield f"{CONTROL}, which would let them run side by side, is not installed"
        return
    folder.mkdir(mode=0o700)
    own = {PIPES: str(folder), LOGS: str(folder)}
    # It sees every GPU, as the ranks do whose CUDA_VISIBLE_DEVICES says which one is theirs.
    every_gpu = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    server = subprocess.Popen(
        [CONTROL, "-f"],
        env=every_gpu | own,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=_end_with_parent,
    )
    try:
        why_not = _trouble(server, folder, own)
        if why_not is None:
            os.environ |= own
        else:
            server.kill()
            server.wait()
        yield why_not
    finally:
        for name in own:
            os.environ.pop(name, None)
        server.kill()  # what it started ends with it
        server.wait()


def _trouble(server: subprocess.Popen[bytes], folder: Path, own: dict[str, str]) -> str | None:
    """Waits until the server answers a client; what is wrong if it does not."""
    end = time.monotonic() + START_S
    while not (folder / "control").exists():
        if server.poll() is not None:
            return f"{CONTROL} ended with {server.returncode}"
        if time.monotonic() > end:
            return f"{CONTROL} was not ready after {START_S:.0f} s"
        time.sleep(0.01)
    try:
        client = subprocess.run(CLIENT, env=os.environ | own, capture_output=True, text=True, timeout=START_S)
    except subprocess.TimeoutExpired:
        return f"{CONTROL} let a first process wait for {START_S:.0f} s"
    words = client.stderr.strip().splitlines() or [f"exit code {client.returncode}"]
    return f"a first process under {CONTROL} failed: {words[-1]}" if client.returncode else None


def _end_with_parent() -> None:
    """In the new process: a driver that is killed leaves no server behind."""
    _libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
