"""The bridge to Ray Tune: hands it trials, passes its events to the driver, does what the driver says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from trainables.redaction import redacted
from trainables.trial import GroupShape, TrialSupervisor
from trainables.worker import Task
from tune_service.driver import Driver
from tune_service.home import StudyHome
from tune_service.place import Place, Session
from tune_service.record import AskedTrial
from tune_service.slots import Slots
from tune_service.spec import StudySpec, beside

NUM_ENDED_KEPT = 50
"""Trials that Tune remembers beside those that run."""


def run_trials(
    spec: StudySpec,
    folder: StudyHome,
    driver: Driver,
    lease: tuple[str, str],
    place: Place,
    tick: Callable[[], None],
    on_lost: Callable[[str], None],
) -> None:
    """Runs the study's trials at `place` until the driver has no more.

    `tick` is called several times a second; `on_lost` when Ray is lost.
    """
    # A variable of Tune's, for a library that no trial uses, would make a runtime environment: Ray then passes over the
    # workers that it has started already, and starts each process of a trial twice, the second time in there.
    class_cache.DEFAULT_ENV_VARS.clear()
    resources = spec.resources
    bundle: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpu_share:
        bundle["GPU"] = resources.gpu_share
    with place.session(spec, on_lost) as session:
        if not session.supervisor_bundle:
            # Here every process has this one's environment, keys of AWS too: in a runtime environment Ray would show
            # them in its state.
            class_cache.ENV_VARS_TO_PROPAGATE.clear()
        # The first bundle is the supervisor's, which costs nothing; where it is empty, Tune leaves it out of the
        # placement group.
        first = dict(session.supervisor_bundle)
        bundles = tune.PlacementGroupFactory([first] + [dict(bundle) for _ in range(resources.workers)])
        scheduler = _StudyScheduler(driver)
        slots = scheduler.slots = Slots(
            session, scheduler.num_running, lambda: driver.num_open, lambda: driver.most_at_once
        )
        config_of = partial(trial_config, spec, folder, lease, session)
        tuner = tune.Tuner(
            tune.with_resources(TrialSupervisor, bundles),
            tune_config=tune.TuneConfig(
                search_alg=_StudySearcher(driver, config_of, slots.number),
                scheduler=scheduler,
                num_samples=-1,  # the driver counts
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=spec.name,
                storage_path=str(session.scratch / "tune"),
                callbacks=[_Hooks(driver, scheduler, tick)],
                stop=_StudyStopper(driver, scheduler.num_running),
                failure_config=tune.FailureConfig(max_failures=0),  # the driver puts the trial back in line
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # checkpoints are the supervisor's
                verbose=0,
            ),
        )
        tuner.fit()


def trial_config(
    spec: StudySpec, folder: StudyHome, lease: tuple[str, str], session: Session, asked: AskedTrial, slot: int
) -> dict[str, Any]:
    """What the supervisor is told, as plain values."""
    if session.root is not None:
        spec = beside(spec, session.root)
    settings = spec.trial_settings().with_params(asked.params).model_dump(mode="json") if spec.is_finetune else {}
    if spec.is_finetune and asked.micro_batch_size is not None:
        settings["training"]["micro_batch_size"] = asked.micro_batch_size
    task = Task(
        number=asked.number,
        trainable=spec.trainable,
        params=spec.training_values | asked.params,
        seed=spec.seed,
        max_epochs=spec.max_epochs,
        logs=folder.logs_where,
        checkpoints=folder.checkpoints.where,
        budget_bytes=spec.checkpoints.budget_bytes,
        objective=(spec.objective.metric, spec.objective.mode),
        lease=lease,
        shrinks=spec.faults.on_oom == "shrink",
        settings=settings,
        import_path=str(spec.folder) if session.root is None else None,  # else it is the rank's working directory
    )
    resources = spec.resources
    shape = GroupShape(
        name=f"{spec.name} slot {slot}",
        workers=resources.workers,
        cpus_per_worker=resources.cpus_per_worker,
        gpus_per_worker=resources.gpu_share,
        step_timeout_s=spec.faults.step_timeout_s,
        start_timeout_s=spec.faults.start_timeout_s,
        first_bundle=1 if session.supervisor_bundle else 0,
        cards=tuple(session.cards),
    )
    return {"task": asdict(task), "group": asdict(shape)}


class _NotKept:
    """Tune pickles its parts beside its results, to restore them; a study goes on from its record instead."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()

    def __deepcopy__(self, memo: object) -> _NotKept:
        return self

    def __copy__(self) -> _NotKept:
        return self


