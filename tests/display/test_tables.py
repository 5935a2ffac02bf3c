"""Tables and texts of the notebooks."""

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
from mrilib.display.tables import marked_text, model_card, parameter_table
from mrilib.model.baselines import VarNetBaseline
from mrilib.model.two_stage import TwoStageModel


def test_each_part_of_the_encoder_has_its_own_row(phantom_dir, tmp_path):
    config = systems.stage1_config(phantom_dir, systems.write_backbone(tmp_path))
    with_maps = systems.build(config.model_copy(update={"finding_labels": ["Mass"]}))
    table, short = (
        parameter_table(system)["parameters"].str.replace(",", "").astype(int)
        for system in (with_maps, systems.build(config))
    )
    parts = table[[name for name in table.index if name.startswith("encoder: ")]]
    assert parts.sum() == table["encoder"] == sum(p.numel() for p in with_maps.encoder.parameters())
    assert set(table.index) - set(short.index) == {"encoder: maps of findings"}
    assert short["encoder: VarNet"] == parts["encoder: VarNet"]


def test_a_varnet_as_decoder_has_one_row():
    table = parameter_table(TwoStageModel(decoder=VarNetBaseline(num_cascades=1, chans=2, pools=2)))
    assert list(table.index) == ["decoder"]


@pytest.mark.parametrize(
    ("true", "generated", "marked"),
    [
        ("Findings: mass, left anterior.", "Findings: mass, left anterior.", "Findings: mass, left anterior."),
        (
            "Findings: extra-axial mass, left anterior.",
            "Findings: extra-axial mass, left anterior; mass, left anterior.",
            "Findings: extra-axial mass, left anterior; <b>mass, left anterior</b>.",
        ),
        (
            "Findings: mass, left anterior; edema, left central.",
            "Findings: none.",
            "Findings: <b>none</b>. <i>(missed: mass, left anterior; edema, left central)</i>",
        ),
        ("Findings: mass, left anterior.", "", "<i>(missed: mass, left anterior)</i>"),
        ("Findings: none.", "", "<i>(missed: none)</i>"),
        ("", "Findings: mass, left anterior.", "Findings: mass, left anterior."),
        (
            "Findings: none.",
            "Findings: none. Whole study: motion artifact.",
            "Findings: none. Whole study: <b>motion artifact</b>.",
        ),
        (
            "Findings: none.",
            "Findings: edema, left central; edema, left central.",
            "Findings: <b>edema, left central</b>; <b>edema, left central</b>.",
        ),
    ],
)
def test_wrong_facts_are_marked(true, generated, marked):
    start = "Axial T1 image, upper third of the brain."
    assert marked_text(f"{start} {true}".strip(), f"{start} {generated}".strip()) == f"{start} {marked}"


@pytest.mark.parametrize(
    ("generated", "marked"),
    [
        ("Axial T2 image, upper third of the brain.", "Axial <b>T2</b> image, upper third of the brain."),
        ("Rubbish <", "<b>Rubbish &lt;</b>"),
    ],
)
def test_a_wrong_contrast_and_a_text_that_is_no_analysis_are_marked(generated, marked):
    assert marked_text("Axial T1 image, upper third of the brain.", generated) == marked


def card_rows(config, volumes, stage1=None):
    """Return the rows "Data" and "Not for" of a model card."""
    parts = SimpleNamespace(encoder=torch.nn.Identity(), backbone=torch.nn.Identity(), decoder=torch.nn.Identity())
    stage1 = stage1 or Stage1Parameters.model_construct(**config)
    stage2 = Stage2Parameters.model_construct(**config)
    text = model_card(parts, EvaluateParameters.model_construct(**config), stage1, stage2, volumes)
    rows = {line.split("|")[1].strip(" *"): line.split("|")[2].strip() for line in text.strip().splitlines()}
    return rows["Data"], rows["Not for"]


def split_of(volumes, **others):
    patients = sorted({volume.patient for volume in volumes})
    parts = {"train": patients[:2], "val": patients[2:3], "test": patients[3:]}
    return {name: [v for v in volumes if v.patient in members] for name, members in parts.items()} | others


@pytest.fixture(scope="module")
def real_heads(tmp_path_factory) -> Path:
    """A folder with a head that is no phantom."""
    folder = tmp_path_factory.mktemp("heads")
    heads.write_head(folder / "file_full.h5")
    return folder


def code(path):
    """Escape a path as the card does."""
    return "<code>" + "".join(f"&#{ord(c)};" if c in "\\`*_{}[]<>()#+!|$&~\"'" else c for c in str(path)) + "</code>"


def test_the_card_describes_a_split_of_one_folder(volumes, phantom_dir):
    data, not_for = card_rows({"data_dir": str(phantom_dir), "split_seed": 3}, split_of(volumes))
    assert f"training: 2 patients of {code(phantom_dir)}" in data
    source = "of the same folder, split by patient (split_seed 3)"
    assert f"validation: 1 patient {source}" in data and f"test: 1 patient {source}" in data
    assert (
        "The training, validation and test patients are a phantom" in not_for and "say nothing of patients" in not_for
    )


def test_the_card_names_separate_folders(volumes, phantom_dir, real_heads):
    config = {"data_dir": str(phantom_dir), "test_dir": str(real_heads), "val_dir": "elsewhere"}
    data, not_for = card_rows(config, split_of(volumes, test=index_volumes(real_heads)))
    assert f"test: 1 patient of {code(real_heads)} (test_dir, a separate folder)" in data
    assert "validation: 1 patient of <code>elsewhere</code> (val_dir, a separate folder)" in data
    assert "split by patient" not in data
    assert "The training and validation patients are a phantom" in not_for and "say nothing" not in not_for


def test_the_card_recognises_the_phantoms_files(volumes, phantom_dir, real_heads, tmp_path):
    real = dict.fromkeys(("train", "val", "test"), index_volumes(real_heads))
    assert "phantom" not in card_rows({"data_dir": str(phantom_dir)}, real)[1]
    shutil.copy(volumes[0].path, tmp_path / volumes[0].path.name)  # without the phantom's parameter file
    _, not_for = card_rows({"data_dir": "elsewhere"}, real | {"test": index_volumes(tmp_path)})
    assert "The test patients are a phantom" in not_for and "say nothing of patients" in not_for


def test_the_card_names_stages_that_were_trained_with_another_split(volumes, phantom_dir):
    config = {"data_dir": str(phantom_dir), "test_dir": "elsewhere"}
    stage1 = Stage1Parameters.model_construct(data_dir="first", split_seed=5)
    data, _ = card_rows(config, split_of(volumes), stage1)
    assert "stage 1 was trained with another split: data_dir <code>first</code>" in data
    assert "split_seed <code>5</code>" in data
    assert "stage 2" not in data


def test_the_phantom_attribute_reaches_no_input(volumes, phantom_dir, backbone_dir, tmp_path):
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
