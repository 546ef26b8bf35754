"""NVIDIA's server, played by a script: it makes the socket that clients look for, and stays until it is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tune_service import mps
from tune_service.mps import CONTROL, LOGS, PIPES, multi_process_service

READY = 'test "$1" = -f && echo $$ > "$CUDA_MPS_PIPE_DIRECTORY/control" && exec sleep 300'
SEES = 'test -z "${CUDA_VISIBLE_DEVICES+set}" && '


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The script, first on PATH. Clients succeed."""
    script = tmp_path / "bin" / CONTROL
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\n{READY}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.delenv(PIPES, raising=False)
    monkeypatch.setattr(mps, "USUAL_PIPES", tmp_path / "nobody")
    monkeypatch.setattr(mps, "CLIENT", [sys.executable, "-c", ""])
    yield script


def server_of(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "control").read_text()))


def test_processes_that_are_started_within_find_the_server(control: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mps"
    with multi_process_service(folder) as why_not:
        assert why_not is None
        assert (os.environ[PIPES], os.environ[LOGS]) == (str(folder), str(folder))
        assert folder.stat().st_mode & 0o777 == 0o700
        server = server_of(folder)
        assert server.is_running()
    assert PIPES not in os.environ and LOGS not in os.environ
    assert not server.is_running()


def test_the_server_sees_every_gpu(control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the numbers that ranks are given would count from the first GPU that this process sees."""
    control.write_text(f"#!/bin/sh\n{SEES}{READY}\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with multi_process_service(tmp_path / "mps") as why_not:
        assert why_not is None
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize("owner", ["environment", "usual place"])
def test_a_server_of_the_users_own_is_used(
    owner: str, control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if owner == "environment":
        monkeypatch.setenv(PIPES, "/theirs")
    else:
        mps.USUAL_PIPES.mkdir()
        (mps.USUAL_PIPES / "control").touch()
    before = os.environ.get(PIPES)
    with multi_process_service(tmp_path / "mps") as why_not:
        assert why_not is None
        assert os.environ.get(PIPES) == before
    assert os.environ.get(PIPES) == before
    assert not (tmp_path / "mps").exists()


def test_without_the_program_trials_take_turns(control: Path, tmp_path: Path) -> None:
    control.unlink()
    with multi_process_service(tmp_path / "mps") as why_not:
        assert why_not == f"{CONTROL}, which would let them run side by side, is not installed"
        assert PIPES not in os.environ


def test_a_server_that_does_not_start_leaves_trials_taking_turns(control: Path, tmp_path: Path) -> None:
    control.write_text("#!/bin/sh\nexit 3\n")
    with multi_process_service(tmp_path / "mps") as why_not:
        assert why_not == f"{CONTROL} ended with 3"
        assert PIPES not in os.environ


def test_a_server_that_is_never_ready_leaves_trials_taking_turns(
    control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control.write_text("#!/bin/sh\nexec sleep 300\n")
    monkeypatch.setattr(mps, "START_S", 0.2)
    with multi_process_service(tmp_path / "mps") as why_not:
        assert why_not == f"{CONTROL} was not ready after 0 s"


def test_a_server_that_serves_nobody_is_ended_at_once(
    control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mps"
    monkeypatch.setattr(mps, "CLIENT", [sys.executable, "-c", f"import os; raise SystemExit(os.environ['{PIPES}'])"])
    with multi_process_service(folder) as why_not:
        assert why_not == f"a first process under {CONTROL} failed: {folder}"
        assert PIPES not in os.environ
        assert not psutil.pid_exists(int((folder / "control").read_text()))


def test_on_a_machine_without_a_gpu_the_first_process_fails(control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real client
    client = subprocess.run(mps.CLIENT, capture_output=True, text=True)
    if client.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert "libcuda.so.1" in client.stderr or client.stderr.startswith("CUDA error ")


def test_a_killed_driver_leaves_no_server_behind(control: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mps"
    program = (
        "import sys, time; from pathlib import Path; from tune_service import mps\n"
        "mps.USUAL_PIPES, mps.CLIENT = Path('/nobody'), [sys.executable, '-c', '']\n"
        f"with mps.multi_process_service(Path({str(folder)!r})): print('up', flush=True); time.sleep(300)"
    )
    driver = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None and driver.stdout.readline() == "up\n"
    server = server_of(folder)
    assert is_alive(server)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    end = time.monotonic() + 5
    while is_alive(server) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_alive(server)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
