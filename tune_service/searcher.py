"""What is tried next: from our search spaces to Optuna's distributions and samplers, translated at the border."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from search_spaces.domains import Choice, Domain, IntUniform, LogUniform, SearchSpace, Uniform


def distribution(domain: Domain) -> BaseDistribution:
    """Optuna's distribution of a domain. Integer ranges include both ends on both sides."""
    match domain:
        case LogUniform(low, high):
            return FloatDistribution(low, high, log=True)
        case Uniform(low, high):
            return FloatDistribution(low, high)
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
        self._make = TPESampler if name == "tpe" else RandomSampler
        self._seed = seed
        self._storage = InMemoryStorage()
        self._view = optuna.create_study(storage=self._storage, direction=direction)
        self._seen: dict[int, tuple[int, OptunaState]] = {}
        """Number -> trial id in the view, state there."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        self._refresh(study)
        return self._sampler(trial).infer_relative_search_space(self._view, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        # TPE notes on the trial what it suggests, for its constant liar: it must be the view's trial.
        shown = self._storage.get_trial(self._seen[trial.number][0])
        return self._sampler(trial).sample_relative(self._view, shown, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # One stream for each parameter: with the same seed, equal ranges would get equal values.
        stream = zlib.crc32(param_name.encode())
        return self._sampler(trial, stream).sample_independent(self._view, trial, param_name, param_distribution)

    def _sampler(self, trial: FrozenTrial, stream: int = 0) -> BaseSampler:
        seed = int(np.random.SeedSequence([self._seed, trial.number, stream]).generate_state(1)[0])
        if self._make is RandomSampler:
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, multivariate=True, constant_liar=True)

    def _refresh(self, study: optuna.Study) -> None:
        """Brings the view up to the record. Trials enter in order, so that both count them alike."""
        for trial in study.get_trials(deepcopy=False):
            view_id, state = self._seen.get(trial.number, (None, None))
            if state is not None and state.is_finished():
                continue
            shown = as_seen_by_sampler(trial)
            if view_id is None:
                view_id = self._storage.create_new_trial(self._view._study_id, template_trial=shown)
            else:
                self._update(view_id, shown)
            self._seen[trial.number] = (view_id, shown.state)
        # A study object keeps the finished trials of its first look at them; a new one looks again.
        self._view = optuna.load_study(study_name=self._view.study_name, storage=self._storage)

    def _update(self, view_id: int, shown: FrozenTrial) -> None:
        """Adds to a trial that has no end yet in the view: it entered when it was asked for, without parameters."""
        known = self._storage.get_trial(view_id).params
        for name, distribution in shown.distributions.items():
            if name not in known:
                value = distribution.to_internal_repr(shown.params[name])
                self._storage.set_trial_param(view_id, name, value, distribution)
        if shown.state.is_finished():
            for epoch, value in shown.intermediate_values.items():
                self._storage.set_trial_intermediate_value(view_id, epoch, value)
            self._storage.set_trial_state_values(view_id, shown.state, shown.values)


def as_seen_by_sampler(trial: FrozenTrial) -> FrozenTrial:
    """The trial as the sampler is told of it.

    TPE ranks PRUNED trials by the epoch they came to, then by value, so one that is NaN at epoch 2 would stand above a
    good one stopped at epoch 1; without any value it stands below all. What is not finished is told as RUNNING, with
    no values: TPE's constant liar keeps away from it.
    """
    finished = trial.state.is_finished()
    diverged = trial.user_attrs.get("diverged", False)
    return create_trial(
        state=trial.state if finished else OptunaState.RUNNING,
        params=trial.params,
        distributions=trial.distributions,
        values=trial.values if trial.state == OptunaState.COMPLETE else None,
        intermediate_values=trial.intermediate_values if finished and not diverged else {},
    )
