"""Baselines: fastMRI's own models, in the decoder's place, on batches of any coils and widths."""

import fastmri
import pytest
import systems
import torch
from fastmri.data.transforms import center_crop
from fastmri.models import VarNet

from mrilib import kspace as physics
from mrilib import model, training
from mrilib.baselines import UNetBaseline, VarNetBaseline, chans_for
from mrilib.checkpoint import load_checkpoint
from mrilib.data import Batch, FastMRIDataset, make_loader, split_volumes
from mrilib.model import TwoStageModel, build_control, count_parameters

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
    return baseline(None, batch.kspace, batch.mask, batch.scale, batch.recon)


@pytest.mark.parametrize("make", [lambda: UNetBaseline(4, 2), lambda: VarNetBaseline(**SMALL)])
def test_every_shape_gives_an_image_in_file_units(make, batches):
    torch.manual_seed(0)
    baseline = make()
    for batch in batches:
        image = call(baseline, batch)
        assert image.shape == batch.target.shape and image.dtype == torch.float32
        assert torch.isfinite(image).all()
        double = baseline(None, batch.kspace, batch.mask, 2 * batch.scale, batch.recon)
        torch.testing.assert_close(double, 2 * image)


def test_varnet_is_fastmris_forward_and_crop(batches):
    torch.manual_seed(0)
    baseline = VarNetBaseline(**SMALL)
    for batch in batches:
        lines = batch.mask[:, None, None, :, None]
        official = center_crop(baseline.varnet(torch.view_as_real(batch.kspace), lines), batch.recon)
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
    full = physics.rss(physics.ifft2c(batch.kspace))
    wanted = physics.center_crop_or_pad(full, batch.recon) * batch.scale[:, None, None]
    image = kept(None, batch.kspace, everything, batch.scale, batch.recon)
    torch.testing.assert_close(image, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))
    assert not torch.allclose(call(kept, batch), call(baseline, batch), rtol=1e-3)
    # lines that no scan of this acquisition has stay zero, so that they may as well be told as measured
    acquired = everything.clone()
    acquired[:, :9] = False
    arguments = batch.mask & acquired, batch.scale, batch.recon
    data = batch.kspace * arguments[0][:, None, None]
    told = kept(None, data, *arguments, acquired)
    assert not torch.allclose(told, kept(None, data, *arguments), rtol=1e-3)
    nothing_missing = acquired & (batch.mask | ~acquired)
    same = kept(None, data * 1, nothing_missing, batch.scale, batch.recon, nothing_missing)
    full = physics.rss(physics.ifft2c(data))
    wanted = physics.center_crop_or_pad(full, batch.recon) * batch.scale[:, None, None]
    torch.testing.assert_close(same, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


def test_empty_coils_and_slices_give_no_nan(batches):
    torch.manual_seed(0)
    baseline, batch = VarNetBaseline(**SMALL), batches[0]
    data, mask, scale = (torch.cat([one[:1], one[:1]]) for one in (batch.kspace, batch.mask, batch.scale))
    data[0, 1] = 0
    data[1] = 0
    image = baseline(None, data, mask, scale, batch.recon)
    assert torch.isfinite(image).all() and image[0].any() and not image[1].any()
    without = torch.cat([data[:1, :1], data[:1, 2:]], dim=1)
    alone = baseline(None, without, mask[:1], scale[:1], batch.recon)
    torch.testing.assert_close(image[:1], alone)


def test_unet_normalises_as_fastmri_does(batches):
    torch.manual_seed(0)
    baseline, batch = UNetBaseline(4, 2), batches[0]
    image = fastmri.rss(fastmri.complex_abs(fastmri.ifft2c(torch.view_as_real(batch.kspace))), dim=1)
    from fastmri.data.transforms import normalize_instance

    for number, one in enumerate(center_crop(image, batch.recon)):
        normal, mean, deviation = normalize_instance(one, eps=1e-11)
        output = baseline.unet(normal.clamp(-6, 6)[None, None])[0, 0] * deviation + mean
        torch.testing.assert_close(call(baseline, batch)[number], output * batch.scale[number])


@pytest.mark.parametrize("wanted", [200_000, 1_000_000])
def test_width_for_a_number_of_parameters(wanted):
    chans = chans_for(wanted, num_cascades=3, pools=3, sens_chans=4, sens_pools=3)
    counts = [count_parameters(VarNet(3, 4, 3, c, 3)) for c in (chans - 1, chans, chans + 1)]
    assert min(counts, key=lambda count: abs(count - wanted)) == counts[1]


def test_width_for_too_few_parameters_is_refused():
    with pytest.raises(ValueError, match="more than 10 parameters"):
        chans_for(10, num_cascades=3, pools=3, sens_chans=4, sens_pools=3)


def test_the_loop_trains_a_baseline_in_the_decoders_place(phantom_dir, backbone_dir, tmp_path):
    config = systems.stage2_config(phantom_dir, backbone_dir, phantom_dir, epochs=3, learning_rate=3e-3)
    training.prepare(config)
    backbone, tokenizer = model.build_backbone(config, "cpu")
    prefix = build_control(systems.stage1_config(phantom_dir, backbone_dir), backbone)
    system = TwoStageModel(prefix, backbone, tokenizer, VarNetBaseline(**SMALL))
    volumes = split_volumes(config)
    train = FastMRIDataset(volumes["train"], config, training=True)
    val = FastMRIDataset(volumes["val"], config)
    stage = training.ReconstructionStage(system, "varnet")
    loaders = make_loader(train, 3, 0, shuffle=True), make_loader(val, 3)
    history = training.fit(stage, config, *loaders, tmp_path)
    assert history.epochs[-1]["val_loss"] < history.epochs[0]["val_loss"]
    saved = load_checkpoint(tmp_path / "stage2_checkpoints" / "varnet_best_model.pt", "varnet")
    assert set(saved["weights"]) == set(VarNetBaseline(**SMALL).state_dict())
