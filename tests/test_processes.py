"""Signals to `mrilib run`: it finishes the step, saves, records the stop, leaves no process, and can be resumed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import systems
import yaml

from mrilib.__main__ import main
from mrilib.config import ROOT
from mrilib.errors import STOPPED
from mrilib.files import read_json_lines
from mrilib.runs import record as record_module
from mrilib.runs.notebooks import Notebook, execute_one
from mrilib.training.checkpoint import load_checkpoint

EPOCHS = 8


def run(params: Path, directory: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mrilib", "run", str(params), "--name", str(directory), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(process: subprocess.Popen[str], log: Path, count: int) -> None:
    while len(read_json_lines(log)) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def record(directory: Path) -> Any:
    return json.loads((directory / "run.json").read_text())


def test_signals_stop_a_run_and_resume_continues_it(phantom_dir, tmp_path, capsys):
    backbone = systems.write_backbone(tmp_path / "backbone")
    values = systems.values(phantom_dir, backbone, **systems.ENCODER, epochs=EPOCHS, batch_size=1, train_control=False)
    values |= {"max_train_slices": 9, "max_val_slices": 3}
    params = tmp_path / "params"
    params.mkdir()
    (params / "stage1.yaml").write_text(yaml.safe_dump(values))
    directory = tmp_path / "run"
    log = directory / "logs" / "stage1.jsonl"

    process = run(params, directory)
    wait_for_steps(process, log, 3)
    assert systems.processes_of(directory)  # papermill and its kernel
    assert main(["run", str(params), "--name", str(directory), "--resume"]) == 1
    assert "is in use by process" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "stopped by SIGTERM; to resume: " in output and "--resume" in output
    assert not systems.processes_of(directory)
    contents = record(directory)
    assert contents["status"] == "failed" and contents["notebooks"]["stage1"]["error"] == "stopped by SIGTERM"
    saved = load_checkpoint(directory / "stage1_checkpoints" / "stage1_resume.pt", "stage1")
    assert saved["step"] == len(read_json_lines(log)) >= 3

    process = run(params, directory, "--resume")
    wait_for_steps(process, log, saved["step"] + 1)
    process.kill()  # its children end, too
    process.wait()
    deadline = time.monotonic() + 60
    while systems.processes_of(directory) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not systems.processes_of(directory)
    assert record(directory)["status"] == "running"  # a killed process cannot record it

    process = run(params, directory, "--resume")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    contents = record(directory)
    assert contents["status"] == "done" and len(contents["resumed"]) == 2
    assert [entry["step"] for entry in read_json_lines(log)] == list(range(1, 9 * EPOCHS + 1))
    process = run(params, directory, "--resume")
    assert "02_train_stage1 is done" in process.communicate()[0] and process.returncode == 0


def test_a_signal_between_two_notebooks_or_during_a_start(tmp_path, capsys):
    record_module.Run(tmp_path, ["stage2", "evaluate"]).save()
    assert execute_one(Notebook("stage2", {}, tmp_path), [signal.SIGTERM]) == STOPPED
    message = f"stopped by SIGTERM; to resume: python -m mrilib run {tmp_path}/params --name {tmp_path} --resume"
    assert message in capsys.readouterr().err
    assert record(tmp_path)["notebooks"]["stage2"] == {"status": "failed", "error": "stopped by SIGTERM"}
    notebook = Notebook("evaluate", {}, tmp_path)
    notebook.stop(1)
    assert notebook.execute() == -signal.SIGTERM and not list(tmp_path.glob("*.ipynb"))
