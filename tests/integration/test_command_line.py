"""The command line keeps its contract: documents, exit codes, messages. One real study serves most of it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml
from program import ROOT, Program, Run, scores
from toys import Note, curve, read_notes

SPEC: dict[str, Any] = {
    "training": {
        "max_epochs": 4,
        "epoch_s": 0.2,
        "faults": [{"x": 8, "epoch": 1, "does": "hold"}],
        "diverge": [
            {"x": 10, "epoch": 2, "metric": "score"},
            {"x": 5, "epoch": 1, "metric": "score"},
            {"x": 4, "epoch": 1, "metric": "train_loss"},
        ],
    },
    # The values fall, so that ASHA has somebody to stop whatever the timing; but trial 2, which is to diverge, is the
    # best at epoch 1. Trial 1 waits until trial 0 has gone on, however far apart their worker groups have started.
    "search_space": {"x": {"choice": [9, 8, 10, 7, 6, 5, 4, 3, 2, 1, 0]}},
    "scheduler": {"name": "asha", "grace_period": 1, "reduction_factor": 3},
    "budget": {"trials": 10, "concurrent_trials": 2},
    "resources": {"workers": 2},
}
CUT_OFF = "of the grid's 11 points the budget takes 10: "
UTC_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@dataclass(frozen=True)
class Finished:
    """A study that `run --json` has ended, and what was seen while it ran."""

    name: str
    run: Run
    notes: list[Note]
    listening: set[str]
    """Addresses that its processes listened on."""
    seen: set[psutil.Process]
    """Its processes."""
    started_twice: set[psutil.Process]
    """Those that Ray made anew for an environment of Tune's, beside the ones that it had made already."""
    leftovers: list[str]
    """Processes and scratch files that were there after the end."""

    @property
    def status(self) -> Any:
        return self.run.json

    @property
    def trials(self) -> list[Any]:
        return list(self.status["trials"])


@pytest.fixture(scope="module")
def study(program: Program) -> Finished:
    """Ten trials of two ranks under ASHA, two at a time; three of them diverge."""
    spec = program.spec("oven", SPEC)
    command = program.start("run", spec, "--json")
    listening: set[str] = set()
    seen: set[psutil.Process] = set()
    started_twice: set[psutil.Process] = set()
    while command.is_running:
        if 2 in program.epochs("oven", x=9):
            program.release("oven")
        processes = program.processes()
        seen |= set(processes)
        listening |= {address for process in processes for address in _listening(process)}
        started_twice |= {process for process in processes if _has_variable_of_tune(process)}
    found = command.wait()
    notes = read_notes(program.notes("oven"))
    return Finished("oven", found, notes, listening, seen, started_twice, program.leftovers())


# ---- the study itself


def test_run_prints_one_json_document_and_ends_with_0(study: Finished) -> None:
    assert study.run.code == 0, study.run.err
    assert study.run.out.count("\n") == 1
    assert study.status["state"] == "completed"


def test_what_ray_prints_goes_to_the_log_of_the_driver(study: Finished, program: Program) -> None:
    assert "Started a local Ray instance" in (program.storage / "oven" / "driver.log").read_text()
    assert "Ray" not in study.run.err


def test_the_run_tells_people_on_standard_error_how_it_goes(study: Finished) -> None:
    assert CUT_OFF in study.run.err and "10 of 10 trials ended" in study.run.err


def test_status_has_the_keys_and_types_of_the_contract(study: Finished) -> None:
    status = study.status
    assert list(status) == ["study", "state", "objective", "trials", "best"]
    assert status["objective"] == {"metric": "score", "mode": "max"}
    assert [trial["number"] for trial in status["trials"]] == list(range(10))
    for trial in status["trials"]:
        assert list(trial) == [
            "number",
            "state",
            "reason",
            "params",
            "reports",
            "checkpoint",
            "restarts",
            "started_at",
            "ended_at",
        ]
        assert trial["state"] in ("completed", "pruned")
        assert (trial["reason"] is None) == (trial["state"] == "completed")
        assert list(trial["params"]) == ["x"]
        assert trial["restarts"] == 0
        assert UTC_TIME.fullmatch(trial["started_at"]) and UTC_TIME.fullmatch(trial["ended_at"])
        assert trial["started_at"] <= trial["ended_at"]
        for report in trial["reports"]:
            assert list(report) == ["epoch", "metrics"]
            assert sorted(report["metrics"]) == ["score", "train_loss"]
        if trial["state"] == "pruned":
            assert trial["checkpoint"] is None, "a stopped trial's are deleted, and the best one was not stopped"
            continue
        assert list(trial["checkpoint"]) == ["epoch", "bytes", "path"]
        assert Path(trial["checkpoint"]["path"]).is_absolute()
        assert trial["checkpoint"]["bytes"] > 0
    assert list(status["best"]) == ["number", "epoch", "value", "params"]


