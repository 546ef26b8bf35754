"""The command line: parses, calls one function, prints. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from trainables.errors import Problem, UserError
from tune_service.cluster_cli import app as cluster_app
from tune_service.errors import CommandError, StorageError, error_json, exit_code

if TYPE_CHECKING:
    from rich.console import Console

    from tune_service.live import StudyDisplay
    from tune_service.spec import StudySpec
    from tune_service.status import StudyStatus
    from tune_service.storage import Storage

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Tunes hyperparameters of transformers: Optuna-guided trials, scheduled by Ray Tune, stopped early by ASHA.",
)
app.add_typer(cluster_app, name="cluster")

StorageOption = Annotated[
    str, typer.Option("--storage", envvar="TUNE_SERVICE_STORAGE", help="Folder that holds the studies.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Spec = Annotated[Path, typer.Argument(help="The spec file (YAML).", show_default=False)]
Study = Annotated[str, typer.Argument(help="The study's name.", show_default=False)]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Overrides a value of the spec; may be repeated.")
]
NameOption = Annotated[str | None, typer.Option("--name", help="Overrides the spec's name.")]
DEFAULT_STORAGE = "./studies"
_UsageFault = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
"""Typer's own copy of Click has it or Click itself, by version; Typer does not export it."""
MAX_ROWS = 20


@app.command()
def run(
    spec: Spec,
    overrides: Overrides = [],  # noqa: B006  (typer's way to write it; never changed)
    name: NameOption = None,
    storage: StorageOption = DEFAULT_STORAGE,
    as_json: JsonOption = False,
) -> None:
    """Run a study on this machine, from its spec to its best trial."""
    from tune_service.study import run_study

    place = _storage(storage)
    loaded = _load(spec, overrides, name, place)
    with _display(as_json) as display:
        status = run_study(loaded, place, display)
    _print_end(status, as_json)


@app.command()
def resume(
    study: Study,
    trials: Annotated[str | None, typer.Option("--trials", help="+20 adds to the budget, 80 sets it.")] = None,
    storage: StorageOption = DEFAULT_STORAGE,
    as_json: JsonOption = False,
) -> None:
    """Go on with a study that was stopped or cut off, or extend one."""
    from tune_service.study import resume_study

    place = _storage(storage)
    with _display(as_json) as display:
        status = resume_study(study, trials, place, display)
    _print_end(status, as_json)


@app.command("list")
def list_(storage: StorageOption = DEFAULT_STORAGE, as_json: JsonOption = False) -> None:
    """List the studies of a storage."""
    from tune_service.record import Record

    found = []
    for folder in _storage(storage).studies():
        try:
            found.append(Record.open(folder).status())
        except StorageError as error:  # one broken record hides no other study
            print(f"left out {error}", file=sys.stderr)
    if as_json:
        rows = [
            {"study": each.study, "state": each.state, "trials": len(each.trials), "best": _best_json(each)}
            for each in found
        ]
        _print_json({"studies": rows})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("study", "state", "trials", "best", "metric"):
        table.add_column(column)
    for each in found:
        best = f"{each.best.value:.4f}" if each.best else "-"
        table.add_row(each.study, each.state, str(len(each.trials)), best, each.objective.metric)
    _console().print(table if found else f"no studies in {storage}")


@app.command()
def status(study: Study, storage: StorageOption = DEFAULT_STORAGE, as_json: JsonOption = False) -> None:
    """Show one study: its state, its trials, its best."""
    from tune_service.record import Record

    _print_status(Record.open(_storage(storage).study(study)).status(deep=True), as_json)


