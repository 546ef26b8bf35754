"""What a study takes to a cluster: its spec, the user's code, local data and a local model, in one zip file.

On every node Ray unpacks it as the working directory of the study's processes.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import re
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from trainables.errors import Problem
from tune_service.dashboard import MAX_PACKAGE_BYTES
from tune_service.errors import SpecError
from tune_service.spec import StudySpec
from tune_service.storage import RECORDS

_OWN = ".tune-service"
_OWN_PACKAGES = ("search_spaces", "trainables", "tune_service")
SPEC = f"{_OWN}/spec.json"
FOLDER_KEYS = {("data", "path"): f"{_OWN}/data", ("model", "name"): f"{_OWN}/model"}
"""What a spec names that may be a folder -> where that lies in the package."""
_ORIGINS = f"{_OWN}/origins.json"
_MAX_RAW_BYTES = 10 * MAX_PACKAGE_BYTES
"""More than this is not even packed."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
_SURROGATE = re.compile("[\ud800-\udfff]")


def pack(spec: StudySpec, to: Path) -> None:
    """Writes the zip file. SpecError when something named is neither here nor named for the cluster, or cannot go."""
    mapping = spec.to_mapping()
    files: dict[str, Path] = {}
    origins: dict[str, str] = {}
    for (section, key), place in FOLDER_KEYS.items():
        named = (mapping.get(section) or {}).get(key)
        if named is not None and Path(named).is_dir():
            found = _files(Path(named))
            _check_names(f"{section}.{key}", found)
            _check_size(f"{section}.{key}", Path(named), found)
            files |= {f"{place}/{name}": path for name, path in found.items()}
            mapping[section] = mapping[section] | {key: place}
            origins[place] = named
        elif named is not None and Path(named).is_relative_to(spec.folder):
            rule = "a local folder exists here and is shipped; one of the cluster's is named by its absolute path there"
            raise SpecError(Problem(f"{section}.{key}", rule, f"no folder {named}", "a folder that exists"))
    if not spec.is_finetune:
        code = _code(spec)
        _check_names("trainable", code)
        _refuse_shadows(spec.folder, code)
        _check_size("trainable", spec.folder, code)
        files |= code
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr(zipfile.ZipInfo(SPEC, _EPOCH), json.dumps(mapping))
        package.writestr(zipfile.ZipInfo(_ORIGINS, _EPOCH), json.dumps(origins))
        for name, path in sorted(files.items()):
            info = zipfile.ZipInfo(name, _EPOCH)  # no dates: the same content is the same package
            info.external_attr = (path.stat().st_mode & 0o777) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            with path.open("rb") as source, package.open(info, "w") as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)
    size = to.stat().st_size
    if size > MAX_PACKAGE_BYTES:
        raise _too_big(_key_of_largest(files), size, files)


def origins(shipped: Path) -> dict[str, str]:
    """Folder in a study's `shipped` -> where it was on the user's own machine."""
    try:
        found = json.loads((shipped / _ORIGINS).read_text(encoding="utf-8"))
    except FileNotFoundError:  # the study was begun where it is
        return {}
    return {str(shipped / place): str(named) for place, named in found.items()}


def _code(spec: StudySpec) -> dict[str, Path]:
    """The spec's folder whole, and the trainable's module where that lies elsewhere and is not installed."""
    found = _files(spec.folder)
    top = spec.trainable.partition(":")[0].partition(".")[0]
    module = importlib.machinery.PathFinder.find_spec(top, [str(spec.folder), *sys.path])
    places = [Path(place) for place in (module.submodule_search_locations or ())] if module is not None else []
    if not places and module is not None and module.origin:
        places = [Path(module.origin)]
    for place in places:
        if place.is_relative_to(spec.folder) or {"site-packages", "dist-packages"} & set(place.parts):
            continue
        inner = (
            {place.name: place} if place.is_file() else {f"{top}/{name}": path for name, path in _files(place).items()}
        )
        found |= inner
    return found


def _refuse_shadows(folder: Path, code: Iterable[str]) -> None:
    """On a cluster the user's code comes first among all modules: one with a library's name would take its place."""
    names = {name.removesuffix(".py").removesuffix("/__init__") for name in code if name.endswith(".py")}
    # A folder without __init__.py takes nobody's place: Python looks on for a package.
    hidden = sorted(name for name in names if "/" not in name and _is_library(name))
    if hidden:
        rule = "no module of your own has the name of a library, whose place it would take on the cluster"
        found = f"{', '.join(hidden)} in {folder}"
        expected = "another name, or the spec and its module in a folder of their own"
        raise SpecError(Problem("trainable", rule, found, expected))


def _is_library(name: str) -> bool:
    if name in sys.stdlib_module_names or name in _OWN_PACKAGES:
        return True
    installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return importlib.machinery.PathFinder.find_spec(name, installed) is not None


def _files(root: Path) -> dict[str, Path]:
    """Name inside `root` -> file. Leaves out what is hidden, compiled, an environment of Python's, or a storage."""
    return {str(path.relative_to(root)): path for path in _walk(root)}


def _walk(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """`above`: the folders on the way here. A link that leads to one of them is not followed: it would never end."""
    found = folder.stat()
    here = (found.st_dev, found.st_ino)
    if here in above:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and not (path / "pyvenv.cfg").exists() and not _is_storage(path):
            yield from _walk(path, above | {here})


def _is_storage(folder: Path) -> bool:
    return any(True for name in RECORDS for _ in folder.glob(f"*/{name}"))


def _check_names(key: str, files: Mapping[str, Path]) -> None:
    """A zip file has names in UTF-8 alone. Of a folder's other names Python holds the odd bytes as surrogates."""
    wrong = [path for name, path in sorted(files.items()) if _SURROGATE.search(name)]
    if wrong:
        rule = "the names of files that a study takes to a cluster are UTF-8"
        found = ", ".join(os.fsencode(path).decode(errors="backslashreplace") for path in wrong[:3])
        raise SpecError(Problem(key, rule, found, "other names, or the files elsewhere"))


def _check_size(key: str, folder: Path, files: dict[str, Path]) -> None:
    size = sum(path.stat().st_size for path in files.values())
    if size > _MAX_RAW_BYTES:
        raise _too_big(key, size, files)


def _key_of_largest(files: dict[str, Path]) -> str:
    """The key of the spec that brought it."""
    largest = max(files, key=lambda name: files[name].stat().st_size)
    named = (f"{section}.{key}" for (section, key), place in FOLDER_KEYS.items() if largest.startswith(f"{place}/"))
    return next(named, "trainable")


def _too_big(key: str, size: int, files: dict[str, Path]) -> SpecError:
    largest = sorted(files.items(), key=lambda item: item[1].stat().st_size, reverse=True)[:3]
    names = ", ".join(f"{name} {path.stat().st_size / 1e6:.0f} MB" for name, path in largest)
    rule = f"what a study takes to a cluster is at most {MAX_PACKAGE_BYTES / 1e6:.0f} MB, packed"
    expected = "big folders put on every node, at the same absolute path, and that path in the spec"
    return SpecError(Problem(key, rule, f"{size / 1e6:.0f} MB; the largest: {names}", expected))
