"""What a study takes to a cluster: all that it needs, nothing else, and not more than a dashboard takes."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tune_service import parcel
from tune_service.errors import SpecError
from tune_service.parcel import SPEC, pack
from tune_service.spec import StudySpec, beside, moved, parse_spec

ORIGINS = ".tune-service/origins.json"


def finetune(folder: Path, **sections: Any) -> StudySpec:
    spec = {"name": "s", "model": {"name": "gpt2"}, "data": {"task": "mrpc"}, "search_space": "gpt2"} | sections
    return parse_spec(spec, folder, here=False)


def own(folder: Path, trainable: str = "bakery:train") -> StudySpec:
    spec = {"name": "s", "trainable": trainable, "search_space": {"x": {"choice": [1]}}}
    return parse_spec(spec | {"objective": {"metric": "score"}}, folder, here=False)


def packed(spec: StudySpec, folder: Path) -> dict[str, bytes]:
    pack(spec, folder / "study.zip")
    with zipfile.ZipFile(folder / "study.zip") as package:
        return {name: package.read(name) for name in package.namelist()}


def touch(path: Path, content: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_local_data_and_a_local_model_go_along_and_the_spec_names_them_there(tmp_path: Path) -> None:
    here = tmp_path / "here"
    touch(here / "data/train.csv", "a")
    touch(here / "gpt/config.json", "{}")
    touch(here / "gpt/.cache/x")
    touch(here / "other/huge")
    files = packed(finetune(here, data={"task": "mrpc", "path": "data"}, model={"name": "./gpt"}), tmp_path)
    own = [".tune-service/data/train.csv", ".tune-service/model/config.json", ORIGINS, SPEC]
    assert sorted(files) == own
    spec = json.loads(files[SPEC])
    assert (spec["data"]["path"], spec["model"]["name"]) == (".tune-service/data", ".tune-service/model")


def test_a_hub_model_and_a_folder_of_the_clusters_own_stay_as_they_are(tmp_path: Path) -> None:
    files = packed(finetune(tmp_path, data={"task": "mrpc", "path": "/of/the/cluster"}), tmp_path)
    spec = json.loads(files[SPEC])
    assert (sorted(files), spec["data"]["path"], spec["model"]["name"]) == ([ORIGINS, SPEC], "/of/the/cluster", "gpt2")


def test_a_local_folder_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        packed(finetune(tmp_path, data={"task": "mrpc", "path": "data"}), tmp_path)
    assert [problem.place for problem in caught.value.problems] == ["data.path"]


def test_the_users_code_goes_along_without_what_is_hidden_compiled_or_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    for name in ("bakery.py", "recipes/rye.json", ".git/HEAD", "__pycache__/a.pyc", "venv/pyvenv.cfg", "venv/lib/b.py"):
        touch(here / name)
    touch(here / "studies/old/record.journal")
    touch(here / "more-studies/old/record.json")
    assert sorted(packed(own(here), tmp_path)) == [ORIGINS, SPEC, "bakery.py", "recipes/rye.json"]


def test_a_link_that_leads_to_a_folder_above_is_not_followed_and_any_other_is(tmp_path: Path) -> None:
    here = tmp_path / "here"
    touch(here / "bakery.py")
    touch(tmp_path / "cellar/flour.csv")
    for name, to in {"a": ".", "b": ".", "cellar": "../cellar", "../cellar/oven": "../here"}.items():
        (here / name).symlink_to(to)
    assert sorted(packed(own(here), tmp_path)) == [ORIGINS, SPEC, "bakery.py", "cellar/flour.csv"]


@pytest.mark.parametrize("key", ["data.path", "trainable"])
def test_a_file_whose_name_is_not_utf_8_is_named_in_the_refusal(key: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    touch(here / "data/train.csv")
    (here / "data" / os.fsdecode(b"caf\xe9.csv")).write_text("")
    spec = own(here) if key == "trainable" else finetune(here, data={"task": "mrpc", "path": "data"})
    with pytest.raises(SpecError) as refusal:
        packed(spec, tmp_path)
    (problem,) = refusal.value.problems
    assert (problem.place, problem.found) == (key, rf"{here}/data/caf\xe9.csv")


def test_a_module_on_pythonpath_goes_along_and_an_installed_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "here/spec.yaml")
    touch(tmp_path / "path/oven/__init__.py")
    touch(tmp_path / "path/oven/heat.py")
    touch(tmp_path / "site-packages/shop.py")
    for folder in ("path", "site-packages"):
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    assert sorted(packed(own(tmp_path / "here", "oven.heat:train"), tmp_path)) == [
        ORIGINS,
        SPEC,
        "oven/__init__.py",
        "oven/heat.py",
        "spec.yaml",
    ]
    assert sorted(packed(own(tmp_path / "here", "shop:train"), tmp_path)) == [ORIGINS, SPEC, "spec.yaml"]


def test_the_same_content_is_the_same_package(tmp_path: Path) -> None:
    touch(tmp_path / "here/bakery.py")
    first = packed(own(tmp_path / "here"), tmp_path), (tmp_path / "study.zip").read_bytes()
    os.utime(tmp_path / "here/bakery.py", (0, 0))
    assert first == (packed(own(tmp_path / "here"), tmp_path), (tmp_path / "study.zip").read_bytes())


def test_what_is_too_big_is_refused_with_the_largest_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcel, "_MAX_RAW_BYTES", 3_000_000)
    touch(tmp_path / "here/bakery.py")
    touch(tmp_path / "here/photos/loaf.raw", "x" * 4_000_000)
    with pytest.raises(SpecError) as caught:
        packed(own(tmp_path / "here"), tmp_path)
    (problem,) = caught.value.problems
    assert problem.found.startswith("4 MB; the largest: photos/loaf.raw 4 MB, bakery.py 0 MB")
    assert "at the same absolute path" in problem.expected


def test_a_spec_moves_with_its_folder_and_is_relative_to_a_ranks_copy(tmp_path: Path) -> None:
    touch(tmp_path / "job/.tune-service/data/train.csv")
    there = finetune(tmp_path / "job", data={"task": "mrpc", "path": ".tune-service/data"})
    kept = moved(there, tmp_path / "job", tmp_path / "kept")
    assert kept.folder == tmp_path / "kept"
    assert kept.data is not None and kept.data.path == str(tmp_path / "kept/.tune-service/data")
    seen = beside(kept, tmp_path / "kept")
    assert seen.data is not None and seen.data.path == ".tune-service/data"
    assert seen.model is not None and seen.model.name == "gpt2"


def test_where_a_shipped_folder_was_at_home_is_known_on_the_cluster(tmp_path: Path) -> None:
    touch(tmp_path / "here/data/train.csv")
    packed(finetune(tmp_path / "here", data={"task": "mrpc", "path": "data"}), tmp_path)
    with zipfile.ZipFile(tmp_path / "study.zip") as package:
        package.extractall(tmp_path / "shipped")
    there = str(tmp_path / "shipped/.tune-service/data")
    assert parcel.origins(tmp_path / "shipped") == {there: str(tmp_path / "here/data")}
    assert parcel.origins(tmp_path) == {}


@pytest.mark.parametrize("name", ["json.py", "optuna/__init__.py", "tune_service/__init__.py"])
def test_a_module_with_a_librarys_name_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    touch(tmp_path / "bakery.py")
    touch(tmp_path / name)
    with pytest.raises(SpecError) as refusal:
        packed(own(tmp_path), tmp_path)
    (problem,) = refusal.value.problems
    assert (problem.place, problem.found) == (
        "trainable",
        f"{name.partition('/')[0].removesuffix('.py')} in {tmp_path}",
    )


def test_folders_that_are_no_packages_and_modules_inside_packages_may_be_called_anything(tmp_path: Path) -> None:
    for name in ("bakery/__init__.py", "bakery/json.py", "datasets/bread.csv", "optuna/notes.txt", "oven.py"):
        touch(tmp_path / "here" / name)
    files = packed(own(tmp_path / "here", "bakery:train"), tmp_path)
    assert {"bakery/json.py", "datasets/bread.csv", "optuna/notes.txt", "oven.py"} <= files.keys()
