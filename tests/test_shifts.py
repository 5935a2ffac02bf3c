"""Shifted copies: the noise that was asked for, the coils that were asked for, files like any other."""

import h5py
import numpy as np
import pytest
import torch

from mrilib import shifts
from mrilib.data import index_volumes
from mrilib.kspace import ifft2c, rss
from mrilib.scanner import object_rms, simulate_volume


def disc(size: int = 64) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size / 2
    return np.where(np.hypot(1.2 * x, y) < 0.42 * size, 1.0, 0.0)[None].repeat(2, 0)


@pytest.mark.parametrize("snr", [10.0, 40.0])
@pytest.mark.parametrize("padding", [(0, 0), (3, 2)])
def test_noise_level_is_the_simulated_one(snr, padding):
    image = disc()
    kspace = simulate_volume(image, 4, np.random.default_rng(0), snr=snr, padding=padding)
    wanted = object_rms(image) / snr
    assert shifts.noise_level(kspace, (padding[0], 64 - padding[1])) == pytest.approx(wanted, rel=0.05)


def test_twice_the_noise(volumes, tmp_path):
    for volume in volumes[:4]:
        noisy = shifts.more_noise(volume, tmp_path, 2.0)
        with h5py.File(volume.path) as before, h5py.File(noisy.path) as after:
            old, new = before["kspace"][()], after["kspace"][()]
            np.testing.assert_array_equal(before["reconstruction_rss"][()], after["reconstruction_rss"][()])
            assert (
                after.attrs["max"] == pytest.approx(before.attrs["max"])
                and dict(before.attrs).keys() == dict(after.attrs).keys()
            )
        before_level = shifts.noise_level(old, volume.padding)
        assert shifts.noise_level(new, noisy.padding) == pytest.approx(2 * before_level, rel=0.05)
        left, right = volume.padding
        assert not new[..., :left].any() and not new[..., right:].any()
        added = (new - old)[..., left:right]
        assert added.real.std() == pytest.approx(np.sqrt(3) * before_level, rel=0.02)
        assert abs(np.vdot(added, old[..., left:right])) < 0.02 * np.linalg.norm(added) * np.linalg.norm(old)
        assert noisy._replace(path=volume.path) == volume


def test_fewer_coils_are_a_scanner_of_its_own(volumes, tmp_path):
    for volume in volumes[:4]:
        small = shifts.fewer_coils(volume, tmp_path, 4)
        assert small.coils == 4 and small.matrix == volume.matrix and small.recon == volume.recon
        with h5py.File(volume.path) as before, h5py.File(small.path) as after:
            kspace, target = after["kspace"][()], after["reconstruction_rss"][()]
            assert target.max() == pytest.approx(after.attrs["max"])
            assert (target <= before["reconstruction_rss"][()] * (1 + 1e-4) + 1e-12).all()
            everywhere = [any(np.array_equal(one, other) for other in before["kspace"][0]) for one in kspace[0]]
        assert everywhere == [True] * 4
        full = rss(ifft2c(torch.from_numpy(kspace[0]))).numpy()
        rows, columns = ((a - b) // 2 for a, b in zip(full.shape, target.shape[1:], strict=True))
        np.testing.assert_allclose(
            full[rows : rows + target.shape[1], columns : columns + target.shape[2]], target[0], rtol=1e-5
        )
    assert shifts.fewer_coils(volumes[0], tmp_path, 99).coils == volumes[0].coils


def test_copies_are_made_once(volumes, tmp_path):
    made = shifts.copies(volumes[:2], tmp_path, "noise 2")
    times = [volume.path.stat().st_mtime_ns for volume in made]
    again = shifts.copies(volumes[:2], tmp_path, "noise 2")
    assert [volume.path.stat().st_mtime_ns for volume in again] == times
    assert index_volumes(tmp_path / "noise_2") == again == made


@pytest.mark.parametrize("shift", ["noise", "noise two", "blur 3", ""])
def test_unknown_shifts_are_refused(shift, volumes, tmp_path):
    with pytest.raises(ValueError, match="not known"):
        shifts.copies(volumes[:1], tmp_path, shift)


def test_less_noise_is_refused(volumes, tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        shifts.more_noise(volumes[0], tmp_path, 0.5)
