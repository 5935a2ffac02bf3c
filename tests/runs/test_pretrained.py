"""Exported models: they reconstruct as their run does, and damaged or foreign folders are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from made_results import volume_scores
from refusals import assert_refused
from safetensors.torch import load_file, save_file

import mrilib
from mrilib.__main__ import main
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.sampler import make_loader
from mrilib.evaluation.reconstructions import summarize_methods
from mrilib.metrics.image import score_volume
from mrilib.runs import reconstruct
from mrilib.training.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory) -> Path:
    """The run, with metrics."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("evaluated") / "small")
    scores = {"4": {"model": volume_scores(0.8), "zero_filled": volume_scores(0.5)}}
    analysis = {"contrast_accuracy": 0.5, "finding_f1": None, "reviewed_samples": 6, "clean_slices": 0}
    analysis |= {"findings_true": 5, "findings_missed": 2, "findings_invented": 1, "clean_slices_with_invented": 0}
    metrics = {"reconstruction": summarize_methods(scores), "analysis": analysis}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture(scope="module")
def folder(evaluated, tmp_path_factory) -> Path:
    """The exported model."""
    path = tmp_path_factory.mktemp("models") / "small"
    assert main(["export", str(evaluated), str(path)]) == 0
    return path


def test_an_exported_model_reconstructs_as_its_run(folder, evaluated, volumes):
    (exported, config), (trained, own) = mrilib.from_pretrained(folder), reconstruct.load_run(evaluated)
    for name in ("num_coils", "img_size", "accelerations", "center_fractions", "mask_type", "crop"):
        assert getattr(config, name) == getattr(own, name)
    assert not exported.training and not any(parameter.requires_grad for parameter in exported.parameters())
    batch = next(iter(make_loader(FastMRIDataset(volumes[:1], config, acceleration=4), 2)))
    with torch.no_grad():
        images = [model(batch).numpy() for model in (trained, exported)]
    assert score_volume(*images)["ssim"] > 0.99  # weights rounded to bfloat16
    weights = trained.decoder.state_dict()
    assert all(
        torch.equal(value, weights[name].bfloat16())
        for name, value in load_file(folder / "decoder.safetensors").items()
    )


def test_the_model_card_has_the_scores_of_the_run(folder):
    card = (folder / "README.md").read_text()
    assert "| 4x | 0.835 | 23.5 | 0.535 | 23.5 |" in card and "Not a medical device" in card


def test_reconstruct_accepts_an_exported_model(folder, volumes, tmp_path, capsys):
    assert main(["reconstruct", str(folder), str(volumes[0].path), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (
        "SSIM" in printed
        and "missed 2 of 5 findings and invented 1" in printed
        and (tmp_path / volumes[0].path.name).is_file()
    )


def test_export_refuses_other_folders_and_unevaluated_runs(evaluated, tmp_path, capsys):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("x")
    assert_refused(["export", str(evaluated), str(tmp_path / "own")], ("own", "is not an exported model"), capsys)
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["thesis.tex"]
    record = json.loads((evaluated / "run.json").read_text())
    record["notebooks"]["evaluate"]["status"] = "failed"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert_refused(["export", str(tmp_path / "run"), str(tmp_path / "new")], ("was not evaluated",), capsys)
    assert not (tmp_path / "new").exists()


def test_damaged_and_missing_files_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="is not an exported model"):
        mrilib.from_pretrained(tmp_path)
    copied = shutil.copytree(folder, tmp_path / "copy")
    (copied / "encoder.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"encoder.safetensors' cannot be read"):
        mrilib.from_pretrained(copied)
    state = load_file(folder / "encoder.safetensors")
    state.pop(next(iter(state)))
    save_file(state, copied / "encoder.safetensors")
    with pytest.raises(CheckpointError, match="does not fit the model: missing"):
        mrilib.from_pretrained(copied)
    content = json.loads((folder / "config.json").read_text())
    for change, words in (({"format": 0}, "format 1"), ({"backbone": "other"}, "another backbone")):
        copied = shutil.copytree(folder, tmp_path / words)
        (copied / "config.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(CheckpointError, match=words):
            mrilib.from_pretrained(copied)