@app.command()
def watch(study: Study, storage: StorageOption = DEFAULT_STORAGE, as_json: JsonOption = False) -> None:
    """Follow a study until it ends.

    With --json, one document a line.
    """
    import time

    from tune_service.live import StudyDisplay
    from tune_service.record import Record

    record = Record.open(_storage(storage).study(study))
    if not as_json:
        with StudyDisplay(_console()) as display:
            while record.folder.driver_is_alive():
                display.show(record)
                time.sleep(0.5)
        _print_status(record.status(), as_json)
        return
    before = ""
    while True:
        found = record.status()
        line = json.dumps(found.to_json(), allow_nan=False)
        if line != before:
            print(line, flush=True)
            before = line
        if found.state != "running":
            return
        time.sleep(0.5)


@app.command()
def logs(
    study: Study,
    trial: Annotated[int | None, typer.Option("--trial", help="Only this trial.")] = None,
    storage: StorageOption = DEFAULT_STORAGE,
    as_json: JsonOption = False,
) -> None:
    """Follow the logs of a study's ranks.

    With --json, one document a line.
    """
    import time

    folder = _storage(storage).study(study)
    shown: dict[Path, int] = {}
    while True:
        alive = folder.driver_is_alive()
        for path in folder.rank_logs(trial):
            text = path.read_bytes()[shown.get(path, 0) :]
            if alive:  # the last line may not be whole yet
                text = text[: text.rfind(b"\n") + 1]
            shown[path] = shown.get(path, 0) + len(text)
            for line in text.decode(errors="replace").splitlines():
                print(json.dumps({"file": path.name, "line": line}) if as_json else f"{path.stem}: {line}", flush=True)
        if not alive:
            return
        time.sleep(0.5)


@app.command()
def stop(
    study: Study,
    now: Annotated[bool, typer.Option("--now", help="At once, not at each trial's next report.")] = False,
    storage: StorageOption = DEFAULT_STORAGE,
    as_json: JsonOption = False,
) -> None:
    """End a study's trials; `resume` goes on.

    Waits until they have ended.
    """
    from tune_service.study import stop_study

    _print_status(stop_study(study, now, _storage(storage)), as_json)


@app.command()
def delete(
    study: Study,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    storage: StorageOption = DEFAULT_STORAGE,
    as_json: JsonOption = False,
) -> None:
    """Delete a study: its record and its checkpoints."""
    from tune_service.study import delete_study

    place = _storage(storage)
    folder = place.study(study)
    question = f"Delete {folder.path} with all its checkpoints?"
    if not yes and not (sys.stdin.isatty() and typer.confirm(question, err=True)):
        raise CommandError(Problem("--yes", "a study is deleted after a question", "no answer of yes", "--yes"))
    num_bytes = delete_study(study, place)
    if as_json:
        _print_json({"study": study, "bytes": num_bytes})
    else:
        print(f"deleted {study}: {num_bytes / 1e6:.1f} MB")


@app.command()
def best(
    study: Study,
    out: Annotated[Path, typer.Option("--out", help="A new or an empty folder.", show_default=False)],
    storage: StorageOption = DEFAULT_STORAGE,
    as_json: JsonOption = False,
) -> None:
    """Export the best trial: model, tokenizer, config and metrics."""
    from tune_service.best import export_best

    found = export_best(study, out, _storage(storage))
    if as_json:
        _print_json(found.model_dump(mode="json") | {"path": str(out.absolute())})
    else:
        print(f"trial {found.number}, epoch {found.epoch}, value {found.value:.4f}: {out.absolute()}")


@app.command()
def check(
    spec: Spec,
    overrides: Overrides = [],  # noqa: B006
    name: NameOption = None,
    storage: StorageOption = DEFAULT_STORAGE,
    as_json: JsonOption = False,
) -> None:
    """Check what can be known before a study starts."""
    from tune_service.check import Check, problems_of, run_checks
    from tune_service.errors import SpecError
    from tune_service.machine import this_machine
    from tune_service.spec import load_spec

    try:
        loaded = load_spec(spec, overrides, name)
    except SpecError:
        loaded = _load(spec, overrides, name, _storage(storage))  # raises, with the faults of its data and model too
    checks = [Check("spec", True, str(spec)), *run_checks(loaded, _storage(storage), this_machine())]
    if as_json:
        _print_json({"checks": [each.to_json() for each in checks]})
    else:
        for each in checks:
            print(f"{'ok  ' if each.ok else 'FAIL'} {each.name}: {each.found}")
            if each.advice:
                print(f"     {each.advice}")
    if not all(each.ok for each in checks):
        sys.exit(exit_code(SpecError(problems_of(checks))))


