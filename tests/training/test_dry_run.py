"""The dry run predicts the cost of a training and leaves no files."""

import dataclasses
import json
from pathlib import Path

import pytest
import systems
import torch
import yaml

from mrilib.__main__ import main
from mrilib.backbone.nirvana import load_backbone
from mrilib.comparison import full_size
from mrilib.config import ROOT
from mrilib.data.dataset import FastMRIDataset
from mrilib.runs import train
from mrilib.training import dry_run, loop, setup


@pytest.fixture(scope="module")
def stage1(phantom_dir, tmp_path_factory):
    backbone = systems.write_backbone(tmp_path_factory.mktemp("backbone"))
    directory = tmp_path_factory.mktemp("run")
    config = systems.stage1_config(
        phantom_dir, backbone, output_dir=str(directory), save_interval=1, epochs=2, train_control=False
    )
    return config, backbone, directory


def test_report_equals_the_cost_of_a_training(stage1, tmp_path):
    config, _, directory = stage1
    report = dry_run.report(config)
    assert list(directory.iterdir()) == []
    stage = setup.build_stage(config, setup.prepare(config))
    loaders = setup.make_loaders(config)
    history = loop.fit(stage, config, loaders.train, loaders.val, tmp_path)
    assert report.steps_per_epoch == len(history.steps) / 2 and report.epochs == 2
    (final,) = tmp_path.glob("*/stage1_final_model.pt")
    assert report.checkpoint_bytes == pytest.approx(final.stat().st_size, rel=0.02)
    assert report.checkpoints == 5  # best, last, one being written, two kept
    assert report.peak_memory_bytes > 1e8 and report.token_cache_bytes == 0
    assert report.epoch_seconds > report.steps_per_epoch * report.step_seconds > 0
    for fact in ("peak memory", "one epoch", "checkpoints", "free on disk"):
        assert fact in report.text()


def test_report_of_stage2_with_token_cache(stage1, phantom_dir, tmp_path):
    config, backbone, _ = stage1
    dry_run.report(config, keep=tmp_path / "stage1")
    checkpoint = tmp_path / "stage1" / "stage1_checkpoints" / "stage1_final_model.pt"
    stage2 = systems.stage2_config(
        phantom_dir, backbone, checkpoint, output_dir=str(tmp_path / "stage2"), train_control=False,
        masks_per_slice=2, token_cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    report = dry_run.report(stage2)
    assert not (tmp_path / "cache").exists() and list((tmp_path / "stage2").iterdir()) == []
    train.train(stage2)
    written = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert report.token_cache_bytes == pytest.approx(written, rel=0.02)
    assert report.token_cache_seconds > 0 and "token cache" in report.text()


def test_only_the_largest_shape_is_kept(stage1):
    config, _, _ = stage1
    loader = setup.make_loaders(config).train
    dataset = loader.dataset
    assert isinstance(dataset, FastMRIDataset)
    sizes = {dataset[index].kspace.numel() for index in range(len(dataset))}
    dry_run.only_largest(dataset, 2, 3)
    assert len(dataset) == 6
    assert {dataset[index].kspace.numel() for index in range(6)} == {max(sizes)}


def test_dry_run_command(stage1, capsys, tmp_path):
    config, _, _ = stage1
    params = tmp_path / "stage1.yaml"
    params.write_text(yaml.safe_dump(config.to_dict()))
    assert main(["train", str(params), "--stage", "1", "--dry-run", "-p", "batch_size=2"]) == 0
    output = capsys.readouterr().out
    assert "peak memory" in output and "2 slices" in output
    assert list(Path(config.output_dir).iterdir()) == []


def test_random_backbone_loads_and_is_finite(tmp_path):
    settings = tmp_path / "config.json"
    values = json.loads((ROOT / "models/nirvana_1_3B.json").read_text())
    values |= {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 2, "concept_dim": 8, "logit_dim": 4}
    settings.write_text(json.dumps(values))
    full_size.write_random_backbone(settings, tmp_path / "weights.safetensors")
    backbone = load_backbone(settings, tmp_path / "weights.safetensors", torch.bfloat16)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.bfloat16}
    assert torch.isfinite(backbone(torch.arange(9)[None]).logits).all()


def test_full_size_measurements_are_stored_by_parameters(tmp_path, monkeypatch):
    report = dry_run.Report(
        "stage1", "cpu", (4, 16, 320, 320), 10**10, 167.0, 0.5, 60.0, 9, 1500.0, 100, 9 * 10**8, 3, 0, 0.0, 10**11
    )
    measured = []

    def measure(**options):
        measured.append(options)
        return [dataclasses.replace(report, device=options["device"])]

    monkeypatch.setattr(full_size, "measure", measure)
    path = tmp_path / "full_size.json"
    first = full_size.measure_once(path, device="cpu")
    assert full_size.measure_once(path, device="cpu") == first == [report] and measured == [{"device": "cpu"}]
    assert full_size.measure_once(path, device="cuda")[0].device == "cuda" and len(measured) == 2
    (row,) = full_size.table(first).to_dict("records")
    assert row["one step [s]"] == "167.00" and row["peak memory [GB]"] == "10.0"
    assert row["slices × coils × readout × phase"] == "4×16×320×320"


@pytest.mark.fullsize
def test_one_step_of_each_stage_of_params_full_fits_in_24_gb(tmp_path, capsys):
    """Batch 4, 16 coils, 320×320, the 1.3B backbone with random weights: about 10 minutes on two cores."""
    reports = full_size.measure(directory=tmp_path)
    with capsys.disabled():
        print("", *(report.text() for report in reports), sep="\n")
    assert [report.batch for report in reports] == [(4, 16, 320, 320)] * 2
    assert all(report.peak_memory_bytes < 24e9 for report in reports)
    assert list(tmp_path.iterdir()) == []
