"""Hands a new study to a cluster."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tune_service.cluster_room import not_for_clusters
from tune_service.parcel import pack
from tune_service.remote import QUEUE_S, RemoteStudies
from tune_service.spec import dump_yaml, load_spec


def submit_study(
    path: Path, overrides: Sequence[str], name: str | None, studies: RemoteStudies, wait: bool
) -> tuple[str, str]:
    """Checks the spec, ships it with the user's code and local data. Returns (study, job).

    It has begun then, or, unless `wait`, the cluster has not come to it in QUEUE_S: the job is in its queue.

    What only the cluster knows (a name that is taken, what a node holds) is checked there, before anything is made.
    """
    spec = load_spec(path, overrides, name, here=False, also=not_for_clusters)
    for line in spec.remarks():
        print(line, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "study.zip"
        pack(spec, package)
        return spec.name, studies.submit(spec.name, dump_yaml(spec), package, None if wait else QUEUE_S)
