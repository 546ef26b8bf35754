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
from tune_service.machine import Machine
from tune_service.mps import CONTROL, LOGS, PIPES, SideBySide, side_by_side
from tune_service.prctl import adopt_orphans
from tune_service.spec import parse_spec
from tune_service.this_machine import LocalSession, ThisMachine

READY = """test "$1" = -f || exit 1
sleep 300 & echo $! > "$CUDA_MPS_PIPE_DIRECTORY/child"
echo $$ > "$CUDA_MPS_PIPE_DIRECTORY/control" && exec sleep 300"""
WILD = "rank 0 raised AcceleratorError: CUDA error: an illegal memory access was encountered"
ASSERT = "rank 0 raised AcceleratorError: CUDA error: device-side assert triggered"


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The script, first on PATH. Clients succeed."""
    script = tmp_path / "bin" / CONTROL
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\n{READY}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.delenv(PIPES, raising=False)
    monkeypatch.setattr(mps, "CLIENT", [sys.executable, "-c", ""])
    adopt_orphans()
    yield script


def servers_of(folder: Path) -> list[psutil.Process]:
    """The server, and what it started."""
    return [psutil.Process(int((folder / name).read_text())) for name in ("control", "child")]


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_processes_that_are_started_within_find_the_server(control: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mps"
    with side_by_side(folder, ["0"], 4) as shared:
        assert shared.why_not is None
        assert (os.environ[PIPES], os.environ[LOGS]) == (str(folder), str(folder))
        assert folder.stat().st_mode & 0o777 == 0o700
        servers = servers_of(folder)
        assert all(map(is_alive, servers))
    assert PIPES not in os.environ and LOGS not in os.environ
    assert not any(map(is_alive, servers))


def test_the_environment_is_as_before_at_the_end(
    control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOGS, "/theirs")
    with side_by_side(tmp_path / "mps", ["0"], 4):
        assert os.environ[LOGS] == str(tmp_path / "mps")
    assert os.environ[LOGS] == "/theirs"


def test_the_server_sees_every_gpu_and_serves_each_that_is_used(
    control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the numbers that ranks are given would count from the first GPU that this process sees."""
    control.write_text(f'#!/bin/sh\ntest -z "${{CUDA_VISIBLE_DEVICES+set}}" || exit 1\n{READY}\n')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    seen = f"import os; open({str(tmp_path)!r} + '/seen-' + os.environ['CUDA_VISIBLE_DEVICES'], 'x')"
    monkeypatch.setattr(mps, "CLIENT", [sys.executable, "-c", seen])
    with side_by_side(tmp_path / "mps", ["3", "5"], 4) as shared:
        assert shared.why_not is None
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert sorted(path.name for path in tmp_path.glob("seen-*")) == ["seen-3", "seen-5"]


def test_a_server_of_the_users_own_is_used(control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PIPES, "/theirs")
    with side_by_side(tmp_path / "mps", ["0"], 4) as shared:
        assert shared.why_not is None
        assert os.environ[PIPES] == "/theirs"
    assert os.environ[PIPES] == "/theirs"
    assert not (tmp_path / "mps").exists()


@pytest.mark.parametrize(
    ("cards", "most", "why_not"),
    [
        (["0"], 49, "the service has room for 48, but 49 may run on a GPU"),
        (["MIG-1", "MIG-2"], 4, "the service was not tried on slices of a GPU"),
    ],
)
def test_where_the_service_cannot_serve_trials_take_turns(
    cards: list[str], most: int, why_not: str, control: Path, tmp_path: Path
) -> None:
    with side_by_side(tmp_path / "mps", cards, most) as shared:
        assert shared.why_not == why_not
        assert PIPES not in os.environ


