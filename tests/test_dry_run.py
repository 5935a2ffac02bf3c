"""The dry run: what it says is what a run then takes, and it leaves nothing behind."""

from pathlib import Path

import pytest
import systems

from mrilib import dry_run, train, training
from mrilib.__main__ import main
from mrilib.data import FastMRIDataset


@pytest.fixture(scope="module")
def stage1(phantom_dir, tmp_path_factory):
    backbone = systems.write_backbone(tmp_path_factory.mktemp("backbone"))
    directory = tmp_path_factory.mktemp("run")
    config = systems.stage1_config(
        phantom_dir, backbone, output_dir=str(directory), save_interval=1, epochs=2, train_control=False
    )
    return config, backbone, directory


def test_it_tells_what_a_run_takes_and_leaves_nothing(stage1, tmp_path):
    config, _, directory = stage1
    report = dry_run.report(config)
    assert list(directory.iterdir()) == []
    stage = next(train.make_stages(config, training.prepare(config)))
    _, *loaders = train.make_loaders(config)
    history = training.fit(stage, config, *loaders, tmp_path)
    assert report.steps_per_epoch == len(history.steps) / 2 and report.epochs == 2
    (final,) = tmp_path.glob("*/stage1_final_model.pt")
    assert report.checkpoint_bytes == pytest.approx(final.stat().st_size, rel=0.02)
    assert report.checkpoints == 5  # best, last, one being written, two kept
    assert report.peak_memory_bytes > 1e8 and report.token_cache_bytes == 0
    assert report.epoch_seconds > report.steps_per_epoch * report.step_seconds > 0
    for fact in ("peak memory", "one epoch", "checkpoints", "free on disk"):
        assert fact in report.text()


def test_stage2_with_its_token_cache(stage1, phantom_dir, tmp_path):
    config, backbone, _ = stage1
    dry_run.report(config, keep=tmp_path / "stage1")
    checkpoint = tmp_path / "stage1" / "stage1_checkpoints" / "stage1_final_model.pt"
    stage2 = systems.stage2_config(
        phantom_dir, backbone, checkpoint, output_dir=str(tmp_path / "stage2"), train_control=False,
        token_cache=True, masks_per_slice=2, token_cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    report = dry_run.report(stage2)
    assert not (tmp_path / "cache").exists() and list((tmp_path / "stage2").iterdir()) == []
    train.train(stage2)
    written = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert report.token_cache_bytes == pytest.approx(written, rel=0.02)
    assert report.token_cache_seconds > 0 and "token cache" in report.text()


def test_the_largest_batch_is_taken(stage1):
    config, _, _ = stage1
    _, loader, _ = train.make_loaders(config)
    dataset = loader.dataset
    assert isinstance(dataset, FastMRIDataset)
    sizes = {dataset[index].kspace.numel() for index in range(len(dataset))}
    dry_run.only_largest(dataset, 2, 3)
    assert len(dataset) == 6
    assert {dataset[index].kspace.numel() for index in range(6)} == {max(sizes)}


def test_the_command(stage1, capsys, tmp_path):
    import yaml

    config, _, _ = stage1
    params = tmp_path / "stage1.yaml"
    params.write_text(yaml.safe_dump(config.to_dict()))
    assert main(["train", str(params), "--stage", "1", "--dry-run", "-p", "batch_size=2"]) == 0
    told = capsys.readouterr().out
    assert "peak memory" in told and "2 slices" in told
    assert list(Path(config.output_dir).iterdir()) == []
