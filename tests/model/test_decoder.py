"""The image decoder: sizes, data consistency, tokens in their places, units, gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fastmri.losses import SSIMLoss
from torch import Tensor, nn

from mrilib.model.baselines import zero_filled
from mrilib.model.decoder import FINAL_SENSE_ITERATIONS, FINAL_SENSE_WEIGHT, INITIAL_SENSE_ITERATIONS, ImageDecoder
from mrilib.model.unet import ChannelNorm
from mrilib.physics import coils as coils_module
from mrilib.physics import fourier
from mrilib.physics import sense as sense_module
from mrilib.training.losses import VolumeSSIMLoss


def decoder(decoder_type: str = "lightweight", trained: bool = True, **changes: Any) -> ImageDecoder:
    torch.manual_seed(0)
    model = ImageDecoder(decoder_type, **{"token_dim": 12, "decoder_hidden_dim": 16, "img_size": 32, **changes})
    if trained:  # the head starts at zero
        nn.init.normal_(model.unet.head.weight, std=0.5)
    return model


def measured(batch: int = 2, coils: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = (torch.arange(height) - height // 2)[:, None] / height
    x = (torch.arange(width) - width // 2) / width
    full = torch.randn(batch, coils, height, width, dtype=torch.complex64, generator=generator) / (0.02 + y**2 + x**2)
    mask = torch.rand(batch, width, generator=generator) < 0.3
    mask[:, width // 2 - 3 : width // 2 + 4] = True
    masked = torch.where(mask[:, None, None], full, 0)
    scale = masked.abs().square().mean((1, 2, 3)).sqrt()
    return {"kspace": masked / scale[:, None, None, None], "mask": mask, "scale": scale * 1e-4}


def some_tokens(batch: int = 2, count: int = 4, width: int = 12) -> Tensor:
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(3))


def coil_images_before_rss(call: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the decoder hands to the root sum of squares."""
    kept: list[Tensor] = []
    original = sense_module.data_consistency

    def keep(*inputs: Tensor) -> Tensor:
        kept.append(original(*inputs))
        return kept[-1]

    with monkeypatch.context() as patch:
        patch.setattr(sense_module, "data_consistency", keep)
        call()
    return kept[0]


@pytest.mark.parametrize(("decoder_type", "millions"), [("full", 160), ("lightweight", 80)])
def test_parameters_are_those_of_the_description_within_2_percent(decoder_type: str, millions: int) -> None:
    with torch.device("meta"):
        model = ImageDecoder(decoder_type)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.02)


@pytest.mark.parametrize("decoder_type", ["full", "lightweight"])
@pytest.mark.parametrize(
    ("height", "width", "image_shape"), [(32, 32, (32, 32)), (32, 27, (32, 27)), (33, 45, (30, 29)), (64, 40, (32, 36))]
)
def test_the_output_is_the_evaluated_crop(
    decoder_type: str, height: int, width: int, image_shape: tuple[int, int]
) -> None:
    model = decoder(decoder_type).eval()
    with torch.no_grad():
        image = model(some_tokens(), **measured(height=height, width=width), image_shape=image_shape)
    assert image.shape == (2, *image_shape) and image.dtype == torch.float32
    assert image.isfinite().all() and (image >= 0).all()