def test_without_the_program_trials_take_turns(control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with side_by_side(tmp_path / "mps", ["0"], 4) as shared:
        assert shared.why_not == f"{CONTROL}, which would let them run side by side, is not installed"
        assert PIPES not in os.environ


def test_a_server_that_does_not_start_leaves_trials_taking_turns(control: Path, tmp_path: Path) -> None:
    control.write_text("#!/bin/sh\nexit 3\n")
    with side_by_side(tmp_path / "mps", ["0"], 4) as shared:
        assert shared.why_not == f"{CONTROL} ended with 3"
        assert PIPES not in os.environ


def test_a_program_that_cannot_be_run_leaves_trials_taking_turns(control: Path, tmp_path: Path) -> None:
    control.write_bytes(b"\x7fELF of another machine")
    with side_by_side(tmp_path / "mps", ["0"], 4) as shared:
        assert shared.why_not == f"{CONTROL} cannot be run: Exec format error"


def test_a_server_that_is_never_ready_leaves_trials_taking_turns(
    control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control.write_text("#!/bin/sh\nexec sleep 300\n")
    monkeypatch.setattr(mps, "START_S", 0.2)
    with side_by_side(tmp_path / "mps", ["0"], 4) as shared:
        assert shared.why_not == f"{CONTROL} was not ready after 0 s"


def test_a_server_that_does_not_answer_leaves_trials_taking_turns(
    control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mps, "START_S", 1.0)
    monkeypatch.setattr(mps, "CLIENT", ["sleep", "300"])
    with side_by_side(tmp_path / "mps", ["0"], 4) as shared:
        assert shared.why_not == f"{CONTROL} let a first process wait for 1 s"


def test_a_server_that_fails_on_one_gpu_is_ended_at_once(
    control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mps"
    program = "import os; os.environ['CUDA_VISIBLE_DEVICES'] == '1' and exit('CUDA error 805')"
    monkeypatch.setattr(mps, "CLIENT", [sys.executable, "-c", program])
    with side_by_side(folder, ["0", "1"], 4) as shared:
        assert shared.why_not == f"a first process under {CONTROL} failed on GPU 1: CUDA error 805"
        assert PIPES not in os.environ
        assert not any(psutil.pid_exists(int((folder / name).read_text())) for name in ("control", "child"))


def test_on_a_machine_without_a_gpu_the_first_process_fails() -> None:
    client = subprocess.run(mps.CLIENT, capture_output=True, text=True)
    if client.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert "libcuda.so.1" in client.stderr or client.stderr.startswith("CUDA error ")


def test_that_the_server_died_is_told(control: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mps"
    with side_by_side(folder, ["0"], 4) as shared:
        session = LocalSession(tmp_path, 4, shared=shared)
        assert session.notice(waits=False) is None
        server, _ = servers_of(folder)
        server.kill()
        end = time.monotonic() + 5
        while session.notice(waits=False) is None and time.monotonic() < end:
            time.sleep(0.01)
        assert session.notice(waits=False) == f"trials that share a GPU take turns: {CONTROL} has ended"


def test_two_faults_of_the_gpu_end_the_server_and_asserts_do_not(control: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mps"
    with side_by_side(folder, ["0"], 4) as shared:
        session = LocalSession(tmp_path, 4, shared=shared)
        for reason in (ASSERT, ASSERT, "rank 0 raised OutOfMemoryError: CUDA out of memory", "rank 0 died", WILD):
            session.failed(reason)
        assert session.notice(waits=False) is None
        servers = servers_of(folder)
        assert all(map(is_alive, servers))
        session.failed(WILD)
        assert not any(map(is_alive, servers))
        found = "trials that share a GPU take turns: a fault of the GPU in one of them ended others"
        assert session.notice(waits=False) == found


def test_two_faults_that_lie_far_apart_are_two_trials_own(
    control: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mps, "FAULTS_WITHIN_S", 0.05)
    with side_by_side(tmp_path / "mps", ["0"], 4) as shared:
        for _ in range(3):
            shared.failed(WILD)
            time.sleep(0.1)
        assert shared.why_not is None


def test_without_a_server_a_fault_ends_nothing() -> None:
    shared = SideBySide(None)
    shared.failed(WILD)
    shared.failed(WILD)
    assert shared.why_not is None


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(control: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mps"
    with side_by_side(folder, ["0"], 4):
        assert os.getpgid(servers_of(folder)[0].pid) != os.getpgid(0)


def test_a_killed_driver_leaves_no_server_behind(control: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mps"
    program = (
        "import sys, time; from pathlib import Path; from tune_service import mps\n"
        "mps.CLIENT = [sys.executable, '-c', '']\n"
        f"with mps.side_by_side(Path({str(folder)!r}), ['0'], 4): print('up', flush=True); time.sleep(300)"
    )
    driver = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None and driver.stdout.readline() == "up\n"
    server, child = servers_of(folder)
    try:
        assert is_alive(server)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        end = time.monotonic() + 5
        while is_alive(server) and time.monotonic() < end:
            time.sleep(0.01)
        assert not is_alive(server)
    finally:
        child.kill()  # NVIDIA's ends with its parent


@pytest.mark.parametrize(
    ("gpus", "gpus_per_worker", "concurrent", "share"),
    [
        (1, 1, None, False),
        (1, 0, None, False),
        (1, 0.5, None, True),
        (1, 0.5, 1, False),
        (2, 1, None, False),
        (2, 0.5, 2, True),  # both on the first
        (2, "auto", 2, False),  # one on each
        (2, "auto", 3, True),
    ],
)
def test_a_server_is_wanted_where_two_trials_may_run_on_one_gpu(
    gpus: int, gpus_per_worker: float | str, concurrent: int | None, share: bool
) -> None:
    written = {
        "name": "shares",
        "trainable": "toys:train",
        "search_space": {"x": {"uniform": [0.0, 1.0]}},
        "objective": {"metric": "x", "mode": "max"},
        "resources": {"gpus_per_worker": gpus_per_worker},
        "budget": {"trials": 9, "concurrent_trials": concurrent},
    }
    spec = parse_spec(written)
    place = ThisMachine()
    place.room = Machine(cpus=16, gpus=gpus, memory_bytes=2**34)
    assert place.some_share_a_gpu(spec) is share
