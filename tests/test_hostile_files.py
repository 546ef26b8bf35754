"""Specs, records and checkpoints of a stranger: nothing in them runs, nothing outside of them is read or written."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hand_driven import HandDriven

from trainables.checkpoint import MANIFEST, CheckpointStore, Manifest, sha256, verify
from trainables.errors import CheckpointError, UserError
from tune_service.best import export_best
from tune_service.errors import SpecError, StorageError
from tune_service.record import Record
from tune_service.spec import load_spec
from tune_service.study import delete_study


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, proof: Path) -> None:
        self._proof = str(proof)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (self._proof, "w")


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """The file that there is when a trap went off."""
    path = tmp_path / "proof"
    pickle.loads(pickle.dumps(Trap(path))).close()  # noqa: S301  (ours)
    assert path.exists()  # the trap works
    path.unlink()
    return path


# ---- specs


def test_a_spec_that_asks_yaml_to_run_something_is_refused_and_nothing_runs(tmp_path: Path, proof: Path) -> None:
    spec = tmp_path / "spec.yaml"
    for tag in ("python/object/apply:builtins.open", "python/object/new:builtins.open", "python/name:os.system"):
        spec.write_text(f"name: toy\ntrainable: !!{tag} [{proof}, w]\n")
        with pytest.raises(SpecError) as refusal:
            load_spec(spec)
        assert "YAML" in refusal.value.problems[0].rule and not proof.exists()
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(spec.read_text())


def test_a_few_lines_of_aliases_that_stand_for_billions_of_values_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    spec = tmp_path / "spec.yaml"
    spec.write_text("\n".join([*lines, "name: toy", "training: {x: *a11}", "trainable: a:b"]))
    with pytest.raises(SpecError) as refusal:
        load_spec(spec)
    assert refusal.value.problems[0].found == "aliases that stand for too much"


# ---- records

CREATE = {"op_code": 0, "worker_id": "w", "study_name": "toy", "directions": [2]}


def attr(name: str, value: Any) -> dict[str, Any]:
    return {"op_code": 2, "worker_id": "w", "study_id": 0, "user_attr": {name: value}}


def trial(**fields: Any) -> dict[str, Any]:
    return {"op_code": 4, "worker_id": "w", "study_id": 0, "datetime_start": None, "state": 1} | fields


SPEC = {"objective": {"metric": "score", "mode": "max"}, "folder": "/", "name": "toy"}
SOUND = [CREATE, attr("format", 1), attr("spec", SPEC), attr("budget_trials", 4)]
FLOAT = '{"name": "FloatDistribution", "attributes": {"low": 0.0, "high": 1.0, "log": false, "step": null}}'
HOSTILE: dict[str, Any] = {
    "a list": [*SOUND, []],
    "a number": [*SOUND, 7],
    "an unknown operation": [*SOUND, {"op_code": 99, "worker_id": "w"}],
    "an operation that is text": [*SOUND, {"op_code": "os.system", "worker_id": "w"}],
    "a format that is text": [CREATE, attr("format", "1; import os"), *SOUND[2:]],
    "no format": [CREATE, *SOUND[2:]],
    "a spec that is text": [CREATE, SOUND[1], attr("spec", "x"), SOUND[3]],
    "an objective that is a list": [CREATE, SOUND[1], attr("spec", {"objective": ["a"]}), SOUND[3]],
    "a budget that is a mapping": [*SOUND[:3], attr("budget_trials", {})],
    "a class of another module": [*SOUND, trial(params={"x": 0.5}, distributions={"x": FLOAT.replace("Float", "os.")})],
    "a choice that is not there": [
        *SOUND,
        trial(
            params={"x": 9.0},
            distributions={"x": '{"name": "CategoricalDistribution", "attributes": {"choices": [1]}}'},
        ),
    ],
    "a state that is none": [*SOUND, trial(state=77)],
    "a report without an epoch": [*SOUND, trial(user_attrs={"report:../../x": {"metrics": {}}})],
    "a report that is text": [*SOUND, trial(user_attrs={"report:1": "x"})],
    "a report of texts": [*SOUND, trial(user_attrs={"report:1": {"metrics": {"score": "__import__('os')"}}})],
    "a reason that is a list": [*SOUND, trial(user_attrs={"reason": [1], "started_at": "x"})],
    "a deep nest": "[" * 100_000 + "\n",
    "a pickle": None,
    "another study": [CREATE | {"study_name": "../../elsewhere"}, *SOUND[1:]],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_record_is_refused_and_nothing_runs(tmp_path: Path, proof: Path, kind: str) -> None:
    study = HandDriven(tmp_path)
    study.kill()
    lines = HOSTILE[kind]
    if lines is None:
        study.folder.journal.write_bytes(pickle.dumps(Trap(proof)) + b"\n" + pickle.dumps(Trap(proof)) + b"\n")
    elif isinstance(lines, str):
        study.folder.journal.write_text(lines + "[1]\n")
    else:
        study.folder.journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(StorageError) as refusal:
        Record.open(study.folder).status(deep=True)
    assert "record" in refusal.value.problems[0].rule and len(str(refusal.value)) < 2000
    assert not proof.exists() and sorted(path.name for path in tmp_path.rglob("*")) == before


def test_the_lines_above_are_a_record_but_for_what_is_wrong_with_them(tmp_path: Path) -> None:
    study = HandDriven(tmp_path)
    study.kill()
    metrics = {"score": 0.5, "loss": float("inf")}  # which JSON has not
    sound = trial(params={"x": 0.5}, distributions={"x": FLOAT}, user_attrs={"report:1": {"metrics": metrics}})
    study.folder.journal.write_text("".join(json.dumps(line) + "\n" for line in [*SOUND, sound]))
    (found,) = Record.open(study.folder).status().trials
    assert (found.params, found.reports[0].metrics) == ({"x": 0.5}, {"score": 0.5, "loss": None})


@pytest.mark.parametrize("name", ["driver.lock", "record.lock"])
def test_a_lock_file_that_leads_elsewhere_is_neither_emptied_nor_written(tmp_path: Path, name: str) -> None:
    study = HandDriven(tmp_path)
    study.kill()
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    (study.folder.path / name).unlink(missing_ok=True)
    (study.folder.path / name).symlink_to(precious)
    with pytest.raises(StorageError) as refusal:
        if name == "driver.lock":
            delete_study("toy", study.storage)
        else:
            Record.open(study.folder).request_stop(now=False)
    assert refusal.value.problems[0].found == "a symbolic link"
    assert precious.read_text() == "years of work"


# ---- checkpoints


def committed(tmp_path: Path, names: list[str]) -> tuple[CheckpointStore, Path]:
    """A checkpoint, and then a manifest of a stranger's that names `names` with their right sizes and hashes."""
    store = CheckpointStore(tmp_path / "study" / "checkpoints")
    (store.stage(0, 1) / "weights").write_text("w")
    store.commit(0, 1, {"score": 0.5})
    folder = store.folder(0, 1)
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in names:
        path = folder / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return store, folder


