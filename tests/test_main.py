"""The commands: a complete run on tiny data, its record, and refusals."""

import argparse
import json
import logging
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import h5py
import heads
import numpy as np
import pytest
import systems
import yaml
from fastmri import evaluate as official
from refusals import assert_refused

from mrilib.__main__ import COMMANDS, main, make_parser
from mrilib.config import ROOT, EvaluateParameters, ParameterError, Stage1Parameters, Stage2Parameters
from mrilib.data.splits import index_volumes
from mrilib.runs.notebooks import claim_folder
from mrilib.runs.reconstruct import load_run
from mrilib.training.setup import check_same_input, make_loaders

NAME = "test-run"


def write_params(folder: Path, data: Path, backbone: Path) -> Path:
    """Write a params file for every notebook, at the smallest sizes."""
    common = systems.values(data, backbone)
    names = ("data_dir", "val_fraction", "test_fraction", "split_seed", "num_coils", "img_size")
    shared = {name: common[name] for name in names}
    language_model = {name: common[name] for name in ("config_path", "backbone_path", "device")}
    checkpoints = dict.fromkeys(
        ("stage1_checkpoint", "stage2_checkpoint", "constant_prefix_checkpoint", "no_token_decoder_checkpoint"), "x"
    )
    contents = {
        "explore": shared,
        "stage1": {**common, **systems.ENCODER, "epochs": "1", "learning_rate": "1e-3"},
        "stage2": {**common, **systems.DECODER, "stage1_checkpoint": "x", "epochs": 1, "train_control": True},
        "evaluate": {**shared, **language_model, **checkpoints, "max_new_tokens": 8},
        "compare": {"runs": []},
    }
    folder.mkdir(exist_ok=True)
    for name, values in contents.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def params(tmp_path_factory, phantom_dir, backbone_dir) -> Path:
    return write_params(tmp_path_factory.mktemp("params"), phantom_dir, backbone_dir)


@pytest.fixture(scope="module")
def run(params, tmp_path_factory) -> Path:
    """A finished run outside of outputs/."""
    directory = tmp_path_factory.mktemp("runs") / NAME
    command = [sys.executable, "-m", "mrilib", "run", str(params), "--name", str(directory)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "zero-filled" in result.stdout and "contrast accuracy" in result.stdout
    return directory


def test_run_leaves_a_complete_record(run):
    stems = ["01_explore_data", "02_train_stage1", "03_train_stage2", "04_evaluate", "05_compare_runs"]
    for stem in stems:
        notebook = json.loads((run / f"{stem}.ipynb").read_text())
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert all(cell["execution_count"] for cell in code)
        assert "widgets" not in notebook["metadata"]
        outputs = [output for cell in code for output in cell["outputs"]]
        assert not any(output["output_type"] == "error" for output in outputs)
        warnings = [o for o in outputs if o.get("name") == "stderr"]
        assert not warnings, warnings
        assert (run / f"{stem}.ipynb").stat().st_size < 2e6
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "done" and set(record["notebooks"]) == set(record["planned"])
    assert all(section["status"] == "done" for section in record["notebooks"].values())
    assert record["notebooks"]["stage1"]["config"]["learning_rate"] == 1e-3
    assert {"git", "versions", "hardware", "started"} <= set(record)
    for stage in ("stage1", "stage2"):
        names = {path.name for path in (run / f"{stage}_checkpoints").iterdir()}
        assert {f"{stage}_best_model.pt", f"{stage}_final_model.pt"} <= names
        assert list((run / "logs").glob(f"{stage}-*.log")) and (run / "logs" / f"{stage}.jsonl").stat().st_size
    assert {path.name for path in (run / "params").iterdir()} >= {"stage1.yaml", "evaluate.yaml"}
    assert len(list((run / "figures").glob("*.png"))) >= 8


def test_the_backbone_is_unchanged_from_stage_1_to_the_evaluation(run):
    notebooks = json.loads((run / "run.json").read_text())["notebooks"]
    before, after = notebooks["stage1"]["frozen_before"], notebooks["stage2"]["frozen_after"]
    assert before == after == notebooks["evaluate"]["frozen"]


def test_metrics_have_all_keys_and_test_volumes(run, phantom_dir):
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) == {"reconstruction", "analysis", "cost"}
    assert set(metrics["reconstruction"]) == {"4", "8"}
    split = json.loads((run / "run.json").read_text())["notebooks"]["stage2"]["split"]
    tested = [volume for volume in index_volumes(phantom_dir) if volume.file in split["test"]]
    for methods in metrics["reconstruction"].values():
        assert {"model", "zero_filled", "nearest_training_slice", "no_tokens", "other_patient_tokens"} <= set(methods)
        assert all(scores["volumes"] == len(tested) for scores in methods.values())
    expected = {
        "cross_entropy", "cross_entropy_without_kspace", "cross_entropy_other_patient", "token_accuracy",
        "contrast_accuracy", "contrast_accuracy_without_kspace", "finding_f1", "finding_f1_without_kspace",
        "finding_f1_best_constant", "samples", "patients",
    }  # fmt: skip
    assert expected <= set(metrics["analysis"])
    analysis = metrics["analysis"]
    assert analysis["findings_true"] == analysis["findings_found"] + analysis["findings_missed"] > 0
    assert {"findings_invented", "clean_slices", "clean_slices_with_invented", "finding_f1_ci95"} <= set(analysis)
    assert str(phantom_dir) in analysis["test_set"] and "phantom" in analysis["test_set"]
    assert all(
        "lesions_lost" in scores for methods in metrics["reconstruction"].values() for scores in methods.values()
    )
    assert {"stage1_seconds", "stage2_seconds", "peak_memory_bytes", "trainable_parameters"} <= set(metrics["cost"])


