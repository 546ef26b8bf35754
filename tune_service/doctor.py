"""The doctor of a cluster: a job on its head that tries what a study of a spec needs, piece by piece.

Every wait has a deadline, and what was taken is given back: the job's actors and placement group end with it in any case.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search_spaces import Domain, IntUniform, Value
from trainables.checkpoint import GIB
from trainables.errors import OutOfMemoryError, Problem, TrialError
from trainables.worker import START_DEADLINE_S, Task
from tune_service import diagnosis, node_look
from tune_service.autoscaler import cluster_file, troubles
from tune_service.check import Check, looked_at, room_for_checkpoints, run_checks
from tune_service.cluster_ray import ThisCluster, is_head, joined
from tune_service.cluster_room import ClusterRoom, demand, kinds_of
from tune_service.diagnosis import Node, Port
from tune_service.errors import CommandError
from tune_service.kept import BYTES_PER_PARAMETER
from tune_service.parcel import SPEC
from tune_service.spec import StudySpec, beside, parse_spec
from tune_service.storage import Storage

if TYPE_CHECKING:
    from tune_service.head import Answer

NODE_S = 180.0
"""How long a node may take to answer: a process starts there, and perhaps imports the user's module."""
PORTS_S = 60.0
ROOM_S = 30.0
"""How long room that seems to be free may take to be given."""
START_NODES_S = 1800.0
"""How long nodes may take that were asked for: machines start, and install what they need."""
TOLD_S = 5.0
WRITTEN_BYTES = 64 * 1024**2
_TRIED = ("all-reduce", "step", "memory", "estimate")
"""What takes a trial's room."""


def check_here(storage: Storage, start_nodes: bool, versions: Mapping[str, str], answer: Answer) -> None:
    """Sends each check as soon as it is done. The spec lies in the working directory, as for a study.

    `versions`: the laptop's.
    """
    root = Path.cwd()
    spec = parse_spec(json.loads((root / SPEC).read_text(encoding="utf-8")), root)
    with joined(f"check {spec.name}", came_with=root) as place:
        doctor = _Doctor(spec, root, storage, place, lambda line: answer.send({"tell": line}))
        for check in doctor.checks(start_nodes, versions):
            answer.send({"check": check.to_json(), "code": check.code})
        answer.send({"ports": [[port.address, port.number, port.program, port.is_heads] for port in doctor.ports]})


