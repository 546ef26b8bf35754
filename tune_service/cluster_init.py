"""Writes a cluster file: checks what was asked for, fills the template, says what to do next."""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.errors import Problem
from tune_service.cluster_template import MOUNTED, PROVIDERS, render
from tune_service.errors import CommandError, OutputNotEmptyError, SpecError

CHECKOUT = Path(__file__).resolve().parents[1]
IDLE_TIMEOUT_MINUTES = 10
URLS = {"aws": "s3", "gcp": "gs"}
"""Provider -> the scheme of its object store."""
LATEST_IMAGE = (
    "aws ssm get-parameter --query Parameter.Value --output text --name "
    "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
)
"""Prints the id of the AWS image that the file is made for: Ubuntu 24.04 with Python 3.12 and NVIDIA's driver."""

_NAME = r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?"
_MACHINE = r"[a-z0-9]+([.-][a-z0-9]+)*"
_PATTERNS = {
    "name": (_NAME, "small letters, digits and -, at most 32"),
    "region": (_MACHINE, "us-west-2 or the like"),
    "zone": (r"[a-z]", "one letter"),
    "project": (r"[a-z][a-z0-9-]{4,28}[a-z0-9]", "the id of a Google Cloud project"),
    "image": (r"ami-[0-9a-f]{8,17}|projects/[\w./-]+", "ami-0123456789abcdef0, or projects/PROJECT/global/images/NAME"),
    "head_type": (_MACHINE, "a machine type"),
    "ssh_user": (r"[a-z_][a-z0-9_.-]*", "a user's name"),
    "ssh_key": (r"[~/][^'\"#:]*", "the path of a private key, from / or ~/"),
    "bucket": (r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", "the bare name of a bucket that exists"),
    "storage": (
        r"(/|\$HOME/)[\w./-]*|(s3|gs)://[a-z0-9][\w./-]*",
        "a folder, from / or $HOME/, or s3://BUCKET/FOLDER, gs://BUCKET/FOLDER",
    ),
}


@dataclass(frozen=True)
class WrittenFile:
    """A new cluster file and the commands that come next."""

    path: Path
    provider: str
    next_steps: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path.absolute()), "provider": self.provider, "next": list(self.next_steps)}


