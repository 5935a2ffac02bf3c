"""Physics: agreement with fastMRI, unitarity, adjointness, coil compression, SENSE, finite gradients."""

import fastmri
import numpy as np
import pytest
import torch
from fastmri.data.subsample import MaskFunc
from fastmri.data.transforms import apply_mask, center_crop
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mrilib.config import ParameterError
from mrilib.physics import fourier, masks, sense
from mrilib.physics.coils import center_coil_maps, combine, compress_coils, expand, remove_background_phase

sizes = st.integers(1, 19)
seeds = st.integers(0, 2**31)
quick = settings(max_examples=25, deadline=None)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def dot(a: Tensor, b: Tensor) -> complex:
    return complex((a.conj() * b).sum())


# ------------------------------------------------------------------------------------------------- Fourier


@quick
@given(sizes, sizes, seeds)
def test_fft2c_equals_fastmri_and_is_unitary(height: int, width: int, seed: int) -> None:
    image = noise(3, height, width, seed=seed)
    spectrum = fourier.fft2c(image)
    expected = torch.view_as_complex(fastmri.fft2c(torch.view_as_real(image)))
    torch.testing.assert_close(spectrum, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spectrum.norm(), image.norm())
    torch.testing.assert_close(fourier.ifft2c(spectrum), image)
    other = noise(3, height, width, seed=seed + 1)
    assert dot(fourier.fft2c(image), other) == pytest.approx(dot(image, fourier.ifft2c(other)), abs=1e-3)


