"""The best trial as a folder: all of it or nothing, and a spec in it that trains the trial again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hand_driven import HandDriven

from trainables.checkpoint import MANIFEST, CheckpointStore
from trainables.errors import DamagedCheckpointError
from tune_service import cli
from tune_service.best import export_best
from tune_service.errors import CommandError, OutputNotEmptyError, StudyNotFoundError, exit_code
from tune_service.spec import load_spec
from tune_service.status import BestTrial


def exported(study: HandDriven, out: Path) -> BestTrial:
    return export_best("toy", out, study.storage)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def study(tmp_path: Path) -> HandDriven:
    """Trial 1 is the best, at its epoch 2, and has checkpoints."""
    study = HandDriven(tmp_path / "work", training={"max_epochs": 9, "x": 0.25, "depth": 2, "note": "kept"})
    study.run(0.5, num_bytes=10)
    study.run(0.6, 0.8, 0.7, num_bytes=20)
    return study


def test_metrics_json_says_what_the_trial_reached(study: HandDriven, tmp_path: Path) -> None:
    best = exported(study, tmp_path / "out")
    params = study.params()[1]
    assert best == BestTrial(number=1, epoch=2, value=0.8, params=params)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {
        "study": "toy",
        "objective": {"metric": "score", "mode": "max"},
        "number": 1,
        "epoch": 2,
        "value": 0.8,
        "params": params,
        "metrics": {"score": 0.8},
        "reports": [
            {"epoch": 1, "metrics": {"score": 0.6}},
            {"epoch": 2, "metrics": {"score": 0.8}},
            {"epoch": 3, "metrics": {"score": 0.7}},
        ],
    }


def test_the_command_exports_below_the_users_home(
    study: HandDriven, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cli.best("toy", Path("~/out"), str(study.storage.root))
    assert (tmp_path / "out" / "metrics.json").exists()
    assert capsys.readouterr().out == f"trial 1, epoch 2, value 0.8000: {tmp_path / 'out'}\n"


def test_config_yaml_is_a_spec_that_trains_this_trial_again(study: HandDriven, tmp_path: Path) -> None:
    exported(study, tmp_path / "out")
    spec = load_spec(tmp_path / "out" / "config.yaml")
    params = study.params()[1]
    assert spec.first_params() == params
    assert spec.training_values == {"max_epochs": 9, "seed": 42, "note": "kept"} | params
    assert (spec.name, spec.budget.trials, spec.scheduler.name, spec.trainable) == (
        "toy-best",
        1,
        "none",
        "toy_module:train",
    )
    again = HandDriven(tmp_path / "again", **{k: v for k, v in spec.to_mapping().items() if k != "name"})
    again.run(0.8)
    assert again.params() == [params] and again.driver.ask() is None


def test_config_yaml_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    study = HandDriven(tmp_path / "work", training={"max_epochs": 9, "note": "süß"})
    study.run(0.5)
    program = (
        "import sys; from pathlib import Path; from tune_service.best import export_best; "
        "from tune_service.storage import Storage; export_best('toy', Path(sys.argv[2]), Storage(Path(sys.argv[1])))"
    )
    words = [sys.executable, "-X", "utf8=0", "-c", program, str(study.storage.root), str(tmp_path / "out")]
    subprocess.run(words, env=os.environ | {"LC_ALL": "C"}, check=True)
    assert load_spec(tmp_path / "out" / "config.yaml").training_values["note"] == "süß"


def test_a_trainable_of_ones_own_gives_its_checkpoint_without_our_manifest(study: HandDriven, tmp_path: Path) -> None:
    exported(study, tmp_path / "out")
    assert files(tmp_path / "out") == ["checkpoint/weights", "config.yaml", "metrics.json"]
    assert (tmp_path / "out" / "checkpoint" / "weights").read_bytes() == b"w" * 20


def test_a_trainable_without_checkpoints_gives_config_and_metrics(tmp_path: Path) -> None:
    study = HandDriven(tmp_path / "work")
    study.run(0.5)
    exported(study, tmp_path / "out")
    assert files(tmp_path / "out") == ["config.yaml", "metrics.json"]


def test_finetune_gives_the_model_folder_and_neither_optimizer_nor_random_state(tmp_path: Path) -> None:
    (tmp_path / "work" / "data").mkdir(parents=True)
    study = HandDriven(
        tmp_path / "work",
        trainable="finetune",
        model={"name": "gpt2", "config": {"n_layer": 3}},
        data={"path": "data", "text": ["a"]},
        training={"max_epochs": 1},
        search_space={
            "learning_rate": {"log_uniform": [1e-5, 1e-3]},
            "model.config.resid_pdrop": {"uniform": [0.0, 0.3]},
        },
        objective={"metric": "eval_accuracy"},
    )
    number, store = study.begin(), study.folder.checkpoints
    staging = store.stage(number, 1)
    (staging / "model").mkdir()
    for name in ("model/model.safetensors", "model/config.json", "optimizer.safetensors", "rng-0.safetensors"):
        (staging / name).write_text(name)
    manifest = store.commit(number, 1, {"eval_accuracy": 0.7})
    study.driver.result(
        {
            "number": number,
            "next_within_s": 1.0,
            "epoch": 1,
            "metrics": [("eval_accuracy", 0.7)],
            "saves": False,
            "checkpoint_bytes": manifest.num_bytes,
            "finished": True,
        }
    )
    exported(study, tmp_path / "out")
    assert files(tmp_path / "out") == ["config.yaml", "metrics.json", "model/config.json", "model/model.safetensors"]
    spec = load_spec(tmp_path / "out" / "config.yaml")
    params = study.params()[0]
    assert spec.first_params() == params
    assert spec.trial_settings().training.learning_rate == params["learning_rate"]
    assert spec.trial_settings().model.config == {"n_layer": 3, "resid_pdrop": params["model.config.resid_pdrop"]}
    assert spec.data is not None and spec.data.path == str(tmp_path / "work" / "data")


# ---- --out


def test_out_may_be_new_with_new_folders_above_it_or_empty(study: HandDriven, tmp_path: Path) -> None:
    exported(study, tmp_path / "new" / "out")
    (tmp_path / "empty").mkdir()
    exported(study, tmp_path / "empty")
    assert files(tmp_path / "new" / "out") == files(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new", "work"]


def test_a_relative_out_lies_in_the_working_directory(
    study: HandDriven, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    exported(study, Path("out"))
    assert (tmp_path / "here" / "out" / "config.yaml").is_file()


@pytest.mark.parametrize("way", ["folder", "link", "."])
def test_an_empty_out_stays_the_folder_it_was_for_it_may_be_a_mount_point_or_where_a_shell_stands(
    study: HandDriven, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "link").symlink_to("folder")
    before = folder.stat().st_ino
    monkeypatch.chdir(folder if way == "." else tmp_path)
    exported(study, Path(way))
    assert folder.stat().st_ino == before and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint", "config.yaml", "metrics.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "work"]


def test_an_out_that_is_a_link_to_nothing_yet_makes_the_folder_it_leads_to(study: HandDriven, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("new")
    exported(study, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "new" / "metrics.json").is_file()


def test_an_out_that_holds_something_is_refused_and_stays_as_it_was(study: HandDriven, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "out", tmp_path / "file"):
        with pytest.raises(OutputNotEmptyError) as refusal:
            exported(study, out)
        assert exit_code(refusal.value) == 2
    assert files(tmp_path / "out") == ["mine"]


def test_an_out_that_cannot_be_written_is_a_failure_and_leaves_nothing(
    study: HandDriven, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for out in (tmp_path / "file" / "out", tmp_path / "loop"):
        with pytest.raises(CommandError):
            exported(study, out)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tune_service.best.write_json", full)
    with pytest.raises(CommandError, match="No space left") as failure:
        exported(study, tmp_path / "out")
    assert exit_code(failure.value) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop", "work"]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("point", ["tune_service.best.write_json", "tune_service.out_folder.fsync_tree", "os.replace"])
@pytest.mark.parametrize("is_new", [True, False])
def test_out_is_as_it_was_when_the_process_is_killed_but_for_what_the_next_export_removes(
    study: HandDriven, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, is_new: bool
) -> None:
    out = tmp_path / "out"
    if not is_new:
        out.mkdir()
    with monkeypatch.context() as patch, pytest.raises(Killed):

        def killed(*_: object, **__: object) -> None:
            patch.setattr("shutil.rmtree", lambda *_, **__: None)  # who is dead tidies nothing up
            raise Killed

        patch.setattr(point, killed)
        exported(study, out)
    assert not out.exists() if is_new else [path.name for path in out.iterdir()] == [".export.partial"]
    exported(study, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "work"]
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint", "config.yaml", "metrics.json"]


def test_an_empty_out_gets_metrics_json_last(
    study: HandDriven, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    replace = os.replace

    def watched(path: Path, to: Path) -> None:
        moved.append(Path(to).name)
        replace(path, to)

    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.replace", watched)
    exported(study, tmp_path / "out")
    assert sorted(moved[-3:-1]) == ["checkpoint", "config.yaml"] and moved[-1] == "metrics.json"


def test_what_has_come_into_an_empty_out_meanwhile_stays_and_nothing_comes_beside_it(
    study: HandDriven, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr("tune_service.out_folder.fsync_tree", lambda _: (out / "config.yaml").write_text("mine"))
    with pytest.raises(OutputNotEmptyError):
        exported(study, out)
    assert files(out) == ["config.yaml"] and (out / "config.yaml").read_text() == "mine"


# ---- which trial


def test_a_best_trial_whose_bytes_have_changed_is_not_exported(study: HandDriven, tmp_path: Path) -> None:
    store = study.folder.checkpoints
    (store.folder(1, 2) / "weights").write_bytes(b"x" * 20)
    assert exported(study, tmp_path / "next").number == 0
    (store.folder(0, 1) / MANIFEST).unlink()
    with pytest.raises(CommandError, match="no completed or pruned trial") as failure:
        exported(study, tmp_path / "none")
    assert exit_code(failure.value) == 1
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_that_turns_out_damaged_as_it_is_copied_gives_way_to_the_next_trial(
    study: HandDriven, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket's bytes are hashed only then."""
    copy = CheckpointStore.copy

    def hashed(self: CheckpointStore, trial: int, epoch: int, to: Path, wanted: Callable[[Path], bool]) -> None:
        if trial == 1:
            raise DamagedCheckpointError("not what was written")
        copy(self, trial, epoch, to, wanted)

    monkeypatch.setattr(CheckpointStore, "copy", hashed)
    assert exported(study, tmp_path / "out").number == 0


def test_a_study_without_an_ended_trial_has_no_best(tmp_path: Path) -> None:
    study = HandDriven(tmp_path / "work")
    study.report(study.begin(), 1, 0.5)
    with pytest.raises(CommandError, match="has a best trial"):
        exported(study, tmp_path / "out")
    with pytest.raises(StudyNotFoundError):
        export_best("other", tmp_path / "out", study.storage)
    assert not (tmp_path / "out").exists()


def test_a_study_that_runs_can_be_exported_from(study: HandDriven, tmp_path: Path) -> None:
    study.report(study.begin(), 1, 0.9)
    assert study.record.status().state == "running"
    assert exported(study, tmp_path / "out").number == 1
