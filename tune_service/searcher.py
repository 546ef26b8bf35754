"""What is tried next: from our search spaces to Optuna's distributions and samplers, translated at the border."""

from __future__ import annotations

import copy
import itertools
import math
import zlib
from bisect import insort
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.search_space import IntersectionSearchSpace
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from search_spaces.domains import Choice, Domain, IntUniform, LogIntUniform, LogUniform, SearchSpace, Uniform

MAX_TRIALS_SHOWN = 1000
"""Of those that have ended, how many TPE learns from."""
NUM_GOOD = 25
"""The most trials that TPE calls good, however many there are (`default_gamma` of Optuna's TPE)."""


def distribution(domain: Domain) -> BaseDistribution:
    """Optuna's distribution of a domain. Integer ranges include both ends on both sides."""
    match domain:
        case LogUniform(low, high):
            return FloatDistribution(low, high, log=True)
        case Uniform(low, high):
            return FloatDistribution(low, high)
        case LogIntUniform(low, high):
            return IntDistribution(low, high, log=True)
        case IntUniform(low, high):
            return IntDistribution(low, high)
        case Choice(values):
            return CategoricalDistribution(values)


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    return {name: distribution(domain) for name, domain in space.items()}


def grid_points(space: SearchSpace, first: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
    """Combinations of the domains' values, the last name fastest, `first` before all others; at most `limit`."""
    axes = [domain.grid() or () for domain in space.values()]
    product = (dict(zip(space, values, strict=True)) for values in _product(axes))
    start = [dict(first)] if len(first) == len(space) else []
    return list(itertools.islice(itertools.chain(start, (point for point in product if point not in start)), limit))


def _product(axes: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """`itertools.product`, which would first put every value of a wide range into memory."""
    if not axes:
        yield ()
        return
    for value in axes[0]:
        for rest in _product(axes[1:]):
            yield (value, *rest)


class StudySampler(BaseSampler):
    """Optuna's TPE or random sampler, on a view of the study in which a diverged trial is the worst of all.

    Made anew for each trial from (seed, trial number): a resumed study goes on where it was, and does not suggest its
    first trials again. TPE is Optuna's multivariate one with a constant liar (Watanabe 2023, arXiv:2304.11127).
    """

    def __init__(self, name: str, seed: int, direction: StudyDirection) -> None:
        self._is_random = name != "tpe"
        self._seed = seed
        self._storage = SamplerView(direction, MAX_TRIALS_SHOWN)
        self._view = optuna.create_study(storage=self._storage, study_name="view", direction=direction)
        self._space = IntersectionSearchSpace(include_pruned=True)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if self._is_random:
            return {}
        self._storage.refresh(study.get_trials(deepcopy=False))
        # A study object keeps the finished trials of its first look at them; a new one looks again.
        self._view = optuna.load_study(study_name="view", storage=self._storage)
        # What TPE itself would answer; but this one goes on from its last answer, where TPE's would start anew.
        space = self._space.calculate(self._view)
        return {name: domain for name, domain in space.items() if not domain.single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler(trial).sample_relative(self._view, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # One stream for each parameter: with the same seed, equal ranges would get equal values.
        stream = zlib.crc32(param_name.encode())
        return self._sampler(trial, stream).sample_independent(self._view, trial, param_name, param_distribution)

    def _sampler(self, trial: FrozenTrial, stream: int = 0) -> BaseSampler:
        seed = int(np.random.SeedSequence([self._seed, trial.number, stream]).generate_state(1)[0])
        if self._is_random:
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, multivariate=True, constant_liar=True)


def suggest(
    study: optuna.Study, number: int, given: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]
) -> dict[str, Any]:
    """Parameters for trial `number`, which is not in the study yet: the given ones, the others as the sampler says.

    In the order of Optuna's own `Trial.suggest_*`, which needs a trial in the storage and writes each one by itself.
    """
    trial = FrozenTrial(
        number=number,
        trial_id=number,
        state=OptunaState.RUNNING,
        value=None,
        datetime_start=None,
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
    )
    sampled = dict(given)
    if not given.keys() >= distributions.keys():
        space = study.sampler.infer_relative_search_space(study, trial)
        sampled = study.sampler.sample_relative(study, trial, space) | sampled
    for name, domain in distributions.items():
        if name not in sampled and isinstance(domain, CategoricalDistribution) and domain.single():
            sampled[name] = domain.choices[0]
        elif name not in sampled:
            sampled[name] = study.sampler.sample_independent(study, trial, name, domain)
    return {name: sampled[name] for name in distributions}


class SamplerView(InMemoryStorage):
    """The trials of a study that TPE is shown: all without an end, and of those with one at most `bound`.

    These are the NUM_GOOD that TPE ranks highest, which are all that it ever calls good, and for the rest, which it
    only keeps away from, the newest: it weighs the older ones less in any case. So a suggestion costs the same after
    10,000 trials as after 1,000. Which trials these are follows from the record alone, so a resumed study is shown the
    same ones.
    """

    def __init__(self, direction: StudyDirection, bound: int) -> None:
        super().__init__()
        self._sign = 1.0 if direction == StudyDirection.MINIMIZE else -1.0
        self._num_newest = bound - NUM_GOOD
        self._good: list[FrozenTrial] = []
        self._rest: dict[int, FrozenTrial] = {}
        self._open: set[int] = set()
        self._num_seen = 0
        self._shown: list[FrozenTrial] = []

    def refresh(self, trials: Sequence[FrozenTrial]) -> None:
        """Brings the view up to a record's trials, in the order of their numbers. Looks only at what is new in it."""
        open_now = []
        for number in [*sorted(self._open), *range(self._num_seen, len(trials))]:
            shown = as_seen_by_sampler(trials[number])
            if not shown.state.is_finished():
                open_now.append(shown)
            elif shown.state != OptunaState.FAIL:  # which TPE passes over
                self._add(shown)
        self._open = {trial.number for trial in open_now}
        self._num_seen = len(trials)
        self._shown = sorted([*open_now, *self._good, *self._rest.values()], key=lambda trial: trial.number)

    def _add(self, trial: FrozenTrial) -> None:
        """Takes in a trial that has ended. In whatever order trials end, the same ones are left at last."""
        insort(self._good, trial, key=lambda each: rank_of(each, self._sign))
        if len(self._good) > NUM_GOOD:
            surpassed = self._good.pop()
            self._rest[surpassed.number] = surpassed
        if len(self._rest) > self._num_newest:
            del self._rest[min(self._rest)]

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[OptunaState] | None = None
    ) -> list[FrozenTrial]:
        found = [trial for trial in self._shown if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Nothing: TPE notes here what it suggests, for those who ask before the trial has it. Here nobody does."""


def rank_of(trial: FrozenTrial, sign: float) -> tuple[int, int, float, int]:
    """Sorts trials that have ended as TPE does, the best first: the completed by value, then the pruned by the epoch
    they came to and then by value, then the pruned without any value. `sign` is 1 for minimising, -1 for maximising.
    """
    if trial.state == OptunaState.COMPLETE:
        return 0, 0, sign * (trial.value or 0.0), trial.number
    if not trial.intermediate_values:
        return 2, 0, 0.0, trial.number
    epoch, value = max(trial.intermediate_values.items())
    return 1, -epoch, math.inf if math.isnan(value) else sign * value, trial.number


def as_seen_by_sampler(trial: FrozenTrial) -> FrozenTrial:
    """The trial as the sampler is told of it.

    TPE ranks PRUNED trials by the epoch they came to, then by value, so one that is NaN at epoch 2 would stand above a
    good one stopped at epoch 1; without any value it stands below all. What is not finished is told as RUNNING, with
    no values: TPE's constant liar keeps away from it.
    """
    finished = trial.state.is_finished()
    diverged = trial.user_attrs.get("diverged", False)
    return FrozenTrial(
        number=trial.number,
        trial_id=trial._trial_id,
        state=trial.state if finished else OptunaState.RUNNING,
        value=trial.value if trial.state == OptunaState.COMPLETE else None,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={},
        system_attrs={},
        intermediate_values=trial.intermediate_values if finished and not diverged else {},
    )
