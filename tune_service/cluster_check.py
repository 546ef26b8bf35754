"""Refuses what Ray's launcher would silently ignore in a cluster file, and what would leave the cluster open."""

from __future__ import annotations

import difflib
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from trainables.errors import Problem
from tune_service.cluster_init import LATEST_IMAGE
from tune_service.cluster_keys import Shape, cluster_shape
from tune_service.cluster_template import CHANGE_ME, PROVIDERS
from tune_service.errors import SpecError
from tune_service.spec_draft import Draft, show
from tune_service.spec_yaml import read_yaml

_MAKE_TOKEN = "(umask 077; ray get-auth-token --generate >/dev/null)"
_EVERYWHERE = {"0.0.0.0/0", "::/0"}
_TYPE_NAMES = {str: "text", int: "an integer", bool: "true or false"}


def check_cluster_file(path: Path) -> None:
    """Raises SpecError with everything that is wrong with a file for `ray up`, called in this folder."""
    draft = _read(path)
    provider = draft.raw.get("provider")
    kind = provider.get("type") if isinstance(provider, dict) else None
    if not isinstance(kind, str) or kind not in PROVIDERS:
        draft.fault("provider.type", "a provider is one of three", kind, "aws, gcp or local")
        raise SpecError(draft.problems)
    _check_shape(draft, draft.raw, cluster_shape(kind), "")
    if not draft.problems:  # of more than one fault Ray tells the first
        _ask_ray(draft)
    if not draft.problems:
        _check_defaults(draft, kind)
        _check_exposure(draft)
        _check_files(draft)
        _check_placeholders(draft)
    if draft.problems:
        raise SpecError(draft.problems)


def _read(path: Path) -> Draft:
    try:
        document, keys = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(
            Problem(str(path), "a cluster file is YAML that can be read", str(error), "one of cluster init")
        ) from error
    if not isinstance(document, dict):
        raise SpecError(Problem(str(path), "a cluster file is a mapping", show(document), "one of cluster init"))
    draft = Draft(file=str(path), raw=document, lines={key.path: key.line for key in keys})
    for key in keys:
        if key.twice is not None:
            draft.fault(key.path, "a key stands once in its mapping", f"{key.twice} twice", "one of the two")
    return draft


def _check_shape(draft: Draft, value: object, shape: Shape, key: str) -> None:
    """Unknown keys and values of another kind, wherever they stand."""
    match shape:
        case dict():
            if not isinstance(value, dict):
                draft.fault(key, "a mapping stands here", value, _keys(shape))
                return
            for name, inner in value.items():
                place = f"{key}.{name}" if key else str(name)
                if name in shape or "*" in shape:
                    _check_shape(draft, inner, shape.get(name, shape.get("*")), place)
                else:
                    _unknown(draft, place, str(name), shape)
        case [item]:
            if not isinstance(value, list):
                draft.fault(key, "a list stands here", value, "- ...")
                return
            for number, inner in enumerate(value):
                _check_shape(draft, inner, item, f"{key}[{number}]")
        case frozenset():
            if not isinstance(value, str) or value not in shape:
                draft.fault(key, "only some words stand here", value, _near(str(value), shape))
        case type():
            if type(value) is not shape:
                draft.fault(key, "a value has its key's type", value, _TYPE_NAMES[shape])


def _keys(shape: Iterable[str]) -> str:
    return ", ".join("any name" if name == "*" else name for name in shape)


def _unknown(draft: Draft, key: str, name: str, shape: Iterable[str]) -> None:
    if key == "min_workers":
        draft.fault(key, "Ray ignores min_workers out here", name, "min_workers of a node type")
    else:
        draft.fault(key, "Ray would ignore or refuse this key", name, _near(name, shape))


def _near(name: str, allowed: Iterable[str]) -> str:
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=1) or [
        each for each in names if each.lower() == name.lower().replace("_", "")
    ]
    return near[0] if near else f"one of {', '.join(names)}"


def _ask_ray(draft: Draft) -> None:
    """What Ray itself refuses, in our words."""
    import contextlib
    import copy
    import io
    import logging

    import click
    from ray.autoscaler._private.util import prepare_config, validate_config

    said = io.StringIO()  # it prints and logs beside what it raises
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            validate_config(prepare_config(copy.deepcopy(draft.raw)))
    except (Exception, click.exceptions.Exit, SystemExit) as error:
        path = ".".join(str(each) for each in getattr(error, "absolute_path", ()))
        last_said = said.getvalue().strip().rpartition("\n")[2]
        found = getattr(error, "message", None) or str(error) or last_said or repr(error)
        draft.fault(path, "Ray's launcher accepts the file", found, "what `tune-service cluster init` writes there")
    finally:
        logging.disable(logging.NOTSET)


