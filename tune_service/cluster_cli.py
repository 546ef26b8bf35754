"""The commands `tune-service cluster ...`: parse, call one function, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Write and check files for Ray's cluster launcher, `ray up`.")

File = Annotated[Path, typer.Argument(help="The cluster file (YAML).", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@app.command()
def init(
    provider: Annotated[
        str, typer.Option("--provider", help="aws, gcp or local (hosts with ssh).", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="A new file.")] = Path("cluster.yaml"),
    name: Annotated[str, typer.Option("--name", help="The cluster's name.")] = "tune-service",
    region: Annotated[str | None, typer.Option("--region", help="aws, gcp.")] = None,
    zone: Annotated[str | None, typer.Option("--zone", help="gcp: the zone's letter.")] = None,
    project: Annotated[str | None, typer.Option("--project", help="gcp: the project's id.")] = None,
    bucket: Annotated[str | None, typer.Option("--bucket", help="aws, gcp: keeps the studies.")] = None,
    image: Annotated[str | None, typer.Option("--image", help="aws, gcp: Ubuntu 24.04 with NVIDIA's driver.")] = None,
    head_type: Annotated[str | None, typer.Option("--head-type", help="aws, gcp: the head's machine type.")] = None,
    worker_type: Annotated[str | None, typer.Option("--worker-type", help="aws, gcp: the workers'.")] = None,
    max_workers: Annotated[int | None, typer.Option("--max-workers", help="aws, gcp: at most so many.")] = None,
    ssh_from: Annotated[str | None, typer.Option("--ssh-from", help="aws: only this CIDR may reach ssh.")] = None,
    hosts: Annotated[str | None, typer.Option("--hosts", help="local: HEAD,WORKER,WORKER.")] = None,
    ssh_user: Annotated[str | None, typer.Option("--ssh-user", help="local: who logs in there.")] = None,
    ssh_key: Annotated[str | None, typer.Option("--ssh-key", help="local: a private key for this cluster.")] = None,
    storage: Annotated[
        str | None, typer.Option("--storage", help="A folder of the head, or one that all share, or a URL.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a cluster file for `ray up`."""
    from tune_service.cluster_init import init_cluster

    options = {
        "region": region,
        "zone": zone,
        "project": project,
        "bucket": bucket,
        "image": image,
        "head_type": head_type,
        "worker_type": worker_type,
        "max_workers": max_workers,
        "ssh_from": ssh_from,
        "hosts": hosts,
        "ssh_user": ssh_user,
        "ssh_key": ssh_key,
        "storage": storage,
    }
    written = init_cluster(provider, out, name, options)
    if as_json:
        print(json.dumps(written.to_json()))
        return
    print(f"wrote {written.path}; next:")
    for step in written.next_steps:
        print(f"  {step}")


@app.command()
def check(file: File, as_json: JsonOption = False) -> None:
    """Find what Ray would silently ignore in a cluster file, and what is missing on this machine."""
    from tune_service.cluster_check import check_cluster_file

    check_cluster_file(file)
    print(json.dumps({"file": str(file), "ok": True}) if as_json else f"{file}: ok")


@app.command()
def firewall(
    file: File,
    ssh_from: Annotated[str, typer.Option("--ssh-from", help="The one CIDR.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Let only one CIDR reach ssh on a cluster on AWS, now or before `ray up`.

    Also moves it, when your address has changed.
    """
    from tune_service.cluster_firewall import narrow_ssh

    groups = narrow_ssh(file, ssh_from)
    if as_json:
        print(json.dumps({"security_groups": groups, "ssh_from": ssh_from}))
    else:
        print(f"{', '.join(groups)}: ssh from {ssh_from} only")
