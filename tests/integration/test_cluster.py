"""Studies on a running cluster, from a laptop that holds its token. The worker nodes do not see the head's disk."""

from __future__ import annotations

import json
import signal
import time
from typing import Any

import pytest
from cluster import Cluster
from program import Program, Run, scores, wait_until
from toys import HOLD_S, curve, read_notes

pytestmark = pytest.mark.slow


@pytest.fixture
def laptop(program: Program, cluster: Cluster) -> Laptop:
    return Laptop(program, cluster)


class Laptop:
    """The program, pointed at the cluster."""

    def __init__(self, program: Program, cluster: Cluster) -> None:
        self.program, self.cluster = program, cluster

    def run(self, *arguments: str, timeout_s: float = 240.0) -> Run:
        return self.program.run(*arguments, "--address", self.cluster.url, env=self.cluster.env(), timeout_s=timeout_s)

    def json(self, *arguments: str, code: int = 0) -> Any:
        found = self.run(*arguments, "--json")
        assert found.code == code, f"exit code {found.code}\n{found.out}\n{found.err}"
        return found.json

    def local(self, *arguments: str) -> Any:
        """What the same command says on the head itself."""
        return self.program.json(*arguments, "--storage", str(self.cluster.storage))

    def wait_for_state(self, study: str, state: str, timeout_s: float = 180.0) -> Any:
        def look() -> Any:
            found = self.local("status", study)
            return found if found["state"] == state else None

        return wait_until(look, timeout_s, f"{study} to be {state}")


def hold(x: int, epoch: int) -> dict[str, Any]:
    """A spec's changes by which a trial waits at an epoch, and is let wait."""
    faults = [{"x": x, "epoch": epoch, "does": "hold"}]
    return {"training": {"faults": faults}, "faults": {"step_timeout_s": HOLD_S}}


def test_a_submitted_study_is_the_study_that_run_makes(laptop: Laptop) -> None:
    spec = laptop.program.spec("bread", {"resources": {"workers": 2}})
    assert laptop.json("submit", spec, "--wait") == {"study": "bread", "job": "bread-1"}
    status = laptop.json("status", "bread")
    assert status == laptop.local("status", "bread")
    assert (status["state"], [trial["state"] for trial in status["trials"]]) == ("completed", ["completed"] * 2)
    assert [scores(trial) for trial in status["trials"]] == [curve(0, 4), curve(1, 4)]
    (row,) = [row for row in laptop.json("list")["studies"] if row["study"] == "bread"]
    assert (row["state"], row["trials"], row["best"]["number"]) == ("completed", 2, 1)
    # Two ranks saved on a node that does not see the studies' disk; both files are in the checkpoint.
    names = sorted(path.name for path in laptop.cluster.storage.glob("bread/checkpoints/trial-00001/epoch-0004/*"))
    assert {"manifest.json", "state-0.json", "state-1.json"} <= set(names)


def test_the_best_model_comes_whole_and_nothing_of_the_way_stays(laptop: Laptop) -> None:
    out = laptop.program.folder / "best-bread"
    found = laptop.json("best", "bread", "--out", str(out))
    assert found == laptop.local("status", "bread")["best"] | {"path": str(out)}
    on_head = laptop.cluster.storage / "bread/checkpoints/trial-00001/epoch-0004/state-1.json"
    assert (out / "checkpoint/state-1.json").read_bytes() == on_head.read_bytes()
    assert json.loads((out / "metrics.json").read_text())["study"] == "bread"

    def is_tidy() -> bool:
        links = (laptop.cluster.folder / "ray").glob("session_*/logs/tune-service-*")
        return not [*links, *laptop.cluster.storage.glob(".export-*"), *laptop.program.folder.glob(".best-*")]

    wait_until(is_tidy, 60.0, "the export to be removed")
    assert laptop.json("best", "bread", "--out", str(out), code=2)["error"]["place"] == "--out"


