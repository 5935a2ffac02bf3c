"""Metrics are fastMRI's own; intervals and standard errors are what a hand computation gives."""

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


def disturbed(volume: Volume, number: int, shape: tuple[int, int] | None = None) -> np.ndarray:
    target = target_of(volume)
    rng = np.random.default_rng(number)
    image = np.abs(target + (number + 1) * 0.02 * target.max() * rng.standard_normal(target.shape)).astype(np.float32)
    if shape is None:
        return image
    wider = np.zeros((image.shape[0], *shape), np.float32)
    top, left = (shape[0] - image.shape[1]) // 2, (shape[1] - image.shape[2]) // 2
    wider[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return wider


def target_of(volume: Volume) -> np.ndarray:
    with h5py.File(volume.path) as h5:
        return h5["reconstruction_rss"][()]


def test_means_are_those_of_fastmris_evaluate(volumes: list[Volume], tmp_path: Path) -> None:
    assert any(v.image_shape[0] > v.image_shape[1] for v in volumes)  # narrower than high: only a square is evaluated
    folder = tmp_path / "model" / "4"
    for number, volume in enumerate(volumes):
        write_reconstruction(folder / volume.path.name, disturbed(volume, number))
    scores = evaluate_volumes(volumes, folder)
    ours = image_module.summarize(scores, 100)
    theirs = official_means(volumes, folder, tmp_path)
    for name in ("ssim", "psnr", "nmse"):
        assert ours[name] == pytest.approx(float(np.squeeze(theirs[name.upper()])), rel=1e-6, abs=1e-9)
    assert [s.file for s in scores] == [v.file for v in volumes]
    assert ours["volumes"] == 12 and ours["patients"] == 4
    assert ours["ssim_ci95"][0] <= ours["ssim"] <= ours["ssim_ci95"][1]


def test_predictions_of_other_sizes_are_cropped_as_fastmri_does(volumes: list[Volume], tmp_path: Path) -> None:
    volume = min(volumes, key=lambda v: v.image_shape[1])
    width = volume.image_shape[1]
    square = disturbed(volume, 3)
    top = (square.shape[1] - width) // 2
    folder = tmp_path / "predictions"
    for prediction in (disturbed(volume, 3, (80, 71)), square[:, top : top + width]):
        write_reconstruction(folder / volume.path.name, prediction)
        (found,) = evaluate_volumes([volume], folder)
        theirs = official_means([volume], folder, tmp_path)
        shutil.rmtree(tmp_path / "targets")
        assert found.ssim == pytest.approx(float(np.squeeze(theirs["SSIM"])), abs=1e-6)
        assert found.nmse == pytest.approx(float(theirs["NMSE"]), rel=1e-6)


def test_missing_and_misfit_reconstructions_are_named(volumes: list[Volume], tmp_path: Path) -> None:
    volume = volumes[0]
    with pytest.raises(FileNotFoundError, match=f"no reconstruction {volume.path.name} in"):
        evaluate_volumes([volume], tmp_path)
    for misfit in (disturbed(volume, 0)[:2], disturbed(volume, 0)[:, :, 1:], disturbed(volume, 0)[0]):
        write_reconstruction(tmp_path / volume.path.name, misfit)
        with pytest.raises(ValueError, match=rf"{volume.path.name}: reconstruction .* does not cover the target"):
            evaluate_volumes([volume], tmp_path)


def test_volumes_without_a_target_are_left_out(volumes: list[Volume], tmp_path: Path) -> None:
    path = tmp_path / volumes[0].path.name
    shutil.copy(volumes[0].path, path)
    with h5py.File(path, "r+") as h5:
        del h5["reconstruction_rss"]
    assert evaluate_volumes([read_volume(path)], tmp_path / "none") == []


def test_the_submission_format(tmp_path: Path) -> None:
    write_reconstruction(tmp_path / "a" / "b.h5", np.ones((2, 3, 4)))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.h5"]
    with h5py.File(tmp_path / "a" / "b.h5") as h5:
        assert list(h5) == ["reconstruction"]
        assert h5["reconstruction"].dtype == np.float32 and h5["reconstruction"].shape == (2, 3, 4)


def test_inside_the_head_the_background_does_not_count(volumes: list[Volume]) -> None:
    target = target_of(volumes[0])
    size = min(target.shape[1:])
    target = target[:, (target.shape[1] - size) // 2 :][:, :size]
    target = target[:, :, (target.shape[2] - size) // 2 :][:, :, :size]
    head = image_module.head_mask(target)
    outside = np.random.default_rng(0).standard_normal(target.shape) * np.where(head, 1e-4, 0.05) * target.max()
    noisy = image_module.score_volume(target, np.abs(target + outside).astype(np.float32))
    halved = image_module.score_volume(target, 0.5 * target)
    assert noisy["psnr"] < 40 and noisy["psnr_head"] == pytest.approx(80, abs=0.5)
    assert noisy["ssim"] < 0.9 and noisy["ssim_head"] > 0.98  # windows at its edge see the background
    assert halved["psnr_head"] == pytest.approx(
        10 * np.log10(target.max() ** 2 / np.mean((target[head] / 2) ** 2)), 1e-5
    )


def test_head_mask_is_one_filled_part_of_each_slice(volumes: list[Volume]) -> None:
    y, x = np.mgrid[:60, :50]
    disc = ((y - 30) ** 2 + (x - 25) ** 2 < 20**2).astype(float)
    image = disc.copy()
    image[25:35, 20:30] = 0  # a dark ventricle
    image[2:5, 2:5] = 1  # a bright artefact
    mask = image_module.head_mask(np.stack([image, np.zeros_like(image), image[:, ::-1]]))
    assert mask.dtype == bool and not mask[1].any() and mask[0][30, 25] and not mask[0][3, 3]
    assert (mask[0] != disc.astype(bool)).sum() <= 40
    border = np.zeros((1, 30, 30))
    border[0, :, :20] = 1  # cut by the field of view: the closing must not eat the border
    assert np.array_equal(image_module.head_mask(border), border.astype(bool))
    for volume in volumes[::3]:
        target = target_of(volume)
        head = image_module.head_mask(target)
        assert 0.3 < head.mean() < 0.9
        assert target[head].mean() > 5 * target[~head].mean()
        assert np.array_equal(image_module.head_mask(target * 1e4), head)


def test_bootstrap_resamples_patients() -> None:
    # Two patients, one with a volume at 1 and one with three at 0: means are 1, 1/4 (twice as often) and 0.
    low, high = image_module.bootstrap_interval([1, 0, 0, 0], ["a", "b", "b", "b"], 2000)
    assert (low, high) == (0, 1)
    rng = np.random.default_rng(0)
    values = rng.standard_normal(400)
    patients = [str(i) for i in range(400)]
    low, high = image_module.bootstrap_interval(values, patients, 2000)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    # Three copies of each patient's volume tell nothing new.
    assert image_module.bootstrap_interval(np.repeat(values, 3), np.repeat(patients, 3), 2000) == pytest.approx(
        (low, high)
    )
    assert image_module.bootstrap_interval([0.3, 0.5], ["a", "a"]) is None  # one patient has no spread
    # A patient with three volumes counts three times: 50 patients with one at 1 and 50 with three at 0 have mean 1/4.
    low, high = image_module.bootstrap_interval(
        [1] * 50 + [0] * 150, [f"a{i}" for i in range(50)] + [f"b{i // 3}" for i in range(150)]
    )
    assert 0.15 < low < 0.25 < high < 0.36
    low, high = image_module.bootstrap_interval(values, patients, 2000)
    again = image_module.bootstrap_interval(values, patients, 100, seed=1)
    assert again == image_module.bootstrap_interval(values, patients, 100, seed=1) != [low, high]


def test_clustered_standard_error() -> None:
    # One value a patient, weights 1: the plain standard error of a mean.
    values = [1.0, 2.0, 4.0, 9.0]
    mean, error = image_module.clustered_mean(values, [1] * 4, list("abcd"))
    assert mean == 4 and error == pytest.approx(np.std(values, ddof=1) / 2)
    # Copies of a patient's slices do not make it smaller.
    assert image_module.clustered_mean(values * 5, [1] * 20, list("abcd") * 5) == pytest.approx((mean, error))
    # By hand: sums 6 of 3 tokens and 10 of 7, mean 16/10 = 1.6, residuals 6 − 4.8 and 10 − 11.2, over 10 tokens
    mean, error = image_module.clustered_mean([2.0, 4.0, 10.0], [1, 2, 7], ["a", "a", "b"])
    assert mean == pytest.approx(1.6) and error == pytest.approx(np.sqrt(2 * (0.12**2 + 0.12**2)))
    assert image_module.clustered_mean([3.0, 5.0], [1, 1], ["a", "a"]) == (4.0, float("inf"))


def test_paired_difference_is_of_the_same_volumes() -> None:
    own, other = ([score(p, s) for p, s in zip("abc", values, strict=True)] for values in ([3, 5, 9], [2, 4, 8]))
    mean, (low, high) = image_module.paired_difference(own, other, "ssim")
    assert mean == low == high == 1


def test_the_nearest_training_slice_of_a_training_slice_is_itself(volumes: list[Volume]) -> None:
    oracle = NearestTrainingSlice(volumes)
    for volume in volumes[::2]:
        for target in target_of(volume):
            np.testing.assert_allclose(oracle.answer(target), target, rtol=1e-4)
            np.testing.assert_allclose(oracle.answer(3 * target), 3 * target, rtol=1e-4)


def test_the_nearest_training_slice_is_scaled_to_the_target_and_fits_its_grid(volumes: list[Volume]) -> None:
    patients = sorted({v.patient for v in volumes})
    oracle = NearestTrainingSlice([v for v in volumes if v.patient in patients[:2]])
    for volume in volumes:
        if volume.patient not in patients[:2]:
            target = target_of(volume)[1]
            answer = oracle.answer(target)
            assert answer.shape == target.shape and answer.dtype == np.float32
            assert np.sum(answer * (target - answer)) == pytest.approx(0, abs=1e-3 * float(np.sum(target**2)))
            assert np.linalg.norm(answer - target) < 0.7 * np.linalg.norm(target)


def test_what_guessing_the_contrast_gives() -> None:
    assert reconstructions.contrast_floor({"T1": 30, "T2": 70}) == pytest.approx((0.7, np.sqrt(0.7 * 0.3 / 100)))


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


def test_every_method_and_acceleration_is_scored(volumes: list[Volume], tmp_path: Path) -> None:
    for number, name in enumerate(("model/4", "model/8", "zero_filled/4")):
        write_reconstruction(tmp_path / name / volumes[0].path.name, disturbed(volumes[0], number))
    scores = reconstructions.score_reconstructions(tmp_path, volumes[:1])
    assert {a: set(methods) for a, methods in scores.items()} == {"4": {"model", "zero_filled"}, "8": {"model"}}
    assert scores["4"]["model"][0].ssim > scores["8"]["model"][0].ssim
    assert reconstructions.read_slice(tmp_path, "model", 8, volumes[0], 2).shape == volumes[0].image_shape
    assert np.array_equal(reconstructions.read_target(volumes[0], 1), target_of(volumes[0])[1])


def test_perfect_and_empty_volumes_have_defined_scores(
    volumes: list[Volume], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """fastMRI's PSNR of an exact image is infinite, and its metrics of a target of zeros are not numbers."""
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
        (found,) = evaluate_volumes([exact, zeros], tmp_path)
    assert f"{path.name}: its target is zero everywhere" in caplog.text
    assert found.file == exact.file and found.psnr == found.psnr_head == image_module.EXACT_PSNR
    assert found.ssim == pytest.approx(1) and found.nmse == 0
    json.dumps(image_module.summarize([found], 100), allow_nan=False)
    with pytest.raises(ValueError, match="zero everywhere"):
        image_module.score_volume(target_of(zeros), target_of(zeros))


def test_own_masks_are_evaluated_once_at_their_acceleration(volumes: list[Volume]) -> None:
    full, own4, own6 = volumes[0], *(v._replace(has_mask=True, acceleration=a) for v, a in zip(volumes[1:3], (4, 6)))  # noqa: B905
    assert reconstructions.by_acceleration([full, own4, own6], [8, 4]) == {4: [full, own4], 6: [own6], 8: [full]}
    assert reconstructions.by_acceleration([own6], [8, 4]) == {6: [own6]}
    assert reconstructions.by_acceleration([full], [8]) == {8: [full]}


def test_the_nearest_slice_of_another_size_is_cropped_or_padded_not_stretched(
    volumes: list[Volume], tmp_path: Path
) -> None:
    volume = max(volumes, key=lambda v: v.image_shape[1])
    oracle = NearestTrainingSlice([volume])
    target = target_of(volume)[1]
    for shape in ((50, 40), (64, 90), (100, 50)):
        changed = reconstructions._crop_or_pad(target, shape)
        np.testing.assert_allclose(oracle.answer(changed), changed, rtol=1e-4, atol=1e-12)


def test_the_nearest_slice_needs_targets(volumes: list[Volume]) -> None:
    without = [volume._replace(has_target=False) for volume in volumes]
    with pytest.raises(ValueError, match="needs training volumes with reconstruction_rss"):
        NearestTrainingSlice(without)
    assert len(NearestTrainingSlice([*without[:2], volumes[3]]).places) == 3


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 48, 37)])
def test_slice_scores_add_up_to_the_official_metrics_of_the_volume(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    target = rng.random(shape, dtype=np.float32) * 1e-5
    target[0, 20, 20] = 2e-5  # the maximum lies in the square that is evaluated of a volume narrower than high
    image = target + 2e-6 * rng.standard_normal(shape, dtype=np.float32)
    slices = [image_module.score_slice(t, r, float(target.max())) for t, r in zip(target, image, strict=True)]
    whole = image_module.score_volume(target, image)
    for name, value in image_module.volume_metrics(slices).items():
        assert value == pytest.approx(whole[name], rel=1e-5)
