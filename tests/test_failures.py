"""Who is tried again, and when failures end the study."""

from __future__ import annotations

import pytest

from tune_service.failures import MAX_IN_VAIN, Failures, first_line
from tune_service.spec import FaultSpec


@pytest.fixture
def failures() -> Failures:
    return Failures(FaultSpec(restarts_per_trial=2, same_error_limit=3))


def test_each_trial_is_started_again_as_often_as_the_spec_says(failures: Failures) -> None:
    assert [failures.may_restart(0) for _ in range(3)] == [True, True, False]
    assert failures.may_restart(1)


def test_supervisors_that_die_before_they_take_the_trial_are_counted_apart(failures: Failures) -> None:
    assert all(failures.may_hand_on(0) for _ in range(MAX_IN_VAIN))
    assert not failures.may_hand_on(0)
    assert failures.may_restart(0) and failures.may_hand_on(1)


def test_reasons_are_alike_when_their_first_lines_differ_in_numbers_alone(failures: Failures) -> None:
    assert failures.too_many_alike("rank 0 died at 0x7f\nits log") is None
    assert failures.too_many_alike("rank 3 died at 0xa1\nanother log") is None
    assert failures.too_many_alike("out of memory: rank 0") is None
    assert failures.too_many_alike("rank 12 died at 0x00") == 3


def test_a_reason_is_told_by_its_first_line() -> None:
    assert first_line("rank 0 died\nLast lines of its log") == "rank 0 died"
    assert first_line("\n  \nrank 0 died") == "rank 0 died"
    assert first_line("") == ""
