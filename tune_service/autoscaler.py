"""What the cluster's autoscaler may start, and what keeps it from doing so, as Ray itself has it.

Ray has no public way to ask either: the first stands in the file that the autoscaler was started with, the second in
what `ray status` prints, which comes from one of two places by the autoscaler's version.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from tune_service.cluster_room import NodeKind


def cluster_file() -> Mapping[str, Any] | None:
    """What the autoscaler on this head was told; None: there is none, nodes come by hand."""
    address = f"--gcs-address={os.environ.get('RAY_ADDRESS', '')}"
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        path = next((word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")), None)
        if path and address in words:
            try:
                found = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
            except (OSError, yaml.YAMLError):
                return None
            return found if isinstance(found, dict) else None
    return None


def kinds_in(file: Mapping[str, Any] | None) -> tuple[tuple[NodeKind, ...], int | None, bool]:
    """(kinds of worker nodes, the limit over all of them, whether these are all that can come)."""
    if file is None:
        return (), None, False
    limit, kinds, is_final = file.get("max_workers"), [], True
    for name, kind in (file.get("available_node_types") or {}).items():
        resources, count = kind.get("resources") or {}, int(kind.get("max_workers") or 0)
        if name == file.get("head_node_type") and file.get("provider", {}).get("type") != "local":
            continue
        if not {"CPU", "GPU"} & resources.keys():
            is_final = is_final and count == 0  # Ray finds out what such a node has when it is there
        elif count:
            kinds.append(NodeKind(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)), count))
    return tuple(kinds), None if limit is None else int(limit), is_final


def troubles() -> Iterator[str]:
    """What the autoscaler is at, in sentences: nodes that are on their way, and those that did not come."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    try:
        yield from _of_v2() if is_autoscaler_v2() else _of_v1()
    except Exception as error:  # a word for people is not worth a study: this is no part of Ray's public API
        print(f"the autoscaler's state could not be read: {type(error).__name__}: {error}")


def _of_v2() -> Iterator[str]:
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(os.environ["RAY_ADDRESS"])
    for launch in status.pending_launches:
        yield f"{launch.count} x {launch.ray_node_type_name} requested from the provider"
    for node in status.pending_nodes:
        details = f" ({node.details})" if node.details else ""
        yield f"a node {node.ray_node_type_name} at {node.ip_address or 'no address yet'} is starting{details}"
    for launch in status.failed_launches:
        why = launch.details or "no reason given"
        yield f"{launch.count} x {launch.ray_node_type_name} could not be started: {why}"


def _of_v1() -> Iterator[str]:
    from ray.experimental.internal_kv import _internal_kv_get

    raw = _internal_kv_get("__autoscaling_status")
    report = json.loads(raw).get("autoscaler_report", {}) if raw else {}
    for kind, count in (report.get("pending_launches") or {}).items():
        yield f"{count} x {kind} requested from the provider"
    for address, kind, state in report.get("pending_nodes") or ():
        yield f"a node {kind} at {address or 'no address yet'} is starting ({state})"
    for address, kind in report.get("failed_nodes") or ():
        yield f"a node {kind} at {address} did not come up"
    availability = (report.get("node_availability_summary") or {}).get("node_availabilities") or {}
    for kind, record in availability.items():
        why = (record or {}).get("unavailable_node_information") or {}
        if not (record or {}).get("is_available", True):
            yield f"{kind} cannot be had: {why.get('category', '')} {why.get('description', '')}".strip()