def init_cluster(provider: str, out: Path, name: str, options: Mapping[str, Any]) -> WrittenFile:
    """Writes `out`, which must not exist. Options that are None were not given.

    Raises SpecError with everything that is wrong with the options.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if provider not in PROVIDERS:
        raise SpecError(Problem("--provider", "a provider is one of three", provider, "aws, gcp or local"))
    problems = list(_problems(provider, {"name": name, **given}))
    if problems:
        raise SpecError(problems)
    missing = [each for each in MOUNTED if not (CHECKOUT / each).exists()]
    if missing:
        rule = "the nodes install tune-service from a checkout, which file_mounts copies"
        raise CommandError(Problem(str(CHECKOUT), rule, f"no {', '.join(missing)}", "tune-service run from a checkout"))
    text = render(provider, _values(provider, name, given, _sources(out)))
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputNotEmptyError(
            Problem(str(out), "no file is written over", "a file that exists", "another --out")
        ) from None
    except OSError as error:
        raise CommandError(
            Problem(str(out), "the file can be written", error.strerror or str(error), "another --out")
        ) from error
    return WrittenFile(out, provider, tuple(_next_steps(provider, out, given)))


def _problems(provider: str, given: Mapping[str, Any]) -> Iterator[Problem]:
    kind = PROVIDERS[provider]
    of_provider = {*kind.defaults, "name", "max_workers"}
    of_provider |= {"hosts"} if provider == "local" else set()
    of_provider |= {"ssh_from"} if provider == "aws" else set()
    of_provider |= {"bucket"} if provider in URLS else set()
    of_provider -= {"max_workers"} if provider == "local" else set()
    for key, value in given.items():
        if key not in of_provider:
            yield Problem(_option(key), f"provider {provider} has no such option", str(value), _instead(provider, key))
        elif key == "worker_type" and value not in kind.worker_types:
            expected = f"one of {', '.join(kind.worker_types)}; edit the file for others"
            yield Problem(_option(key), "the CPUs and GPUs of the worker's machine type are known", value, expected)
        elif key == "max_workers" and value < 1:
            yield Problem(_option(key), "a cluster has room for workers", str(value), "1 or more")
        elif key == "hosts":
            yield from _host_problems(value)
        elif key == "ssh_from":
            yield from cidr_problems(value)
        elif key in _PATTERNS and not re.fullmatch(_PATTERNS[key][0], value):
            yield Problem(_option(key), f"{key.replace('_', ' ')} is well-formed", repr(value), _PATTERNS[key][1])
    if {"bucket", "storage"} <= given.keys():
        yield Problem("--bucket", "studies lie in one place", "--bucket and --storage", "one of the two")
    if provider == "local" and "hosts" not in given:
        yield Problem("--hosts", "a cluster of ssh hosts has hosts", "none", "HEAD,WORKER,WORKER")


def _instead(provider: str, key: str) -> str:
    if key == "ssh_from" and provider == "gcp":
        return "gcloud compute firewall-rules update default-allow-ssh --source-ranges=CIDR"
    if key == "max_workers":
        return "as many --hosts as there shall be"
    if key == "bucket":
        return "--storage s3://BUCKET/FOLDER"
    return ", ".join(each for each, kind in PROVIDERS.items() if key in kind.defaults) or "no such option"


def _host_problems(hosts: str) -> Iterator[Problem]:
    names = hosts.split(",")
    if len(names) < 2:
        yield Problem("--hosts", "a head, which runs no trials, and at least one worker", hosts, "HEAD,WORKER,WORKER")
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", name):
            yield Problem("--hosts", "a host is a name or an IPv4 address", repr(name), "10.0.0.10,10.0.0.11")
        elif names.count(name) > 1:
            yield Problem("--hosts", "a host stands once", name, "every host once, the head first")


def cidr_problems(cidr: str) -> Iterator[Problem]:
    """Why a string is no range of addresses that one may narrow ssh to."""
    try:
        ipaddress.IPv4Network(cidr)
    except ValueError as error:
        yield Problem("--ssh-from", "a range of IPv4 addresses as CIDR", str(error), "203.0.113.7/32")


def _values(provider: str, name: str, given: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    kind = PROVIDERS[provider]
    values: dict[str, Any] = {**kind.defaults, **given, "name": name}
    values["idle_timeout_minutes"] = IDLE_TIMEOUT_MINUTES
    values["mounts"] = "".join(f"  ~/tune-service/{each}: {source}\n" for each, source in sources.items())
    values["make_flags"] = "" if provider == "local" else " PYTHON=python3.12"
    head_setup = []
    if provider == "local":
        head, *workers = given["hosts"].split(",")
        values |= {"head_ip": head, "worker_ips": ", ".join(workers), "max_workers": len(workers)}
        if re.fullmatch(r"[\d.]+", head):  # a host with several addresses is known by the one that was given
            values["node_ip"] = f"--node-ip-address={head} "
    else:
        values["cpus"], values["gpus"] = kind.worker_types[values["worker_type"]]
    if provider == "gcp":
        head_setup.append("cd ~/tune-service && make install-gcp   # Ray's launcher needs Google's client on the head")
    if "bucket" in given:
        values["storage"] = f"{URLS[provider]}://{given['bucket']}/studies"
    if "ssh_from" in given:
        head_setup.append(f"tune-service cluster firewall ~/ray_bootstrap_config.yaml --ssh-from {given['ssh_from']}")
    values.setdefault("node_ip", "")
    values["head_setup"] = "".join(f"\n  - {each}" for each in head_setup) or " []"
    return values


def _sources(out: Path) -> dict[str, str]:
    """Where the mounted files are: relative in a file that lies in the checkout, so that it can be shared."""
    inside = out.absolute().parent.resolve() == CHECKOUT
    return {each: each if inside else str(CHECKOUT / each) for each in MOUNTED}


def _next_steps(provider: str, out: Path, given: Mapping[str, Any]) -> Iterator[str]:
    file = shlex.quote(str(out))
    if provider == "aws" and "image" not in given:
        region = given.get("region", PROVIDERS["aws"].defaults["region"])
        yield f"{LATEST_IMAGE} --region {region}   # put it in as ImageId"
    yield "(umask 077; ray get-auth-token --generate >/dev/null); export RAY_AUTH_MODE=token"
    yield f"tune-service cluster check {file}"
    yield f"ray up -y {file}"
    yield f"tune-service submit SPEC --address {file}"
    yield f"ray down -y {file}"


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"