def test_the_evaluation_starts_with_its_answer(run):
    cells = json.loads((run / "04_evaluate.ipynb").read_text())["cells"]
    place = next(i for i, cell in enumerate(cells) if "".join(cell["source"]) == "## The answer")
    answer = "".join(cells[place + 1]["outputs"][0]["data"]["text/markdown"])
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pictures = [output["metadata"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    metrics = json.loads((run / "metrics.json").read_text())
    control = metrics["reconstruction"]["4"]["trained_without_tokens"]
    assert f"{control['ssim']:.3f}" in answer and f"{control['lesions_lost']} of {control['lesions']}" in answer
    assert f"of {metrics['analysis']['findings_true']} findings" in answer and "right contrast" in answer
    first_picture = next(i for i, cell in enumerate(cells) if "image/png" in str(cell.get("outputs", "")))
    assert first_picture <= place + 3
    assert all(picture["alt"] and picture["width"] <= 1000 for picture in pictures) and len(pictures) == 8
    tables = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert max("".join(table).count("<tr") for table in tables) <= 21
    assert any(
        "not for diagnosis" in "".join(output["data"].get("text/markdown", ""))
        for output in outputs
        if "data" in output
    )
    assert (run / "lesions.csv").stat().st_size


def test_reconstruct_gives_the_image_of_the_evaluation(run, phantom_dir, tmp_path, capsys):
    split = json.loads((run / "run.json").read_text())["notebooks"]["stage2"]["split"]
    file = phantom_dir / f"{split['test'][0]}.h5"
    assert main(["reconstruct", str(run), str(file), "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    analysis = json.loads((run / "metrics.json").read_text())["analysis"]
    assert "SSIM" in output and "not for diagnosis" in output
    assert f"missed {analysis['findings_missed']} of {analysis['findings_true']} findings" in output
    with h5py.File(tmp_path / file.name) as new, h5py.File(run / "reconstructions" / "model" / "4" / file.name) as old:
        np.testing.assert_allclose(new["reconstruction"][()], old["reconstruction"][()], rtol=1e-3, atol=1e-7)
    lines = (tmp_path / f"{file.stem}.jsonl").read_text().splitlines()
    assert len(lines) == index_volumes(phantom_dir)[0].slices and "analysis" in json.loads(lines[0])
    assert (tmp_path / f"{file.stem}.png").stat().st_size


def test_reconstruct_uses_the_weights_in_the_given_folder(run, phantom_dir, tmp_path):
    file = next(phantom_dir.glob("*.h5"))
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    _, config = load_run(moved)
    assert Path(config.stage2_checkpoint).is_relative_to(moved) and Path(config.stage1_checkpoint).is_relative_to(moved)
    (moved / "stage2_checkpoints" / "stage2_best_model.pt").unlink()
    assert main(["reconstruct", str(moved), str(file), "--out", str(tmp_path)]) == 1  # not those of the original folder


def test_wrong_options_are_refused_before_data_is_written(run, params, tmp_path, capsys):
    shutil.copytree(params, tmp_path / "params")
    explore = tmp_path / "params" / "explore.yaml"
    values = yaml.safe_load(explore.read_text()) | {"data_dir": str(tmp_path / "data"), "phantom_volumes": 6}
    explore.write_text(yaml.safe_dump(values))
    common = ["run", str(tmp_path / "params"), "-p", f"stage1.data_dir={tmp_path / 'data'}"]
    assert main([*common, "--name", str(tmp_path / "a"), "-p", "stage1.learnin_rate=1"]) == 1
    assert "learnin_rate" in capsys.readouterr().err
    assert main([*common, "--name", str(tmp_path / "a"), "-p", "stage2.mask_type=poisson"]) == 1
    assert "stage2: mask_type: 'poisson' is not known; there are random, equispaced" in capsys.readouterr().err
    taken = tmp_path / "taken"
    shutil.copytree(run, taken, ignore=shutil.ignore_patterns("*.pt"))
    assert main([*common, "--name", str(taken)]) == 1
    assert "taken' exists; choose another --name" in capsys.readouterr().err
    assert main([*common, "--name", "../a"]) == 1
    assert "--name ../a" in capsys.readouterr().err
    assert not (tmp_path / "data").exists() and not (tmp_path / "a").exists()


def test_a_split_that_tests_on_training_patients_is_refused(run):
    values = json.loads((run / "run.json").read_text())["notebooks"]
    stage1 = Stage1Parameters.create(values["stage1"]["config"])
    evaluate = EvaluateParameters.create(values["evaluate"]["config"])
    check_same_input(evaluate, stage1)
    for name, value in (("split_seed", 77), ("test_fraction", 0.41), ("val_fraction", 0.39)):
        with pytest.raises(ParameterError, match=f"{name}: .*patients that it has learned from"):
            check_same_input(evaluate.model_copy(update={name: value}), stage1)
    check_same_input(evaluate.model_copy(update={"split_seed": 1, "test_dir": "elsewhere"}), stage1)


def test_the_pipeline_accepts_another_head(run, phantom_dir, backbone_dir, tmp_path):
    """nibabel's head, as a test file with its own mask and no target, and fully sampled; one patient."""
    data = tmp_path / "heads"
    data.mkdir()
    heads.as_test_file(heads.write_head(data / "file_test.h5"), acceleration=6)
    heads.write_head(data / "file_full.h5")
    assert main(["check", str(data)]) == 0
    assert main(["reconstruct", str(run), str(data / "file_test.h5"), "--out", str(tmp_path / "one")]) == 0

    values = json.loads((run / "run.json").read_text())["notebooks"]["evaluate"]["config"]
    values |= {"test_dir": str(data), "output_dir": str(tmp_path / "run"), "interactive": False}
    out = tmp_path / "evaluate.ipynb"
    command = [sys.executable, "-m", "papermill", "notebooks/04_evaluate.ipynb", str(out), "-y", yaml.safe_dump(values)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    written = {str(path.relative_to(tmp_path / "run" / "reconstructions")) for path in tmp_path.glob("run/rec*/*/*/*")}
    assert {"model/4/file_full.h5", "model/8/file_full.h5", "model/6/file_test.h5"} <= written
    assert not any(path.endswith(("4/file_test.h5", "8/file_test.h5", "6/file_full.h5")) for path in written)
    for path in (tmp_path / "one" / "file_test.h5", tmp_path / "run/reconstructions/model/6/file_test.h5"):
        with h5py.File(path) as h5:
            assert h5["reconstruction"].shape == (8, 96, 96) and np.isfinite(h5["reconstruction"][()]).all()
    with (
        h5py.File(tmp_path / "one" / "file_test.h5") as one,
        h5py.File(tmp_path / "run/reconstructions/model/6/file_test.h5") as evaluated,
    ):
        np.testing.assert_allclose(one["reconstruction"][()], evaluated["reconstruction"][()], rtol=1e-3, atol=1e-9)

    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["reconstruction"]
    assert set(metrics) == {"4", "8"} and "nearest_training_slice" in metrics["4"]
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "file_full.h5").symlink_to(data / "file_full.h5")
    text = json.loads((tmp_path / "run" / "metrics.json").read_text())["analysis"]
    assert text["patients"] == 1 and text["cross_entropy_other_patient"] is None
    for acceleration, methods in metrics.items():
        for method, scores in methods.items():
            folder = tmp_path / "run" / "reconstructions" / method / acceleration
            assert_equals_official(scores, tmp_path / "targets", folder)


def assert_equals_official(scores, targets, predictions):
    args = Namespace(target_path=targets, predictions_path=predictions, acquisition=None, acceleration=None)
    expected = official.evaluate(args, "reconstruction_rss").means()
    for name in ("ssim", "psnr", "nmse"):
        assert scores[name] == pytest.approx(float(np.squeeze(expected[name.upper()])), rel=1e-6)


def test_metrics_equal_those_of_fastmris_evaluate(run, phantom_dir, tmp_path):
    split = json.loads((run / "run.json").read_text())["notebooks"]["stage2"]["split"]
    for file in split["test"]:
        (tmp_path / f"{file}.h5").symlink_to(phantom_dir / f"{file}.h5")
    metrics = json.loads((run / "metrics.json").read_text())["reconstruction"]
    for acceleration, methods in metrics.items():
        for method, scores in methods.items():
            assert_equals_official(scores, tmp_path, run / "reconstructions" / method / acceleration)


def test_bad_files_are_refused_or_skipped_and_listed(params, volumes, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for volume in volumes:
        shutil.copy(volume.path, data)
    with h5py.File(data / volumes[0].path.name, "r+") as h5:
        h5["kspace"][1, 0, 0, 0] = np.nan
    (data / "truncated.h5").write_bytes(volumes[1].path.read_bytes()[:5000])
    common = ["run", str(params), "--stage1-only", "-p", f"stage1.data_dir={data}", "-p", "stage1.max_train_slices=3"]
    common += ["-p", "stage1.train_control=false"]
    assert main([*common, "--name", str(tmp_path / "refused")]) == 1
    record = json.loads((tmp_path / "refused" / "run.json").read_text())
    assert record["status"] == "failed"
    assert all(name in record["notebooks"]["stage1"]["error"] for name in (volumes[0].path.name, "truncated.h5"))
    assert main([*common, "-p", "stage1.on_bad_file=skip", "--name", str(tmp_path / "skipped")]) == 0
    section = json.loads((tmp_path / "skipped" / "run.json").read_text())["notebooks"]["stage1"]
    assert {entry["file"] for entry in section["skipped_files"]} == {volumes[0].path.name, "truncated.h5"}
    assert not any(volumes[0].file in part for part in section["split"].values())


def test_a_run_folder_is_overwritten_only_with_overwrite(run, params, capsys):
    before = (run / "run.json").read_text()
    assert main(["run", str(params), "--name", str(run)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (run / "run.json").read_text() == before


def test_a_run_killed_in_its_evaluation_resumes_to_the_same_metrics(run, tmp_path):
    """For a run killed in training, see test_resume."""
    again = tmp_path / NAME
    shutil.copytree(run, again)
    shutil.rmtree(again / "reconstructions")
    (again / "metrics.json").unlink()
    record = json.loads((again / "run.json").read_text())
    del record["notebooks"]["evaluate"], record["notebooks"]["compare"]
    (again / "run.json").write_text(json.dumps(record))
    command = [sys.executable, "-m", "mrilib", "run", str(again / "params"), "--name", str(again), "--resume"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(again.glob("reconstructions/*/*/*.h5")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    while systems.processes_of(again):
        time.sleep(0.05)
    assert not (again / "metrics.json").exists()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    metrics = [json.loads((directory / "metrics.json").read_text()) for directory in (run, again)]
    for one in metrics:
        del one["cost"]
    assert metrics[0] == metrics[1]


def test_other_folders_are_never_emptied(params, tmp_path, capsys):
    precious = tmp_path / "documents" / "thesis.tex"
    precious.parent.mkdir()
    precious.touch()
    for more in ([], ["--overwrite"], ["--resume"]):
        assert main(["run", str(params), "--name", str(precious.parent), *more]) == 1
        assert "is not a run folder (it has no run.json)" in capsys.readouterr().err
    assert [path.name for path in precious.parent.iterdir()] == ["thesis.tex"]
    remains = tmp_path / "killed-at-once"
    (remains / "params").mkdir(parents=True)
    claim_folder(remains, overwrite=False)
    assert [path.name for path in remains.iterdir()] == [".lock"]


def test_refused_overrides_are_not_stored(run, tmp_path, capsys):
    again = tmp_path / NAME
    shutil.copytree(run, again)
    files = {path: path.read_bytes() for path in again.rglob("*") if path.is_file() and path.name != ".lock"}
    command = ["run", str(again / "params"), "--name", str(again), "--resume"]
    assert_refused([*command, "-p", "stage1.epochs=99"], ("-p stage1.epochs", "stage1 is done, with epochs: 1"), capsys)
    assert main([*command, "-p", "stage1.epochs=1"]) == 0  # unchanged
    record = json.loads((again / "run.json").read_text())
    record["notebooks"]["stage1"]["status"] = "failed"
    (again / "run.json").write_text(json.dumps(record))
    assert_refused([*command, "-p", "stage1.learning_rate=5"], ("was begun with learning_rate: 0.001",), capsys)
    assert not [path for path, content in files.items() if path.suffix == ".pt" and path.read_bytes() != content]
    kept = yaml.safe_load((again / "params" / "overrides.yaml").read_text())
    assert kept == {"stage1": {"epochs": 1}}


def test_runs_table(run, capsys):
    assert main(["runs", str(run.parent)]) == 0
    out = capsys.readouterr().out
    assert NAME in out and "done" in out and "SSIM 4x" in out


def test_stage2_only_uses_the_given_checkpoint(run, params, tmp_path):
    checkpoint = run / "stage1_checkpoints" / "stage1_final_model.pt"
    alone = tmp_path / "alone"
    overrides = ["-p", "stage2.train_control=false", "-p", "stage2.max_train_slices=6"]
    status = main(["run", str(params), "--name", str(alone), "--stage2-only", "-c", str(checkpoint), *overrides])
    record = json.loads((alone / "run.json").read_text())
    assert status == 0 and record["status"] == "done" and record["planned"] == ["stage2"]
    assert record["notebooks"]["stage2"]["config"]["stage1_checkpoint"] == str(checkpoint)
    assert (alone / "stage2_checkpoints" / "stage2_best_model.pt").exists()
    overrides += ["-p", f"stage2.token_cache_dir={tmp_path / 'cache'}", "-p", "stage2.masks_per_slice=1"]
    cached = tmp_path / "cached"
    status = main(["run", str(params), "--name", str(cached), "--stage2-only", "-c", str(checkpoint), *overrides])
    assert status == 0
    for folder in (alone, cached):
        config = Stage2Parameters.create(
            {**json.loads((folder / "run.json").read_text())["notebooks"]["stage2"]["config"], "output_dir": ""}
        )
        steps = (folder / "logs" / "stage2.jsonl").read_text().splitlines()
        assert len(steps) == config.epochs * len(make_loaders(config).train)


def test_the_error_of_a_failed_notebook_is_recorded(run, params, tmp_path, capsys):
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes((run / "stage1_checkpoints" / "stage1_final_model.pt").read_bytes()[:1000])
    failed = tmp_path / "failed"
    assert main(["run", str(params), "--name", str(failed), "--stage2-only", "-c", str(damaged)]) == 1
    record = json.loads((failed / "run.json").read_text())
    assert record["status"] == "failed"
    assert "damaged" in record["notebooks"]["stage2"]["error"]
    assert "damaged" in (failed / "03_train_stage2.ipynb").read_text()
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "stage1.learnin_rate=1"], "learning_rate"),
        (["-p", "stage1.epochs=many"], "epochs"),
        (["-p", "stage1.data_dir=nowhere"], "nowhere"),
        (["-p", "stage1.train_control=false"], 'leave the baseline out (evaluate.constant_prefix_checkpoint: "")'),
        (["-p", "stage2.train_control=false"], "set stage2.train_control to true"),
        (["-p", "epochs=3"], "NOTEBOOK.NAME=VALUE"),
        (["--stage2-only"], "-c CHECKPOINT"),
    ],
)
def test_bad_parameters_are_refused_before_anything_starts(params, tmp_path, capsys, arguments, message):
    directory = tmp_path / "never"
    assert main(["run", str(params), "--name", str(directory), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not directory.exists()


def test_every_command_and_option_has_a_help_text_with_its_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = make_parser()
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    helps = {choice.dest: choice.help for choice in commands._choices_actions}
    assert set(commands.choices) == set(helps) == set(COMMANDS) and all(helps.values())
    lines = [line.split(maxsplit=1) for line in parser.format_help().splitlines()]
    assert all([name, text] in lines for name, text in helps.items()), "one line per command"
    for name, command in commands.choices.items():
        for action in command._actions:
            assert action.help, (name, action.dest)
            if action.dest != "help" and not action.required:
                assert "default" in action.help, (name, action.dest)


def test_the_traceback_of_an_unforeseen_error_is_in_the_named_log(tmp_path, monkeypatch, capsys):
    def fail(_):
        raise KeyError("evaluate\n\x1b[31m")

    monkeypatch.setitem(COMMANDS, "runs", fail)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("mrilib"), "handlers", [])
    assert main(["runs"]) == 1
    (log,) = (tmp_path / "mrilib" / "errors").iterdir()
    line = capsys.readouterr().err
    assert line.startswith("error: KeyError: ") and line.endswith(f"(the traceback is in {log})\n")
    assert line.count("\n") == 1 and "\x1b" not in line
    assert "in fail" in log.read_text() and "KeyError" in log.read_text()

    handler = logging.FileHandler(tmp_path / "stage1.log")
    monkeypatch.setattr(logging.getLogger("mrilib"), "handlers", [handler])  # a run is open
    assert main(["runs"]) == 1
    handler.close()
    assert str(tmp_path / "stage1.log") in capsys.readouterr().err
    assert "in fail" in (tmp_path / "stage1.log").read_text()

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(logging.getLogger("mrilib"), "handlers", [])
    assert main(["runs"]) == 1
    assert "the traceback could not be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (RecursionError("maximum recursion depth exceeded"), "error: maximum recursion depth exceeded\n"),
        (ParameterError("a:\nb\nc"), "error: a: b; c\n"),
        (FileNotFoundError(2, "No such file or directory", "x\x07"), "error: 'x\\x07': No such file or directory\n"),
        (ParameterError("x" * 10_000), "… (10000 characters)"),
        (KeyboardInterrupt(), "stopped by SIGINT"),
    ],
)
def test_any_exception_is_one_line(error, message, tmp_path, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.setitem(COMMANDS, "runs", fail)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("mrilib.errors.PACKAGE", Path(__file__).parent)
    assert main(["runs"]) == (130 if isinstance(error, KeyboardInterrupt) else 1)
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1 and len(line) < 2300


def test_make_data(tmp_path, capsys):
    options = "--volumes 2 --slices 2 --img-size 32 --coils 4"
    arguments = ["make-data", str(tmp_path / "d"), *options.split()]
    assert main(arguments) == 0
    assert len(index_volumes(tmp_path / "d")) == 2
    assert main([*arguments, "--seed", "9"]) == 1  # other parameters, same folder
    assert "choose another directory" in capsys.readouterr().err
