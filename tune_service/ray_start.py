"""What goes round `ray.init`: what it takes no argument for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from signal import SIG_IGN, SIGHUP, SIGINT, SIGTERM, Signals, getsignal, raise_signal, signal
from threading import Event, Thread
from types import FrameType
from typing import Any

NODE_S = 10.0
"""Within it Ray's node is there on any machine; else Ray goes on looking by itself."""
NODE_LOOK_S = 0.02
PORT_MS = 1000
"""How long Ray may take to read its server's port when that is written."""
NOWHERE = b"127.0.0.1:9"
"""An address where nobody listens."""


@contextmanager
def interrupts_put_off(told: list[int] | None = None) -> Iterator[None]:
    """Ctrl-C and its kin wait until `ray.init` is done, some seconds, but for a second one. `told` gets their numbers.

    An exception where it connects ends the process by SIGSEGV or SIGABRT at times. So does its own answer to SIGTERM,
    which it would put in the place of ours.
    """
    from ray._private import utils

    told = [] if told is None else told
    before = {number: getsignal(number) for number in (SIGINT, SIGTERM, SIGHUP)}

    def put_off(number: int, frame: FrameType | None) -> None:
        told.append(number)
        handler = before[Signals(number)]
        if len(told) > 1 and callable(handler):
            handler(number, frame)

    for number, handler in before.items():
        if handler != SIG_IGN:
            signal(number, put_off)
    try:
        with _replaced(utils, "set_sigterm_handler", lambda handler: None):
            yield
    finally:
        for number, handler in before.items():
            signal(number, handler)
        if told:
            raise_signal(told[0])


@contextmanager
def quick_start(told: Sequence[int] = ()) -> Iterator[None]:
    """For a Ray of one's own: half of its processes, and 1.5 s of its start, serve nothing here.

    These are the dashboard's server, which it starts where none is wanted too, and the agent's part in it; the
    autoscaler; and what passes logs on to a driver that wants none. And it looks for its node once a second, and for
    its server's port ten times, while no thread of this process runs: nobody sees then that the server has died. Here
    it does not wait for either once signals were `told`.
    """
    from ray._private import node, parameter, ray_constants, services, utils
    from ray._private.state import GlobalState

    get_node, wait_for_port = services.get_node, node.wait_for_persisted_port

    def wait_until(is_there: Callable[[], bool], patience_s: float) -> None:
        end = time.monotonic() + patience_s
        while not is_there() and time.monotonic() < end:
            if told:  # nothing is connected yet, so that an exception does no harm
                raise KeyboardInterrupt(Signals(told[0]).name)
            time.sleep(NODE_LOOK_S)

    def wait_for_port_soon(folder: str, node_id: str, name: str, timeout_ms: int) -> int:
        wait_until((Path(folder) / node.get_port_filename(node_id, name)).exists, timeout_ms / 1000)
        return int(wait_for_port(folder, node_id, name, timeout_ms=min(timeout_ms, PORT_MS)))

    def get_node_soon(gcs_address: str, node_id: str) -> Any:
        is_there = Event()

        def look() -> None:
            with suppress(Exception):  # then Ray looks by itself
                state = GlobalState()
                state._initialize_global_state(services._get_gcs_client_options(gcs_address))
                while all(each["NodeID"] != node_id for each in state.node_table()):
                    time.sleep(NODE_LOOK_S)
            is_there.set()

        Thread(target=look, name="node-look", daemon=True).start()  # which stands still where the server is gone
        wait_until(is_there.is_set, NODE_S)
        return get_node(gcs_address, node_id)

    def no_dashboard(
        included: object, required: object, host: object, gcs: str, cluster: str, *_: object, **__: object
    ) -> Any:
        # The agent would look for its address all the time, and log that it found none.
        address, space = ray_constants.DASHBOARD_ADDRESS.encode(), ray_constants.KV_NAMESPACE_DASHBOARD
        services.GcsClient(address=gcs, cluster_id=cluster).internal_kv_put(address, NOWHERE, True, space)
        return "", None

    params = partial(parameter.RayParams, no_monitor=True, include_log_monitor=False)
    with ExitStack() as replaced:
        replaced.enter_context(_replaced(parameter, "RayParams", params))
        replaced.enter_context(_replaced(services, "start_api_server", no_dashboard))
        replaced.enter_context(_replaced(node, "wait_for_persisted_port", wait_for_port_soon))
        replaced.enter_context(_replaced(services, "get_node", get_node_soon))
        replaced.enter_context(_replaced(utils, "get_dashboard_dependency_error", lambda: "none is wanted"))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
