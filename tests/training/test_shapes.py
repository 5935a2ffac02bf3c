"""All shapes of fastMRI brain volumes in both stages and in the evaluation, without NaN."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import systems
import torch
from fastmri import evaluate as official
from heads import as_test_file, write_shape

from mrilib.config import DataParameters, Stage1Parameters
from mrilib.data import check
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.fastmri_file import Volume, read_volume
from mrilib.data.sampler import collate, make_loader
from mrilib.evaluation.reconstructions import by_acceleration, evaluate_volumes, write_reconstruction
from mrilib.metrics.image import summarize
from mrilib.model import two_stage
from mrilib.model.decoders import build_decoder
from mrilib.physics import fourier
from mrilib.training import stages as training

#: coils, (H, W), target, padding, reconSpace's y if not the target's
SHAPES = [
    (2, (512, 260), (256, 256), (0, 0), 0),
    (5, (640, 264), (264, 264), (9, 4), 320),  # narrower than its header says
    (16, (640, 320), (320, 320), (0, 0), 0),
    (20, (640, 322), (320, 320), (31, 30), 0),
    (24, (768, 396), (384, 384), (0, 20), 0),
]
COILS = 6  # after compression; 16 take three times as long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shapes")
    for number, (coils, matrix, image_shape, padding, header_width) in enumerate(SHAPES):
        write_shape(directory / f"file{number}.h5", coils, matrix, image_shape, padding, header_width)
    return directory


@pytest.fixture(scope="module")
def system(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[two_stage.TwoStageModel, Stage1Parameters]:
    backbone = systems.write_backbone(tmp_path_factory.mktemp("backbone"))
    config = systems.stage1_config(folder, backbone, img_size=320, num_coils=COILS, epochs=1)
    model = systems.build(config)
    stage2 = systems.stage2_config(folder, backbone, backbone / "config.json", img_size=320, num_coils=COILS)
    model.decoder = build_decoder(stage2, two_stage.hidden_size(model.backbone))
    return model, config


def volumes_of(folder: Path) -> list[Volume]:
    return [read_volume(path) for path in sorted(folder.glob("*.h5"))]


def test_files_are_valid_with_an_empty_and_a_noise_only_slice(folder: Path) -> None:
    for path in sorted(folder.glob("*.h5")):
        report = check.check_file(path)
        assert report.problems == [] and report.warnings == ["slice 1: all zero", "slice 2: noise only"]


@pytest.mark.parametrize(
    ("number", "crop"), [*((number, "readout") for number in range(len(SHAPES))), (1, "image"), (4, "image")]
)
def test_both_stages_train_on_every_shape(
    folder: Path, system: tuple[two_stage.TwoStageModel, Stage1Parameters], number: int, crop: str
) -> None:
    model, config = system
    config = config.model_copy(update={"crop": crop})
    volume = volumes_of(folder)[number]
    coils, matrix, image_shape, padding, _ = SHAPES[number]
    dataset = FastMRIDataset([volume], config, training=True)
    batch = collate([dataset[index] for index in range(3)])
    if crop == "readout":
        assert batch.kspace.shape == (3, min(coils, COILS), image_shape[0], matrix[1])
        outside = torch.ones(matrix[1], dtype=torch.bool)
        outside[padding[0] : matrix[1] - padding[1]] = False
        assert not batch.mask[:, outside].any() and not batch.kspace[..., outside].any()
        assert batch.acquired is not None and torch.equal(batch.acquired[0], ~outside)
        assert batch.image_shape == image_shape
    else:
        assert batch.kspace.shape == (3, min(coils, COILS), 320, 320) and batch.image_shape == (320, 320)
    stages = {"encoder": training.AnalysisStage(model), "decoder": training.ReconstructionStage(model)}
    for part, stage in stages.items():
        model.freeze(part)
        loss = stage.loss(batch).total
        assert loss.isfinite()
        loss.backward()
        gradients = [p.grad for p in stage.part.parameters() if p.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)
        model.zero_grad()
    with torch.no_grad():
        image = model(batch)
    assert image.shape == (3, *batch.image_shape) and image.isfinite().all()
    assert image[1].max() < 1e-9 * image[0].max()  # an empty slice stays empty


# The limits lie between the losses of 16 coils (norm 0.0327 and 0.0225, peak 0.0184 and 0.0122) and of 15 (0.0373 and
# 0.0257, 0.0202 and 0.0132), so that one direction too few fails.
@pytest.mark.parametrize(("acceleration", "norm", "peak"), [(4, 0.035, 0.0193), (8, 0.024, 0.0127)])
def test_compression_from_24_to_16_coils_keeps_the_rss(
    folder: Path, acceleration: int, norm: float, peak: float
) -> None:
    """Mostly noise of the discarded directions is lost."""
    volume = volumes_of(folder)[4]
    images = []
    for num_coils in (24, 16):
        config = DataParameters.create(
            {"data_dir": str(folder), "num_coils": num_coils, "center_fractions": [0.08, 0.04]}
        )
        item = FastMRIDataset([volume], config, acceleration=acceleration)[0]
        assert item.kspace.shape[0] == num_coils
        images.append(fourier.rss(fourier.ifft2c(item.kspace * item.scale)))
    full, compressed = images
    assert (compressed - full).norm() / full.norm() < norm
    assert (compressed - full).abs().max() / full.max() < peak


def test_metrics_equal_fastmris_on_batches_of_equal_shape(
    folder: Path, system: tuple[two_stage.TwoStageModel, Stage1Parameters], tmp_path: Path
) -> None:
    model, config = system
    volumes = volumes_of(folder)
    dataset = FastMRIDataset(volumes, config, acceleration=8)
    images: dict[str, dict[int, np.ndarray]] = {volume.file: {} for volume in volumes}
    for batch in make_loader(dataset, 2):
        with torch.no_grad():
            for item, image in zip(batch.slices, model(batch), strict=True):
                images[item.file][item.slice_num] = image.numpy()
    for volume in volumes:
        stack = np.stack([images[volume.file][number] for number in range(3)])
        write_reconstruction(tmp_path / volume.path.name, stack)
    ours = summarize(evaluate_volumes(volumes, tmp_path))
    json.dumps(ours, allow_nan=False)
    args = argparse.Namespace(target_path=folder, predictions_path=tmp_path, acquisition=None, acceleration=None)
    theirs = official.evaluate(args, "reconstruction_rss").means()
    for name in ("ssim", "psnr", "nmse"):
        assert ours[name] == pytest.approx(float(np.squeeze(theirs[name.upper()])), rel=1e-6)


@pytest.mark.parametrize("number", [1, 4])
def test_test_files_use_their_own_mask(
    system: tuple[two_stage.TwoStageModel, Stage1Parameters], tmp_path: Path, number: int
) -> None:
    model, config = system
    coils, matrix, image_shape, padding, header_width = SHAPES[number]
    path = write_shape(tmp_path / "test.h5", coils, matrix, image_shape, padding, header_width)
    as_test_file(path, acceleration=6)
    report = check.check_file(path)
    assert report.problems == []
    volume = read_volume(path)
    assert by_acceleration([volume], config.accelerations) == {6: [volume]}
    batch = collate([FastMRIDataset([volume], config)[0]])
    with torch.no_grad():
        image = model(batch)
    assert image.shape == (1, *volume.image_shape) and image.isfinite().all() and batch.slices[0].acceleration == 6
