"""Distribution shifts: noise, coils and patients as requested, in valid files."""

import h5py
import numpy as np
import pytest
import torch

from mrilib.comparison import shifts
from mrilib.config import EvaluateParameters, ParameterError
from mrilib.data.splits import index_volumes
from mrilib.phantom.scanner import object_rms, simulate_volume
from mrilib.physics.fourier import ifft2c, rss


def disc(size: int = 64) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size / 2
    return np.where(np.hypot(1.2 * x, y) < 0.42 * size, 1.0, 0.0)[None].repeat(2, 0)


@pytest.mark.parametrize("snr", [10.0, 40.0])
@pytest.mark.parametrize("padding", [(0, 0), (3, 2)])
def test_noise_level_is_the_simulated_one(snr, padding):
    image = disc()
    kspace = simulate_volume(image, 4, np.random.default_rng(0), snr=snr, padding=padding)
    expected = object_rms(image) / snr
    assert shifts.noise_level(kspace, (padding[0], 64 - padding[1])) == pytest.approx(expected, rel=0.05)


def test_twice_the_noise(volumes, tmp_path):
    for volume in volumes[:4]:
        noisy = shifts.more_noise(volume, tmp_path, 2.0)
        with h5py.File(volume.path) as before, h5py.File(noisy.path) as after:
            old, new = before["kspace"][()], after["kspace"][()]
            np.testing.assert_array_equal(before["reconstruction_rss"][()], after["reconstruction_rss"][()])
            assert after.attrs["max"] == pytest.approx(before.attrs["max"])
            assert dict(before.attrs).keys() == dict(after.attrs).keys()
        before_level = shifts.noise_level(old, volume.padding)
        assert shifts.noise_level(new, noisy.padding) == pytest.approx(2 * before_level, rel=0.05)
        left, right = volume.padding
        assert not new[..., :left].any() and not new[..., right:].any()
        added = (new - old)[..., left:right]
        assert added.real.std() == pytest.approx(np.sqrt(3) * before_level, rel=0.02)
        assert abs(np.vdot(added, old[..., left:right])) < 0.02 * np.linalg.norm(added) * np.linalg.norm(old)
        assert noisy._replace(path=volume.path) == volume


def test_fewer_coils_have_their_own_target(volumes, tmp_path):
    for volume in volumes[:4]:
        small = shifts.fewer_coils(volume, tmp_path, 4)
        assert small.coils == 4 and small.matrix == volume.matrix and small.image_shape == volume.image_shape
        with h5py.File(volume.path) as before, h5py.File(small.path) as after:
            kspace, target = after["kspace"][()], after["reconstruction_rss"][()]
            assert target.max() == pytest.approx(after.attrs["max"])
            assert (target <= before["reconstruction_rss"][()] * (1 + 1e-4) + 1e-12).all()
            original = before["kspace"][0]
        assert all(any(np.array_equal(coil, other) for other in original) for coil in kspace[0])
        full = rss(ifft2c(torch.from_numpy(kspace[0]))).numpy()
        rows, columns = ((a - b) // 2 for a, b in zip(full.shape, target.shape[1:], strict=True))
        np.testing.assert_allclose(
            full[rows : rows + target.shape[1], columns : columns + target.shape[2]], target[0], rtol=1e-5
        )
    assert shifts.fewer_coils(volumes[0], tmp_path, 99).coils == volumes[0].coils


def config_with(shift: str, phantom_dir) -> EvaluateParameters:
    values = {"data_dir": str(phantom_dir), "shift": shift, "num_coils": 6}
    return EvaluateParameters.create(values, written_later=EvaluateParameters.existing_paths)


def test_shifted_files_are_written_once(volumes, phantom_dir, tmp_path):
    assert shifts.shifted(config_with("", phantom_dir), volumes, tmp_path) == list(volumes)
    for shift, folder in (("noise 2", "noise_2"), ("coils 4", "coils_4"), ("head nibabel", "head_nibabel")):
        config = config_with(shift, phantom_dir)
        written = shifts.shifted(config, volumes[:2], tmp_path)
        times = [volume.path.stat().st_mtime_ns for volume in written]
        again = shifts.shifted(config, volumes[:2], tmp_path)
        assert [volume.path.stat().st_mtime_ns for volume in again] == times
        assert index_volumes(tmp_path / folder) == again == written


def test_other_patients_are_like_the_phantom(volumes, phantom_dir, tmp_path):
    others = shifts.shifted(config_with("patients 3", phantom_dir), volumes[:3], tmp_path)
    assert len(others) == 3 and {volume.image_shape[0] for volume in others} == {
        volume.image_shape[0] for volume in volumes
    }
    assert {volume.patient for volume in others}.isdisjoint(volume.patient for volume in volumes)
    with pytest.raises(ParameterError, match=r"shift: patients 52: .*choose another seed"):
        shifts.shifted(config_with("patients 52", phantom_dir), volumes[:3], tmp_path)
    with pytest.raises(ParameterError, match="no phantom"):
        shifts.shifted(config_with("patients 3", tmp_path), volumes[:3], tmp_path)


@pytest.mark.parametrize("shift", ["noise", "noise two", "noise 0.5", "coils 0", "blur 3", "patients x"])
def test_unknown_shifts_are_refused(shift, volumes, phantom_dir, tmp_path):
    with pytest.raises(ParameterError, match=r"shift: .* is not known; there are"):
        shifts.shifted(config_with(shift, phantom_dir), volumes[:1], tmp_path)


def test_less_noise_is_refused(volumes, tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        shifts.more_noise(volumes[0], tmp_path, 0.5)
