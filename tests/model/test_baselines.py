"""The baselines in the decoder's place, on batches of all coil counts and widths; and the registry of decoders."""

import textwrap
from typing import Any

import fastmri
import pytest
import systems
import torch
from fastmri.data.transforms import center_crop, normalize_instance
from fastmri.models import VarNet
from torch import Tensor, nn

from mrilib.data.dataset import Batch, FastMRIDataset
from mrilib.data.sampler import make_loader
from mrilib.model import decoders
from mrilib.model.baselines import CombinedVarNet, UNetBaseline, VarNetBaseline, zero_filled
from mrilib.model.encoder import KSpaceEncoder
from mrilib.physics import coils, fourier, sense

SMALL = {"num_cascades": 2, "chans": 4, "pools": 2, "sens_chans": 4, "sens_pools": 2}
VARNETS = [lambda: VarNetBaseline(**SMALL), lambda: CombinedVarNet(2, 4, 2)]


@pytest.fixture(scope="module")
def batches(phantom_dir, backbone_dir, volumes) -> list[Batch]:
    """One batch of each shape in the phantom data: odd widths, different coil counts."""
    config = systems.stage1_config(phantom_dir, backbone_dir, num_coils=8)
    loader = make_loader(FastMRIDataset(volumes, config), 2)
    shapes = {tuple(batch.kspace.shape[1:]): batch for batch in loader}
    assert len({shape[0] for shape in shapes}) > 1 and len({shape[2] for shape in shapes}) > 1
    return list(shapes.values())


def reconstruct(decoder: nn.Module, batch: Batch) -> Tensor:
    return decoder(None, batch.kspace, batch.mask, batch.scale, batch.image_shape)


def rss_in_file_units(kspace: Tensor, batch: Batch) -> Tensor:
    rss = fourier.rss(fourier.ifft2c(kspace))
    return fourier.center_crop_or_pad(rss, batch.image_shape) * batch.scale[:, None, None]


@pytest.mark.parametrize("build", [lambda: UNetBaseline(4, 2), *VARNETS])
def test_every_shape_gives_an_image_in_file_units(build, batches):
    torch.manual_seed(0)
    baseline = build()
    for batch in batches:
        image = reconstruct(baseline, batch)
        assert image.shape == batch.target.shape and image.dtype == torch.float32
        assert torch.isfinite(image).all()
        torch.testing.assert_close(reconstruct(baseline, batch._replace(scale=2 * batch.scale)), 2 * image)


def test_varnet_equals_fastmris_forward_and_crop(batches):
    torch.manual_seed(0)
    baseline = VarNetBaseline(**SMALL)
    baseline.varnet.load_state_dict(VarNet(2, 4, 2, 4, 2).state_dict())
    for batch in batches:
        lines = batch.mask[:, None, None, :, None]
        official = center_crop(baseline.varnet(torch.view_as_real(batch.kspace), lines), batch.image_shape)
        torch.testing.assert_close(reconstruct(baseline, batch), official * batch.scale[:, None, None])


def test_measured_lines_replace_those_of_varnet(batches):
    torch.manual_seed(0)
    batch = batches[0]
    soft, exact = VarNetBaseline(**SMALL), VarNetBaseline(**SMALL, measured_lines=True)
    exact.load_state_dict(soft.state_dict())
    everything = torch.ones_like(batch.mask)
    expected = rss_in_file_units(batch.kspace, batch)
    image = reconstruct(exact, batch._replace(mask=everything))
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert not torch.allclose(reconstruct(exact, batch), reconstruct(soft, batch), rtol=1e-3)


def test_lines_that_are_not_acquired_count_as_measured(batches):
    """They are zero in the target."""
    torch.manual_seed(0)
    batch, baseline = batches[0], VarNetBaseline(**SMALL, measured_lines=True)
    acquired = torch.ones_like(batch.mask)
    acquired[:, :9] = False
    mask = batch.mask & acquired
    kspace = batch.kspace * mask[:, None, None]
    with_acquired = baseline(None, kspace, mask, batch.scale, batch.image_shape, acquired)
    assert not torch.allclose(with_acquired, baseline(None, kspace, mask, batch.scale, batch.image_shape), rtol=1e-3)
    image = baseline(None, kspace, mask, batch.scale, batch.image_shape, mask)  # no acquired line is missing
    expected = rss_in_file_units(kspace, batch)
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_combined_varnet_equals_the_encoders_cascades_with_data_consistency(batches, monkeypatch):
    torch.manual_seed(0)
    baseline, batch = CombinedVarNet(2, 4, 2).eval(), batches[0]
    encoder = KSpaceEncoder(8, 32, 8, 1, 1, 2, 4, 2, map_network=False).eval()
    encoder.varnet.cascades = baseline.cascades
    with torch.no_grad():
        maps = coils.center_coil_maps(batch.kspace, batch.mask)
        monkeypatch.setattr(encoder, "_coil_maps", lambda *_: maps)
        refined = encoder.refined_image(batch.kspace, batch.mask)
        coil_images = sense.data_consistency(refined, maps, batch.kspace, batch.mask)
        expected = rss_in_file_units(fourier.fft2c(coil_images), batch)
        atol = 1e-4 * float(expected.max())
        torch.testing.assert_close(reconstruct(baseline, batch), expected, rtol=1e-3, atol=atol)
        image = reconstruct(baseline, batch._replace(mask=torch.ones_like(batch.mask)))
    torch.testing.assert_close(image, rss_in_file_units(batch.kspace, batch), rtol=1e-4, atol=0.1 * atol)


@pytest.mark.parametrize("build", VARNETS)
def test_empty_coils_and_slices_give_finite_images(batches, build):
    torch.manual_seed(0)
    baseline, batch = build(), batches[0]
    kspace, mask, scale = (torch.cat([values[:1], values[:1]]) for values in (batch.kspace, batch.mask, batch.scale))
    kspace[0, 1] = 0
    kspace[1] = 0
    image = baseline(None, kspace, mask, scale, batch.image_shape)
    assert torch.isfinite(image).all() and image[0].any() and not image[1].any()
    without_coil = torch.cat([kspace[:1, :1], kspace[:1, 2:]], dim=1)
    torch.testing.assert_close(image[:1], baseline(None, without_coil, mask[:1], scale[:1], batch.image_shape))


def test_unet_normalises_as_fastmri_does(batches):
    torch.manual_seed(0)
    baseline, batch = UNetBaseline(4, 2), batches[0]
    images = reconstruct(baseline, batch)
    rss = fastmri.rss(fastmri.complex_abs(fastmri.ifft2c(torch.view_as_real(batch.kspace))), dim=1)
    for row, image in enumerate(center_crop(rss, batch.image_shape)):
        normalised, mean, deviation = normalize_instance(image, eps=1e-11)
        output = baseline.unet(normalised.clamp(-6, 6)[None, None])[0, 0] * deviation + mean
        torch.testing.assert_close(images[row], output * batch.scale[row])


def test_the_documented_decoder_can_be_registered(batches, monkeypatch):
    monkeypatch.setattr(decoders, "DECODERS", dict(decoders.DECODERS))
    example = decoders.__doc__[decoders.__doc__.index("    class ") : decoders.__doc__.index("\nWith ")]
    names: dict[str, Any] = {**vars(decoders), "zero_filled": zero_filled}
    exec(textwrap.dedent(example), names)
    entry = decoders.find_decoder("scaled")
    batch = batches[0]
    torch.testing.assert_close(
        reconstruct(entry.build(None, 0), batch), zero_filled(batch.kspace, batch.scale, batch.image_shape)
    )