class _Doctor:
    def __init__(
        self, spec: StudySpec, root: Path, storage: Storage, place: ThisCluster, tell: Callable[[str], None]
    ) -> None:
        self._spec, self._root, self._storage, self._place, self._tell = spec, root, storage, place, tell
        self._bytes_s = 0.0
        """What the storage takes in a second; 0: unknown."""
        self.ports: list[Port] = []

    def checks(self, start_nodes: bool, versions: Mapping[str, str]) -> Iterator[Check]:
        yield self._token()
        for check in run_checks(self._spec, self._storage, self._place.room):
            if check.ok and check.name == "storage":
                check = looked_at("storage", self._storage_speed)
            elif check.ok and check.name == "resources":
                check = self._resources(check)
            yield check
        with self._room(start_nodes) as (group, why_not):
            nodes = self._look()
            yield diagnosis.versions(nodes, versions)
            yield diagnosis.nodes_check(nodes)
            if any(node.is_worker for node in nodes):
                yield diagnosis.opened("trainable on nodes" if not self._spec.is_finetune else "inputs on nodes", nodes)
            if group is None:
                advice = "" if start_nodes else "--start-nodes asks the autoscaler for what one trial needs"
                yield from (diagnosis.not_looked_at(name, why_not, advice) for name in _TRIED)
            else:
                yield from self._tried(group, nodes)
            self.ports = self._probe(nodes)
            yield diagnosis.ports(self.ports)

    # The head

    def _token(self) -> Check:
        """Whether the one port that leads to everything, the GCS, refuses who shows no token."""
        host, _, port = os.environ["RAY_ADDRESS"].rpartition(":")
        says = node_look.probed([(host, int(port))])[0]
        if says == node_look.REFUSED:
            return Check("token", True, f"the GCS at {host}:{port} refuses who shows none")
        found = f"the GCS at {host}:{port} takes orders from who shows none: anybody who reaches it runs programs"
        return diagnosis.failed("token", found, diagnosis.TOKEN_ADVICE)

    def _storage_speed(self) -> str:
        """Writes, reads and deletes a file where studies lie."""
        place = next(each for each in (self._storage.root, *self._storage.root.parents) if each.is_dir())
        path, block = place / f".check-{os.getpid()}", os.urandom(1024**2)
        try:
            started = time.monotonic()
            with path.open("wb") as file:
                for _ in range(WRITTEN_BYTES // len(block)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
                written_s = time.monotonic() - started
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else it is read from memory
            started = time.monotonic()
            is_whole = path.stat().st_size == WRITTEN_BYTES and path.read_bytes().endswith(block)
            read_s = time.monotonic() - started
        except OSError as error:
            expected = "a disk with room, or another --storage DIR"
            raise CommandError(Problem("--storage", "takes and gives back a file", str(error), expected)) from error
        finally:
            path.unlink(missing_ok=True)
        if not is_whole:
            raise CommandError(Problem("--storage", "gives back what it took", "another content", "another disk"))
        self._bytes_s = WRITTEN_BYTES / written_s
        speeds = f"writes {self._bytes_s / 1e6:.0f} MB/s, synced, reads {WRITTEN_BYTES / read_s / 1e6:.0f} MB/s"
        return f"{self._storage.root}: {speeds}, {self._storage.free_bytes() / GIB:.3g} GiB free"

    def _resources(self, check: Check) -> Check:
        """Adds how many fit now; where none does and no autoscaler is there, waiting would not end."""
        resources, room = self._spec.resources, self._place.room
        if not room.fits_now(resources) and cluster_file() is None:
            found = (
                f"a trial needs {resources.workers} workers of {demand(resources)} each, the cluster has {room.offer()}"
            )
            advice = "nodes that hold it, or less in `resources`: nodes come by hand here, no autoscaler was found"
            return Check("resources", False, found, advice, code=2)
        return replace(check, found=f"{check.found}, {room.fits_now(resources)} now")

    # Room for one trial

    @contextmanager
    def _room(self, start_nodes: bool) -> Iterator[tuple[Any, str]]:
        """(placement group with a trial's bundles, ""), or (None, why there is none)."""
        resources = self._spec.resources
        room = self._place.room
        if room.is_final and not room.fit(resources):
            yield None, "no node meets the demand"
            return
        if not start_nodes and not room.fits_now(resources):
            yield None, "no worker node is up" if not any(kind.cpus for kind in room.alive) else "no node up holds it"
            return
        if not start_nodes and not ClusterRoom(_free()).fits_now(resources):
            yield None, "other studies have all the room"
            return
        import ray

        bundle = {"CPU": resources.cpus_per_worker}
        if resources.gpus_per_worker:
            bundle["GPU"] = resources.gpus_per_worker
        group = ray.util.placement_group([dict(bundle) for _ in range(resources.workers)])
        try:
            yield (
                (group, "") if self._comes(group, START_NODES_S if start_nodes else ROOM_S) else (None, "no room came")
            )
        finally:
            ray.util.remove_placement_group(group)

    def _comes(self, group: Any, patience_s: float) -> bool:
        """Waits for the group; says what the autoscaler is at."""
        end, told = time.monotonic() + patience_s, ""
        while not group.wait(TOLD_S):
            if time.monotonic() > end:
                return False
            line = "; ".join(troubles())
            if line != told:
                self._tell(line or "waiting for nodes")
                told = line
        return True

    # Nodes

    def _look(self) -> list[Node]:
        """Asks all living nodes at once."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        spec = beside(self._spec, self._root)
        inputs = {
            "model": spec.model.model_dump(mode="json") if spec.is_finetune and spec.model else None,
            "data": spec.data.model_dump(mode="json") if spec.is_finetune and spec.data else None,
            "trainable": None if spec.is_finetune else spec.trainable,
        }
        ray.cloudpickle.register_pickle_by_value(node_look)
        look = ray.remote(num_cpus=0, max_retries=0)(node_look.look)
        alive = [node for node in ray.nodes() if node["Alive"]]
        asked = [
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                self._place.session_name, os.environ["RAY_ADDRESS"], inputs
            )
            for node in alive
        ]
        answers = _answers(asked, NODE_S)
        self._node_ids = [node["NodeID"] for node in alive]
        return [
            Node(
                node["NodeManagerAddress"],
                is_head(node),
                node["Resources"].get("CPU", 0.0),
                node["Resources"].get("GPU", 0.0),
                answer,
            )
            for node, answer in zip(alive, answers, strict=True)
        ]

    def _probe(self, nodes: Sequence[Node]) -> list[Port]:
        """Tries each node's ports from the node after it."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        probe = ray.remote(num_cpus=0, max_retries=0)(node_look.probed)
        calls = [_callable_at(node) for node in nodes]
        asked = [
            probe.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(
                    self._node_ids[(number + 1) % len(nodes)], soft=False
                )
            ).remote([(address, port) for address, port, _ in listed])
            for number, listed in enumerate(calls)
        ]
        found: dict[tuple[str, int], Port] = {}
        for node, listed, says in zip(nodes, calls, _answers(asked, PORTS_S), strict=True):
            for (address, number, program), each in zip(listed, says if isinstance(says, list) else (), strict=False):
                found.setdefault((address, number), Port(address, number, program, node.is_head, each))
        return list(found.values())

    # A trial's worker group

    def _tried(self, group: Any, nodes: Sequence[Node]) -> Iterator[Check]:
        """What one worker group of the spec's finds out."""
        from trainables.worker_group import RayWorkerGroup, StepDeadline

        spec = self._spec
        resources, deadline_s = spec.resources, spec.faults.step_timeout_s or START_DEADLINE_S
        scratch = Path(tempfile.mkdtemp(prefix="tune-check-"))
        shape = (resources.workers, resources.cpus_per_worker, resources.gpus_per_worker)
        ranks = RayWorkerGroup(f"{spec.name} check", *shape, group, StepDeadline(START_DEADLINE_S))
        name = _TRIED[0]
        try:
            ranks.begin(self._task(scratch))
            first = ranks.next_report()
            assert first is not None, "the probe has a first report"
            yield self._all_reduce(first.metrics)
            if not spec.is_finetune:
                why = "a trainable of your own is imported, not run"
                yield from (diagnosis.not_looked_at(name, why) for name in _TRIED[1:])
                return
            name = _TRIED[1]
            second = ranks.next_report()
            assert second is not None, "the probe has a second report where there is something to fine-tune"
            yield from self._step(second.metrics, nodes, deadline_s)
        except TrialError as error:
            yield self._failed_trial(name, error)
        finally:
            ranks.shutdown()
            shutil.rmtree(scratch, ignore_errors=True)

    def _task(self, scratch: Path) -> Task:
        spec = beside(self._spec, self._root)
        params = largest_params(spec)
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

    def _all_reduce(self, found: Mapping[str, float]) -> Check:
        workers = self._spec.resources.workers
        if workers == 1:
            return Check("all-reduce", True, "one worker a trial: its rank came up and has nobody to exchange with")
        seconds, num_bytes = found["all_reduce_s"], found["all_reduce_bytes"]
        backend = "NCCL" if self._spec.resources.gpus_per_worker else "gloo"
        speed = f"{num_bytes / 1e6:.0f} MB in {1000 * seconds:.0f} ms, {num_bytes / seconds / 1e6:.0f} MB/s"
        return Check("all-reduce", True, f"{workers} ranks by {backend}: {speed}")

    def _step(self, found: Mapping[str, float], nodes: Sequence[Node], deadline_s: float) -> Iterator[Check]:
        spec, room = self._spec, self._place.room
        sizes = spec.trial_settings().with_params(largest_params(spec)).training
        micro = f", micro_batch_size {sizes.micro_batch_size}" if sizes.micro_batch_size else ""
        told = f"{found['step_s']:.3g} s with batch_size {sizes.batch_size}, max_length {sizes.max_length}{micro}"
        yield Check("step", True, f"{told}, the longest rows there are; {found['parameters']:.3g} parameters")
        yield diagnosis.memory(spec, found, nodes, max((kind.ranks(spec.resources) for kind in room.alive), default=1))
        each = int(BYTES_PER_PARAMETER * found["parameters"])
        yield looked_at("checkpoint size", lambda: room_for_checkpoints(spec, self._storage, each))
        at_once = room.fit(spec.resources, spec.budget.concurrent_trials)
        if not self._bytes_s:
            yield diagnosis.not_looked_at("estimate", "the storage takes no checkpoints")
            return
        estimate = diagnosis.estimate(spec, found, at_once, self._bytes_s)
        if too_long := diagnosis.first_epoch(spec, estimate, deadline_s):
            yield too_long
        yield Check("estimate", True, f"{estimate}; {at_once} trials at once")

    def _failed_trial(self, name: str, error: TrialError) -> Check:
        if isinstance(error, OutOfMemoryError):
            advice = "training.micro_batch_size, smaller largest batch_size and max_length, or more GPU for each worker"
            return Check(name, False, str(error), advice, code=2)
        advice = "a study's trials would fail alike: its last lines say why; all ports between nodes must be open"
        return diagnosis.failed(name, str(error), advice)


