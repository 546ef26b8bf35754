"""What goes round Ray's start: interrupts that wait for its end, and servers that die meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tune_service.ray_start import interrupts_put_off, quick_start

STARTS = """
import os, signal, sys
from tune_service.local_ray import end_children, local_ray, prepare_environment, scratch_folder
def lost(why):
    print(why, flush=True)
    end_children()
    os._exit(7)
def interrupt(number, frame):
    raise KeyboardInterrupt(signal.Signals(number).name)
for each in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(each, interrupt)
prepare_environment(2)
try:
    with scratch_folder() as scratch:
        print(scratch, flush=True)
        with local_ray(scratch, 2, 0, "dies", lost):
            print("has started", flush=True)
except KeyboardInterrupt as told:
    print(f"interrupted by {told}", flush=True)
    os._exit(130)
"""


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda way: way.name)
def test_an_interrupt_waits_until_ray_has_started_but_a_second_one_does_not(way: signal.Signals) -> None:
    from ray._private import utils

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    reached: list[str] = []
    before = signal.signal(way, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt, match=way.name), interrupts_put_off():
            utils.set_sigterm_handler(interrupt)  # as `ray.init` does
            signal.raise_signal(way)
            reached.append("goes on")
        with pytest.raises(KeyboardInterrupt, match=way.name), interrupts_put_off():
            signal.raise_signal(way)
            signal.raise_signal(way)
            reached.append("never")
        with interrupts_put_off():
            reached.append("undisturbed")
        assert signal.getsignal(way) is interrupt
    finally:
        signal.signal(way, before)
    assert reached == ["goes on", "undisturbed"]


def test_what_nohup_ignores_stays_ignored_while_ray_starts() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts_put_off():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_ray_starts_with_is_put_back_after_a_start_that_failed() -> None:
    from ray._private import node, parameter, services, utils

    def found() -> list[object]:
        return [
            parameter.RayParams,
            services.start_api_server,
            services.get_node,
            node.wait_for_persisted_port,
            utils.get_dashboard_dependency_error,
            utils.set_sigterm_handler,
        ]

    before = found()
    with pytest.raises(RuntimeError), interrupts_put_off(), quick_start():
        assert all(now is not then for now, then in zip(found(), before, strict=True))
        raise RuntimeError("no start")
    assert found() == before


@contextmanager
def starting(server: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A driver whose Ray is just starting that server, and its scratch folder. At the end both must be gone."""
    driver = subprocess.Popen([sys.executable, "-c", STARTS], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert driver.stdout is not None
        scratch, end = Path(driver.stdout.readline().strip()), time.monotonic() + 60
        while not any(map(is_up, named(driver, server))) and time.monotonic() < end:
            time.sleep(0.01)
        family = psutil.Process(driver.pid).children(recursive=True)
        guards = [each for each in family if is_guard(each)]
        yield driver, scratch
        _, alive = psutil.wait_procs(set(family) - set(guards), timeout=5)
        assert alive == []
        _, alive = psutil.wait_procs(guards, timeout=60)  # it may have to start first
        assert alive == []
        while scratch.exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert not scratch.exists()
    finally:
        driver.kill()
        driver.communicate()


def named(driver: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    return [each for each in psutil.Process(driver.pid).children() if each.name() == name]


def is_guard(process: psutil.Process) -> bool:
    try:
        return "clear_up" in " ".join(process.cmdline())
    except psutil.Error:  # it has ended meanwhile
        return False


def is_up(server: psutil.Process) -> bool:
    """Whether it has come so far that it says something of its own end: SIGABRT has a handler."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGABRT - 1) & 1)


@pytest.mark.parametrize("server", ["gcs_server", "raylet"])
def test_a_server_that_dies_while_ray_starts_is_told_at_once_and_nothing_is_left(server: str) -> None:
    """Ray itself waits for it for half a minute."""
    with starting(server) as (driver, _):
        named(driver, server)[0].kill()
        began = time.monotonic()
        words, _ = driver.communicate(timeout=30)
        assert time.monotonic() - began < 3
        assert (words.strip(), driver.returncode) == (f"Ray's {server} died", 7)


def test_what_a_server_says_of_its_end_is_told_with_it() -> None:
    with starting("raylet") as (driver, _):
        named(driver, "raylet")[0].send_signal(signal.SIGABRT)
        words, _ = driver.communicate(timeout=30)
        assert words.startswith("Ray's raylet died: *** SIGABRT received at time="), words


@pytest.mark.parametrize("way", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT], ids=lambda way: way.name)
def test_a_signal_that_ends_rays_servers_too_is_an_interrupt(way: signal.Signals) -> None:
    """As of a terminal that is closed."""
    with starting("raylet") as (driver, _):
        os.killpg(driver.pid, way)
        words, _ = driver.communicate(timeout=30)
        assert (words.strip(), driver.returncode) == (f"interrupted by {way.name}", 130)
