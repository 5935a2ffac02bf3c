"""Baselines: fastMRI's own models, in the decoder's place, on batches of any coils and widths."""

import fastmri
import pytest
import systems
import torch
from fastmri.data.transforms import center_crop
from fastmri.models import VarNet

from mrilib.data.dataset import Batch, FastMRIDataset
from mrilib.data.sampler import make_loader
from mrilib.model.baselines import CombinedVarNet, UNetBaseline, VarNetBaseline
from mrilib.model.encoder import KSpaceEncoder
from mrilib.physics import coils, fourier, sense

SMALL = {"num_cascades": 2, "chans": 4, "pools": 2, "sens_chans": 4, "sens_pools": 2}


@pytest.fixture(scope="module")
def batches(phantom_dir, backbone_dir, volumes) -> list[Batch]:
    """Every shape of the phantom: odd widths, other coil counts."""
    config = systems.stage1_config(phantom_dir, backbone_dir, num_coils=8)
    data = FastMRIDataset(volumes, config)
    loader = make_loader(data, 2)
    shapes = {tuple(batch.kspace.shape[1:]): batch for batch in loader}
    assert len({shape[0] for shape in shapes}) > 1 and len({shape[2] for shape in shapes}) > 1
    return list(shapes.values())


def call(baseline, batch: Batch):
    return baseline(None, batch.kspace, batch.mask, batch.scale, batch.image_shape)


VARNETS = [lambda: VarNetBaseline(**SMALL), lambda: CombinedVarNet(2, 4, 2)]


@pytest.mark.parametrize("make", [lambda: UNetBaseline(4, 2), *VARNETS])
def test_every_shape_gives_an_image_in_file_units(make, batches):
    torch.manual_seed(0)
    baseline = make()
    for batch in batches:
        image = call(baseline, batch)
        assert image.shape == batch.target.shape and image.dtype == torch.float32
        assert torch.isfinite(image).all()
        double = baseline(None, batch.kspace, batch.mask, 2 * batch.scale, batch.image_shape)
        torch.testing.assert_close(double, 2 * image)


def test_varnet_is_fastmris_forward_and_crop(batches):
    torch.manual_seed(0)
    baseline = VarNetBaseline(**SMALL)
    for batch in batches:
        lines = batch.mask[:, None, None, :, None]
        official = center_crop(baseline.varnet(torch.view_as_real(batch.kspace), lines), batch.image_shape)
        torch.testing.assert_close(call(baseline, batch), official * batch.scale[:, None, None])


def test_varnet_takes_fastmris_state_dict():
    torch.manual_seed(1)
    official = VarNet(2, 4, 2, 4, 2)
    VarNetBaseline(**SMALL).varnet.load_state_dict(official.state_dict())


def test_measured_lines_are_put_back(batches):
    torch.manual_seed(0)
    batch = batches[0]
    baseline, kept = VarNetBaseline(**SMALL), VarNetBaseline(**SMALL, measured_lines=True)
    kept.load_state_dict(baseline.state_dict())
    everything = torch.ones_like(batch.mask)
    full = fourier.rss(fourier.ifft2c(batch.kspace))
    wanted = fourier.center_crop_or_pad(full, batch.image_shape) * batch.scale[:, None, None]
    image = kept(None, batch.kspace, everything, batch.scale, batch.image_shape)
    torch.testing.assert_close(image, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))
    assert not torch.allclose(call(kept, batch), call(baseline, batch), rtol=1e-3)
    # lines that no scan of this acquisition has stay zero, so that they may as well be told as measured
    acquired = everything.clone()
    acquired[:, :9] = False
    arguments = batch.mask & acquired, batch.scale, batch.image_shape
    data = batch.kspace * arguments[0][:, None, None]
    told = kept(None, data, *arguments, acquired)
    assert not torch.allclose(told, kept(None, data, *arguments), rtol=1e-3)
    nothing_missing = acquired & (batch.mask | ~acquired)
    same = kept(None, data * 1, nothing_missing, batch.scale, batch.image_shape, nothing_missing)
    full = fourier.rss(fourier.ifft2c(data))
    wanted = fourier.center_crop_or_pad(full, batch.image_shape) * batch.scale[:, None, None]
    torch.testing.assert_close(same, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


def test_the_combined_varnet_is_the_encoders_cascades_and_keeps_the_measured_lines(batches, monkeypatch):
    """Its last combined image is the one that an encoder with the same cascades and maps makes."""
    torch.manual_seed(0)
    baseline, batch = CombinedVarNet(2, 4, 2).eval(), batches[0]
    encoder = KSpaceEncoder(8, 32, 8, 1, 1, 2, 4, 2, map_network=False).eval()
    encoder.varnet.cascades = baseline.cascades
    with torch.no_grad():
        maps = coils.center_coil_maps(batch.kspace, batch.mask)
        monkeypatch.setattr(encoder, "_coil_maps", lambda *_: maps)
        refined = encoder.refined_image(batch.kspace, batch.mask)
        coil_images = sense.data_consistency(refined, maps, batch.kspace, batch.mask)
        wanted = fourier.center_crop_or_pad(fourier.rss(coil_images), batch.image_shape) * batch.scale[:, None, None]
        torch.testing.assert_close(call(baseline, batch), wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()))
        everything = torch.ones_like(batch.mask)
        full = fourier.center_crop_or_pad(fourier.rss(fourier.ifft2c(batch.kspace)), batch.image_shape)
        image = baseline(None, batch.kspace, everything, batch.scale, batch.image_shape)
    torch.testing.assert_close(image, full * batch.scale[:, None, None], rtol=1e-4, atol=1e-5 * float(wanted.max()))


@pytest.mark.parametrize("make", VARNETS)
def test_empty_coils_and_slices_give_no_nan(batches, make):
    torch.manual_seed(0)
    baseline, batch = make(), batches[0]
    data, mask, scale = (torch.cat([one[:1], one[:1]]) for one in (batch.kspace, batch.mask, batch.scale))
    data[0, 1] = 0
    data[1] = 0
    image = baseline(None, data, mask, scale, batch.image_shape)
    assert torch.isfinite(image).all() and image[0].any() and not image[1].any()
    without = torch.cat([data[:1, :1], data[:1, 2:]], dim=1)
    alone = baseline(None, without, mask[:1], scale[:1], batch.image_shape)
    torch.testing.assert_close(image[:1], alone)


def test_unet_normalises_as_fastmri_does(batches):
    torch.manual_seed(0)
    baseline, batch = UNetBaseline(4, 2), batches[0]
    image = fastmri.rss(fastmri.complex_abs(fastmri.ifft2c(torch.view_as_real(batch.kspace))), dim=1)
    from fastmri.data.transforms import normalize_instance

    for number, one in enumerate(center_crop(image, batch.image_shape)):
        normal, mean, deviation = normalize_instance(one, eps=1e-11)
        output = baseline.unet(normal.clamp(-6, 6)[None, None])[0, 0] * deviation + mean
        torch.testing.assert_close(call(baseline, batch)[number], output * batch.scale[number])
