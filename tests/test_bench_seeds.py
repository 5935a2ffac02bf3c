"""The bench's seeds side by side: the same trainings, limits and errors that come through."""

import json
import signal

import pytest
import systems
import yaml

from mrilib import bench, bench_seeds
from mrilib.config import BenchParameters, ParameterError
from mrilib.distributed import TrainingStopped
from mrilib.runs import read_json_lines


@pytest.fixture(scope="module")
def values(phantom_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("params")
    backbone = systems.write_backbone(folder / "backbone")
    common = {"max_val_slices": 2, "center_fractions": [0.16, 0.08], "num_coils": 8, "split_seed": 2}
    one = systems.values(phantom_dir, backbone, **systems.ENCODER, **common)
    two = systems.values(phantom_dir, backbone, **systems.DECODER, **common, train_control=False)
    for name, content in (("stage1", one), ("stage2", two)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return {
        "bench_parts": ["train"],
        "stage1_params": str(folder / "stage1.yaml"),
        "stage2_params": str(folder / "stage2.yaml"),
        "bench_seeds": [3, 5],
        "methods": ["unet", "decoder_alone"],
        "steps": [4, 2],
        "learning_rates": [1e-3, 1e-3],
        "validations": 2,
        "interactive": False,
    }


def test_seeds_side_by_side_are_trained_as_one_after_the_other(values, tmp_path):
    one = bench.Bench(BenchParameters.create({**values, "seeds_at_once": 2, "bench_seconds": 0}), tmp_path / "together")
    assert one.run() == [] and one.untrained(3) == one.untrained(5) == []
    alone = bench.Bench(BenchParameters.create({**values, "bench_seconds": 0}), tmp_path / "alone")
    assert alone.run() == []
    for seed in (3, 5):
        for name, steps in (("unet", 4), ("decoder_alone", 2)):
            folders = [each.directory / f"seed{seed}" / name for each in (one, alone)]
            told, expected = (json.loads((folder / "done.json").read_text()) for folder in folders)
            assert told["steps"] == steps and told["made_with"] == expected["made_with"]
            losses = [
                [step["loss"] for step in read_json_lines(folder / "logs" / f"{name}.jsonl")] for folder in folders
            ]
            assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == steps
            one.trained(name, seed)
    logs = [one.directory / f"seed{seed}" / "train.log" for seed in (3, 5)]
    told = [log.read_text() for log in logs]
    assert all("bench: train unet, seed" in text and text.startswith("==== begun") for text in told)
    assert one.run() == [] and [log.read_text() for log in logs] == told, "what is done needs no process"
    changed = bench.Bench(one.config.model_copy(update={"steps": [4, 3]}), one.directory)
    with pytest.raises(ParameterError, match="decoder_alone was made with other values of steps"):
        changed.run()


def test_when_time_is_over_no_seed_begins_and_one_under_way_stops(values, tmp_path):
    one = bench.Bench(BenchParameters.create({**values, "seeds_at_once": 2, "bench_parts": ["stage1"]}), tmp_path)
    one.config = one.config.model_copy(update={"bench_seeds": [3, 5, 7], "stage1_steps": 2000})
    with pytest.raises(TrainingStopped, match="stage 1, seed 3, stage 1, seed 5, stage 1, seed 7"):
        bench_seeds.train_side_by_side(one, 0.0)
    assert not list(tmp_path.glob("seed*"))
    with pytest.raises(TrainingStopped, match="stage 1, seed 7"):
        bench_seeds.train_side_by_side(one, 1.0)
    assert not (tmp_path / "seed7").exists() and not list(tmp_path.glob("seed*/stage1/stop"))
    for seed in (3, 5):
        assert "left: stage 1, seed" in (tmp_path / f"seed{seed}" / "train.log").read_text()
        assert (tmp_path / f"seed{seed}" / "stage1" / "stage1_checkpoints" / "stage1_resume.pt").exists()


def test_the_end_stops_a_training_under_way_to_be_resumed(values, tmp_path, monkeypatch):
    one = bench.Bench(BenchParameters.create({**values, "bench_seeds": [3], "bench_seconds": 0}), tmp_path)
    fit = bench.training.fit

    def ended(*given, on_step):
        return fit(*given, on_step=lambda step: one.end())

    monkeypatch.setattr(bench.training, "fit", ended)
    assert one.run() == ["train unet, seed 3", "train decoder_alone, seed 3"]
    log = tmp_path / "seed3" / "unet" / "logs" / "unet.jsonl"
    assert len(read_json_lines(log)) == 1 and not (tmp_path / "seed3" / "unet" / "stop").exists()
    monkeypatch.undo()
    assert one.run() == [] and len(read_json_lines(log)) == 4


def test_a_seed_that_fails_says_why_and_ends_the_others(values, tmp_path):
    given = {**values, "seeds_at_once": 2, "bench_parts": ["stage1"], "stage1_steps": 2000}
    one = bench.Bench(BenchParameters.create(given), tmp_path)
    damaged = tmp_path / "seed5" / "stage1" / "stage1_checkpoints" / "stage1_resume.pt"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"no checkpoint")
    with pytest.raises(RuntimeError, match=r"training seed5 failed, .*stage1_resume.*; see '.*train\.log'"):
        one.run()
    assert not (tmp_path / "seed3" / "stage1" / "done.json").exists()


def test_what_someone_stops_is_no_failure(values, tmp_path, monkeypatch):
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({**values, "bench_seeds": [3]}))

    def stopped(self, name, seed):
        raise TrainingStopped("unet was stopped")

    monkeypatch.setattr(bench.Bench, "train_method", stopped)
    monkeypatch.setattr(bench_seeds.signal, "signal", lambda *given: None)
    with pytest.raises(SystemExit, match="stopped: unet was stopped"):
        bench_seeds.main(str(path), str(tmp_path))
    (tmp_path / "train.log").write_text("==== begun before\nleft: old\n==== begun now\nstopped: unet was stopped\n")
    with pytest.raises(TrainingStopped, match="unet was stopped"):
        bench_seeds._told(tmp_path, 1)
    assert bench_seeds._told(tmp_path, 0) == []


def test_a_process_asked_to_end_saves_and_tells_what_is_left(values, tmp_path, monkeypatch, capsys):
    handlers = {}
    monkeypatch.setattr(bench_seeds.signal, "signal", lambda number, handler: handlers.update({number: handler}))
    begun = []

    def train(self, name, seed):
        begun.append(name)
        handlers[signal.SIGTERM](signal.SIGTERM, None)
        raise TrainingStopped(name)

    monkeypatch.setattr(bench.Bench, "train_method", train)
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({**values, "bench_seeds": [3]}))
    bench_seeds.main(str(path), str(tmp_path))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left: ")]
    assert begun == ["unet"] and told == ["left: train unet, seed 3", "left: train decoder_alone, seed 3"]