@pytest.mark.parametrize("way", ["up", "absolute", "link", "linked folder", "nowhere"])
def test_a_manifest_that_names_a_file_outside_is_no_manifest(tmp_path: Path, way: str) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("s")
    inside = tmp_path / "study" / "checkpoints" / "trial-00000" / "epoch-0001"
    if way in ("link", "linked folder"):
        committed(tmp_path, [])
        (inside / "link").symlink_to(secret if way == "linked folder" else secret / "key")
    names = {
        "up": os.path.relpath(secret / "key", inside),
        "absolute": str(secret / "key"),
        "link": "link",
        "linked folder": "link/key",
        "nowhere": "../../../../../../../../../../../nowhere",
    }
    if way == "nowhere":
        store, folder = committed(tmp_path, [])
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"][names[way]] = {"bytes": 1, "sha256": "0"}
        (folder / MANIFEST).write_text(json.dumps(manifest))
    elif way in ("up", "absolute"):
        committed(tmp_path, [])
        store, folder = committed(tmp_path, [names[way]])
    else:
        manifest = json.loads((inside / MANIFEST).read_text())
        manifest["files"][names[way]] = {"bytes": 1, "sha256": sha256(secret / "key")}
        (inside / MANIFEST).write_text(json.dumps(manifest))
        store, folder = CheckpointStore(tmp_path / "study" / "checkpoints"), inside
    assert not verify(folder, deep=False) and not verify(folder) and store.latest(0) is None
    if "link" not in way:
        with pytest.raises(CheckpointError, match="names a file that is not one of the folder"):
            Manifest.read(folder)


