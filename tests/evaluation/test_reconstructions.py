"""Reconstruction files: official scores, the nearest training slice, picked slices."""

import argparse
import json
import logging
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from fastmri import evaluate as official
from made_results import score

from mrilib.data.fastmri_file import Volume, read_volume
from mrilib.evaluation import reconstructions
from mrilib.evaluation.reconstructions import NearestTrainingSlice, evaluate_volumes, write_reconstruction
from mrilib.metrics import image as image_module


def official_means(volumes: list[Volume], folder: Path, scratch: Path) -> dict[str, float]:
    targets = scratch / "targets"
    targets.mkdir()
    for volume in volumes:
        (targets / volume.path.name).symlink_to(volume.path)
    args = argparse.Namespace(target_path=targets, predictions_path=folder, acquisition=None, acceleration=None)
    return official.evaluate(args, "reconstruction_rss").means()


def target_of(volume: Volume) -> np.ndarray:
    with h5py.File(volume.path) as h5:
        return h5["reconstruction_rss"][()]


def noisy(volume: Volume, number: int, shape: tuple[int, int] | None = None) -> np.ndarray:
    """The target with noise that increases with `number`, zero-padded to `shape`."""
    target = target_of(volume)
    rng = np.random.default_rng(number)
    image = np.abs(target + (number + 1) * 0.02 * target.max() * rng.standard_normal(target.shape)).astype(np.float32)
    if shape is None:
        return image
    padded = np.zeros((image.shape[0], *shape), np.float32)
    top, left = (shape[0] - image.shape[1]) // 2, (shape[1] - image.shape[2]) // 2
    padded[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return padded


def test_means_equal_fastmris_evaluate(volumes: list[Volume], tmp_path: Path) -> None:
    assert any(v.image_shape[0] > v.image_shape[1] for v in volumes)  # evaluated in a square alone
    folder = tmp_path / "model" / "4"
    for number, volume in enumerate(volumes):
        write_reconstruction(folder / volume.path.name, noisy(volume, number))
    scores = evaluate_volumes(volumes, folder)
    summary = image_module.summarize(scores)
    expected = official_means(volumes, folder, tmp_path)
    for name in ("ssim", "psnr", "nmse"):
        assert summary[name] == pytest.approx(float(np.squeeze(expected[name.upper()])), rel=1e-6, abs=1e-9)
    assert [s.file for s in scores] == [v.file for v in volumes]
    assert summary["volumes"] == 12 and summary["patients"] == 4
    assert summary["ssim_ci95"][0] <= summary["ssim"] <= summary["ssim_ci95"][1]


def test_predictions_of_other_sizes_are_cropped_as_fastmri_does(volumes: list[Volume], tmp_path: Path) -> None:
    volume = min(volumes, key=lambda v: v.image_shape[1])
    width = volume.image_shape[1]
    image = noisy(volume, 3)
    top = (image.shape[1] - width) // 2
    folder = tmp_path / "predictions"
    for prediction in (noisy(volume, 3, (80, 71)), image[:, top : top + width]):
        write_reconstruction(folder / volume.path.name, prediction)
        (scored,) = evaluate_volumes([volume], folder)
        expected = official_means([volume], folder, tmp_path)
        shutil.rmtree(tmp_path / "targets")
        assert scored.ssim == pytest.approx(float(np.squeeze(expected["SSIM"])), abs=1e-6)
        assert scored.nmse == pytest.approx(float(expected["NMSE"]), rel=1e-6)


def test_missing_and_small_reconstructions_are_errors(volumes: list[Volume], tmp_path: Path) -> None:
    volume = volumes[0]
    with pytest.raises(FileNotFoundError, match=f"no reconstruction {volume.path.name} in"):
        evaluate_volumes([volume], tmp_path)
    image = noisy(volume, 0)
    for small in (image[:2], image[:, :, 1:], image[0]):
        write_reconstruction(tmp_path / volume.path.name, small)
        with pytest.raises(ValueError, match=rf"{volume.path.name}: reconstruction .* does not cover the target"):
            evaluate_volumes([volume], tmp_path)


def test_volumes_without_a_target_are_left_out(volumes: list[Volume], tmp_path: Path) -> None:
    path = tmp_path / volumes[0].path.name
    shutil.copy(volumes[0].path, path)
    with h5py.File(path, "r+") as h5:
        del h5["reconstruction_rss"]
    assert evaluate_volumes([read_volume(path)], tmp_path / "none") == []


def test_submission_format(tmp_path: Path) -> None:
    write_reconstruction(tmp_path / "a" / "b.h5", np.ones((2, 3, 4)))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.h5"]
    with h5py.File(tmp_path / "a" / "b.h5") as h5:
        assert list(h5) == ["reconstruction"]
        assert h5["reconstruction"].dtype == np.float32 and h5["reconstruction"].shape == (2, 3, 4)


def test_exact_and_all_zero_volumes_have_defined_scores(
    volumes: list[Volume], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """fastMRI's PSNR of an exact image is infinite, and its metrics of an all-zero target are not numbers."""
    exact, empty = volumes[:2]
    write_reconstruction(tmp_path / exact.path.name, target_of(exact))
    path = tmp_path / "data" / empty.path.name
    path.parent.mkdir()
    shutil.copy(empty.path, path)
    with h5py.File(path, "r+") as h5:
        h5["kspace"][...] = 0
        h5["reconstruction_rss"][...] = 0
        h5.attrs["max"] = 0.0
    zeros = read_volume(path)
    write_reconstruction(tmp_path / path.name, np.zeros_like(target_of(zeros)))
    with caplog.at_level("WARNING", logger="mrilib"):
        logging.getLogger("mrilib").propagate = True
        (scored,) = evaluate_volumes([exact, zeros], tmp_path)
    assert f"{path.name}: its target is zero everywhere" in caplog.text
    assert scored.file == exact.file and scored.psnr == scored.psnr_head == image_module.EXACT_PSNR
    assert scored.ssim == pytest.approx(1) and scored.nmse == 0
    json.dumps(image_module.summarize([scored]), allow_nan=False)
    with pytest.raises(ValueError, match="zero everywhere"):
        image_module.score_volume(target_of(zeros), target_of(zeros))


def test_volumes_with_a_mask_are_grouped_by_its_acceleration(volumes: list[Volume]) -> None:
    full = volumes[0]
    own4, own6 = (volumes[a]._replace(has_mask=True, acceleration=a) for a in (4, 6))
    assert reconstructions.by_acceleration([full, own4, own6], [8, 4]) == {4: [full, own4], 6: [own6], 8: [full]}
    assert reconstructions.by_acceleration([own6], [8, 4]) == {6: [own6]}
    assert reconstructions.by_acceleration([full], [8]) == {8: [full]}


def test_every_method_and_acceleration_is_scored(volumes: list[Volume], tmp_path: Path) -> None:
    for number, name in enumerate(("model/4", "model/8", "zero_filled/4")):
        write_reconstruction(tmp_path / name / volumes[0].path.name, noisy(volumes[0], number))
    scores = reconstructions.score_reconstructions(tmp_path, volumes[:1])
    assert {a: set(methods) for a, methods in scores.items()} == {"4": {"model", "zero_filled"}, "8": {"model"}}
    assert scores["4"]["model"][0].ssim > scores["8"]["model"][0].ssim
    assert reconstructions.read_slice(tmp_path, "model", 8, volumes[0], 2).shape == volumes[0].image_shape
    assert np.array_equal(reconstructions.read_target(volumes[0], 1), target_of(volumes[0])[1])


@pytest.mark.parametrize(
    ("count", "roles"),
    [(3, ["best", "median", "worst"]), (1, ["best"]), (9, ["best", "rank 2 of 5", "median", "rank 4 of 5", "worst"])],
)
def test_picked_slices_are_ranked(volumes: list[Volume], count: int, roles: list[str]) -> None:
    scores = [score(v.patient, i / 10, file=v.file) for i, v in enumerate(volumes[:5])]
    picked = reconstructions.pick_slices(scores, volumes, count)
    assert [p.role for p in picked] == roles and picked[0].volume.file == volumes[4].file
    assert all(p.slice_num == 1 for p in picked)
    assert [p.role for p in reconstructions.pick_slices(scores[:1], volumes, count)] == ["best"]


# ------------------------------------------------------------------------------------------------- nearest slice


def test_nearest_training_slice_of_a_training_slice_is_itself(volumes: list[Volume]) -> None:
    oracle = NearestTrainingSlice(volumes)
    for volume in volumes[::2]:
        for target in target_of(volume):
            np.testing.assert_allclose(oracle.answer(target), target, rtol=1e-4)
            np.testing.assert_allclose(oracle.answer(3 * target), 3 * target, rtol=1e-4)


def test_nearest_training_slice_is_scaled_to_the_target(volumes: list[Volume]) -> None:
    patients = sorted({v.patient for v in volumes})
    oracle = NearestTrainingSlice([v for v in volumes if v.patient in patients[:2]])
    for volume in volumes:
        if volume.patient not in patients[:2]:
            target = target_of(volume)[1]
            answer = oracle.answer(target)
            assert answer.shape == target.shape and answer.dtype == np.float32
            assert np.sum(answer * (target - answer)) == pytest.approx(0, abs=1e-3 * float(np.sum(target**2)))
            assert np.linalg.norm(answer - target) < 0.7 * np.linalg.norm(target)


@pytest.mark.parametrize("shape", [(50, 40), (64, 90), (100, 50)])
def test_nearest_training_slice_is_cropped_or_padded_to_the_target(
    volumes: list[Volume], shape: tuple[int, int]
) -> None:
    volume = max(volumes, key=lambda v: v.image_shape[1])
    target = reconstructions._crop_or_pad(target_of(volume)[1], shape)
    np.testing.assert_allclose(NearestTrainingSlice([volume]).answer(target), target, rtol=1e-4, atol=1e-12)


def test_nearest_training_slice_needs_targets(volumes: list[Volume]) -> None:
    without = [volume._replace(has_target=False) for volume in volumes]
    with pytest.raises(ValueError, match="needs training volumes with reconstruction_rss"):
        NearestTrainingSlice(without)
    assert len(NearestTrainingSlice([*without[:2], volumes[3]]).places) == 3
