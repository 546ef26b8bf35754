"""The command line: parses, calls one function, prints. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from trainables.bucket import is_url, parsed
from trainables.errors import Problem, UserError
from trainables.redaction import redacted
from tune_service import __version__
from tune_service.cluster_cli import app as cluster_app
from tune_service.errors import CommandError, InterruptedCommandError, exit_code
from tune_service.output import display as display_of
from tune_service.output import print_check, print_failure, print_json, print_rows, print_status, reader_is_gone
from tune_service.words import shown_value

if TYPE_CHECKING:
    from tune_service.check import Check
    from tune_service.home import StudyStorage
    from tune_service.remote import RemoteStudies
    from tune_service.spec import StudySpec
    from tune_service.status import StudyStatus
    from tune_service.studies import Studies

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Tunes hyperparameters of transformers: Optuna-guided trials, scheduled by Ray Tune, stopped early by ASHA.",
)
app.add_typer(cluster_app, name="cluster")

StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="FOLDER|URL",
        help="Of the studies (s3://, gs://). Without it TUNE_SERVICE_STORAGE, else ./studies; a cluster has its own.",
        show_default=False,
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="URL|FILE", help="Of a cluster: its dashboard's URL, or its cluster.yaml."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
JsonLinesOption = Annotated[bool, typer.Option("--json", help="Print one JSON document a line and nothing else.")]
Spec = Annotated[Path, typer.Argument(help="The spec file (YAML).", show_default=False)]
Study = Annotated[str, typer.Argument(help="The study's name.", show_default=False)]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Overrides a value of the spec; may be repeated.")
]
NameOption = Annotated[str | None, typer.Option("--name", help="Overrides the spec's name.")]
_UsageFault = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
"""Typer's own copy of Click has it or Click itself, by version; Typer does not export it."""


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    spec: Spec,
    overrides: Overrides = [],  # noqa: B006  (typer's way to write it; never changed)
    name: NameOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a study on this machine, from its spec to its best trial."""
    from tune_service.study import run_study

    place = _storage(storage)
    loaded = _load(spec, overrides, name, place)
    with display_of(as_json) as display:
        for line in loaded.remarks():
            display.tell(line)
        status = run_study(loaded, place, display)
    _print_end(status, as_json)


@app.command()
def resume(
    study: Study,
    trials: Annotated[str | None, typer.Option("--trials", help="+20 adds to the budget, 80 sets it.")] = None,
    storage: StorageOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on with a study that was stopped or cut off, or extend one.

    On a cluster it goes on there, and Ctrl-C ends the looking on alone.
    """
    with _studies(storage, address) as studies, display_of(as_json) as display:
        status = studies.resume(study, trials, display)
    _print_end(status, as_json)


@app.command()
def submit(
    spec: Spec,
    address: Annotated[str, AddressOption.__metadata__[0]],
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the study to its end; its exit code is then this one's.")
    ] = False,
    overrides: Overrides = [],  # noqa: B006
    name: NameOption = None,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hand a study to a cluster, which runs it whatever becomes of this machine."""
    from tune_service.submit import submit_study

    with _remote(storage, address) as studies:
        name, job = submit_study(spec, overrides, name, studies, wait)
        if wait:
            with display_of(as_json) as display:
                status = studies.follow(name, display)
    if as_json:
        print_json({"study": name, "job": job})
    else:
        print(f"study {name} is job {job} of {address}")
    if wait:
        if not as_json:
            print_status(status, as_json)
        if status.state in ("failed", "interrupted"):
            sys.exit(1)


@app.command("list")
def list_(storage: StorageOption = None, address: AddressOption = None, as_json: JsonOption = False) -> None:
    """List the studies of a storage."""
    with _studies(storage, address) as studies:
        found = list(studies.list())
    if as_json:
        print_json({"studies": [row.to_json() for row in found]})
        return
    print_rows(found, address or _root(storage))


@app.command()
def status(
    study: Study,
    storage: StorageOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one study: its state, its trials, its best."""
    with _studies(storage, address) as studies:
        found = studies.status(study)
    print_status(found, as_json)