def test_centre_of_kspace_is_the_mean() -> None:
    for shape in ((8, 6), (7, 5), (1, 9)):
        spectrum = fourier.fft2c(torch.ones(*shape, dtype=torch.complex64))
        assert spectrum[shape[0] // 2, shape[1] // 2].real == pytest.approx((shape[0] * shape[1]) ** 0.5)
        spectrum[shape[0] // 2, shape[1] // 2] = 0
        assert spectrum.abs().max() < 1e-5


def test_fft_stays_in_float32_under_autocast() -> None:
    image = noise(2, 7, 10)
    with torch.autocast("cpu", torch.bfloat16):
        spectrum, back = fourier.fft2c(image), fourier.ifft2c(fourier.fft2c(image))
    assert spectrum.dtype == torch.complex64
    torch.testing.assert_close(back, image)


def test_rss_equals_fastmri_and_has_a_finite_gradient_at_zero() -> None:
    images = noise(2, 5, 7, 4)
    torch.testing.assert_close(fourier.rss(images), fastmri.rss_complex(torch.view_as_real(images), dim=1))
    images[:, :, 3, 2] = 0
    images.requires_grad_()
    value = fourier.rss(images)
    assert (value[:, 3, 2] < 1e-18).all() and value.isfinite().all()
    value.sum().backward()
    assert images.grad is not None and torch.view_as_real(images.grad).isfinite().all()
    torch.testing.assert_close(images.grad[:, 0, 0, 0], (images / fourier.rss(images)[:, None])[:, 0, 0, 0].detach())


# ------------------------------------------------------------------------------------------------- crops


@quick
@given(sizes, sizes, sizes, sizes)
def test_crop_equals_fastmri_and_inverts_padding(height: int, width: int, new_height: int, new_width: int) -> None:
    image = torch.arange(2 * height * width).reshape(2, height, width)
    changed = fourier.center_crop_or_pad(image, (new_height, new_width))
    assert changed.shape == (2, new_height, new_width)
    if new_height <= height and new_width <= width:
        assert torch.equal(changed, center_crop(image, (new_height, new_width)))
    if new_height >= height and new_width >= width:
        assert torch.equal(fourier.center_crop_or_pad(changed, (height, width)), image)
        assert changed.sum() == image.sum()


def test_padding_keeps_the_centre_pixel_of_even_sizes() -> None:
    image = torch.zeros(6, 8)
    image[3, 4] = 1
    assert fourier.center_crop_or_pad(image, (12, 10))[6, 5] == 1


@pytest.mark.parametrize(("height", "width", "readout"), [(16, 7, 8), (14, 5, 7), (9, 4, 9), (13, 6, 8)])
def test_readout_oversampling_is_cropped_in_image_space(height: int, width: int, readout: int) -> None:
    image = noise(3, height, width)
    cropped = fourier.remove_readout_oversampling(fourier.fft2c(image), readout)
    assert cropped.shape == (3, readout, width)
    torch.testing.assert_close(fourier.ifft2c(cropped), fourier.center_crop_or_pad(image, (readout, width)))


def test_readout_crop_treats_lines_independently() -> None:
    full = noise(2, 12, 9)
    other = full.clone()
    other[..., 4] = torch.nan
    before, after = (fourier.remove_readout_oversampling(x, 6) for x in (full, other))
    rest = [line for line in range(9) if line != 4]
    assert torch.equal(before[..., rest], after[..., rest])
    masked = full * (torch.arange(9) % 2 == 0)
    torch.testing.assert_close(fourier.remove_readout_oversampling(masked, 6), before * (torch.arange(9) % 2 == 0))


# ------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("mask_type", masks.MASK_CLASSES)
@pytest.mark.parametrize("width", [96, 61])
def test_masks_equal_fastmri(mask_type: str, width: int) -> None:
    ours, theirs = (masks.make_mask_func(mask_type, [0.08, 0.04], [4, 8]) for _ in range(2))
    data = torch.view_as_real(noise(2, 6, width))
    drawn = set()
    for number in range(12):
        seed = number if number % 2 else masks.validation_seed(f"file_brain_{number}.h5")
        padding = [(0, width), (3, width - 5)][number % 3 == 0]
        mask, acceleration = masks.sample_mask(ours, width, seed, padding)
        masked, expected, _ = apply_mask(data, theirs, seed=seed, padding=padding)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, expected.reshape(-1) > 0)
        assert torch.equal(torch.where(mask, torch.view_as_complex(data), 0), torch.view_as_complex(masked))
        assert not mask[: padding[0]].any() and not mask[padding[1] :].any()
        drawn.add(acceleration)
    assert drawn == {4, 8}


@pytest.mark.parametrize("mask_type", ["random", "equispaced_fraction", "magic_fraction"])
def test_reported_acceleration_is_the_drawn_one(mask_type: str) -> None:
    func = masks.make_mask_func(mask_type, [0.08, 0.04], [4, 8])
    width = 320
    shares: dict[int, list[float]] = {4: [], 8: []}
    for seed in range(40):
        mask, acceleration = masks.sample_mask(func, width, seed, (0, width))
        shares[acceleration].append(mask.float().mean().item())
        start, stop = masks.center_lines(mask)
        # 0.08 and 0.04 of 320 are 26 and 13 lines; sampled neighbours can lengthen the block
        assert stop - start >= (25 if acceleration == 4 else 13)
    assert np.mean(shares[4]) == pytest.approx(1 / 4, rel=0.1)
    assert np.mean(shares[8]) == pytest.approx(1 / 8, rel=0.1)


@pytest.mark.parametrize("mask_type", masks.MASK_CLASSES)
def test_check_mask_refuses_exactly_the_impossible_masks(mask_type: str) -> None:
    for width in (61, 96, 260, 396):
        for acceleration in (1, 4, 16):
            for product in (0.3, 0.9, 1.0, 1.1):
                pair = (product / acceleration, acceleration)
                if pair[0] > 1:
                    continue
                func = masks.make_mask_func(mask_type, [pair[0]], [acceleration])
                try:
                    masks.sample_mask(func, width, 3, (0, width))
                except (ZeroDivisionError, ValueError):
                    with pytest.raises(ValueError, match=rf"center_fractions {pair[0]:g} with accelerations "):
                        masks.check_mask(mask_type, *pair, width)
                else:
                    masks.check_mask(mask_type, *pair, width)


class EveryOtherLine(MaskFunc):
    """Every other line, whatever the acceleration."""

    def calculate_acceleration_mask(self, num_cols, acceleration, offset, num_low_frequencies):
        return np.arange(num_cols) % 2


def test_a_custom_mask_is_an_entry_of_mask_classes(monkeypatch) -> None:
    monkeypatch.setitem(masks.MASK_CLASSES, "every_other", EveryOtherLine)
    mask, acceleration = masks.sample_mask(masks.make_mask_func("every_other", [0.1], [2]), 20, 0, (0, 20))
    assert mask.tolist() == [line % 2 == 1 or line in (9, 10) for line in range(20)] and acceleration == 2
    with pytest.raises(ParameterError, match=r"mask_type: 'poisson' is not known; there are random.*, every_other"):
        masks.make_mask_func("poisson", [0.1], [2])


def test_sample_mask_preserves_the_random_state() -> None:
    func = masks.make_mask_func("random", [0.1], [3])
    before = func.rng.get_state()[1].copy()
    masks.sample_mask(func, 50, 3, (0, 50))
    assert np.array_equal(before, func.rng.get_state()[1])


def test_training_seed_depends_on_every_argument() -> None:
    base = (0, "file_brain_1", 2, 3)
    others = [(1, *base[1:]), (0, "file_brain_2", 2, 3), (0, "file_brain_1", 3, 2), (0, "file_brain_1", 2, 4)]
    assert masks.training_seed(*base) == masks.training_seed(*base)
    assert len({masks.training_seed(*one) for one in [base, *others]}) == 5
    assert all(0 <= masks.training_seed(*one) < 2**32 for one in others)
    assert masks.validation_seed("ab.h5") == (97, 98, 46, 104, 53)


@quick
@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_center_lines_are_sampled_symmetric_and_longest(sampled: list[bool]) -> None:
    start, stop = masks.center_lines(torch.tensor(sampled))
    center = len(sampled) // 2
    assert all(sampled[start:stop]) and (start != stop) == sampled[center]
    if start != stop:
        assert center - start == stop - 1 - center
        outside = [start - 1, stop]
        assert min(outside) < 0 or max(outside) >= len(sampled) or not all(sampled[i] for i in outside)


# ------------------------------------------------------------------------------------------------- coils


def test_coil_maps_have_unit_rss_and_use_centre_lines_only() -> None:
    full = fourier.fft2c(noise(2, 5, 12, 15))
    mask = torch.zeros(2, 15, dtype=torch.bool)
    mask[0, 5:10] = mask[1, 7] = True
    mask[:, 1] = mask[0, 4] = True  # line 4 lies outside the symmetric block
    masked = torch.where(mask[:, None, None], full, 0)
    maps = center_coil_maps(masked, mask)
    assert maps.shape == full.shape and maps.dtype == torch.complex64
    torch.testing.assert_close(fourier.rss(maps), torch.ones(2, 12, 15))
    masked[..., 1] = 7  # outside the centre block
    masked[0, ..., 4] = 7
    assert torch.equal(center_coil_maps(masked, mask), maps)


def test_coil_maps_recover_smooth_sensitivities() -> None:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 48), torch.linspace(-1, 1, 45), indexing="ij")
    true = torch.stack(
        [torch.exp(1j * a) * (1 + 0.4 * torch.cos(b + x + 0.5 * y)) for a, b in [(x, 0), (y, 1), (x, 2)]]
    )
    true = true / fourier.rss(true)
    image = (torch.exp(-3 * (x**2 + y**2)) + 0.1).to(torch.complex64)
    mask = (torch.arange(45) - 22).abs() <= 6
    maps = center_coil_maps((fourier.fft2c(true * image) * mask)[None], mask[None])[0]
    # up to a phase common to all coils
    agreement = (maps.conj() * true).sum(0).abs()
    assert agreement[6:-6, 6:-6].min() > 0.99


