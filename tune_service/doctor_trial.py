"""One trial's worker group, tried on a cluster: its ranks, their exchange, a step, its memory, and what that makes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainables.errors import OutOfMemoryError, TrialError
from trainables.far import own_files
from trainables.worker import FIRST_DEADLINE_S, Task
from tune_service import diagnosis
from tune_service.check import Check
from tune_service.cluster_room import ClusterRoom
from tune_service.diagnosis import Node
from tune_service.estimate import estimate, too_long
from tune_service.kept import BYTES_PER_PARAMETER
from tune_service.spec import StudySpec
from tune_service.words import counted

TRIED = ("all-reduce", "step", "memory", "estimate")
"""What takes a trial's room."""


def try_trial(
    spec: StudySpec,
    group: Any,
    room: ClusterRoom,
    nodes: Sequence[Node],
    checkpoints: Callable[[int], tuple[Check, float]],
) -> Iterator[Check]:
    """The checks of `TRIED`, in a placement group with a trial's bundles. `spec`: as a rank sees it.

    `checkpoints` looks at the room for checkpoints of so many bytes, and how many bytes the storage takes in a second.
    """
    from trainables.worker_group import RayWorkerGroup, StepDeadline

    resources = spec.resources
    scratch = own_files.emptied("check")
    shape = (resources.workers, resources.cpus_per_worker, resources.gpu_share)
    deadline = StepDeadline(FIRST_DEADLINE_S, spec.faults.start_timeout_s)
    ranks = RayWorkerGroup(f"{spec.name} check", *shape, group, deadline)
    name = TRIED[0]
    try:
        ranks.begin(_task(spec, scratch))
        first = ranks.next_report()
        assert first is not None, "the probe has a first report"
        yield _all_reduce(spec, first.metrics)
        if not spec.is_finetune:
            why = "a trainable of your own is imported, not run"
            yield from (diagnosis.not_looked_at(name, why) for name in TRIED[1:])
            return
        name = TRIED[1]
        second = ranks.next_report()
        assert second is not None, "the probe has a second report where there is something to fine-tune"
        yield from _step(spec, second.metrics, room, nodes, checkpoints)
    except TrialError as error:
        yield _failed(name, error)
    finally:
        ranks.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _task(spec: StudySpec, scratch: Path) -> Task:
    params = spec.largest_params()
    return Task(
        number=0,
        trainable="trainables.probe:probe",
        params=params,
        seed=spec.seed,
        max_epochs=spec.max_epochs,
        logs=str(scratch / "logs"),
        checkpoints=str(scratch / "checkpoints"),
        settings=spec.trial_settings().with_params(params).model_dump(mode="json") if spec.is_finetune else {},
    )


def _all_reduce(spec: StudySpec, found: Mapping[str, float]) -> Check:
    workers = spec.resources.workers
    if workers == 1:
        return Check("all-reduce", True, "one worker a trial: its rank came up, and has nobody to exchange with")
    seconds, num_bytes = found["all_reduce_s"], found["all_reduce_bytes"]
    backend = "NCCL" if spec.resources.gpu_share else "gloo"
    speed = f"{num_bytes / 1e6:.0f} MB in {1000 * seconds:.0f} ms, {num_bytes / seconds / 1e6:.0f} MB/s"
    return Check("all-reduce", True, f"{workers} ranks by {backend}: {speed}")


def _step(
    spec: StudySpec,
    found: Mapping[str, float],
    room: ClusterRoom,
    nodes: Sequence[Node],
    checkpoints: Callable[[int], tuple[Check, float]],
) -> Iterator[Check]:
    sizes = spec.trial_settings().with_params(spec.largest_params()).training
    micro = f", micro_batch_size {sizes.micro_batch_size}" if sizes.micro_batch_size else ""
    told = f"{found['step_s']:.3g} s with batch_size {sizes.batch_size}, max_length {sizes.max_length}{micro}"
    yield Check("step", True, f"{told} and the longest rows there are; {found['parameters']:.3g} parameters")
    yield diagnosis.memory(spec, found, nodes)
    has_room, storage_bytes_s = checkpoints(int(BYTES_PER_PARAMETER * found["parameters"]))
    yield has_room
    if not storage_bytes_s:
        yield diagnosis.not_looked_at(TRIED[-1], "the storage takes no checkpoints")
        return
    at_once = room.fit(spec.resources, spec.budget.concurrent_trials)
    estimated = estimate(spec, found, at_once, storage_bytes_s)
    yield too_long(spec, estimated) or Check(TRIED[-1], True, f"{estimated}; with {counted(at_once, 'trial')} at once")


def _failed(name: str, error: TrialError) -> Check:
    if isinstance(error, OutOfMemoryError):
        advice = (
            "training.micro_batch_size, smaller largest batch_size and max_length, or more of a GPU for each worker"
        )
        return Check(name, False, str(error), advice, code=2)
    advice = "a study's trials would fail alike; between nodes all ports must be open"
    return diagnosis.failed(name, str(error), advice)