def test_a_name_is_taken_also_while_the_first_study_runs(laptop: Laptop) -> None:
    assert laptop.json("submit", laptop.program.spec("bread"), code=2)["error"]["place"] == "name"
    spec = laptop.program.spec("dough", hold(0, 2) | {"budget": {"concurrent_trials": 1}})
    laptop.json("submit", spec)
    refused = laptop.json("submit", spec, code=2)["error"]
    assert (refused["place"], refused["found"]) == ("name", "job dough-1 is running")
    # In the dashboard, the job says what it is, and a rank which study it works for.
    assert laptop.cluster.jobs()["dough-1"]["metadata"]["study"] == "dough"
    assert "toys:steady" in laptop.cluster.jobs()["dough-1"]["metadata"]["spec"]
    laptop.program.wait_for_note("dough", "hold", x=0, epoch=2)
    assert "dough slot 0 rank 0" in {actor["name"] for actor in laptop.cluster.actors()}


def test_stop_ends_the_study_and_not_the_job_that_drives_it(laptop: Laptop) -> None:
    laptop.program.release("dough")
    stopped = laptop.json("stop", "dough")
    assert stopped == laptop.local("status", "dough")
    assert stopped["state"] in ("stopped", "completed")
    wait_until(lambda: laptop.cluster.jobs()["dough-1"]["status"] == "SUCCEEDED", 60.0, "the job to end by itself")


def test_a_killed_driver_leaves_nothing_running_and_resume_goes_on_from_the_checkpoints(laptop: Laptop) -> None:
    spec = laptop.program.spec("rolls", hold(1, 3) | {"resources": {"workers": 2}})
    laptop.json("submit", spec)
    laptop.program.wait_for_note("rolls", "hold", x=1, epoch=3)
    job = laptop.cluster.jobs()["rolls-1"]["job_id"]

    def are_gone() -> bool:
        return not any(actor["job_id"] == job for actor in laptop.cluster.actors())

    assert not are_gone()
    laptop.cluster.driver("rolls").send_signal(signal.SIGKILL)

    wait_until(are_gone, 90.0, "all actors to end with the job")
    assert laptop.json("status", "rolls")["state"] == "interrupted"
    laptop.program.release("rolls")
    status = laptop.json("resume", "rolls")
    assert (status["state"], [scores(trial) for trial in status["trials"]]) == ("completed", [curve(0, 4), curve(1, 4)])
    assert laptop.program.epochs("rolls", x=1) == [1, 2, 3, 3, 4]  # epoch 2's checkpoint went back to the node
    assert {job for job in laptop.cluster.jobs() if job.startswith("rolls")} == {"rolls-1", "rolls-2"}


def test_a_rank_that_fails_on_another_node_leaves_its_last_words(laptop: Laptop) -> None:
    spec = laptop.program.spec("burnt", {"trainable": "toys:hopeless", "faults": {"restarts_per_trial": 0}})
    assert laptop.run("submit", spec, "--wait").code == 1
    reason = laptop.json("status", "burnt")["trials"][0]["reason"]
    assert "no bread at 0" in reason and "the oven of rank 0 is cold" in reason
    lines = [json.loads(line) for line in laptop.run("logs", "burnt", "--json").out.splitlines()]
    assert {"file": "trial-00000-rank-0.log", "line": "the oven of rank 0 is cold"} in lines
    shown = [path.read_text() for path in (laptop.cluster.folder / "ray").glob("session_*/logs/worker-*.out")]
    assert any("trial 0 rank 0 | the oven of rank 0 is cold\n" in text for text in shown)
    assert laptop.json("delete", "burnt", "--yes")["study"] == "burnt"
    assert not (laptop.cluster.storage / "burnt").exists()
    assert "burnt" not in {row["study"] for row in laptop.json("list")["studies"]}


