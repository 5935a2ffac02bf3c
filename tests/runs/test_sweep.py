"""Sweeps: combinations, refusals before the first run, failed runs, signals and resuming."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import systems
import yaml

from mrilib.__main__ import main
from mrilib.config import ParameterError, Stage1Parameters
from mrilib.runs import sweep
from mrilib.runs.sweep import variants


def test_variants_are_all_combinations_and_their_names_contain_what_varies():
    grid = {"stage1.learning_rate": ["1e-4", "3e-4"], "stage1.epochs": [2], "evaluate.accelerations": [[4], [4, 8]]}
    combinations = variants("demo", grid)
    assert [variant.name for variant in combinations][:2] == [
        "demo-stage1.learning_rate-1e-4-evaluate.accelerations-4",
        "demo-stage1.learning_rate-1e-4-evaluate.accelerations-4_8",
    ]
    assert len(combinations) == 4 and all(variant.of("stage1")["epochs"] == 2 for variant in combinations)
    methods = {"varnet": {"stage2.decoder": "varnet"}, "unet": {"stage2.decoder": "fastmri_unet"}}
    names = [variant.name for variant in variants("c", {}, methods, [0, 1])]
    assert names == ["c-varnet-seed-0", "c-varnet-seed-1", "c-unet-seed-0", "c-unet-seed-1"]
    with pytest.raises(ParameterError, match="nothing to sweep"):
        variants("demo", {"stage1.epochs": [2]})
    with pytest.raises(ParameterError, match="same folder name"):
        variants("demo", {"stage1.reports_path": ["a b", "a_b"]})


def test_a_signal_reaches_the_run_once_and_ends_the_sweep(tmp_path, monkeypatch):
    received, ready = tmp_path / "received", tmp_path / "ready"
    child = (
        "import pathlib, signal, sys, time\n"
        f"received, ready = pathlib.Path({str(received)!r}), pathlib.Path({str(ready)!r})\n"
        "signal.signal(signal.SIGTERM, lambda *_: open(received, 'a').write('x'))\n"
        "ready.touch()\n"
        "while not received.exists(): time.sleep(0.02)\n"
        "time.sleep(0.3)\n"  # saves its state
    )
    monkeypatch.setattr(sweep, "MRILIB", (sys.executable, "-c", child))

    def interrupt():
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(sweep.SweepStopped, match="SIGTERM"):
        sweep._mrilib([])
    assert received.read_text() == "x" and signal.getsignal(signal.SIGTERM) is before


@pytest.fixture(scope="module")
def params(phantom_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("params")
    backbone = systems.write_backbone(tmp_path_factory.mktemp("backbone"))
    own = {"epochs": 1, "max_train_slices": 3, "max_val_slices": 3, "train_control": False}
    values = systems.values(phantom_dir, backbone, **systems.ENCODER, **own)
    (folder / "stage1.yaml").write_text(yaml.safe_dump(values | own))
    return folder


def test_a_failed_run_does_not_stop_the_sweep_and_the_comparison_ends_it(params, tmp_path, capfd):
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"no weights")
    name = str(tmp_path / "s")
    command = ["sweep", str(params), "--name", name, "--stage1-only", "-p", f"stage1.varnet_weights={damaged},''"]
    command += ["-p", "stage1.varnet_map_network=true"]
    assert main(command) == 1
    out = capfd.readouterr().out
    failed, done = (
        tmp_path / f"s-stage1.varnet_weights-{end}" for end in (str(damaged).replace("/", "_")[-40:], "empty")
    )
    assert out.index(f"failed  {failed}") < out.index(f"done    {done}")
    records = {path: json.loads((path / "run.json").read_text()) for path in (failed, done, tmp_path / "s-sweep")}
    assert [record["status"] for record in records.values()] == ["failed", "done", "done"]
    assert records[tmp_path / "s-sweep"]["notebooks"]["compare"]["compared"] == {
        failed.name: str(failed),
        done.name: str(done),
    }
    states = records[tmp_path / "s-sweep"]["notebooks"]["compare"]["states"]
    assert states[done.name] == "done"
    assert states[failed.name].startswith("failed in 02_train_stage1: ValueError: varnet_weights: ")
    assert "reconstructions; 04_evaluate writes them" in (tmp_path / "s-sweep" / "05_compare_runs.ipynb").read_text()

    assert main(command) == 1
    assert "not finished" in capfd.readouterr().err, "a failed run is not repeated without --resume"
    shutil.rmtree(failed)
    assert main([*command, "-p", "stage1.epochs=2"]) == 1
    assert "was run with stage1.epochs 1, not 2" in capfd.readouterr().err


def test_resume_resumes_unfinished_runs(params, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(sweep, "_mrilib", lambda command: commands.append(command) or 0)
    for epochs, status in ((2, "done"), (3, "failed")):
        folder = tmp_path / f"s-stage1.epochs-{epochs}"
        folder.mkdir()
        values = yaml.safe_load((params / "stage1.yaml").read_text()) | {"epochs": epochs}
        config = Stage1Parameters.create(values).to_dict()
        record = {
            "status": status,
            "started": "2026-01-01",
            "planned": ["stage1"],
            "notebooks": {"stage1": {"config": config}},
        }
        (folder / "run.json").write_text(json.dumps(record))
    command = ["sweep", str(params), "--name", str(tmp_path / "s"), "--stage1-only", "-p", "stage1.epochs=2,3,4"]
    assert main(command) == 1 and not commands
    assert main([*command, "--resume"]) == 0
    assert ["--resume" in command for command in commands] == [True, False, False]
    assert [words[words.index("--name") + 1].rsplit("/", 1)[1] for words in commands] == [
        "s-stage1.epochs-3",
        "s-stage1.epochs-4",
        "s-sweep",
    ]


def test_the_evaluated_methods_are_compared_at_the_end(tmp_path, monkeypatch):
    folder, compared = tmp_path / "params", []
    (folder / "methods").mkdir(parents=True)
    for notebook in ("stage2", "evaluate"):
        (folder / f"{notebook}.yaml").write_text("interactive: false")
    for decoder in ("varnet", "fastmri_unet"):
        (folder / "methods" / f"{decoder}.yaml").write_text(f"decoder: {decoder}")

    def execute(command):
        directory = Path(command[command.index("--name") + 1])
        if directory.name == "s-sweep":
            compared.append((sorted(path.name for path in Path(command[1]).iterdir()), command))
            return 0
        is_done = "unet" not in directory.name
        record = {"status": "done" if is_done else "failed", "started": "2026-01-01", "planned": ["evaluate"]}
        directory.mkdir()
        (directory / "run.json").write_text(json.dumps({**record, "notebooks": {"evaluate": {}}}))
        return 0 if is_done else 1

    monkeypatch.setattr(sweep, "_mrilib", execute)
    assert main(["sweep", str(folder), "--name", str(tmp_path / "s"), "--methods", "all"]) == 1
    ((files, command),) = compared
    assert files == ["compare.yaml", "comparison.yaml"]
    varnet, unet = tmp_path / "s-varnet", tmp_path / "s-fastmri_unet"
    assert command[-1] == f"comparison.runs={sweep.format_value([str(varnet)])}"
    assert command[-3] == f"compare.runs={sweep.format_value([str(unet), str(varnet)])}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "stage1.epochs=1,0"], "epochs"),
        (["-p", "stage1.tokenizer_path=nowhere,elsewhere"], "nowhere"),
        (["-p", "stage2.epochs=1,2"], "stage2"),
        (["-p", "stage1.epochs=1"], "nothing to sweep"),
    ],
)
def test_nothing_starts_if_any_variant_is_wrong(params, tmp_path, capsys, arguments, message):
    assert main(["sweep", str(params), "--name", str(tmp_path / "never"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