def _check_defaults(draft: Draft, kind: str) -> None:
    """Where leaving a key out means a default that nobody wants."""
    raw = draft.raw
    if kind == "local":
        return
    if not raw.get("setup_commands"):
        found = "none, for which Ray installs its nightly build"
        draft.fault("setup_commands", "the nodes install pinned packages", found, "those of cluster init")
    if "available_node_types" not in raw:
        draft.fault("available_node_types", "the machines are chosen", "none: Ray has its own", "those of cluster init")
        return
    for name, node_type in raw["available_node_types"].items() if kind == "aws" else ():
        if "ImageId" not in node_type["node_config"]:
            key = f"available_node_types.{name}.node_config"
            draft.fault(key, "the image is pinned", "no ImageId: Ray takes one of Ubuntu 18.04", LATEST_IMAGE)


def _check_exposure(draft: Draft) -> None:
    """The token is on, the dashboard stays on loopback, and no port but ssh is open to the world."""
    raw = draft.raw
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        commands = raw.get(key) or []
        if not any("ray start" in each for each in commands):
            draft.fault(
                key, "Ray is started with a token", "no `ray start`, for which Ray uses one without", "see cluster init"
            )
        for number, command in enumerate(commands):
            if "ray start" in command and "RAY_AUTH_MODE=token" not in command:
                rule = "every `ray start` says RAY_AUTH_MODE=token, for nodes that differ in it refuse each other"
                draft.fault(f"{key}[{number}]", rule, command, "RAY_AUTH_MODE=token ray start ...")
            host = command.partition("--dashboard-host")[2].lstrip("= ").split(" ")[0]
            if host not in ("", "127.0.0.1", "localhost"):
                rule = "the dashboard stays on loopback: outside, the token would travel in clear"
                draft.fault(f"{key}[{number}]", rule, host, "--dashboard-host=127.0.0.1")
    rules = raw["provider"].get("security_group", {}).get("IpPermissions", [])
    for number, rule in enumerate(rules):
        ranges = {
            each.get("CidrIp", each.get("CidrIpv6"))
            for name in ("IpRanges", "Ipv6Ranges")
            for each in rule.get(name, [])
        }
        if ranges & _EVERYWHERE and (rule.get("FromPort"), rule.get("ToPort")) != (22, 22):
            key = f"provider.security_group.IpPermissions[{number}]"
            draft.fault(key, "no port but ssh is open to the world", rule, "a CIDR of yours")


def _check_files(draft: Draft) -> None:
    """What is mounted is there, and nobody else can read the token."""
    for remote, local in (draft.raw.get("file_mounts") or {}).items():
        key, path = f"file_mounts.{remote}", Path(local).expanduser()
        is_token = Path(remote).name == "auth_token"
        if not path.exists():
            expected = _MAKE_TOKEN if is_token else f"a file or folder, seen from {Path.cwd()}"
            draft.fault(key, "what is mounted is there", f"no {local}", expected)
        elif is_token and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            draft.fault(key, "only you can read the token", f"mode {mode:o}", f"chmod 600 {local}")
    private_key = draft.raw.get("auth", {}).get("ssh_private_key")
    if private_key is not None and not Path(private_key).expanduser().exists():
        expected = f"ssh-keygen -t ed25519 -f {private_key}"
        draft.fault("auth.ssh_private_key", "the key is there", f"no {private_key}", expected)


def _check_placeholders(draft: Draft) -> None:
    seen = set()
    for key, text in _texts(draft.raw, ""):
        if CHANGE_ME in text and text not in seen:
            seen.add(text)
            expected = LATEST_IMAGE if key.endswith("ImageId") else "a name of yours"
            draft.fault(key, f"{CHANGE_ME} was replaced by what only you know", text, expected)


def _texts(value: object, key: str) -> Iterator[tuple[str, str]]:
    inner: Iterable[tuple[str, Any]] = ()
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        inner = ((f"{key}.{name}" if key else str(name), each) for name, each in value.items())
    elif isinstance(value, list):
        inner = ((f"{key}[{number}]", each) for number, each in enumerate(value))
    for place, each in inner:
        yield from _texts(each, place)
