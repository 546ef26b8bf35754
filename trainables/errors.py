"""Errors that a user can cause: what the rule is, what was found, where, and what would be right."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from trainables.redaction import redacted

MOST_SAID = 2_000
"""Characters of an exception's text, at most."""
CUT = 500
"""Characters that are left out before a cut, more than a secret has: half of one would not be found."""


@dataclass(frozen=True)
class Problem:
    """One fault of what the user wrote or gave."""

    place: str
    """Where it is: a key of the spec (`data.path`), a file, an option."""
    rule: str
    """What must hold."""
    found: str
    """What was there instead; without the secrets that it held."""
    expected: str
    """What would be right, in a form that can be copied where there is one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "found", redacted(self.found))

    def __str__(self) -> str:
        return f"{self.place}: {self.rule}; found {self.found}; expected {self.expected}"

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def text_of(error: BaseException) -> str:
    """What an exception says; empty when that itself raises."""
    try:
        return str(error)
    except Exception:
        return ""


def in_words(error: BaseException) -> str:
    """The class and the text of an exception, without secrets: only what a terminal prints as it is, and not all of
    what is very long."""
    text = text_of(error).strip()
    shown = printed(redacted(text[: 4 * MOST_SAID]))
    if len(text) > 4 * MOST_SAID:
        shown = shown[:-CUT]  # there may be half a secret
    if len(text) > MOST_SAID:
        shown = f"{shown[:MOST_SAID]}... ({len(text)} characters)"
    return f"{type(error).__name__}{': ' if shown else ''}{shown}"


def printed(text: str) -> str:
    """With escapes in the place of control characters, and of what no encoding takes."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


class UserError(Exception):
    """Something the user can put right. Holds every fault that was found, never only the first."""

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        assert self.problems, "a UserError needs at least one problem"
        super().__init__("\n".join(str(problem) for problem in self.problems))


class DataError(UserError):
    """The data set cannot be trained on."""


class ModelError(UserError):
    """The model or its tokenizer cannot be opened."""


class TrainableError(UserError):
    """A trainable of the user's own broke its contract: it cannot be imported, or yielded something wrong."""


class BucketError(OSError, UserError):
    """An object store refuses, or does not answer.

    It is both: what a full disk is to a study, which then waits, and what a command tells its user.
    """

    def __init__(self, problem: Problem, is_away: bool) -> None:
        UserError.__init__(self, problem)
        self.errno = errno.EREMOTEIO
        self.is_away = is_away
        """The store's fault, not the input's."""

    def __str__(self) -> str:
        # The system's words first, by which the error is known where only its text comes through.
        return f"{os.strerror(errno.EREMOTEIO)}: {self.problems[0]}"

    def __reduce__(self) -> tuple[type[BucketError], tuple[Problem, bool]]:
        return BucketError, (self.problems[0], self.is_away)


class CheckpointError(Exception):
    """A checkpoint is incomplete or its bytes are not the ones that were written."""


class DamagedCheckpointError(CheckpointError):
    """All of a checkpoint is there, and some of it is not what was written, by its sha256: it stays so."""


class TrialError(Exception):
    """A trial cannot go on: a rank raised, died or went silent. The message ends with the rank's last log lines."""


class OutOfMemoryError(TrialError):
    """A rank needed more memory than there is. To try the same again would end the same."""


class StorageUnavailableError(TrialError):
    """A disk takes nothing: it is full, or read-only, or away. The trial is not to blame."""


class CheckpointBudgetError(TrialError):
    """A checkpoint does not fit into the study's budget beside what must be kept."""


class InputError(TrialError):
    """What the user wrote is wrong: the same again would end the same."""


class WorkerLostError(TrialError):
    """A rank's process is gone."""


class RankNotStartedError(WorkerLostError):
    """A rank's process was gone before it had done anything: its node was going when it was put there."""


class StepDeadlineError(TrialError):
    """A rank gave no report before the step deadline."""