def test_the_reports_are_what_the_trainable_yielded(study: Finished) -> None:
    for trial in study.trials:
        expected = curve(trial["params"]["x"], len(trial["reports"]))
        if "score is nan" in (trial["reason"] or ""):
            assert scores(trial) == [*expected[:-1], None]
        else:
            assert scores(trial) == expected


def test_the_best_is_the_best_of_all_reports(study: Finished) -> None:
    assert study.status["best"] == {"number": 0, "epoch": 4, "value": curve(9, 4)[-1], "params": {"x": 9}}


def test_the_checkpoint_of_the_best_trial_holds_what_both_ranks_saved(study: Finished) -> None:
    folder = Path(study.trials[0]["checkpoint"]["path"])
    states = [json.loads((folder / f"state-{rank}.json").read_text()) for rank in range(2)]
    assert states == [{"total": curve(9, 4)[-1], "epoch": 4}] * 2


def test_trials_that_asha_stopped_say_why(study: Finished) -> None:
    stopped = [trial for trial in study.trials if (trial["reason"] or "").startswith("asha")]
    assert len(stopped) >= 3
    for trial in stopped:
        found = re.fullmatch(r"asha: epoch (\d+), rank (\d+) of (\d+)", trial["reason"])
        assert found, trial["reason"]
        epoch, rank, of = map(int, found.groups())
        assert epoch == len(trial["reports"]) and epoch in (1, 3) and 1 < rank <= of <= 10


@pytest.mark.parametrize(
    ("x", "epoch", "reason"),
    [
        (10, 2, "diverged: score is nan at epoch 2"),
        (5, 1, "diverged: score is nan at epoch 1"),
        (4, 1, "diverged: train_loss is inf at epoch 1"),
    ],
)
def test_a_trial_that_diverges_ends_at_that_report(study: Finished, x: int, epoch: int, reason: str) -> None:
    """T3: stock parts train it to the end, and never tell the sampler."""
    trial = next(trial for trial in study.trials if trial["params"]["x"] == x)
    assert (trial["state"], trial["reason"]) == ("pruned", reason)
    assert len(trial["reports"]) == epoch


def test_optunas_record_has_stopped_trials_as_pruned_with_every_value(
    study: Finished, program: Program, tmp_path: Path
) -> None:
    """T1: stock parts record them as complete, with a half-trained value as the final one."""
    recorded = _optuna_trials(program, "oven", tmp_path)
    assert any(trial["state"] == "pruned" for trial in study.trials)
    for trial, found in zip(study.trials, recorded, strict=True):
        is_pruned = trial["state"] == "pruned"
        assert found.state == (optuna.trial.TrialState.PRUNED if is_pruned else optuna.trial.TrialState.COMPLETE)
        assert found.params == trial["params"]
        values = {report["epoch"]: report["metrics"]["score"] for report in trial["reports"]}
        assert {epoch: _null_if_nan(value) for epoch, value in found.intermediate_values.items()} == values
        assert found.value == (list(values.values())[-1] if is_pruned else max(values.values()))  # Optuna's own custom


def test_after_a_study_its_processes_and_scratch_files_are_gone(study: Finished) -> None:
    """T8. Told by a mark in their environment, so also those that were handed to init."""
    assert study.leftovers == []
    assert len(study.seen) > 6, "Ray's own processes, supervisors and ranks were seen while it ran"
    assert not [process for process in study.seen if process.is_running()]


def test_nothing_listens_on_an_address_that_others_reach(study: Finished) -> None:
    assert study.listening, "Ray listens somewhere"
    assert {address for address in study.listening if not address.startswith("127.")} == set()


def test_the_next_trial_runs_in_the_processes_of_the_one_before(study: Finished) -> None:
    """T7: also after one that was stopped early, where stock parts leave one rank in the old trial."""
    assert {note.pid for note in study.notes if note.rank == 0}.isdisjoint(
        note.pid for note in study.notes if note.rank == 1
    )
    assert len({note.pid for note in study.notes}) <= 4, "two trials at once, two ranks each"
    slots = {}
    for trial in study.trials:
        ranks = {note.rank: note.pid for note in study.notes if note.x == trial["params"]["x"]}
        assert slots.setdefault(ranks[0], ranks[1]) == ranks[1], "a warm group keeps its ranks"