@pytest.mark.parametrize("sampled", [False, True])
def test_coil_maps_of_zeros_are_zero(sampled: bool) -> None:
    zeros, mask = torch.zeros(1, 3, 6, 7, dtype=torch.complex64), torch.full((1, 7), sampled)
    maps = center_coil_maps(zeros, mask)
    assert torch.equal(maps, zeros)
    images = sense.data_consistency(torch.zeros(1, 6, 7, dtype=torch.complex64), maps, zeros, mask)
    assert torch.equal(images, zeros)


@quick
@given(sizes, sizes, seeds)
def test_combine_is_the_adjoint_of_expand(height: int, width: int, seed: int) -> None:
    maps, coil_images = noise(3, height, width, seed=seed), noise(3, height, width, seed=seed + 1)
    image = noise(height, width, seed=seed + 2)
    left, right = (
        dot(expand(image, maps), coil_images),
        dot(image, combine(coil_images, maps)),
    )
    assert left == pytest.approx(right, rel=1e-3, abs=1e-3)


def test_data_consistency_combines_measured_and_predicted_lines() -> None:
    maps, measured, image = noise(2, 3, 8, 9), noise(2, 3, 8, 9, seed=1), noise(2, 8, 9, seed=2)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    result = fourier.fft2c(sense.data_consistency(image, maps, measured, mask))
    predicted = fourier.fft2c(expand(image, maps))
    for one in range(2):
        torch.testing.assert_close(result[one][..., mask[one]], measured[one][..., mask[one]])
        torch.testing.assert_close(result[one][..., ~mask[one]], predicted[one][..., ~mask[one]])


