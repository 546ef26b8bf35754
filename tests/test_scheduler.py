"""ASHA's arithmetic, with numbers that a reader can check in the head."""

from __future__ import annotations

import pytest

from tune_service.scheduler import Asha, rungs
from tune_service.status import EpochReport, TrialStatus


def asha(grace_period: int = 1, reduction_factor: float = 3, max_epochs: int = 9, maximize: bool = True) -> Asha:
    return Asha(grace_period, reduction_factor, max_epochs, maximize, metric="score")


def trial(number: int, *values: float | None) -> TrialStatus:
    """A trial that reported `values` from epoch 1 on."""
    reports = tuple(EpochReport(epoch=epoch, metrics={"score": value}) for epoch, value in enumerate(values, start=1))
    return TrialStatus(number=number, state="pruned", params={}, reports=reports)


@pytest.mark.parametrize(
    ("grace_period", "reduction_factor", "max_epochs", "expected"),
    [
        (1, 3, 9, [1, 3]),
        (1, 3, 10, [1, 3, 9]),
        (2, 2, 9, [2, 4, 8]),
        (4, 2, 4, []),  # a trial that has all its epochs is not stopped
        (1, 3, 1, []),
        (1, 1.5, 6, [1, 2, 3, 4]),  # 1, 1.5, 2.25, 3.375, 5.06 -> 6
        (1, 1.2, 5, [1, 2, 3, 4]),  # 1, 1.2, 1.44, 1.73, 2.07, 2.49, 2.99, 3.58, 4.30 -> 5: no epoch twice
    ],
)
def test_rungs_are_the_epochs_at_which_trials_are_compared(
    grace_period: int, reduction_factor: float, max_epochs: int, expected: list[int]
) -> None:
    assert rungs(grace_period, reduction_factor, max_epochs) == expected


def test_the_first_trial_at_a_rung_always_goes_on() -> None:
    scheduler = asha()
    scheduler.add(0, 1, -1e9)
    assert scheduler.stop_reason(0, 1) is None


def test_the_best_third_rounded_up_goes_on() -> None:
    scheduler = asha()
    values = [0.50, 0.60, 0.55, 0.70, 0.58, 0.61, 0.40]
    reasons = []
    for number, value in enumerate(values):
        scheduler.add(number, 1, value)
        reasons.append(scheduler.stop_reason(number, 1))
    assert reasons == [
        None,  # 1 of 1, and ceil(1 / 3) = 1 goes on
        None,  # 1 of 2, 1 goes on
        "asha: epoch 1, rank 2 of 3",  # 1 goes on
        None,  # 1 of 4, 2 go on
        "asha: epoch 1, rank 3 of 5",  # 2 go on
        None,  # 2 of 6, 2 go on
        "asha: epoch 1, rank 7 of 7",
    ]


def test_for_a_loss_the_smallest_goes_on() -> None:
    scheduler = asha(maximize=False)
    for number, value in enumerate([0.5, 0.4, 0.6]):
        scheduler.add(number, 1, value)
    assert [scheduler.stop_reason(number, 1) for number in range(3)] == [
        "asha: epoch 1, rank 2 of 3",
        None,
        "asha: epoch 1, rank 3 of 3",
    ]


def test_equals_share_a_rank() -> None:
    scheduler = asha()
    for number, value in enumerate([0.7, 0.7, 0.6, 0.6]):
        scheduler.add(number, 1, value)
    assert [scheduler.stop_reason(number, 1) for number in range(4)] == [
        None,
        None,
        "asha: epoch 1, rank 3 of 4",
        "asha: epoch 1, rank 3 of 4",
    ]


def test_between_rungs_nobody_is_stopped() -> None:
    scheduler = asha()
    for number, value in enumerate([0.9, 0.1]):
        scheduler.add(number, 1, 0.5)
        scheduler.add(number, 2, value)
    assert scheduler.stop_reason(1, 2) is None


def test_a_trial_that_reports_some_epochs_is_compared_at_its_first_report_from_a_rung_on() -> None:
    scheduler = asha(max_epochs=10)  # rungs 1, 3, 9
    for epoch in (2, 4, 6):
        scheduler.add(0, epoch, 0.9)
        scheduler.add(1, epoch, 0.8)
    assert scheduler.stop_reason(1, 2) == "asha: epoch 2, rank 2 of 2"
    assert scheduler.stop_reason(1, 4) == "asha: epoch 4, rank 2 of 2"
    assert scheduler.stop_reason(1, 6) is None, "no rung lies between 4 and 6"
    scheduler.add(2, 9, 0.1)
    assert scheduler.stop_reason(2, 9) is None, "the others have not come to 9, the last rung on its way"
    scheduler.add(1, 4, 1.0)
    assert scheduler.stop_reason(1, 4) is None, "trained again it counts with its new value"


def test_trials_are_compared_at_the_same_epoch_only() -> None:
    scheduler = asha()
    scheduler.add(0, 1, 0.5)
    scheduler.add(0, 3, 0.9)
    scheduler.add(1, 1, 0.6)  # worse than 0.9, but that was two epochs later
    assert scheduler.stop_reason(1, 1) is None
    assert scheduler.stop_reason(0, 3) is None


def test_a_report_that_comes_again_counts_once() -> None:
    scheduler = asha()
    for number, value in [(0, 0.5), (1, 0.6), (1, 0.6)]:
        scheduler.add(number, 1, value)
    scheduler.add(2, 1, 0.4)
    assert scheduler.stop_reason(2, 1) == "asha: epoch 1, rank 3 of 3"


def test_refilled_rungs_hold_what_the_reports_said_and_no_nan() -> None:
    scheduler = asha()
    scheduler.refill([trial(0, 0.5, 0.6, 0.7), trial(1, 0.9), trial(2, None), trial(3)])
    scheduler.add(4, 1, 0.4)
    scheduler.add(4, 3, 0.6)
    assert scheduler.stop_reason(4, 1) == "asha: epoch 1, rank 3 of 3"
    assert scheduler.stop_reason(4, 3) == "asha: epoch 3, rank 2 of 2"