class _StudySearcher(_NotKept, Searcher):  # type: ignore[misc]  # Ray has no types
    """Hands Tune one trial after the other, at most `num_slots()` at a time."""

    def __init__(
        self, driver: Driver, config_of: Callable[[AskedTrial, int], dict[str, Any]], num_slots: Callable[[], int]
    ) -> None:
        super().__init__()
        self._driver = driver
        self._config_of = config_of
        self._num_slots = num_slots
        self._slots: dict[int, str] = {}
        """Slot -> the trial that holds it."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if len(self._slots) >= self._num_slots() or not self._driver.has_room:
            return None  # Tune asks again
        slot = next(number for number in count() if number not in self._slots)
        asked = self._driver.ask()
        if asked is None:
            # While trials run, one of them may come back in line.
            return None if self._driver.has_running else str(Searcher.FINISHED)
        self._slots[slot] = trial_id
        return self._config_of(asked, slot)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Frees the slot. What the trial came to is in the record already."""
        self._slots = {slot: holder for slot, holder in self._slots.items() if holder != trial_id}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the record has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a study goes on from its record, never from Tune's state."""


class _StudyScheduler(_NotKept, FIFOScheduler):  # type: ignore[misc]
    """Passes every result to the driver."""

    slots: Slots
    _controller: Any
    """Tune's own, from the first trial on."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver
        self.trials: dict[str, Trial] = {}
        """Those without an end, by Tune's id."""

    def num_running(self) -> int:
        """Trials that have an actor, and so room."""
        return sum(trial.temporary_state.ray_actor is not None for trial in self.trials.values())

    def actor_of(self, trial: Trial) -> Any:
        """Its supervisor, from when Ray has room for it; Tune itself tells of it only once it has started."""
        actor = trial.temporary_state.ray_actor
        if actor is None:
            made = self._controller._actor_manager._live_actors_to_ray_actors_resources
            actor, _ = made.get(self._controller._trial_to_actor.get(trial), (None, None))
        return actor

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        self._controller = tune_controller
        self.trials[trial.trial_id] = trial
        _forget_ended(tune_controller)
        self.slots.widen(tune_controller._actor_cache, trial.placement_group_factory)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if "failure" in result:
            self.slots.failed(result["failure"])
        goes_on = self._driver.result(result)
        if goes_on and self._driver.stopping:
            trial.temporary_state.ray_actor.save_whole.remote()  # comes before the step that Tune asks for next
        return str(TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The first that waits; Tune's own looks at every trial there ever was, at every step.

        One that no actor is starting for comes before: if Tune has an idle actor for it, it ends the starting one.
        """
        waiting = [trial for trial in self.trials.values() if trial.status == Trial.PENDING]
        starting = tune_controller._trial_to_actor
        return min(waiting, key=lambda trial: trial in starting, default=None)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, trial, result)
        self.trials.pop(trial.trial_id, None)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_remove(tune_controller, trial)
        self.trials.pop(trial.trial_id, None)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_error(tune_controller, trial)
        self.trials.pop(trial.trial_id, None)


def _forget_ended(tune_controller: Any) -> None:
    """Tune keeps every trial with all its metrics, 80 KB each, and ends with a look at all. The record has them too.

    The last ones stay, in case something of theirs still comes. There is no public setting for this.
    """
    ended = [trial for trial in tune_controller._trials if trial.is_finished()]
    if len(ended) < 2 * NUM_ENDED_KEPT:
        return
    forgotten = set(ended[:-NUM_ENDED_KEPT])
    tune_controller._trials[:] = [trial for trial in tune_controller._trials if trial not in forgotten]
    for kept in (tune_controller._stopped_trials, tune_controller._failed_trials, tune_controller._trials_to_cache):
        kept -= forgotten


class _Hooks(_NotKept, tune.Callback):  # type: ignore[misc]
    """Tune's other events."""

    def __init__(self, driver: Driver, scheduler: _StudyScheduler, tick: Callable[[], None]) -> None:
        self._driver = driver
        self._scheduler = scheduler
        self._open_trials = scheduler.trials
        self._slots = scheduler.slots
        self._tick = tick

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._driver.started(_number(trial))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._driver.supervisor_lost(_number(trial), _error_line(trial))

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        overdue = set(self._driver.poll())
        for trial in self._open_trials.values():
            number, actor = _number(trial), self._scheduler.actor_of(trial)
            if actor is not None and trial.status == Trial.PENDING:
                self._driver.handed_over(number, is_warm=trial.temporary_state.ray_actor is not None)
            if actor is not None and number in overdue:
                ray.kill(actor)  # Tune then sees it fail, which it does not when the process is only silent
        self._slots.settle()
        self._driver.notice(self._slots.notice(len(self._open_trials)))
        self._tick()


class _StudyStopper(_NotKept, tune.Stopper):  # type: ignore[misc]
    """Ends everything at once when the driver says so, or when it stops and all that there is only waits for room."""

    def __init__(self, driver: Driver, num_running: Callable[[], int]) -> None:
        self._driver = driver
        self._num_running = num_running

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._driver.stopping_now or (self._driver.stopping and self._num_running() == 0)


def _number(trial: Trial) -> int:
    return int(trial.config["task"]["number"])


def _error_line(trial: Trial) -> str:
    """What Ray says of a supervisor's end, on one line."""
    path = trial.error_file
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if path else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no word of why")
    return redacted(last.partition(" Some common causes")[0])


def _trial_name(trial: Trial) -> str:
    return f"trial-{_number(trial):05d}"
