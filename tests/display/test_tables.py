"""Tables that the notebooks show."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import heads
import pytest
import systems
import torch

from mrilib.config import EvaluateParameters, Stage1Parameters, Stage2Parameters
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.splits import index_volumes
from mrilib.display.tables import model_card, parameter_table


def test_each_part_of_the_encoder_has_its_own_row(phantom_dir, tmp_path):
    backbone = systems.write_backbone(tmp_path)
    config = systems.stage1_config(phantom_dir, backbone)
    added = {"finding_labels": ["Mass"]}
    plain, system = (systems.build(config.model_copy(update=update)) for update in ({}, added))
    table, short = (parameter_table(one)["parameters"].str.replace(",", "").astype(int) for one in (system, plain))
    parts = table[[name for name in table.index if name.startswith("encoder: ")]]
    assert parts.sum() == table["encoder"] == sum(p.numel() for p in system.encoder.parameters())
    assert set(table.index) - set(short.index) == {"encoder: maps of findings"}
    assert short["encoder: VarNet"] == parts["encoder: VarNet"]


def card(config, volumes, stage1=None, stage2=None):
    """The model card of a system that is none: its data's row and what it is not for."""
    parts = SimpleNamespace(encoder=torch.nn.Identity(), backbone=torch.nn.Identity(), decoder=torch.nn.Identity())
    stages = [cls.model_construct(**config) for cls in (Stage1Parameters, Stage2Parameters)]
    stages = [given or made for given, made in zip((stage1, stage2), stages, strict=True)]
    text = model_card(parts, EvaluateParameters.model_construct(**config), *stages, volumes)
    rows = {line.split("|")[1].strip(" *"): line.split("|")[2].strip() for line in text.strip().splitlines()}
    return rows["Data"], rows["Not for"]


def split_of(volumes, **others):
    patients = sorted({volume.patient for volume in volumes})
    parts = {"train": patients[:2], "val": patients[2:3], "test": patients[3:]}
    return {name: [v for v in volumes if v.patient in of] for name, of in parts.items()} | others


@pytest.fixture(scope="module")
def heads_of_others(tmp_path_factory) -> Path:
    """A folder with a head that is no phantom."""
    folder = tmp_path_factory.mktemp("heads")
    heads.write_head(folder / "file_full.h5")
    return folder


def code(path):
    """A path as the card shows it."""
    return "<code>" + "".join(f"&#{ord(c)};" if c in "\\`*_{}[]<>()#+!|$&~\"'" else c for c in str(path)) + "</code>"


def test_the_card_tells_a_split_of_one_folder(volumes, phantom_dir):
    data, not_for = card({"data_dir": str(phantom_dir), "split_seed": 3}, split_of(volumes))
    assert f"training: 2 patients of {code(phantom_dir)}" in data
    apart = "of the same folder, set apart by patient (split_seed 3)"
    assert f"validation: 1 patient {apart}" in data and f"test: 1 patient {apart}" in data
    assert (
        "The training, validation and test patients are a phantom" in not_for and "say nothing of patients" in not_for
    )


def test_the_card_names_the_folders_that_were_given(volumes, phantom_dir, heads_of_others):
    config = {"data_dir": str(phantom_dir), "test_dir": str(heads_of_others), "val_dir": "elsewhere"}
    data, not_for = card(config, split_of(volumes, test=index_volumes(heads_of_others)))
    assert f"test: 1 patient of {code(heads_of_others)} (test_dir, a folder of its own)" in data
    assert "validation: 1 patient of <code>elsewhere</code> (val_dir, a folder of its own)" in data
    assert "set apart" not in data
    # the heads are real
    assert "The training and validation patients are a phantom" in not_for and "say nothing" not in not_for


def test_the_card_calls_only_the_phantoms_files_a_phantom(volumes, phantom_dir, heads_of_others, tmp_path):
    real = dict.fromkeys(("train", "val", "test"), index_volumes(heads_of_others))
    assert "phantom" not in card({"data_dir": str(phantom_dir)}, real)[1]
    copied = tmp_path / volumes[0].path.name  # without the note that lies beside the original
    shutil.copy(volumes[0].path, copied)
    _, not_for = card({"data_dir": "elsewhere"}, real | {"test": index_volumes(tmp_path)})
    assert "The test patients are a phantom" in not_for and "say nothing of patients" in not_for


def test_the_card_says_where_training_was_on_another_split(volumes, phantom_dir):
    config = {"data_dir": str(phantom_dir), "test_dir": "elsewhere"}
    stage1 = Stage1Parameters.model_construct(data_dir="first", split_seed=5)
    data, _ = card(config, split_of(volumes), stage1)
    assert "stage 1 was trained with another split: data_dir <code>first</code>" in data
    assert "split_seed <code>5</code>" in data
    assert "stage 2" not in data


def test_the_phantoms_mark_reaches_no_input(volumes, phantom_dir, backbone_dir, tmp_path):
    path = tmp_path / volumes[0].path.name
    shutil.copy(volumes[0].path, path)
    with h5py.File(path, "r+") as h5:
        assert "ICBM 152" in h5.attrs["phantom"]
        del h5.attrs["phantom"]
    config = systems.stage1_config(phantom_dir, backbone_dir)
    (marked, unmarked) = (FastMRIDataset(index_volumes(folder)[:1], config)[1] for folder in (phantom_dir, tmp_path))
    for name, value in marked._asdict().items():
        other = getattr(unmarked, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