def largest_params(spec: StudySpec) -> dict[str, Value]:
    """Those of the first trial, with the largest batches and lengths of the search space."""
    first = spec.first_params()
    params = {name: first.get(name, _smallest(domain)) for name, domain in spec.domains.items()}
    for name in ("batch_size", "micro_batch_size", "max_length"):
        if spec.is_finetune and name in spec.domains:
            params[name] = _largest(spec.domains[name])
    return params


def _smallest(domain: Domain) -> Value:
    values = domain.grid()
    return values[0] if values is not None else domain.low


def _largest(domain: Domain) -> Value:
    """Of a choice that has null, null: no limit."""
    if isinstance(domain, IntUniform):
        return domain.high
    values = domain.grid() or ()
    numbers = [value for value in values if isinstance(value, int | float)]
    return None if None in values else max(numbers)


def _free() -> Any:
    """What is free on each node now."""
    from ray._private.state import available_resources_per_node

    return kinds_of((each.get("CPU", 0), each.get("GPU", 0)) for each in available_resources_per_node().values())


def _callable_at(node: Node) -> list[tuple[str, int, str]]:
    """(address, port, program): what listens on every address is called at the node's."""
    listed = node.found.get("listening", ())
    return [
        (node.address if address in ("0.0.0.0", "::") else address, port, program) for address, port, program in listed
    ]


def _answers(asked: Sequence[Any], patience_s: float) -> list[Any]:
    """What each said, or {"error": why nothing}. Whoever is silent is waited for no longer."""
    import ray
    from ray.exceptions import RayError

    ready, silent = ray.wait(list(asked), num_returns=len(asked), timeout=patience_s)
    answers = []
    for reference in asked:
        if reference in silent:
            ray.cancel(reference, force=True)
            answers.append({"error": f"no answer in {patience_s:.0f} s"})
            continue
        try:
            answers.append(ray.get(reference))
        except RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            answers.append({"error": lines[-1] if lines else type(error).__name__})
    return answers
