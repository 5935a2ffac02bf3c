"""The bench's seeds side by side: the same trainings, limits and errors that come through."""

import json
import signal

import pytest
import systems
import yaml

from mrilib import bench, bench_seeds
from mrilib.config import BenchParameters
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
    together = BenchParameters.create({**values, "seeds_at_once": 2, "bench_seconds": 1})
    one = bench.Bench(together, tmp_path / "together")
    assert one.run() == ["train the seeds"], "their time is over before they have begun"
    one.config = one.config.model_copy(update={"bench_seconds": 0})
    assert one.run() == []
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
    assert not list(one.directory.glob("seed*/*/stop"))


def test_a_seed_that_fails_says_why_and_ends_the_others(values, tmp_path):
    one = bench.Bench(BenchParameters.create({**values, "seeds_at_once": 2}), tmp_path)
    (tmp_path / "seed5" / "unet").mkdir(parents=True)
    (tmp_path / "seed5" / "unet" / "done.json").write_text(json.dumps({"made_with": {"steps": 7}}))
    with pytest.raises(RuntimeError, match=r"training seed 5 failed, .*unet was made with other values of.*train\.log"):
        one.run()
    assert not (tmp_path / "seed3" / "decoder_alone" / "done.json").exists()


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