def test_trials_run_in_the_processes_that_ray_started_in_advance(study: Finished) -> None:
    assert not study.started_twice


def test_one_trial_follows_another_in_moments(study: Finished) -> None:
    """T6: stock parts take 4 s to a minute."""
    gaps = []
    for pid in {note.pid for note in study.notes}:
        notes = [note for note in study.notes if note.pid == pid]
        gaps += [after.at - before.at for before, after in itertools.pairwise(notes) if after.event == "begin"]
    assert len(gaps) >= 2 * (10 - 2)
    assert statistics.median(gaps) < 3.0


def test_all_epochs_were_trained_once(study: Finished, program: Program) -> None:
    for trial in study.trials:
        for rank in range(2):
            epochs = program.epochs("oven", trial["params"]["x"], rank)
            # A stopped trial's ranks have not begun the next epoch: they go on only when they are asked to.
            assert epochs == [report["epoch"] for report in trial["reports"]]


# ---- commands that read it


def test_status_prints_what_run_printed(study: Finished, program: Program) -> None:
    assert program.json("status", "oven") == study.status


def test_status_for_people_names_every_trial_and_the_best(study: Finished, program: Program) -> None:
    found = program.run("status", "oven")
    assert found.code == 0
    assert "study oven: completed, 10 trials" in found.out
    assert "best trial 0, epoch 4: score" in found.out
    assert found.out.count("pruned") >= 3


def test_the_storage_option_wins_over_the_environment(study: Finished, program: Program, tmp_path: Path) -> None:
    found = program.json("list", "--storage", str(tmp_path))
    assert found == {"studies": []}
    assert program.json("list", "--storage", "studies") == program.json("list")


def test_list_names_the_studies(study: Finished, program: Program) -> None:
    rows = program.json("list")["studies"]
    assert rows == [{"study": "oven", "state": "completed", "trials": 10, "best": study.status["best"]}]
    assert "oven" in program.run("list").out


def test_watch_ends_with_the_study(study: Finished, program: Program) -> None:
    found = program.run("watch", "oven", "--json")
    assert found.code == 0
    assert [json.loads(line) for line in found.out.splitlines()] == [study.status]


def test_logs_have_what_the_ranks_printed(study: Finished, program: Program) -> None:
    found = program.run("logs", "oven", "--json")
    assert found.code == 0
    printed = [json.loads(line) for line in found.out.splitlines()]
    whole = [trial for trial in study.trials if trial["state"] == "completed"]
    for number, rank in itertools.product([trial["number"] for trial in whole], range(2)):
        name, x = f"trial-{number:05d}-rank-{rank}.log", study.trials[number]["params"]["x"]
        lines = [each["line"] for each in printed if each["file"] == name]
        assert lines == [f"epoch {epoch} of x={x}" for epoch in (1, 2, 3, 4)]
    assert {tuple(each) for each in printed} == {("file", "line")}
    first = program.run("logs", "oven", "--trial", "0")
    assert first.code == 0
    expected = [f"trial-00000-rank-{rank}: epoch {epoch} of x=9" for rank in range(2) for epoch in (1, 2, 3, 4)]
    assert sorted(first.out.splitlines()) == expected