@pytest.mark.parametrize("width", [32, 27, 45])
def test_a_new_decoder_gives_data_consistency_of_the_zero_filled_image(width: int) -> None:
    model = decoder(trained=False).eval()
    data = measured(width=width)
    maps = coils_module.center_coil_maps(data["kspace"], data["mask"])
    combined = coils_module.combine(fourier.ifft2c(data["kspace"]), maps)
    coil_images = sense_module.data_consistency(combined, maps, data["kspace"], data["mask"])
    expected = fourier.center_crop_or_pad(fourier.rss(coil_images), (30, 25)) * data["scale"][:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(model(some_tokens(), **data, image_shape=(30, 25)), expected, rtol=1e-4, atol=1e-8)


def test_measured_lines_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = decoder().eval(), measured(width=45)
    with torch.no_grad():
        images = coil_images_before_rss(lambda: model(some_tokens(), **data, image_shape=(32, 45)), monkeypatch)
        plain = coil_images_before_rss(lambda: decoder(trained=False)(None, **data, image_shape=(32, 45)), monkeypatch)
    found = fourier.fft2c(images)
    for one in range(2):
        mask = data["mask"][one]
        torch.testing.assert_close(found[one][..., mask], data["kspace"][one][..., mask], rtol=1e-4, atol=1e-4)
    assert (images - plain).abs().max() > 1e-2  # the network does speak elsewhere


def without_spread(model: ImageDecoder) -> ImageDecoder:
    """The same U-Net with norms taken out and convolutions cut to their centre: what a token changes stays in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ChannelNorm):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3):
                center = child.weight.data[..., 1:2, 1:2].clone()
                child.weight.data.zero_()
                child.weight.data[..., 1:2, 1:2] = center
    return model


@pytest.mark.parametrize(
    ("img_size", "height", "width"), [(128, 128, 128), (128, 128, 140), (128, 145, 109), (64, 96, 128), (32, 90, 63)]
)
def test_tokens_meet_the_pixels_of_their_own_patches(img_size: int, height: int, width: int) -> None:
    model = decoder(img_size=img_size, use_bilinear_upsample=False).eval()
    without_spread(model)
    side = img_size // 16
    top, left = ((n - img_size) // 2 for n in (height, width))  # where the ViT's crop (or padding) begins
    odd = ((height - img_size) % 2, (width - img_size) % 2)  # half a pixel cannot be shared out: then one is allowed
    data = measured(1, 2, height, width)
    tokens = torch.zeros(1, side * side, 12)
    with torch.no_grad():
        before = unet_output(model, tokens, data)
        for row, column in ((0, 0), (1, side - 1), (side - 1, 1), (side // 2, 0)):
            own = tokens.clone()
            own[0, row * side + column] = torch.linspace(-3, 3, 12)
            changed = ((unet_output(model, own, data) - before).abs().sum(1)[0] > 1e-6).nonzero()
            found = [changed.amin(0), changed.amax(0) + 1]
            for axis, (start, length) in enumerate(((top + 16 * row, height), (left + 16 * column, width))):
                assert abs(int(found[0][axis]) - max(0, start)) <= odd[axis], (row, column, found)
                assert abs(int(found[1][axis]) - min(length, start + 16)) <= odd[axis], (row, column, found)


def unet_output(model: ImageDecoder, tokens: Tensor, data: dict[str, Tensor]) -> Tensor:
    """The U-Net's own output on the native grid, before data consistency spreads it along the phase encoding."""
    height, width = data["kspace"].shape[-2:]
    kept: list[Tensor] = []
    handle = model.unet.register_forward_hook(lambda module, inputs, output: kept.append(output))
    model(tokens, **data, image_shape=(height, width))
    handle.remove()
    return fourier.center_crop_or_pad(kept[0], (height, width))


def test_file_units_follow_the_scale_alone() -> None:
    model, data = decoder().eval(), measured()
    with torch.no_grad():
        image = model(some_tokens(), **data, image_shape=(32, 32))
        doubled = model(some_tokens(), **{**data, "scale": 2 * data["scale"]}, image_shape=(32, 32))
        torch.testing.assert_close(doubled, 2 * image)
        # and the network sees an image of unit size: twice the k-space is twice the image
        torch.testing.assert_close(
            model(some_tokens(), **{**data, "kspace": 2 * data["kspace"]}, image_shape=(32, 32)),
            2 * image,
            rtol=1e-4,
            atol=1e-8,
        )
        from_tokens = decoder(image_skip=False).eval()
        one, two = (
            from_tokens(some_tokens(), **{**data, "scale": data["scale"] * f}, image_shape=(32, 32)) for f in (1, 2)
        )
        torch.testing.assert_close(two, 2 * one)


def test_slices_of_a_batch_do_not_matter_to_each_other() -> None:
    model, data, tokens = decoder("full").eval(), measured(3), some_tokens(3)
    with torch.no_grad():
        together = model(tokens, **data, image_shape=(32, 32))
        one = model(tokens[1:2], **{name: value[1:2] for name, value in data.items()}, image_shape=(32, 32))
    torch.testing.assert_close(together[1:2], one, rtol=1e-4, atol=1e-8)


def test_sense_starts_from_its_image_and_ends_in_line_with_the_coils(monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained, the decoder is SENSE twice; trained, its image is what the last one makes of the U-Net's."""
    data = measured(height=33, width=45)
    maps = coils_module.center_coil_maps(data["kspace"], data["mask"])
    start = sense_module.sense(data["kspace"], data["mask"], maps, iterations=INITIAL_SENSE_ITERATIONS)
    calls: list[Tensor | None] = []
    original = sense_module.sense

    def keep(*inputs: Any, prior: Tensor | None = None, **steps: Any) -> Tensor:
        calls.append(prior)
        return original(*inputs, prior=prior, **steps)

    monkeypatch.setattr(sense_module, "sense", keep)
    model = decoder(sense=True, trained=False).eval()
    assert model.unet.stem.in_channels == 4 * 4
    with torch.no_grad():
        image = model(some_tokens(), **data, image_shape=(33, 45))
        torch.testing.assert_close(calls[1], start, rtol=1e-4, atol=1e-5)
        again = original(data["kspace"], data["mask"], maps, FINAL_SENSE_WEIGHT, FINAL_SENSE_ITERATIONS, prior=start)
        coils = sense_module.data_consistency(again, maps, data["kspace"], data["mask"])
        torch.testing.assert_close(image, fourier.rss(coils) * data["scale"][:, None, None], rtol=1e-4, atol=1e-8)
        trained = decoder(sense=True).eval()
        together = trained(some_tokens(), **data, image_shape=(32, 32))
        one = trained(some_tokens()[1:], **{name: value[1:] for name, value in data.items()}, image_shape=(32, 32))
    torch.testing.assert_close(together[1:], one, rtol=1e-3, atol=1e-8)
    assert not torch.allclose(calls[-1], start[1:])


def test_sense_learns_through_its_steps() -> None:
    model, data = decoder(sense=True), measured()
    model(some_tokens(), **data, image_shape=(32, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.unet.stem.weight.grad[:, 8:].abs().max() > 0  # type: ignore[index]


@pytest.mark.parametrize("sense", [False, True])
def test_noise_power_is_added_under_the_root(sense: bool) -> None:
    """In units of the measured image's mean power, wherever it lies; what is less than nothing is zero."""
    data = measured(height=33, width=45)
    plain, noisy = (decoder(sense=sense, trained=False).eval() for _ in range(2))
    maps = coils_module.center_coil_maps(data["kspace"], data["mask"])
    zero = coils_module.combine(fourier.ifft2c(data["kspace"]), maps)
    power = zero.abs().square().mean((-2, -1)) * data["scale"].square()
    image_shape = (30, 40)
    for added in (0.7, -1e6):
        with torch.no_grad():
            noisy.unet.head.bias.view(3, 4)[2] = added
            before, after = model_pair = (
                plain(None, **data, image_shape=image_shape),
                noisy(None, **data, image_shape=image_shape),
            )
        assert all(image.isfinite().all() for image in model_pair)
        expected = (before.square() + added * power[:, None, None]).clamp_min(0).sqrt()
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-9)


def test_without_the_skip_only_tokens_matter() -> None:
    model, data = decoder(image_skip=False).eval(), measured(width=45)
    with torch.no_grad():
        image = model(some_tokens(), **data, image_shape=(40, 30))
        other = model(some_tokens(), **{**measured(width=45, seed=9), "scale": data["scale"]}, image_shape=(40, 30))
        assert image.shape == (2, 40, 30) and torch.equal(image, other) and (image >= 0).all()
        assert not torch.equal(image, model(some_tokens().flip(1), **data, image_shape=(40, 30)))


def test_without_tokens_the_measured_data_is_enough() -> None:
    data = measured()
    plain = decoder(token_dim=0).eval()
    with torch.no_grad():
        assert plain(None, **data, image_shape=(32, 32)).isfinite().all()
        with pytest.raises(ValueError, match="built without image tokens"):
            plain(some_tokens(), **data, image_shape=(32, 32))
        model = decoder().eval()
        assert not torch.equal(
            model(None, **data, image_shape=(32, 32)), model(some_tokens(), **data, image_shape=(32, 32))
        )


@pytest.mark.parametrize("bilinear", [True, False])
def test_up_sampling_and_checkpointing(bilinear: bool) -> None:
    data, gradients = measured(), []
    for on in (False, True):
        model = decoder(use_bilinear_upsample=bilinear, activation_checkpointing=on).train()
        image = model(some_tokens(), **data, image_shape=(32, 32))
        (image / data["scale"][:, None, None]).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
    kinds = {type(up.conv) for up in model.unet.grow}
    assert kinds == {nn.Conv2d if bilinear else nn.ConvTranspose2d}


def test_autocast_keeps_images_in_float32() -> None:
    model, data = decoder().eval(), measured()
    with torch.no_grad():
        expected = model(some_tokens(), **data, image_shape=(32, 32))
        with torch.autocast("cpu", torch.bfloat16):
            image = model(some_tokens(), **data, image_shape=(32, 32))
    assert image.dtype == torch.float32
    assert (image - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"decoder_type": "medium"}, "decoder_type 'medium' is not one of full, lightweight"),
        ({"decoder_hidden_dim": 18}, "decoder_hidden_dim 18 is not a multiple of 4"),
        ({"img_size": 100}, "img_size 100 is not a multiple of 16"),
        ({"token_dim": 0, "image_skip": False}, "needs image tokens, the measured data"),
        ({"sense": True, "image_skip": False}, "sense needs the measured data"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        decoder(**{"trained": False, **changes})


@pytest.mark.parametrize("shape", [(2, 3, 12), (2, 4, 13), (2, 6, 12)])
def test_tokens_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image tokens \(2, .*\) are not \(B, 4, 12\)"):
        decoder()(torch.zeros(shape), **measured(), image_shape=(32, 32))


def test_zero_filled_is_the_rss_of_the_masked_data_in_file_units() -> None:
    data = measured(width=45)
    in_file_units = data["kspace"] * data["scale"][:, None, None, None]
    expected = fourier.center_crop_or_pad(fourier.rss(fourier.ifft2c(in_file_units)), (30, 45))
    torch.testing.assert_close(zero_filled(data["kspace"], data["scale"], (30, 45)), expected)


# ------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_fastmris_in_any_unit() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 20, 23, generator=generator)
    image = target + 0.1 * torch.rand(3, 20, 23, generator=generator)
    maximum = torch.tensor([1.0, 0.8, 2.0])
    loss = VolumeSSIMLoss()
    found = loss(image, target, maximum)
    expected = [SSIMLoss()(image[i][None, None], target[i][None, None], maximum[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss(image * 1e-12, target * 1e-12, maximum * 1e-12), found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss(target, target, maximum), torch.zeros(3), atol=1e-6, rtol=0)


def test_the_loss_is_the_official_metrics_up_to_its_border() -> None:
    from skimage.metrics import structural_similarity

    rng = np.random.default_rng(0)
    target = rng.random((40, 36)).astype(np.float32) * 1e-4
    image = target + 2e-5 * rng.random((40, 36)).astype(np.float32)
    official = structural_similarity(target, image, data_range=target.max())  # it leaves the same border out
    maximum = torch.tensor([float(target.max())])
    found = VolumeSSIMLoss()(torch.from_numpy(image)[None], torch.from_numpy(target)[None], maximum)
    assert 1 - float(found) == pytest.approx(official, abs=1e-4)


def test_the_loss_stays_in_float32_under_autocast() -> None:
    target = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0))
    loss = VolumeSSIMLoss()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(target * 1.01, target, torch.ones(1))
    assert inside.dtype == torch.float32 and torch.equal(inside, loss(target * 1.01, target, torch.ones(1)))


@pytest.mark.parametrize(("image_skip", "sense"), [(True, False), (True, True), (False, False)])
def test_gradients_are_finite_for_empty_slices(image_skip: bool, sense: bool) -> None:
    model, data = decoder(image_skip=image_skip, sense=sense).train(), measured()
    data["kspace"][0] = 0
    data["scale"][0] = 1.0
    image = model(some_tokens(), **data, image_shape=(32, 32))
    assert image.isfinite().all() and (not image_skip or image[0].max() < 1e-12)
    target = torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(0)) * 1e-4
    target[0] = 0
    losses = VolumeSSIMLoss()(image, target, torch.full((2,), 1e-4))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class ConstantBottleneck(nn.Module):
    """Drops the tokens at the bottleneck: 24 channels of ones."""

    def forward(self, joined: Tensor) -> Tensor:
        return torch.ones_like(joined[:, :24])


def test_a_volume_of_zeros_has_a_finite_loss() -> None:
    image = torch.zeros(2, 20, 20, requires_grad=True)
    losses = VolumeSSIMLoss()(image, torch.zeros(2, 20, 20), torch.zeros(2))
    torch.testing.assert_close(losses, torch.zeros(2))
    losses.sum().backward()
    assert image.grad is not None and image.grad.isfinite().all()