@app.command()
def watch(
    study: Study,
    storage: StorageOption = None,
    address: AddressOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """Follow a study until it ends."""
    with _studies(storage, address) as studies:
        if as_json:
            before = ""
            for view in studies.views(study):
                line = json.dumps(view.status().to_json(), allow_nan=False)
                if line != before:
                    print(line, flush=True)
                    before = line
            return
        with display_of(as_json) as display:
            for view in studies.views(study):
                display.show(view)
        print_status(view.status(), as_json)


@app.command()
def logs(
    study: Study,
    trial: Annotated[int | None, typer.Option("--trial", help="Only this trial.")] = None,
    storage: StorageOption = None,
    address: AddressOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """Follow the logs of a study's ranks."""
    with _studies(storage, address) as studies:
        for piece in studies.logs(study, trial):
            name = piece.file.removesuffix(".log")
            for line in piece.lines:
                print(json.dumps({"file": piece.file, "line": line}) if as_json else f"{name}: {line}", flush=True)


@app.command()
def stop(
    study: Study,
    now: Annotated[bool, typer.Option("--now", help="At once, not at each trial's next report.")] = False,
    storage: StorageOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a study's trials; `resume` goes on.

    Waits until they have ended.
    """
    with _studies(storage, address) as studies:
        found = studies.stop(study, now)
    print_status(found, as_json)


@app.command()
def delete(
    study: Study,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    storage: StorageOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a study: its record and its checkpoints."""
    with _studies(storage, address) as studies:
        if not yes and not _agrees(f"Delete {studies.where(study)} with all its checkpoints?"):
            expected = "y to the question, or --yes, which asks none"
            raise CommandError(Problem(study, "a study is deleted when that is confirmed", "not confirmed", expected))
        num_bytes = studies.delete(study)
    if as_json:
        print_json({"study": study, "bytes": num_bytes})
    else:
        print(f"deleted {study}: {num_bytes / 1e6:.1f} MB")


def _agrees(question: str) -> bool:
    """A person's answer, or the one that a pipe holds; where there is none, no."""
    if sys.stdin is None:
        return False
    if sys.stdin.isatty():
        return typer.confirm(question, err=True)
    print(f"{question} [y/N]: ", file=sys.stderr)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@app.command()
def best(
    study: Study,
    out: Annotated[Path, typer.Option("--out", help="A new or an empty folder.", show_default=False)],
    storage: StorageOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export the best trial: model, tokenizer, config and metrics."""
    from tune_service.storage import expanded

    out = expanded(out, "--out")
    path = str(out.absolute())
    with _studies(storage, address) as studies:
        found = studies.best(study, out)
    if as_json:
        print_json(found.model_dump(mode="json") | {"path": path})
    else:
        print(f"trial {found.number}, epoch {found.epoch}, value {shown_value(found.value)}: {path}")


@app.command()
def check(
    spec: Spec,
    overrides: Overrides = [],  # noqa: B006
    name: NameOption = None,
    storage: StorageOption = None,
    address: AddressOption = None,
    start_nodes: Annotated[
        bool, typer.Option("--start-nodes", help="With --address: have the autoscaler start what one trial needs.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check what can be known before a study starts.

    On a cluster, one trial's worker group trains a few steps.
    """
    with ExitStack() as connection:
        if address is None:
            found = _checks_here(spec, overrides, name, _storage(storage))
        else:
            from tune_service.checkup import check_cluster

            studies = connection.enter_context(_remote(storage, address))
            found = connection.enter_context(closing(check_cluster(spec, overrides, name, studies, start_nodes)))
        checks = []
        for each in found:
            checks.append(each)
            if not as_json:
                print_check(each)
    if as_json:
        print_json({"checks": [each.to_json() for each in checks]})
    if code := max(each.code for each in checks):
        sys.exit(code)


def _checks_here(path: Path, overrides: list[str], name: str | None, storage: StudyStorage) -> Iterator[Check]:
    from tune_service.check import Check, looked_at, run_checks, with_lines
    from tune_service.errors import SpecError
    from tune_service.machine import this_machine
    from tune_service.model_look import built, changed_models
    from tune_service.spec import load_spec, places

    try:
        loaded = load_spec(path, overrides, name)
    except SpecError:
        loaded = _load(path, overrides, name, storage)  # raises, with the faults of its data and model too
    yield Check("spec", True, str(path), "; ".join(loaded.remarks()))
    checks, place = run_checks(loaded, storage, this_machine()), places(path, overrides, name)
    yield from (with_lines(each, place) for each in checks)
    is_sound = all(each.ok for each in checks if each.name == "model")
    if is_sound and (models := changed_models(loaded)):
        yield with_lines(looked_at("model.config", lambda: built(models)), place)


@app.command()
def demo(storage: StorageOption = None, as_json: JsonOption = False) -> None:
    """Run a small real study, without network or GPU."""
    from tune_service.demo import run_demo
    from tune_service.storage import Storage

    root = _root(storage)
    if is_url(root):
        raise UserError(Problem("--storage", "is a folder where the demo runs", redacted(root), "--storage FOLDER"))
    place = Storage(Path(root))
    with display_of(as_json) as display:
        found = run_demo(place, display)
    _print_end(found.status, as_json)
    if not as_json:
        print(found.summary)


def main() -> NoReturn:
    """The program `tune-service`."""
    try:
        _run_command()
    except BrokenPipeError:
        if not reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python has a last flush to come
        sys.exit(1)


def _run_command() -> NoReturn:
    as_json = "--json" in sys.argv
    try:
        code = app(standalone_mode=False)
    except typer.Exit as stopped:
        sys.exit(stopped.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail(KeyboardInterrupt(), as_json)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
            sys.exit(2)
        if isinstance(error, _UsageFault):
            found = error.format_message()  # type: ignore[attr-defined]
            _fail(UserError(Problem("command line", "is one that --help shows", found, _usage(error))), as_json)
        if not isinstance(error, UserError) and not as_json:
            sys.stderr.write(redacted(traceback.format_exc()))  # a fault of ours: this is what helps
            sys.exit(1)
        _fail(error, as_json)
    if code == 130:  # Typer's answer to Ctrl-C
        _fail(KeyboardInterrupt(), as_json)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: BaseException, as_json: bool) -> NoReturn:
    print_failure(error, as_json, sys.stdout, sys.stderr)
    sys.exit(exit_code(error))


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context else "tune-service --help"


def _storage(given: str | None) -> StudyStorage:
    from tune_service.storages import open_storage

    return open_storage(_root(given))


def _root(given: str | None) -> str:
    """Where studies of this machine lie."""
    return given if given is not None else os.environ.get("TUNE_SERVICE_STORAGE") or "./studies"


@contextmanager
def _studies(storage: str | None, address: str | None) -> Iterator[Studies]:
    """The studies that a command is about: of a folder here, or of a cluster."""
    if address is None:
        from tune_service.studies import LocalStudies

        yield LocalStudies(_storage(storage))
    else:
        with _remote(storage, address) as found:
            yield found


@contextmanager
def _remote(storage: str | None, address: str) -> Iterator[RemoteStudies]:
    from tune_service.address import connected
    from tune_service.remote import RemoteStudies

    # `storage`: only what the command line says. The environment's is about this machine's own studies.
    if storage is not None and is_url(storage):
        parsed(storage)  # before it stands in the list of jobs: it may hold a secret
    try:
        with connected(address) as dashboard:
            yield RemoteStudies(dashboard, storage)
    except KeyboardInterrupt as interrupt:
        expected = "what was handed to the cluster goes on there, `watch --address` looks again"
        raise InterruptedCommandError(expected) from interrupt


def _load(path: Path, overrides: list[str], name: str | None, storage: StudyStorage) -> StudySpec:
    """The spec with all that is wrong with it, its data, its model and this machine, in one SpecError."""
    from tune_service.check import problems_of, run_checks
    from tune_service.machine import this_machine
    from tune_service.spec import load_spec

    machine = this_machine()
    return load_spec(path, overrides, name, also=lambda spec: problems_of(run_checks(spec, storage, machine)))


def _print_end(found: StudyStatus, as_json: bool) -> None:
    print_status(found, as_json)
    if found.state in ("failed", "interrupted"):
        sys.exit(1)


if __name__ == "__main__":
    main()