def test_best_exports_the_checkpoint_config_and_metrics(study: Finished, program: Program, tmp_path: Path) -> None:
    out = tmp_path / "best"
    found = program.json("best", "oven", "--out", str(out))
    assert found == study.status["best"] | {"path": str(out)}
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint", "config.yaml", "metrics.json"]
    assert json.loads((out / "checkpoint" / "state-1.json").read_text())["total"] == found["value"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["metrics"]["score"] == found["value"]
    assert [report["epoch"] for report in metrics["reports"]] == [1, 2, 3, 4]


def test_the_exported_config_is_a_spec_that_trains_this_trial_again(
    study: Finished, program: Program, tmp_path: Path
) -> None:
    out = tmp_path / "best"
    program.json("best", "oven", "--out", str(out))
    spec = yaml.safe_load((out / "config.yaml").read_text())
    assert spec["training"]["x"] == 9 and spec["budget"]["trials"] == 1 and spec["scheduler"]["name"] == "none"
    shutil.copy(out / "config.yaml", program.specs / "again.yaml")
    again = program.json("run", str(program.specs / "again.yaml"), "--name", "again")
    assert again["best"] == study.status["best"]
    assert scores(again["trials"][0]) == scores(study.trials[0])
    program.json("delete", "again", "--yes")


def test_best_refuses_a_folder_that_holds_something(study: Finished, program: Program, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    error = program.json("best", "oven", "--out", str(tmp_path), code=2)["error"]
    assert error["place"] == "--out"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_best_takes_another_when_the_best_checkpoint_is_damaged(program: Program, tmp_path: Path) -> None:
    before = program.json("run", program.spec("two-loaves", {"training": {"epoch_s": 0.0}}))
    assert (before["best"]["number"], before["best"]["epoch"]) == (1, 4)
    state = Path(before["trials"][1]["checkpoint"]["path"]) / "state-0.json"
    state.write_text(state.read_text().replace("4", "5"))  # as many bytes as before
    found = program.json("best", "two-loaves", "--out", str(tmp_path / "best"))
    assert (found["number"], found["epoch"], found["value"]) == (0, 4, curve(0, 4)[-1])


def test_delete_asks_and_needs_a_yes(study: Finished, program: Program, tmp_path: Path) -> None:
    shutil.copytree(program.storage / "oven", tmp_path / "oven")
    refused = program.json("delete", "oven", "--storage", str(tmp_path), code=1)["error"]
    assert "--yes" in refused["expected"]
    assert (tmp_path / "oven").exists()
    command = [sys.executable, "-m", "tune_service.cli", "delete", "oven", "--storage", str(tmp_path)]
    for answer in ("n\n", ""):
        done = subprocess.run(command, input=answer, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "") and "with all its checkpoints? [y/N]" in done.stderr
    assert (tmp_path / "oven").is_dir()
    assert subprocess.run(command, input="y\n", capture_output=True, text=True, check=True).stdout.startswith("deleted")
    assert list(tmp_path.iterdir()) == []
    shutil.copytree(program.storage / "oven", tmp_path / "oven")
    found = program.json("delete", "oven", "--yes", "--storage", str(tmp_path))
    assert found["study"] == "oven" and found["bytes"] > 1000
    assert list(tmp_path.iterdir()) == []


def test_stop_of_a_study_that_has_ended_changes_nothing(study: Finished, program: Program) -> None:
    assert program.json("stop", "oven") == study.status


def test_resume_of_a_study_whose_trials_have_all_ended_says_so_and_starts_nothing(
    study: Finished, program: Program
) -> None:
    found = program.run("resume", "oven", "--json")
    assert (found.code, found.json) == (0, study.status)
    assert "nothing to do: all 10 trials have ended; --trials +20 adds some" in found.err
    assert not program.named("ray")


def test_the_program_tells_its_version_and_without_a_command_its_help(program: Program) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", program.run("--version").out)
    bare = program.run()
    assert (bare.code, bare.out) == (2, "")
    assert bare.err.startswith("Usage: ") and "Follow a study until it ends." in bare.err


def test_a_name_is_taken_once(study: Finished, program: Program) -> None:
    error = program.json("run", program.spec("oven", SPEC), code=2)["error"]
    assert "oven" in error["found"] + error["rule"] + error["place"]
    assert program.json("status", "oven") == study.status


@pytest.mark.parametrize("command", [["--help"], ["list"], ["status", "oven"]])
def test_light_commands_import_neither_torch_nor_ray(study: Finished, program: Program, command: list[str]) -> None:
    arguments = [sys.executable, "-X", "importtime", "-m", "tune_service.cli", *command]
    environment = {"TUNE_SERVICE_STORAGE": str(program.storage), "PATH": ""}
    found = subprocess.run(arguments, cwd=program.folder, capture_output=True, text=True, env=environment, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in found.stderr.splitlines()}
    assert "tune_service" in imported
    assert imported.isdisjoint({"torch", "ray", "transformers", "colossalai", "datasets"})


# ---- check


def test_check_looks_at_everything_and_runs_nothing(program: Program) -> None:
    found = program.json("check", program.spec("oven-2", SPEC))
    assert {check["name"] for check in found["checks"]} == {"spec", "storage", "resources", "trainable"}
    for check in found["checks"]:
        assert list(check) == ["name", "ok", "found", "advice"]
        assert check["ok"] is True
    assert found["checks"][0]["advice"].startswith(CUT_OFF)
    assert read_notes(program.notes("oven-2")) == []
    assert not (program.storage / "oven-2").exists()


def test_check_finds_what_run_would_refuse(program: Program) -> None:
    spec = program.spec("oven-3", {"resources": {"workers": 1000, "cpus_per_worker": 8}, "trainable": "nowhere:train"})
    found = program.json("check", spec, code=2)
    assert {check["name"]: check["ok"] for check in found["checks"]} == {
        "spec": True,
        "storage": True,
        "resources": False,
        "trainable": False,
    }
    assert all(check["advice"] for check in found["checks"] if not check["ok"])


# ---- surroundings


@pytest.mark.slow
def test_names_may_be_long_and_have_spaces(program: Program, tmp_path: Path) -> None:
    """Ray makes sockets in the temporary folder, whose paths have room for 107 bytes."""
    storage, temporary = tmp_path / "sto rage ü", tmp_path / ("t" * 80)
    temporary.mkdir()
    spec = program.spec("n" * 63, {"training": {"epoch_s": 0.0}})
    found = program.run("run", spec, "--json", "--storage", str(storage), env={"TMPDIR": str(temporary)})
    assert (found.code, found.json["state"]) == (0, "completed"), found.err
    assert list(temporary.glob("tune-*")) == []


def test_keys_of_aws_are_in_no_runtime_environment_which_ray_would_show_in_its_state(program: Program) -> None:
    """Ray starts a process of its own for each, too, beside the ones that it had started in advance."""
    found_in = program.specs / "found.txt"
    (program.specs / "looking.py").write_text(
        "import os\nfrom pathlib import Path\n\nimport ray\n\nfrom trainables import Report\n\n\n"
        "def train(context):\n"
        "    found = os.environ['AWS_ACCESS_KEY_ID'], dict(ray.get_runtime_context().runtime_env)\n"
        f"    Path({str(found_in)!r}).write_text(repr(found))\n"
        "    yield Report(1, {'score': 1.0})\n"
    )
    changes = {"trainable": "looking:train", "training": {"max_epochs": 1}, "budget": {"trials": 1}}
    found = program.run("run", program.spec("keys", changes), env={"AWS_ACCESS_KEY_ID": "not-a-real-key"})
    assert found.code == 0, found.err
    assert found_in.read_text() == "('not-a-real-key', {})"


def test_a_trainable_is_found_on_the_python_path(program: Program, tmp_path: Path) -> None:
    shutil.copy(program.specs / "toys.py", tmp_path / "bakery.py")
    spec = program.spec("path", {"trainable": "bakery:steady"})
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    assert program.run("check", spec).code == 2
    assert program.run("check", spec, env={"PYTHONPATH": path}).code == 0


# ---- input that is wrong

FAULTS: dict[str, dict[str, Any]] = {
    "an unknown key": {"trainning": {"max_epochs": 3}},
    "a key of later": {"training": {"compile": "auto"}, "trainable": "finetune"},
    "a module that is not there": {"trainable": "nowhere:train"},
    "a module that raises": {"trainable": "broken:train"},
    "a module that exits": {"trainable": "leaving:train"},
    "a function that is not there": {"trainable": "toys:stedy"},
    "more than the machine has": {"resources": {"workers": 1000, "cpus_per_worker": 8}},
    "an endless grid": {"search_space": {"x": {"uniform": [0, 1]}}},
    "a bad name": {"name": "../oven"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spec_that_is_refused_says_why_and_writes_nothing(program: Program, tmp_path: Path, fault: str) -> None:
    (program.specs / "broken.py").write_text("raise OSError('no flour')\n")
    (program.specs / "leaving.py").write_text("import sys\nsys.exit(3)\n")
    spec = program.spec("bad", FAULTS[fault])
    storage = tmp_path / "studies"
    found = program.json("run", spec, "--storage", str(storage), code=2)
    assert list(found) == ["errors"] and found["errors"]
    for error in found["errors"]:
        assert list(error) == ["place", "rule", "found", "expected"]
        assert all(isinstance(value, str) and value for value in error.values())
    assert not storage.exists()
    if fault == "a module that raises":
        assert "no flour" in found["errors"][0]["found"]


def test_all_faults_of_a_spec_come_at_once(program: Program) -> None:
    changes = {"objektive": 1, "training": {"max_epochs": 0}, "search_space": {"x": {"choice": []}}}
    spec = program.spec("bad", changes)
    found = program.json("run", spec, "--set", "budget.trials=-1", code=2)
    places = " ".join(error["place"] for error in found["errors"])
    assert all(key in places for key in ("training.max_epochs", "search_space.x", "--set budget.trials"))
    assert "bad.yaml:" in places, "with the line in the file"
    assert any("objektive" in error["found"] + error["place"] for error in found["errors"])


def test_people_get_the_faults_as_words(program: Program) -> None:
    found = program.run("run", program.spec("bad", {"training": {"max_epochs": 0}, "trainable": "nowhere:train"}))
    assert found.code == 2
    assert found.out == ""
    assert "training.max_epochs" in found.err and "nowhere" in found.err and "expected" in found.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "cake"],
        ["watch", "cake"],
        ["logs", "cake"],
        ["stop", "cake"],
        ["resume", "cake"],
        ["best", "cake", "--out", "cake-best"],
        ["delete", "cake", "--yes"],
        ["status", "../specs"],
        ["run", "no-such-file.yaml"],
        ["check", "no-such-file.yaml"],
        ["run", "specs"],
        ["bake"],
        ["status"],
        ["status", "cake", "--loud"],
        ["logs", "cake", "--trial", "first"],
        ["logs", "oven", "--trial", "10"],
        ["logs", "oven", "--trial", "-1"],
        ["list", "--storage", ""],
        ["list", "--storage", __file__],
        ["best", "cake"],
    ],
    ids=" ".join,
)
def test_wrong_input_ends_with_2_and_one_document(study: Finished, program: Program, arguments: list[str]) -> None:
    def files() -> list[Path]:
        """But for what the commands said."""
        return sorted(path for path in program.folder.rglob("*") if not path.name.startswith("command-"))

    before = files()
    found = program.json(*arguments, code=2)
    errors = found["errors"] if "errors" in found else [found["error"]]
    assert errors
    for error in errors:
        assert list(error) == ["place", "rule", "found", "expected"]
    assert files() == before


@pytest.mark.parametrize("arguments", [["bake"], ["status", "cake"], ["status", "cake", "--loud"]], ids=" ".join)
def test_wrong_input_is_explained_to_people(program: Program, arguments: list[str]) -> None:
    found = program.run(*arguments)
    assert found.code == 2 and found.out == ""
    assert arguments[-1] in found.err


@pytest.mark.parametrize("arguments", ["check no-such-file.yaml --json", "check no-such-file.yaml", "list"])
def test_a_reader_that_has_gone_is_no_traceback(tmp_path: Path, arguments: str) -> None:
    """`tune-service list | head -1`, with a head that is done before there is anything."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tune_service.cli", *arguments.split(), "--storage", str(tmp_path)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert done.returncode == (2 if arguments == "check no-such-file.yaml" else 1)


@pytest.mark.parametrize("trials", ["0", "-3", "many", "1.5", ""])
def test_a_budget_is_a_whole_number(study: Finished, program: Program, trials: str) -> None:
    found = program.json("resume", "oven", f"--trials={trials}", code=2)
    assert found["error"]["place"] == "--trials"
    assert program.json("status", "oven") == study.status


def test_a_record_that_cannot_be_read_is_said_in_one_message(study: Finished, program: Program, tmp_path: Path) -> None:
    shutil.copytree(program.storage / "oven", tmp_path / "oven")
    (tmp_path / "oven" / "record.journal").write_bytes(b"\x00\x01 not a journal\n{}\n")
    found = program.json("status", "oven", "--storage", str(tmp_path), code=2)
    assert "record" in found["error"]["rule"]


# ---- looking


def _has_variable_of_tune(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return "PL_DISABLE_FORK" in process.environ()
    return False


def _listening(process: psutil.Process) -> set[str]:
    try:
        connections = process.net_connections(kind="inet")
    except psutil.Error:
        return set()
    return {each.laddr.ip.removeprefix("::ffff:") for each in connections if each.status == psutil.CONN_LISTEN}


def _optuna_trials(program: Program, name: str, tmp_path: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials as Optuna's own tools read them, from a copy."""
    copy = shutil.copy(program.storage / name / "record.journal", tmp_path / "journal")
    backend = optuna.storages.journal.JournalFileBackend(str(copy))
    study = optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend))
    return study.trials


def _null_if_nan(value: float) -> float | None:
    return value if value == value else None
