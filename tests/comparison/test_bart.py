"""BART: files, axes, units and the choice of settings; skipped if BART is not installed."""

import numpy as np
import pytest
import systems
import torch

from mrilib.comparison import bart
from mrilib.config import DataParameters
from mrilib.data.dataset import FastMRIDataset
from mrilib.metrics.image import score_volume
from mrilib.model.baselines import zero_filled
from mrilib.physics import fourier

installed = pytest.mark.skipif(not bart.version(), reason=bart.MISSING)


@pytest.fixture(scope="module")
def batch(phantom_dir, volumes):
    """Two slices at 4x of odd width, which shows errors of the centre convention."""
    values = {"accelerations": [4], "center_fractions": [0.16], "num_coils": 8, "img_size": 64}
    config = DataParameters.create({"data_dir": str(phantom_dir), **values})
    odd = [volume for volume in volumes if volume.matrix[1] % 2]
    assert odd
    return systems.batch_of(FastMRIDataset(odd, config), 2)


def single(batch, number=0):
    """Select one slice of a batch."""
    names = ("kspace", "mask", "scale", "target", "maximum", "slices", "acquired")
    values = {name: getattr(batch, name) for name in names}
    return batch._replace(**{name: v if v is None else v[number : number + 1] for name, v in values.items()})


def test_cfl_files_are_read_as_written(tmp_path):
    rng = np.random.default_rng(0)
    array = (rng.standard_normal((5, 4, 1, 3)) + 1j * rng.standard_normal((5, 4, 1, 3))).astype(np.complex64)
    bart.write_cfl(tmp_path / "x", array)
    np.testing.assert_array_equal(bart.read_cfl(tmp_path / "x"), array)
    first = np.fromfile(tmp_path / "x.cfl", np.complex64)[:5]
    np.testing.assert_array_equal(first, array[:, 0, 0, 0])  # the first axis varies fastest


@installed
def test_fully_sampled_data_is_reproduced(batch):
    """Both outputs for a smooth object without noise are its RSS, in its orientation and in file units."""
    y, x = np.mgrid[:64, :63] / 64 - 0.5
    head = torch.from_numpy(np.exp(-((1.5 * (x - 0.05)) ** 2 + (y + 0.08) ** 2) * 40)).to(torch.complex64)
    corners = [(-1, -1), (1, -1), (-1, 1), (1, 1.3)]
    sensitivities = [np.exp(-((x - 0.6 * a) ** 2 + (y - 0.6 * b) ** 2)) * np.exp(1j * (a + b * x)) for a, b in corners]
    maps = torch.from_numpy(np.stack(sensitivities)).to(torch.complex64)
    maps = maps / fourier.rss(maps)
    kspace = fourier.fft2c(maps * head)
    full = batch._replace(
        kspace=kspace[None],
        mask=torch.ones(1, 63, dtype=torch.bool),
        acquired=torch.ones(1, 63, dtype=torch.bool),
        scale=torch.tensor([3.0]),
        slices=batch.slices[:1],
    )
    full = full._replace(image_shape=(64, 63))
    expected = 3.0 * head.abs()
    inside = expected > 0.1 * expected.max()  # ESPIRiT's maps are zero where there is no signal
    for output, tolerance in (("combined", 0.02), ("rss", 1e-4)):
        image = bart.reconstruct(full, bart.Settings(strength=1e-5, output=output))[0]
        assert float((image - expected)[inside].norm() / expected.norm()) < tolerance
        doubled = bart.reconstruct(full._replace(scale=2 * full.scale), bart.Settings(strength=1e-5, output=output))[0]
        assert float((doubled - 2 * image).norm() / image.norm()) < 0.02  # BART shifts its wavelets at random


@installed
def test_slices_of_a_batch_are_independent(batch):
    both = bart.reconstruct(batch, bart.Settings())
    assert len(both) == 2 and not torch.equal(both[0], both[1])
    for number, image in enumerate(both):
        assert torch.equal(bart.reconstruct(single(batch, number), bart.Settings())[0], image)


@installed
def test_bart_is_better_than_zero_filled(batch):
    assert batch.target is not None
    image = bart.reconstruct(batch, bart.Settings(kernel=4, strength=0.002))
    assert image.shape == batch.target.shape and image.dtype == torch.float32
    baseline = zero_filled(batch.kspace, batch.scale, batch.image_shape)
    scores = [score_volume(batch.target.numpy(), each.numpy()) for each in (image, baseline)]
    assert scores[0]["psnr_head"] > scores[1]["psnr_head"] + 1
    assert scores[0]["ssim_head"] > scores[1]["ssim_head"] + 0.05


@installed
def test_measured_lines_are_kept(batch):
    """With almost all lines measured the RSS is theirs, so the phase that pics leaves on its image is removed."""
    mask = torch.ones_like(batch.mask)
    mask[:, 3] = False
    full = batch._replace(mask=mask, kspace=torch.where(mask[:, None, None], batch.kspace + 1e-9, 0))
    expected = fourier.rss(fourier.ifft2c(full.kspace))
    expected = fourier.center_crop_or_pad(expected, batch.image_shape) * batch.scale[:, None, None]
    image = bart.reconstruct(full, bart.Settings(kernel=4))
    assert float((image - expected).norm() / expected.norm()) < 0.02


@installed
def test_the_best_settings_are_chosen(batch, monkeypatch):
    monkeypatch.setattr(bart, "KERNELS", (3, -3))  # BART refuses the second
    monkeypatch.setattr(bart, "CALIBRATIONS", (12,))
    monkeypatch.setattr(bart, "STRENGTHS", (0.002, 0.005))
    settings, trials = bart.choose([single(batch)])
    scores = {
        bart.Settings(*(trial[name] for name in bart.Settings._fields)): trial["ssim_head"]
        for trial in trials
        if "refused" not in trial
    }
    assert {trial.output for trial in scores} == {"combined", "rss"}
    assert {trial.strength for trial in scores} == {0.002, 0.005}
    assert scores[settings] == max(scores.values())


@installed
def test_errors_quote_bart(batch):
    with pytest.raises(bart.BartError, match="bart ecalib"):
        bart.reconstruct(single(batch), bart.Settings(kernel=-3))


@installed
def test_an_empty_slice_stays_empty(batch):
    empty = batch._replace(kspace=torch.zeros_like(batch.kspace))
    assert not bart.reconstruct(empty, bart.Settings()).any()


def test_without_bart_the_error_says_how_to_install_it(batch, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert bart.version() == ""
    for call in (lambda: bart.choose([batch]), lambda: bart.reconstruct(batch, bart.Settings())):
        with pytest.raises(bart.BartError, match="apt-get install bart"):
            call()
