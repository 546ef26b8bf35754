"""A study's numbers for Prometheus, through Ray's own metrics: they stand beside those of the cluster it runs on.

`grafana_dashboard.json` shows them; import it into a Grafana that reads the cluster's Prometheus.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from ray.util.metrics import Gauge

from tune_service.status import StudyView, TrialState, TrialStatus, ranked

PUBLISH_S = 5.0
STATES: tuple[TrialState, ...] = ("waiting", "running", "paused", "completed", "pruned", "failed")
BEST = "tune_service_best_value"
TRIALS = "tune_service_trials"
EPOCH = "tune_service_trial_epoch"
TOKENS_PER_S = "tune_service_trial_tokens_per_s"


class StudyMetrics:
    """What one study publishes. Needs a process that has joined a Ray."""

    def __init__(self) -> None:
        self._best = Gauge(BEST, "Best value of the objective so far", ("study", "metric"))
        self._trials = Gauge(TRIALS, "Trials by state", ("study", "state"))
        self._epoch = Gauge(EPOCH, "Last epoch that a trial has reported", ("study", "trial"))
        self._tokens = Gauge(
            TOKENS_PER_S, "Tokens a second in a trial's last epoch; 0: it has ended", ("study", "trial")
        )
        self._next = 0.0
        self._told: dict[int, tuple[str, int]] = {}
        """Trial -> the state and the number of reports that were published last."""

    def publish(self, study: str, view: StudyView) -> None:
        """Called often; publishes every PUBLISH_S, and of trials only what is new."""
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + PUBLISH_S
        trials = view.trials()
        counts = Counter(trial.state for trial in trials)
        for state in STATES:
            self._trials.set(counts[state], {"study": study, "state": state})
        for best in ranked(trials, view.objective)[:1]:
            self._best.set(best.value, {"study": study, "metric": view.objective.metric})
        for trial in trials:
            news = (trial.state, len(trial.reports))
            if trial.reports and self._told.get(trial.number) != news:
                self._told[trial.number] = news
                self._publish_trial(trial, {"study": study, "trial": str(trial.number)})

    def _publish_trial(self, trial: TrialStatus, tags: dict[str, str]) -> None:
        last = trial.reports[-1]
        self._epoch.set(last.epoch, tags)
        tokens: Any = last.metrics.get("tokens_per_s")
        if tokens is not None:
            self._tokens.set(tokens if trial.state == "running" else 0.0, tags)
