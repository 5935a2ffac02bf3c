"""Comparison of run records."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from mrilib.config import CompareParameters, ParameterError
from mrilib.display import compare_runs
from mrilib.display import images as images_module
from mrilib.evaluation import reconstructions
from mrilib.files import write_json
from mrilib.training.history import read_history


def make_run(folder, volumes, *, learning_rate=1e-3, factor=0.9, accelerations=("4", "8"), status="done"):
    data_dir = str(volumes[0].path.parent)
    config = {"output_dir": str(folder), "data_dir": data_dir, "learning_rate": learning_rate, "interactive": False}
    checkpoint = {"stage1_checkpoint": str(folder / "stage1_checkpoints" / "stage1_best_model.pt"), "test_dir": ""}
    notebooks = {
        "stage1": {"status": "done", "config": config},
        "evaluate": {"status": "done", "config": {**config, **checkpoint}},
    }
    record = {"name": folder.name, "status": status, "planned": list(notebooks), "notebooks": notebooks}
    write_json(folder / "run.json", {**record, "started": f"2030-01-01T00:00:0{len(folder.name) % 10}"})
    scores = {"ssim": factor, "psnr": 30 * factor}
    section = {a: {"model": scores, "zero_filled": {"ssim": 0.5, "psnr": 18.0}} for a in accelerations}
    write_json(folder / "metrics.json", {"reconstruction": section, "cost": {"stage1_seconds": 61.7}})
    for acceleration in accelerations:
        for method, scale in (("model", factor), ("zero_filled", 0.5)):
            for volume in volumes[:2]:
                images = np.stack([scale * reconstructions.read_target(volume, n) for n in range(volume.slices)])
                path = folder / "reconstructions" / method / acceleration / volume.path.name
                reconstructions.write_reconstruction(path, images)
    logs = folder / "logs"
    logs.mkdir()
    attempts = [(1, 9.0), (2, 9.0), (1, 3.0), (2, 2.0), (3, 1.0)]  # the first was interrupted
    lines = [{"epoch": 1, "step": step, "loss": loss, "cross_entropy": loss} for step, loss in attempts]
    (logs / "stage1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (logs / "stage1_history.csv").write_text("epoch,train_loss,val_loss\n1,3.0,2.5\n2,2.0,1.5\n3,1.0,1.6\n")
    return folder


@pytest.fixture
def two_runs(tmp_path, volumes):
    return {
        "a": make_run(tmp_path / "a", volumes),
        "bb": make_run(tmp_path / "bb", volumes, learning_rate=2e-3, factor=0.8, accelerations=("4",)),
    }


def config_of(*paths):
    return CompareParameters.create({"runs": [str(path) for path in paths]})


def test_named_runs(two_runs, tmp_path, volumes):
    assert compare_runs.select_runs(config_of(*two_runs.values()), tmp_path / "own") == two_runs
    (tmp_path / "other").mkdir()
    twin = make_run(tmp_path / "other" / "a", volumes[:2])
    chosen = compare_runs.select_runs(config_of(two_runs["a"], twin), tmp_path / "own")
    assert len(chosen) == 2, "runs of the same name must stay separate"
    with pytest.raises(ParameterError, match=r"'.*nothing' is no run folder"):
        compare_runs.select_runs(config_of(tmp_path / "nothing"), tmp_path / "own")


def test_all_finished_runs_by_default(tmp_path, volumes, monkeypatch):
    monkeypatch.setattr("mrilib.files.ROOT", tmp_path)
    own = make_run(tmp_path / "outputs" / "own", volumes, status="running")
    make_run(tmp_path / "outputs" / "failed", volumes, status="failed")
    done = make_run(tmp_path / "outputs" / "finished", volumes)
    chosen = compare_runs.select_runs(CompareParameters.create({}), own)
    assert set(chosen.values()) == {own, done}
    assert set(compare_runs.select_runs(CompareParameters.create({}), tmp_path / "elsewhere").values()) == {done}


def test_nothing_to_compare(tmp_path, monkeypatch):
    monkeypatch.setattr("mrilib.files.ROOT", tmp_path)
    with pytest.raises(ParameterError, match="no finished run"):
        compare_runs.select_runs(CompareParameters.create({}), tmp_path / "own")


def test_only_differing_parameters(two_runs):
    table = compare_runs.differing_parameters(two_runs)
    assert list(table.index) == ["stage1.learning_rate", "evaluate.learning_rate"]
    assert table.loc["stage1.learning_rate"].to_dict() == {"a": "0.001", "bb": "0.002"}


def test_a_notebook_that_one_run_lacks_is_one_row(two_runs):
    record = json.loads((two_runs["bb"] / "run.json").read_text())
    del record["notebooks"]["stage1"]
    write_json(two_runs["bb"] / "run.json", record)
    table = compare_runs.differing_parameters(two_runs)
    assert table.loc["stage1"].to_dict() == {"a": "run", "bb": "not run"}
    assert list(table.index) == ["stage1", "evaluate.learning_rate"]  # without the parameters of the missing notebook


def test_metrics_table(two_runs):
    table = compare_runs.metrics_table(two_runs)
    assert table.loc["4x two-stage model SSIM"].to_dict() == {"a": "0.900", "bb": "0.800"}
    assert table.loc["8x two-stage model PSNR [dB]"].to_dict() == {"a": "27.00", "bb": "–"}
    assert table.loc["stage 1 training [s]", "a"] == "62"


def test_the_history_is_that_of_the_last_attempt(two_runs):
    history = read_history(two_runs["a"], "stage1")
    assert [step["loss"] for step in history.steps] == [3.0, 2.0, 1.0]
    assert (history.best_epoch, history.best_loss) == (2, 1.5)
    assert read_history(two_runs["a"], "stage2") is None
    assert {run: list(stages) for run, stages in compare_runs.read_histories(two_runs).items()} == {
        "a": ["stage1"],
        "bb": ["stage1"],
    }


def test_same_slice_at_the_common_acceleration(two_runs, volumes):
    (shown,), left_out = compare_runs.same_slice(two_runs)  # only one of them was evaluated at 8x
    volume = min(volumes[:2], key=lambda one: one.path.name)
    assert list(shown.images) == ["zero_filled", "a", "bb"] and left_out == []
    assert np.array_equal(shown.target, reconstructions.read_target(volume, volume.slices // 2))
    assert np.allclose(shown.images["bb"], 0.8 * shown.target)
    assert "4x" in shown.title
    images_module.reconstruction_comparison([shown])
    assert len(compare_runs.same_slice({"a": two_runs["a"]})[0]) == 2


def test_runs_with_other_test_files_are_left_out(two_runs, tmp_path):
    evaluated = read_config(two_runs["a"])
    evaluated["notebooks"]["evaluate"]["config"]["data_dir"] = str(tmp_path / "moved")
    write_json(two_runs["a"] / "run.json", evaluated)
    shown, left_out = compare_runs.same_slice(two_runs)
    assert left_out == ["a"] and [list(one.images) for one in shown] == [["zero_filled", "bb"]]
    # Same name, another scan.
    (tmp_path / "moved").mkdir()
    for path in (two_runs["a"] / "reconstructions" / "model").glob("*/*.h5"):
        source = Path(read_config(two_runs["bb"])["notebooks"]["evaluate"]["config"]["data_dir"]) / path.name
        shutil.copy(source, tmp_path / "moved")
        with h5py.File(tmp_path / "moved" / path.name, "r+") as h5:
            h5["reconstruction_rss"][...] *= 2
    shown, left_out = compare_runs.same_slice(two_runs)
    assert len(left_out) == 1 and all(left_out[0] not in one.images for one in shown)
    for path in (two_runs["bb"] / "reconstructions" / "model").glob("*/*.h5"):
        path.rename(path.with_name(f"other_{path.name}"))
    assert len(compare_runs.same_slice(two_runs)[1]) == 1
    assert compare_runs.same_slice({"x": tmp_path}) == ([], [])


def read_config(run):
    return json.loads((run / "run.json").read_text())


def test_states_name_failed_and_missing_notebooks(volumes, tmp_path):
    folders = {name: tmp_path / name for name in ("fine", "failed", "unfinished")}
    for folder in folders.values():
        make_run(folder, volumes)
    records = {name: json.loads((folder / "run.json").read_text()) for name, folder in folders.items()}
    records["failed"]["notebooks"]["evaluate"].update(status="failed", error="ValueError: odd\nsecond line")
    records["unfinished"]["status"] = "running"
    records["unfinished"]["notebooks"]["evaluate"]["status"] = "running"
    for name, record in records.items():
        write_json(folders[name] / "run.json", record)
    assert compare_runs.states({"failed": folders["failed"]})["failed"] == "failed in 04_evaluate: ValueError: odd"
    records["failed"]["notebooks"]["evaluate"]["error"] = ""
    write_json(folders["failed"] / "run.json", records["failed"])
    assert compare_runs.states(folders) == {
        "fine": "done",
        "failed": "failed in 04_evaluate: no error is recorded",
        "unfinished": "running, without 04_evaluate",
    }
