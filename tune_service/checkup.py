"""`check SPEC --address A` on the laptop: what can only be seen from here, and what the cluster's doctor sends."""

from __future__ import annotations

import socket
import sys
import tempfile
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from tune_service import diagnosis, node_look
from tune_service.check import Check
from tune_service.cluster_room import not_for_clusters
from tune_service.diagnosis import Port
from tune_service.parcel import pack
from tune_service.remote import RemoteStudies
from tune_service.spec import load_spec

REACH_S = 3.0


def check_cluster(
    path: Path, overrides: Sequence[str], name: str | None, studies: RemoteStudies, start_nodes: bool
) -> Generator[Check, None, None]:
    """Each check as soon as it is done. SpecError when the spec alone is wrong."""
    spec = load_spec(path, overrides, name, here=False, also=not_for_clusters)
    yield Check("spec", True, str(path), "; ".join(spec.remarks()))
    yield _dashboard(studies)
    listening: list[Port] = []
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "study.zip"
        pack(spec, package)
        # Its end stops the doctor's job, where nobody waits for the rest.
        with closing(studies.checkup(spec.name, package, start_nodes, node_look.versions())) as documents:
            for document in documents:
                if "check" in document:
                    yield Check(**document["check"], code=document["code"])
                elif "tell" in document:
                    print(document["tell"], file=sys.stderr, flush=True)
                elif "ports" in document:
                    listening = [Port(*each) for each in document["ports"]]
    yield diagnosis.reach(studies.host, _reached(studies.host, listening))


def _dashboard(studies: RemoteStudies) -> Check:
    if studies.refuses_strangers():
        return Check("dashboard", True, f"{studies.address} refuses who shows no token")
    found = f"{studies.address} answers who shows no token: anybody who reaches it runs programs there"
    return diagnosis.failed("dashboard", found, diagnosis.TOKEN_ADVICE)


def _reached(host: str | None, listening: Sequence[Port]) -> list[Port]:
    """The ports that this machine can connect to: the head's, by the address it is known by here, and others' where
    their own address is one of the internet."""
    tried = [
        port if diagnosis.is_public(port.address) else port.at(host)
        for port in listening
        if diagnosis.is_public(port.address) or port.is_heads
        if host is not None
    ]
    with ThreadPoolExecutor(32) as threads:
        return [port for port, is_open in zip(tried, threads.map(_is_open, tried), strict=True) if is_open]


def _is_open(port: Port) -> bool:
    try:
        socket.create_connection((port.address, port.number), timeout=REACH_S).close()
    except OSError:
        return False
    return True
