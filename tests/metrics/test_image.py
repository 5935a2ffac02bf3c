"""Image metrics equal fastMRI's; intervals and standard errors equal a computation by hand."""

import h5py
import numpy as np
import pytest
from made_results import score

from mrilib.data.fastmri_file import Volume
from mrilib.metrics import image as image_module
from mrilib.metrics import text_scores


def target_of(volume: Volume) -> np.ndarray:
    with h5py.File(volume.path) as h5:
        return h5["reconstruction_rss"][()]


def test_background_does_not_count_inside_the_head(volumes: list[Volume]) -> None:
    target = target_of(volumes[0])
    size = min(target.shape[1:])
    target = target[:, (target.shape[1] - size) // 2 :][:, :size]
    target = target[:, :, (target.shape[2] - size) // 2 :][:, :, :size]
    head = image_module.head_mask(target)
    noise = np.random.default_rng(0).standard_normal(target.shape) * np.where(head, 1e-4, 0.05) * target.max()
    noisy = image_module.score_volume(target, np.abs(target + noise).astype(np.float32))
    halved = image_module.score_volume(target, 0.5 * target)
    assert noisy["psnr"] < 40 and noisy["psnr_head"] == pytest.approx(80, abs=0.5)
    assert noisy["ssim"] < 0.9 and noisy["ssim_head"] > 0.98  # SSIM windows at the head's edge contain background
    error = np.mean((target[head] / 2) ** 2)
    assert halved["psnr_head"] == pytest.approx(10 * np.log10(target.max() ** 2 / error), 1e-5)


def test_head_mask_is_one_component_without_holes() -> None:
    y, x = np.mgrid[:60, :50]
    disc = ((y - 30) ** 2 + (x - 25) ** 2 < 20**2).astype(float)
    image = disc.copy()
    image[25:35, 20:30] = 0  # a dark ventricle
    image[2:5, 2:5] = 1  # a bright artefact
    mask = image_module.head_mask(np.stack([image, np.zeros_like(image), image[:, ::-1]]))
    assert mask.dtype == bool and not mask[1].any() and mask[0][30, 25] and not mask[0][3, 3]
    assert (mask[0] != disc.astype(bool)).sum() <= 40
    border = np.zeros((1, 30, 30))
    border[0, :, :20] = 1  # cut by the field of view
    assert np.array_equal(image_module.head_mask(border), border.astype(bool))


def test_head_mask_of_the_phantom_does_not_depend_on_the_unit(volumes: list[Volume]) -> None:
    for volume in volumes[::3]:
        target = target_of(volume)
        head = image_module.head_mask(target)
        assert 0.3 < head.mean() < 0.9
        assert target[head].mean() > 5 * target[~head].mean()
        assert np.array_equal(image_module.head_mask(target * 1e4), head)


def test_bootstrap_resamples_patients() -> None:
    # Two patients, one with a volume at 1 and one with three at 0: the possible means are 1, 1/4 and 0.
    assert image_module.bootstrap_interval([1, 0, 0, 0], ["a", "b", "b", "b"]) == [0, 1]
    rng = np.random.default_rng(0)
    values = rng.standard_normal(400)
    patients = [str(i) for i in range(400)]
    interval = image_module.bootstrap_interval(values, patients)
    error = values.std() / 20
    expected = values.mean() - 1.96 * error, values.mean() + 1.96 * error
    assert interval == pytest.approx(expected, abs=0.25 * error)
    # Copies of a patient's volume add no information.
    copies = image_module.bootstrap_interval(np.repeat(values, 3), np.repeat(patients, 3))
    assert copies == pytest.approx(interval)
    # 50 patients with one volume at 1 and 50 with three at 0 have a mean of 1/4.
    patients = [f"a{i}" for i in range(50)] + [f"b{i // 3}" for i in range(150)]
    low, high = image_module.bootstrap_interval([1] * 50 + [0] * 150, patients)
    assert 0.15 < low < 0.25 < high < 0.36
    assert image_module.bootstrap_interval([0.3, 0.5], ["a", "a"]) is None  # one patient has no spread


def test_bootstrap_of_a_ratio() -> None:
    # The ratios of the resamples of two patients, 2/2 and 1/4, are 1, 3/6 and 1/4; one without weight changes nothing.
    assert image_module.bootstrap_interval([2, 1], ["a", "b"], [2, 4]) == [0.25, 1]
    assert image_module.bootstrap_interval([0, 0, 2], ["a", "b", "c"], [0, 0, 2]) == [1, 1]
    assert image_module.bootstrap_interval([0, 0], ["a", "b"], [0, 0]) is None


def test_bootstrap_depends_on_its_seed_alone() -> None:
    values, patients = np.random.default_rng(0).standard_normal(40), [str(i) for i in range(40)]
    first, again, other = (image_module.bootstrap_interval(values, patients, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_clustered_standard_error() -> None:
    # One value for each patient, weights 1: the ordinary standard error of a mean.
    values = [1.0, 2.0, 4.0, 9.0]
    mean, error = image_module.clustered_mean(values, [1] * 4, list("abcd"))
    assert mean == 4 and error == pytest.approx(np.std(values, ddof=1) / 2)
    # Copies of a patient's slices do not reduce it.
    assert image_module.clustered_mean(values * 5, [1] * 20, list("abcd") * 5) == pytest.approx((mean, error))
    # By hand: sums 6 of 3 tokens and 10 of 7, mean 16/10 = 1.6, residuals 6 − 4.8 and 10 − 11.2, over 10 tokens.
    mean, error = image_module.clustered_mean([2.0, 4.0, 10.0], [1, 2, 7], ["a", "a", "b"])
    assert mean == pytest.approx(1.6) and error == pytest.approx(np.sqrt(2 * (0.12**2 + 0.12**2)))
    assert image_module.clustered_mean([3.0, 5.0], [1, 1], ["a", "a"]) == (4.0, float("inf"))


def test_paired_difference_is_of_the_same_volumes() -> None:
    own, other = ([score(p, s) for p, s in zip("abc", values, strict=True)] for values in ([3, 5, 9], [2, 4, 8]))
    mean, (low, high) = image_module.paired_difference(own, other, "ssim")
    assert mean == low == high == 1


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 48, 37)])
def test_slice_scores_sum_to_the_volume_metrics(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    target = rng.random(shape, dtype=np.float32) * 1e-5
    target[0, 20, 20] = 2e-5  # the maximum lies in the evaluated square
    image = target + 2e-6 * rng.standard_normal(shape, dtype=np.float32)
    slices = [image_module.score_slice(t, r, float(target.max())) for t, r in zip(target, image, strict=True)]
    expected = image_module.score_volume(target, image)
    for name, value in image_module.volume_metrics(slices).items():
        assert value == pytest.approx(expected[name], rel=1e-5)


def test_contrast_floor_is_the_share_of_the_most_frequent_contrast() -> None:
    assert text_scores.contrast_floor({"T1": 30, "T2": 70}) == pytest.approx((0.7, np.sqrt(0.7 * 0.3 / 100)))
