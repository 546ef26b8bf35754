"""What can go wrong with a study, and how a command says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

from trainables.errors import BucketError, Problem, UserError


class SpecError(UserError):
    """The spec is wrong: one problem for each fault in it."""


class StudyNotFoundError(UserError):
    """The storage has no study of this name."""

    @classmethod
    def among(cls, name: str, storage: object, known: Iterable[str]) -> Self:
        """`known`: the studies that are there."""
        names = ", ".join(known)
        expected = f"one of: {names}" if names else "no study yet: `tune-service run` makes one"
        return cls(Problem("STUDY", f"is a study of the storage {storage}", repr(name), expected))


class StudyExistsError(UserError):
    """The storage has a study of this name already."""

    @classmethod
    def of(cls, name: str, place: object, is_study: bool = True) -> Self:
        """`place`: what has the name; a study, or something that nobody knows."""
        expected = f"another name (--name), or `tune-service resume {name}`" if is_study else "another name (--name)"
        return cls(Problem("name", "is not taken in the storage", f"{place} exists", expected))


class StudyRunningError(UserError):
    """The study has a living driver, and this command may not run beside it."""


class OutputNotEmptyError(UserError):
    """The folder of `--out` holds something already."""


class StorageError(UserError):
    """The storage cannot be read or written, or is not a place that this version knows."""


class AddressError(UserError):
    """What `--address` names is no cluster."""


class InterruptedCommandError(UserError):
    """Ctrl-C, or a signal that ends a command as that does, where something goes on or can be gone on with."""

    def __init__(self, expected: str, signal: str = "Ctrl-C") -> None:
        """`expected`: what goes on, or how to go on with it."""
        super().__init__(Problem("", "the command runs to its end", signal, expected))


class CommandError(UserError):
    """The input was right, but the command could not do it."""


class RemoteError(UserError):
    """What a cluster's head says is wrong: the document and the exit code that the command has there."""

    def __init__(self, document: Mapping[str, Any], code: int) -> None:
        raw = document.get("errors") or [document["error"]]
        super().__init__([Problem(**each) for each in raw])
        self.document, self.code = dict(document), code


class RecordHeldError(StorageError):
    """A process that was stopped has the record's lock, and nobody else can write."""


class LeaseLostError(CommandError):
    """Another process drives the study now: this one may write nothing more."""


class RecordUnavailableError(CommandError):
    """The database that holds a study's record cannot be reached, or refuses what is asked of it."""


class StudyHaltedError(CommandError):
    """The study cannot go on for now, and keeps all it has: `resume` goes on when the cause is gone."""

    @classmethod
    def of(cls, name: str, rule: str, found: str) -> Self:
        return cls(Problem(name, rule, found, f"`tune-service resume {name}` when that is put right"))


def exit_code(error: BaseException) -> int:
    """What the process ends with: 2 for wrong input, 1 for a failure, 130 after Ctrl-C."""
    if isinstance(error, KeyboardInterrupt | InterruptedCommandError):
        return 130
    if isinstance(error, RemoteError):
        return error.code
    if isinstance(error, BucketError):
        return 1 if error.is_away else 2
    return 2 if isinstance(error, UserError) and not isinstance(error, CommandError) else 1


def error_json(error: BaseException) -> dict[str, Any]:
    """The one document of a `--json` command that failed: `error`, and for a spec the list `errors`."""
    if isinstance(error, RemoteError):
        return error.document
    if isinstance(error, SpecError):
        return {"errors": [problem.to_json() for problem in error.problems]}
    if isinstance(error, UserError):
        document: dict[str, Any] = {"error": error.problems[0].to_json()}
        if len(error.problems) > 1:
            document["errors"] = [problem.to_json() for problem in error.problems]
        return document
    if isinstance(error, KeyboardInterrupt):
        return error_json(InterruptedCommandError("the same command once more"))
    # Not foreseen: a fault of ours or of the machine's. It still has the shape that a reading program relies on.
    found = f"{type(error).__name__}: {error}"
    return {"error": Problem("", "the command runs to its end", found, "see the log; this is not your input").to_json()}
