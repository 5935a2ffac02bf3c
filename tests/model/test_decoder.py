"""The image decoder: sizes, data consistency, positions of tokens, units, gradients; and the SSIM loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
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
    if trained:  # the head is initialized with zeros
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
    """Coil images before the decoder takes their root sum of squares."""
    outputs: list[Tensor] = []
    original = sense_module.data_consistency

    def record(*inputs: Tensor) -> Tensor:
        outputs.append(original(*inputs))
        return outputs[-1]

    with monkeypatch.context() as patch:
        patch.setattr(sense_module, "data_consistency", record)
        call()
    return outputs[0]


@pytest.mark.parametrize(("decoder_type", "millions"), [("full", 160), ("lightweight", 80)])
def test_parameter_counts_match_the_paper_within_2_percent(decoder_type: str, millions: int) -> None:
    with torch.device("meta"):
        model = ImageDecoder(decoder_type)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.02)


@pytest.mark.parametrize("decoder_type", ["full", "lightweight"])
@pytest.mark.parametrize(
    ("height", "width", "image_shape"), [(32, 32, (32, 32)), (32, 27, (32, 27)), (33, 45, (30, 29)), (64, 40, (32, 36))]
)
def test_output_is_the_evaluated_crop(decoder_type: str, height: int, width: int, image_shape: tuple[int, int]) -> None:
    model = decoder(decoder_type).eval()
    with torch.no_grad():
        image = model(some_tokens(), **measured(height=height, width=width), image_shape=image_shape)
    assert image.shape == (2, *image_shape) and image.dtype == torch.float32
    assert image.isfinite().all() and (image >= 0).all()


@pytest.mark.parametrize("width", [32, 27, 45])
def test_untrained_decoder_is_data_consistency_of_the_zero_filled_image(width: int) -> None:
    model = decoder(trained=False).eval()
    data = measured(width=width)
    maps = coils_module.center_coil_maps(data["kspace"], data["mask"])
    combined = coils_module.combine(fourier.ifft2c(data["kspace"]), maps)
    coil_images = sense_module.data_consistency(combined, maps, data["kspace"], data["mask"])
    expected = fourier.center_crop_or_pad(fourier.rss(coil_images), (30, 25)) * data["scale"][:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(model(some_tokens(), **data, image_shape=(30, 25)), expected, rtol=1e-4, atol=1e-8)


def test_measured_lines_are_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = decoder().eval(), measured(width=45)
    with torch.no_grad():
        images = coil_images_before_rss(lambda: model(some_tokens(), **data, image_shape=(32, 45)), monkeypatch)
        untrained = coil_images_before_rss(
            lambda: decoder(trained=False)(None, **data, image_shape=(32, 45)), monkeypatch
        )
    output = fourier.fft2c(images)
    for row, mask in enumerate(data["mask"]):
        torch.testing.assert_close(output[row][..., mask], data["kspace"][row][..., mask], rtol=1e-4, atol=1e-4)
    assert (images - untrained).abs().max() > 1e-2  # the network changes the other lines


def make_pointwise(model: ImageDecoder) -> None:
    """Remove the norms and cut convolutions to their centre, so that a token changes its own patch alone."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ChannelNorm):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3):
                center = child.weight.data[..., 1:2, 1:2].clone()
                child.weight.data.zero_()
                child.weight.data[..., 1:2, 1:2] = center


