"""What the doctor decides before it takes anything of a cluster."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from hand_driven import toy_spec

from tune_service.cluster_room import ClusterRoom, kinds_of
from tune_service.doctor import _Doctor
from tune_service.storage import Storage


def doctor(tmp_path: Path, **sections: Any) -> _Doctor:
    place: Any = SimpleNamespace(room=ClusterRoom(kinds_of([(8, 1)])))
    return _Doctor(toy_spec(tmp_path, **sections), tmp_path, Storage(tmp_path), place, lambda line: None)


@pytest.mark.parametrize(("comes", "why_not"), [(True, ""), (False, "no room came in 0 s: others have it")])
def test_whether_there_is_room_is_the_placement_groups_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes: bool, why_not: str
) -> None:
    """What is free of a GPU may be 0.75 of it: a quarter fits, and Ray alone knows on which one."""
    group = SimpleNamespace(wait=lambda timeout_s: comes)
    removed: list[Any] = []
    monkeypatch.setattr(ray.util, "placement_group", lambda bundles: group)
    monkeypatch.setattr(ray.util, "remove_placement_group", removed.append)
    monkeypatch.setattr("tune_service.doctor.ROOM_S", 0.0)
    monkeypatch.setattr("tune_service.doctor.troubles", list)
    quarter = doctor(tmp_path, resources={"workers": 1, "gpus_per_worker": 0.25})
    with quarter._room(start_nodes=False) as found:
        assert found == (group if comes else None, why_not)
    assert removed == [group]