def test_data_consistency_keeps_unacquired_lines_zero() -> None:
    maps, measured, image = noise(2, 3, 8, 9), noise(2, 3, 8, 9, seed=1), noise(2, 8, 9, seed=2)
    acquired = torch.ones(2, 9, dtype=torch.bool)
    acquired[0, :2] = acquired[0, 8:] = acquired[1, 0] = False
    mask = (torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.4) & acquired
    whole, padded = (fourier.fft2c(sense.data_consistency(image, maps, measured, mask, a)) for a in (None, acquired))
    for one in range(2):
        assert padded[one][..., ~acquired[one]].abs().max() < 1e-5 < whole[one][..., ~acquired[one]].abs().max()
        torch.testing.assert_close(padded[one][..., acquired[one]], whole[one][..., acquired[one]])


@quick
@given(st.integers(2, 7), st.integers(2, 9), st.integers(1, 4), seeds)
def test_sense_solves_its_least_squares_problem(height: int, width: int, coils: int, seed: int) -> None:
    """Compare with a dense solution by LAPACK, with and without a prior."""
    maps = noise(2, coils, height, width, seed=seed)
    maps = maps / fourier.rss(maps).unsqueeze(-3)
    mask = torch.rand(2, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    measured = noise(2, coils, height, width, seed=seed + 1) * mask[:, None, None]
    prior, weight = noise(2, height, width, seed=seed + 2), 0.2
    for one in range(2):
        unit = torch.eye(height * width, dtype=torch.complex64).reshape(-1, height, width)
        columns = fourier.fft2c(expand(unit, maps[one])) * mask[one]
        matrix = columns.reshape(height * width, -1).T.to(torch.complex128)
        right = matrix.mH @ measured[one].reshape(-1).to(torch.complex128)
        left = matrix.mH @ matrix + weight * torch.eye(height * width, dtype=torch.complex128)
        for chosen in (None, prior):
            added = 0 if chosen is None else weight * prior[one].reshape(-1)
            exact = torch.linalg.solve(left, right + added).reshape(height, width).to(torch.complex64)
            image = sense.sense(measured, mask, maps, weight, 40, chosen)[one]
            torch.testing.assert_close(image, exact, rtol=1e-3, atol=1e-3)


def test_sense_gradient_is_that_of_the_minimiser() -> None:
    """Compare with the dense derivative weight (A + weight)⁻¹."""
    maps = noise(1, 3, 5, 6)
    maps = maps / fourier.rss(maps).unsqueeze(-3)
    mask, weight = torch.tensor([[True, False, True, True, False, False]]), 0.3
    measured = noise(1, 3, 5, 6, seed=1) * mask[:, None, None]
    prior = noise(1, 5, 6, seed=2).requires_grad_()
    wanted = noise(1, 5, 6, seed=3)
    image = sense.sense(measured, mask, maps, weight, 40, prior)
    (image * wanted.conj()).real.sum().backward()
    unit = torch.eye(30, dtype=torch.complex64).reshape(-1, 5, 6)
    matrix = (fourier.fft2c(expand(unit, maps[0])) * mask[0]).reshape(30, -1).T
    exact = weight * torch.linalg.solve(matrix.mH @ matrix + weight * torch.eye(30), wanted.reshape(-1))
    assert prior.grad is not None
    torch.testing.assert_close(prior.grad.reshape(-1), exact, rtol=1e-3, atol=1e-4)


def test_sense_of_zeros_is_the_prior() -> None:
    zeros, mask = torch.zeros(1, 2, 6, 7, dtype=torch.complex64), torch.zeros(1, 7, dtype=torch.bool)
    maps = center_coil_maps(zeros, mask)
    assert not sense.sense(zeros, mask, maps).abs().any()
    prior = noise(1, 6, 7).requires_grad_()
    image = sense.sense(zeros, mask, maps, 0.1, 3, prior)
    torch.testing.assert_close(image.detach(), prior.detach())
    image.abs().sum().backward()
    assert prior.grad is not None and torch.view_as_real(prior.grad).isfinite().all()


def smooth_coils(coils: int, rank: int, seed: int = 0) -> Tensor:
    return (noise(coils, rank, seed=seed) @ noise(rank, 10 * 13, seed=seed + 1)).reshape(coils, 10, 13)


@pytest.mark.parametrize(("coils", "rank", "num_coils"), [(9, 4, 4), (9, 3, 5), (20, 7, 16), (3, 1, 1)])
def test_compression_is_exact_for_low_rank_data(coils: int, rank: int, num_coils: int) -> None:
    data = smooth_coils(coils, rank)
    compressed = compress_coils(data, num_coils)
    assert compressed.shape == (num_coils, 10, 13) and compressed.dtype == torch.complex64
    torch.testing.assert_close(
        fourier.rss(fourier.ifft2c(compressed)), fourier.rss(fourier.ifft2c(data)), rtol=1e-4, atol=1e-4
    )


@quick
@given(st.integers(2, 12), st.integers(1, 12), seeds)
def test_compression_keeps_the_largest_singular_values(coils: int, num_coils: int, seed: int) -> None:
    data = noise(coils, 5, 7, seed=seed)
    compressed = compress_coils(data, num_coils)
    if num_coils >= coils:
        assert compressed is data
        return
    values = torch.linalg.svdvals(data.reshape(coils, -1))
    virtual = compressed.reshape(num_coils, -1)
    # The virtual coils are orthogonal and have the largest singular values.
    gram = virtual @ virtual.mH
    torch.testing.assert_close(gram, torch.diag(values[:num_coils] ** 2).to(gram.dtype), rtol=1e-3, atol=1e-3)
    # The RSS loses at most the root of the sum of the discarded squared singular values.
    lost = fourier.rss(data) - fourier.rss(compressed)
    assert lost.min() > -1e-4 and lost.max() <= values[num_coils:].square().sum().sqrt() + 1e-4


def test_compression_is_deterministic_and_uses_all_coils() -> None:
    data = smooth_coils(6, 2)
    assert torch.equal(compress_coils(data, 3), compress_coils(data.clone(), 3))
    shuffled = compress_coils(data.flip(0), 2)
    torch.testing.assert_close(fourier.rss(shuffled), fourier.rss(data), rtol=1e-4, atol=1e-4)
    single = torch.zeros(6, 4, 5, dtype=torch.complex64)
    single[-1] = noise(4, 5)
    torch.testing.assert_close(fourier.rss(compress_coils(single, 2)), single[-1].abs())


def test_the_phase_of_virtual_coils_is_fixed() -> None:
    data = noise(6, 9, 8)
    weights = compress_coils(data, 3).reshape(3, -1) @ torch.linalg.pinv(data.reshape(6, -1))
    largest = weights.gather(1, weights.abs().argmax(1, keepdim=True))
    torch.testing.assert_close(largest, largest.abs().to(largest.dtype), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------- phase


@pytest.mark.parametrize("shape", [(24, 31), (40, 40), (7, 64), (5, 5)])
def test_background_phase_is_removed_and_magnitude_kept(shape: tuple[int, int]) -> None:
    image = noise(2, *shape)
    result = remove_background_phase(image)
    torch.testing.assert_close(result.abs(), image.abs())
    y, x = torch.meshgrid(torch.linspace(-1, 1, shape[0]), torch.linspace(-1, 1, shape[1]), indexing="ij")
    anatomy = 1 + 0.3 * torch.cos(3 * x * y)
    flat = remove_background_phase(anatomy * torch.exp(1j * (0.8 + 1.2 * x - 0.7 * y)))
    if min(shape) >= 24:  # room for a low-pass filter
        assert (flat.real / anatomy)[4:-4, 4:-4].min() > 0.95
    rotated = remove_background_phase(image * np.exp(1.3j))
    torch.testing.assert_close(rotated, result, atol=1e-5, rtol=1e-4)


def test_background_phase_of_another_image() -> None:
    image, other = noise(2, 24, 31), noise(2, 24, 31)
    assert torch.equal(remove_background_phase(image, like=image), remove_background_phase(image))
    result = remove_background_phase(image, like=other)
    torch.testing.assert_close(remove_background_phase(-image, like=other), -result)
    rotated = [x * np.exp(1.3j) for x in (image, other)]
    torch.testing.assert_close(remove_background_phase(*rotated), result, atol=1e-5, rtol=1e-4)


def test_background_phase_of_zeros_has_a_finite_gradient() -> None:
    image = torch.zeros(1, 9, 8, dtype=torch.complex64, requires_grad=True)
    result = remove_background_phase(image)
    assert torch.equal(result, torch.zeros_like(result))
    torch.view_as_real(result).sum().backward()
    assert image.grad is not None and torch.view_as_real(image.grad).isfinite().all()