@app.command()
def demo(storage: StorageOption = DEFAULT_STORAGE, as_json: JsonOption = False) -> None:
    """Run a small real study, without network or GPU."""
    from tune_service.demo import run_demo

    place = _storage(storage)
    with _display(as_json) as display:
        found = run_demo(place, display)
    _print_end(found.status, as_json)
    if not as_json:
        print(found.summary)


def main() -> NoReturn:
    """The program `tune-service`."""
    as_json = "--json" in sys.argv
    try:
        code = app(standalone_mode=False)
    except typer.Exit as stopped:
        sys.exit(stopped.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail(KeyboardInterrupt(), as_json)
    except Exception as error:
        if isinstance(error, _UsageFault):
            found = error.format_message()  # type: ignore[attr-defined]
            _fail(UserError(Problem("command line", "is one that --help shows", found, _usage(error))), as_json)
        if not isinstance(error, UserError) and not as_json:
            raise  # a fault of ours: the traceback is what helps
        _fail(error, as_json)
    if code == 130:  # Typer's answer to Ctrl-C
        _fail(KeyboardInterrupt(), as_json)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: BaseException, as_json: bool) -> NoReturn:
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; `tune-service resume` goes on", file=sys.stderr)
    if as_json:
        _print_json(error_json(error))
    elif isinstance(error, UserError):
        for problem in error.problems:
            print(f"error: {problem.place}: {problem.rule}", file=sys.stderr)
            print(f"  found:    {problem.found}", file=sys.stderr)
            print(f"  expected: {problem.expected}", file=sys.stderr)
    sys.exit(exit_code(error))


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context else "tune-service --help"


def _storage(root: str) -> Storage:
    from tune_service.storage import Storage

    return Storage(Path(root))


def _load(path: Path, overrides: list[str], name: str | None, storage: Storage) -> StudySpec:
    """The spec with all that is wrong with it, its data, its model and this machine, in one SpecError."""
    from tune_service.check import problems_of, run_checks
    from tune_service.machine import this_machine
    from tune_service.spec import load_spec

    machine = this_machine()
    return load_spec(path, overrides, name, also=lambda spec: problems_of(run_checks(spec, storage, machine)))


def _console() -> Console:
    from tune_service.live import console

    return console(sys.stdout)


@contextmanager
def _display(as_json: bool) -> Iterator[StudyDisplay]:
    """A display on standard output; with --json, which has that for its document, on standard error."""
    from tune_service.live import StudyDisplay, console
    from tune_service.terminal import shown_stream

    with shown_stream(2 if as_json else 1) as stream, StudyDisplay(console(stream)) as display:
        yield display


def _print_end(found: StudyStatus, as_json: bool) -> None:
    _print_status(found, as_json)
    if found.state == "failed":
        sys.exit(1)
    return


def _print_status(found: StudyStatus, as_json: bool) -> None:
    if as_json:
        _print_json(found.to_json())
        return
    from tune_service.live import best_line, study_table

    console = _console()
    console.print(study_table(found, MAX_ROWS if console.is_terminal else None))
    console.print(f"study {found.study}: {found.state}, {len(found.trials)} trials", highlight=False)
    console.print(best_line(found), highlight=False, soft_wrap=True)


def _best_json(found: StudyStatus) -> Any:
    return found.best.model_dump(mode="json") if found.best else None


def _print_json(document: Any) -> None:
    print(json.dumps(document, allow_nan=False))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
