"""Why a command failed, in words and as its document."""

from __future__ import annotations

import io
import json

import pytest

from trainables.errors import Problem, UserError
from tune_service.errors import InterruptedCommandError, exit_code
from tune_service.output import print_failure


def told(error: BaseException, as_json: bool) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    print_failure(error, as_json, out, err)
    return out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("error", "line", "expected"),
    [
        (KeyboardInterrupt(), "interrupted\n", "the same command once more"),
        (
            InterruptedCommandError("`tune-service resume toy` goes on"),
            "interrupted; `tune-service resume toy` goes on\n",
            "`tune-service resume toy` goes on",
        ),
    ],
    ids=["nothing goes on", "a study can be gone on with"],
)
def test_an_interrupt_promises_only_what_is_there(error: BaseException, line: str, expected: str) -> None:
    assert exit_code(error) == 130
    assert told(error, as_json=False) == ("", line)
    out, err = told(error, as_json=True)
    assert err == line
    found = json.loads(out)["error"]
    assert (found["rule"], found["found"], found["expected"]) == ("the command runs to its end", "Ctrl-C", expected)


def test_a_fault_has_its_place_what_was_found_and_what_would_be_right() -> None:
    error = UserError(Problem("s.yaml:3 budget.trials", "is at least 1", "0", "1 or more"))
    lines = "error: s.yaml:3 budget.trials: is at least 1\n  found:    0\n  expected: 1 or more\n"
    assert told(error, as_json=False) == ("", lines)