ODD = """[]
"x"
{}
{"format": 1, "trial": 0, "epoch": 1, "metrics": {"score": "x"}, "files": {}}
{"format": 1, "trial": 0, "epoch": 1, "metrics": {}, "files": ["a"]}
{"format": 1, "trial": "x", "epoch": 1, "metrics": {}, "files": {}}
{"format": 1, "trial": 0, "epoch": 1, "metrics": {}, "files": {"": {"bytes": 1, "sha256": "0"}}}
\x80\x04pickle""".splitlines()


@pytest.mark.parametrize("manifest", [*ODD, "[" * 100_000], ids=range(len(ODD) + 1))
def test_a_manifest_of_odd_types_is_no_manifest(tmp_path: Path, manifest: str) -> None:
    store, folder = committed(tmp_path, [])
    (folder / MANIFEST).write_bytes(manifest.encode("latin-1"))
    assert not verify(folder) and store.latest(0) is None


def test_a_manifest_of_another_trial_is_not_gone_on_from(tmp_path: Path) -> None:
    store, folder = committed(tmp_path, [])
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"epoch": 10**9}))
    assert store.latest(0) is None


def test_folders_that_are_not_ours_are_passed_over(tmp_path: Path) -> None:
    store, folder = committed(tmp_path, [])
    for name in ("trial-x", "trial-00000/epoch-", "trial-00000/epoch-1e9", "trial-00000/epoch-٣"):
        (store.root / name).mkdir()
    (folder.parent / "epoch-0002").symlink_to(folder)
    assert store.kept() == {0: [1]}


def test_of_a_model_nothing_is_exported_that_is_not_in_the_manifest_or_could_be_a_pickle(
    tmp_path: Path, proof: Path
) -> None:
    spec: dict[str, Any] = {"trainable": "finetune", "model": {"name": "gpt2"}, "data": {"task": "mrpc"}}
    spec |= {"search_space": {"learning_rate": {"log_uniform": [1e-5, 1e-3]}}, "objective": {"metric": "eval_f1"}}
    study = HandDriven(tmp_path, **spec)
    number, store = study.begin(), study.folder.checkpoints
    model = store.stage(number, 1) / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(pickle.dumps(Trap(proof)))
    (model / "config.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(proof)))
    store.commit(number, 1, {"eval_f1": 0.5})
    study.driver.result(
        {"number": number, "next_within_s": 1.0, "epoch": 1, "metrics": [("eval_f1", 0.5)]}
        | {"saves": False, "checkpoint_bytes": 1, "finished": True}
    )
    study.kill()
    folder = store.folder(number, 1) / "model"
    (folder / "training_args.bin").write_bytes(pickle.dumps(Trap(proof)))
    (folder / "stolen.json").symlink_to("/etc/hostname")
    export_best("toy", tmp_path / "best", study.storage)
    exported = sorted(path.name for path in (tmp_path / "best" / "model").iterdir())
    assert exported == ["config.json", "model.safetensors"] and not proof.exists()


def test_a_pickle_named_as_safetensors_is_not_opened(tmp_path: Path, proof: Path) -> None:
    torch_files = pytest.importorskip("safetensors.torch")
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Trap(proof)))
    with pytest.raises(Exception, match=r"(?i)header"):
        torch_files.load_file(tmp_path / "model.safetensors")
    assert not proof.exists()


def test_every_refusal_is_an_error_of_ours() -> None:
    assert issubclass(SpecError, UserError) and issubclass(StorageError, UserError)