def test_a_second_study_gets_its_share_while_the_first_has_trials_left(laptop: Laptop) -> None:
    values = {"search_space": {"x": {"choice": list(range(8))}}, "resources": {"cpus_per_worker": 1}}
    slow = values | {"budget": {"trials": 8, "concurrent_trials": None}, "faults": {"step_timeout_s": HOLD_S}}
    # Its first two trials have both CPUs until the second study is there, whatever that takes.
    slow["training"] = {"epoch_s": 2.0, "faults": [{"x": x, "epoch": 1, "does": "hold"} for x in (0, 1)]}
    laptop.json("submit", laptop.program.spec("first", slow))
    for x in (0, 1):
        laptop.program.wait_for_note("first", "hold", x=x, epoch=1)
    laptop.json("submit", laptop.program.spec("second", values | {"budget": {"trials": 2}}))
    laptop.wait_for_state("second", "running")
    laptop.program.release("first")
    second = laptop.wait_for_state("second", "completed")
    assert [trial["state"] for trial in second["trials"]] == ["completed"] * 2
    laptop.json("stop", "first", "--now")
    began = min(note.at for note in read_notes(laptop.program.notes("second")))
    before = {note.x for note in read_notes(laptop.program.notes("first")) if note.event == "begin" and note.at < began}
    assert 7 not in before, "it waited for a trial's end, not until the first study had no more to start"


def test_a_demand_that_no_node_meets_is_said_in_words(laptop: Laptop) -> None:
    spec = laptop.program.spec("giant", {"resources": {"gpus_per_worker": 8}})
    laptop.json("submit", spec)
    words = "trials wait for nodes: a trial needs 1 worker of 0.25 CPUs, 8 GPUs each"

    def is_said() -> bool:
        return words in laptop.run("status", "giant").out

    wait_until(is_said, 150.0, "the status to say what is missing")
    assert laptop.json("stop", "giant", "--now")["state"] == "stopped"


def test_what_is_wrong_with_the_connection_is_said_in_words(laptop: Laptop) -> None:
    program, url = laptop.program, laptop.cluster.url
    nobody = {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "", "HOME": str(program.folder)}

    def error(address: str, env: dict[str, str]) -> tuple[int, str]:
        found = program.run("status", "bread", "--address", address, "--json", env=env)
        return found.code, found.json["error"]["found"]

    assert error(url, nobody) == (1, "no token here")
    assert error(url, {"RAY_AUTH_TOKEN": "0" * 64}) == (1, f"{url} knows another token")
    assert error("somewhere", nobody) == (2, "somewhere")
    assert error(laptop.cluster.url, nobody | {"RAY_AUTH_TOKEN_PATH": "/no/file"}) == (2, "no file /no/file")
    began = time.monotonic()
    code, found = error("http://127.0.0.1:9", laptop.cluster.env())
    assert code == 1 and "refused" in found and time.monotonic() - began < 20
    missing = laptop.json("status", "nothing", code=2)["error"]
    assert missing["place"] == "STUDY"


def test_a_lost_node_is_named_and_its_trials_go_on_elsewhere(laptop: Laptop) -> None:
    holds = [{"x": x, "epoch": 3, "does": "hold"} for x in range(4)]
    values = {"training": {"faults": holds}, "search_space": {"x": {"choice": [0, 1, 2, 3]}}}
    values["faults"] = {"step_timeout_s": HOLD_S}
    size = {"budget": {"trials": 4, "concurrent_trials": None}, "resources": {"cpus_per_worker": 1}}
    doomed = laptop.cluster.add_worker(cpus=2)
    laptop.json("submit", laptop.program.spec("storm", values | size))
    for x in range(4):
        laptop.program.wait_for_note("storm", "hold", x=x, epoch=3)
    laptop.cluster.end_node(doomed)
    words = "was lost at"

    def is_said() -> bool:
        return words in laptop.run("status", "storm").out

    wait_until(is_said, 150.0, "the status to name the node")
    laptop.program.release("storm")
    status = laptop.wait_for_state("storm", "completed")
    assert [scores(trial) for trial in status["trials"]] == [curve(x, 4) for x in range(4)]
    assert sorted(trial["restarts"] for trial in status["trials"]) == [0, 0, 1, 1]