@pytest.mark.parametrize(
    ("img_size", "height", "width"), [(128, 128, 128), (128, 128, 140), (128, 145, 109), (64, 96, 128), (32, 90, 63)]
)
def test_tokens_change_the_pixels_of_their_own_patches(img_size: int, height: int, width: int) -> None:
    model = decoder(img_size=img_size, use_bilinear_upsample=False).eval()
    make_pointwise(model)
    side = img_size // 16
    top, left = ((n - img_size) // 2 for n in (height, width))  # start of the ViT's crop or padding
    tolerance = ((height - img_size) % 2, (width - img_size) % 2)  # an odd difference shifts the crop by half a pixel
    data = measured(1, 2, height, width)
    zeros = torch.zeros(1, side * side, 12)
    with torch.no_grad():
        before = unet_output(model, zeros, data)
        for row, column in ((0, 0), (1, side - 1), (side - 1, 1), (side // 2, 0)):
            tokens = zeros.clone()
            tokens[0, row * side + column] = torch.linspace(-3, 3, 12)
            changed = ((unet_output(model, tokens, data) - before).abs().sum(1)[0] > 1e-6).nonzero()
            starts, stops = changed.amin(0), changed.amax(0) + 1
            for axis, (start, length) in enumerate(((top + 16 * row, height), (left + 16 * column, width))):
                assert abs(int(starts[axis]) - max(0, start)) <= tolerance[axis], (row, column, starts)
                assert abs(int(stops[axis]) - min(length, start + 16)) <= tolerance[axis], (row, column, stops)


def unet_output(model: ImageDecoder, tokens: Tensor, data: dict[str, Tensor]) -> Tensor:
    """The U-Net's output on the native grid, before data consistency spreads it along the phase encoding."""
    height, width = data["kspace"].shape[-2:]
    outputs: list[Tensor] = []
    handle = model.unet.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(tokens, **data, image_shape=(height, width))
    handle.remove()
    return fourier.center_crop_or_pad(outputs[0], (height, width))


def test_output_scales_with_scale_and_kspace() -> None:
    model, data = decoder().eval(), measured()
    with torch.no_grad():
        image = model(some_tokens(), **data, image_shape=(32, 32))
        for name in ("scale", "kspace"):
            doubled = model(some_tokens(), **{**data, name: 2 * data[name]}, image_shape=(32, 32))
            torch.testing.assert_close(doubled, 2 * image, rtol=1e-4, atol=1e-8)
        from_tokens = decoder(image_skip=False).eval()
        image = from_tokens(some_tokens(), **data, image_shape=(32, 32))
        doubled = from_tokens(some_tokens(), **{**data, "scale": 2 * data["scale"]}, image_shape=(32, 32))
        torch.testing.assert_close(doubled, 2 * image)


@pytest.mark.parametrize(("decoder_type", "sense"), [("full", False), ("lightweight", True)])
def test_slices_of_a_batch_are_independent(decoder_type: str, sense: bool) -> None:
    model, data, tokens = decoder(decoder_type, sense=sense).eval(), measured(3), some_tokens(3)
    with torch.no_grad():
        together = model(tokens, **data, image_shape=(32, 32))
        separate = model(tokens[1:2], **{name: value[1:2] for name, value in data.items()}, image_shape=(32, 32))
    torch.testing.assert_close(together[1:2], separate, rtol=1e-3, atol=1e-8)


def test_sense_decoder_solves_before_and_after_the_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained, the decoder is two SENSE solves; trained, the second solve's prior is the U-Net's image."""
    data = measured(height=33, width=45)
    kspace, mask = data["kspace"], data["mask"]
    maps = coils_module.center_coil_maps(kspace, mask)
    initial = sense_module.sense(kspace, mask, maps, iterations=INITIAL_SENSE_ITERATIONS)
    priors: list[Tensor | None] = []
    original = sense_module.sense

    def record(*inputs: Any, prior: Tensor | None = None, **options: Any) -> Tensor:
        priors.append(prior)
        return original(*inputs, prior=prior, **options)

    monkeypatch.setattr(sense_module, "sense", record)
    with torch.no_grad():
        image = decoder(sense=True, trained=False).eval()(some_tokens(), **data, image_shape=(33, 45))
        torch.testing.assert_close(priors[1], initial, rtol=1e-4, atol=1e-5)
        final = original(kspace, mask, maps, FINAL_SENSE_WEIGHT, FINAL_SENSE_ITERATIONS, prior=initial)
        coil_images = sense_module.data_consistency(final, maps, kspace, mask)
        expected = fourier.rss(coil_images) * data["scale"][:, None, None]
        torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-8)
        decoder(sense=True).eval()(some_tokens(), **data, image_shape=(32, 32))
    assert priors[-1] is not None and not torch.allclose(priors[-1], initial)


def test_gradients_pass_through_the_sense_solves() -> None:
    model, data = decoder(sense=True), measured()
    model(some_tokens(), **data, image_shape=(32, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.unet.stem.weight.grad[:, 8:].abs().max() > 0  # type: ignore[index]


@pytest.mark.parametrize("sense", [False, True])
def test_noise_power_is_added_under_the_root(sense: bool) -> None:
    """Its unit is the mean power of the measured image; a negative sum is clamped to zero."""
    data = measured(height=33, width=45)
    noiseless, noisy = (decoder(sense=sense, trained=False).eval() for _ in range(2))
    maps = coils_module.center_coil_maps(data["kspace"], data["mask"])
    zero = coils_module.combine(fourier.ifft2c(data["kspace"]), maps)
    power = zero.abs().square().mean((-2, -1)) * data["scale"].square()
    image_shape = (30, 40)
    for added in (0.7, -1e6):
        with torch.no_grad():
            noisy.unet.head.bias.view(3, 4)[2] = added
            before, after = (
                noiseless(None, **data, image_shape=image_shape),
                noisy(None, **data, image_shape=image_shape),
            )
        assert before.isfinite().all() and after.isfinite().all()
        expected = (before.square() + added * power[:, None, None]).clamp_min(0).sqrt()
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-9)


def test_without_image_skip_only_tokens_matter() -> None:
    model, data = decoder(image_skip=False).eval(), measured(width=45)
    with torch.no_grad():
        image = model(some_tokens(), **data, image_shape=(40, 30))
        other = model(some_tokens(), **{**measured(width=45, seed=9), "scale": data["scale"]}, image_shape=(40, 30))
        assert image.shape == (2, 40, 30) and torch.equal(image, other) and (image >= 0).all()
        assert not torch.equal(image, model(some_tokens().flip(1), **data, image_shape=(40, 30)))


def test_decoder_without_tokens_uses_the_measured_data_alone() -> None:
    data = measured()
    model = decoder(token_dim=0).eval()
    with torch.no_grad():
        assert model(None, **data, image_shape=(32, 32)).isfinite().all()
        with pytest.raises(ValueError, match="built without image tokens"):
            model(some_tokens(), **data, image_shape=(32, 32))


def test_zero_tokens_differ_from_tokens() -> None:
    data, model = measured(), decoder().eval()
    with torch.no_grad():
        assert not torch.equal(
            model(None, **data, image_shape=(32, 32)), model(some_tokens(), **data, image_shape=(32, 32))
        )


@pytest.mark.parametrize("bilinear", [True, False])
def test_activation_checkpointing_keeps_every_gradient(bilinear: bool) -> None:
    data, gradients = measured(), []
    for checkpointing in (False, True):
        model = decoder(use_bilinear_upsample=bilinear, activation_checkpointing=checkpointing).train()
        image = model(some_tokens(), **data, image_shape=(32, 32))
        (image / data["scale"][:, None, None]).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
    assert {type(up.conv) for up in model.unet.grow} == {nn.Conv2d if bilinear else nn.ConvTranspose2d}


def test_autocast_keeps_images_in_float32() -> None:
    model, data = decoder().eval(), measured()
    with torch.no_grad():
        expected = model(some_tokens(), **data, image_shape=(32, 32))
        with torch.autocast("cpu", torch.bfloat16):
            image = model(some_tokens(), **data, image_shape=(32, 32))
    assert image.dtype == torch.float32
    assert (image - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_type": "medium"}, "decoder_type 'medium' is not one of full, lightweight"),
        ({"decoder_hidden_dim": 18}, "decoder_hidden_dim 18 is not a multiple of 4"),
        ({"img_size": 100}, "img_size 100 is not a multiple of 16"),
        ({"token_dim": 0, "image_skip": False}, "needs image tokens, the measured data"),
        ({"sense": True, "image_skip": False}, "sense needs the measured data"),
    ],
)
def test_invalid_parameters_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder(**{"trained": False, **changes})


@pytest.mark.parametrize("shape", [(2, 3, 12), (2, 4, 13), (2, 6, 12)])
def test_tokens_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image tokens \(2, .*\) are not \(B, 4, 12\)"):
        decoder()(torch.zeros(shape), **measured(), image_shape=(32, 32))


def test_zero_filled_is_the_rss_in_file_units() -> None:
    data = measured(width=45)
    in_file_units = data["kspace"] * data["scale"][:, None, None, None]
    expected = fourier.center_crop_or_pad(fourier.rss(fourier.ifft2c(in_file_units)), (30, 45))
    torch.testing.assert_close(zero_filled(data["kspace"], data["scale"], (30, 45)), expected)


# ------------------------------------------------------------------------------------------------- loss


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
