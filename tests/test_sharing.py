"""How many trials share a GPU, by toy cards whose throughput can be worked out in the head."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import pytest

from tune_service.sharing import Sharing, of_largest
from tune_service.spec import parse_spec

COLD_S = 30.0


class Card:
    """GPUs on which `per_s(k)` epochs a second are finished while k worker groups train; a group starts in 30 s."""

    def __init__(self, sharing: Sharing, per_s: Callable[[int], float], epochs: int = 3, memory: float = 0.0) -> None:
        self.sharing, self.per_s, self.epochs, self.memory = sharing, per_s, epochs, memory
        self.now_s = 0.0
        self.told: list[str] = []
        self.running: list[tuple[float, int, int, int, float]] = []
        """(end of the epoch that runs, worker group, trial, epochs left after it, when the group had started)."""
        self.warm: list[int] = []
        self.num_groups = self.num_trials = 0

    def run(self, seconds: float) -> Card:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            while len(self.running) < self.sharing.number:
                self._start()
            self.now_s, group, trial, left, _ = heapq.heappop(self.running)
            line = self.sharing.reported(trial, group, self.now_s, self.memory)
            self.told += [line] if line else []
            if left:
                self._train(group, trial, left - 1, 0.0)
            elif len(self.running) < self.sharing.number:
                self.warm.append(group)
        return self

    def _start(self) -> None:
        cold_s = 0.0
        if not self.warm:
            self.num_groups += 1
            self.warm.append(self.num_groups)
            cold_s = COLD_S
        self.num_trials += 1
        self.sharing.handed_out(self.num_trials)
        self._train(self.warm.pop(), self.num_trials, self.epochs - 1, cold_s)

    def _train(self, group: int, trial: int, left: int, cold_s: float) -> None:
        from_s = self.now_s + cold_s
        beside = 1 + sum(started_s <= from_s for *_, started_s in self.running)  # who starts slows nobody down
        heapq.heappush(self.running, (from_s + beside / self.per_s(beside), group, trial, left, from_s))


def saturates(at: int) -> Callable[[int], float]:
    """One epoch a second for each trial, up to so many; no more beyond."""
    return lambda k: float(min(k, at))


@pytest.mark.parametrize(("at", "settles"), [(1, 2), (2, 2), (4, 4), (8, 8), (16, 8)])
def test_trials_are_doubled_while_that_gains_a_tenth(at: int, settles: int) -> None:
    card = Card(Sharing(num_gpus=1, most=8), saturates(at)).run(600)
    assert card.sharing.number == settles


def test_people_are_told_what_was_measured() -> None:
    card = Card(Sharing(num_gpus=1, most=8), saturates(4)).run(600)
    assert card.told == [
        "2 trials share the GPU: 2 epochs/s; trying 4",
        "4 trials share the GPU: 4 epochs/s, with 2 it was 2; trying 8",
        "4 trials share the GPU: 4 epochs/s, with 8 it was 4",
    ]


def test_a_card_settles_where_more_gain_too_little() -> None:
    """1.10 epochs a second with two, 1.27 with four; beyond that nearly nothing."""
    per_s = {1: 0.94, 2: 1.10, 3: 1.2, 4: 1.27}
    card = Card(Sharing(num_gpus=1, most=8), lambda k: per_s.get(k, 1.3)).run(900)
    assert card.sharing.number == 4
    assert card.told[-1] == "4 trials share the GPU: 1.27 epochs/s, with 8 it was 1.3"


def test_trials_of_one_epoch_are_measured_too() -> None:
    assert Card(Sharing(num_gpus=1, most=8), saturates(4), epochs=1).run(600).sharing.number == 4


def test_the_start_of_a_worker_group_counts_for_nothing() -> None:
    """Four groups have 30 s of a first epoch each; counted, they would make four look worse than two."""
    sharing = Sharing(num_gpus=1, most=4)
    Card(sharing, saturates(4), epochs=3).run(120)
    assert sharing.number == 4


def test_no_more_than_cpus_and_spec_allow() -> None:
    assert Card(Sharing(num_gpus=1, most=3), saturates(8)).run(600).sharing.number == 3
    assert Card(Sharing(num_gpus=1, most=1), saturates(8)).run(600).sharing.number == 1


def test_on_two_gpus_there_are_twice_as_many() -> None:
    sharing = Sharing(num_gpus=2, most=16)
    assert sharing.number == 4
    card = Card(sharing, saturates(8)).run(600)
    assert sharing.number == 8
    assert card.told[-1] == "8 trials share 2 GPUs: 8 epochs/s, with 16 it was 8"


def test_on_two_gpus_memory_counts_on_each() -> None:
    assert Card(Sharing(num_gpus=2, most=16), saturates(16), memory=0.3).run(600).sharing.number == 6


@pytest.mark.parametrize(("memory", "settles"), [(0.1, 8), (0.2, 4), (0.3, 3), (0.45, 2), (0.46, 1), (0.95, 1)])
def test_all_that_share_a_gpu_take_nine_tenths_of_its_memory_at_most(memory: float, settles: int) -> None:
    assert Card(Sharing(num_gpus=1, most=8), saturates(8), memory=memory).run(600).sharing.number == settles


def test_a_trial_that_is_smaller_than_others_may_be_says_what_those_take() -> None:
    sharing = Sharing(num_gpus=1, most=8)
    sharing.handed_out(0, of_largest=0.5)
    line = sharing.reported(0, 1, 1.0, memory_share=0.25)
    assert sharing.number == 1, "a largest one may take half, and two of those are more than nine tenths"
    assert line == "1 trial has the GPU from now on: the largest may take 50% of a GPU's memory"
    sharing.handed_out(1, of_largest=1.0)
    sharing.reported(1, 1, 2.0, memory_share=0.3)
    assert sharing.number == 2, "now it is known: three tenths"


def test_a_trial_that_ran_out_of_memory_beside_others_is_tried_again_beside_fewer() -> None:
    sharing = Sharing(num_gpus=1, most=8)
    card = Card(sharing, saturates(8)).run(50)
    assert sharing.number == 4
    _, group, trial, *_ = card.running.pop()
    sharing.lost(group)
    assert sharing.ran_out(trial) == (
        f"3 trials share the GPU from now on: trial {trial} ran out of memory and is tried again"
    )
    card.run(600)
    assert sharing.number == 3, "it stays so, whatever more would gain"


def test_of_trials_that_run_out_of_memory_together_each_is_tried_again_and_one_lowers_the_number() -> None:
    sharing = Sharing(num_gpus=1, most=8)
    card = Card(sharing, saturates(8)).run(50)
    lines = [sharing.ran_out(trial) for _, _, trial, *_ in card.running]
    assert len(lines) == 4 and None not in lines
    assert sharing.number == 3


def test_a_trial_that_ran_out_of_memory_with_the_gpu_for_itself_is_not_tried_again() -> None:
    sharing = Sharing(num_gpus=1, most=8)
    for trial in (0, 1):
        sharing.handed_out(trial)
    assert sharing.ran_out(0) is not None
    assert sharing.number == 1
    sharing.handed_out(0)
    assert sharing.ran_out(0) is None
    assert sharing.number == 2, "it was this trial, which fits nowhere: the others may share again"


def test_a_trial_that_fits_nowhere_bounds_the_others_only_as_long_as_it_may_be_they_that_are_too_many() -> None:
    sharing = Sharing(num_gpus=1, most=8)
    sharing.handed_out(0)
    sharing.handed_out(1)
    sharing.lost(0)
    assert sharing.ran_out(0) is not None and sharing.number == 1
    assert report(sharing, range(1, 2), range(1, 20)) == ["1 trial has the GPU: 1 epochs/s"], "measured meanwhile"
    sharing.handed_out(0)
    assert sharing.ran_out(0) is None and sharing.number == 2


def test_of_two_trials_that_fit_nowhere_neither_leaves_a_bound_behind() -> None:
    sharing = Sharing(num_gpus=1, most=8)
    for trial in (0, 1):
        sharing.handed_out(trial)
    assert sharing.ran_out(0) is not None and sharing.ran_out(1) is not None
    for trial, number in ((0, 1), (1, 2)):
        sharing.handed_out(trial)
        assert sharing.ran_out(trial) is None
        assert sharing.number == number


def report(sharing: Sharing, groups: range, seconds: range) -> list[str]:
    """Each group finishes an epoch each second. What people are told."""
    lines = [sharing.reported(group, group, float(second), 0.0) for second in seconds for group in groups]
    return [line for line in lines if line]


def three_trials() -> Sharing:
    """Two of them may run at a time, never more."""
    sharing = Sharing(num_gpus=1, most=2)
    for trial in range(3):
        sharing.handed_out(trial)
    return sharing


def test_eight_epochs_are_measured_after_the_first_of_each_group() -> None:
    sharing = three_trials()
    assert report(sharing, range(2), range(1, 6)) == []  # group 0 counts from second 2 on, when both have started
    assert report(sharing, range(2), range(6, 7)) == ["2 trials share the GPU: 2 epochs/s"]


def test_what_a_group_does_while_another_starts_anew_is_not_counted() -> None:
    sharing = three_trials()
    assert report(sharing, range(2), range(1, 5)) == []
    sharing.lost(1)
    assert report(sharing, range(1), range(5, 100)) == []
    for second in (100, 110, 120, 130, 140, 150):  # beside the other one it takes ten times as long
        told = report(sharing, range(2), range(second, second + 1))
    assert told == ["2 trials share the GPU: 0.2 epochs/s"]


def test_one_group_s_epochs_are_not_believed_before_each_has_finished_two() -> None:
    sharing = three_trials()
    assert report(sharing, range(2), range(1, 2)) == []
    assert report(sharing, range(1), range(2, 20)) == []
    assert report(sharing, range(1, 2), range(20, 22)) == ["2 trials share the GPU: 1.1 epochs/s"]


def test_nothing_is_measured_while_more_run_than_may() -> None:
    """As they do for a while after their number was lowered."""
    sharing = three_trials()
    assert report(sharing, range(3), range(1, 20)) == []
    assert report(sharing, range(2), range(20, 26)) == ["2 trials share the GPU: 2 epochs/s"]


def test_a_trials_size_is_its_rows_by_its_length_over_the_largest_of_the_space() -> None:
    written: dict[str, Any] = {
        "name": "sizes",
        "model": {"name": "gpt2"},
        "data": {"task": "mrpc"},
        "training": {"max_length": 128},
        "search_space": {"batch_size": {"choice": [16, 64]}, "micro_batch_size": {"choice": [None, 8]}},
    }
    spec = parse_spec(written)
    assert of_largest(spec, {"batch_size": 64, "micro_batch_size": None}) == 1.0
    assert of_largest(spec, {"batch_size": 16, "micro_batch_size": None}) == 0.25
    assert of_largest(spec, {"batch_size": 64, "micro_batch_size": 8}) == 0.125
