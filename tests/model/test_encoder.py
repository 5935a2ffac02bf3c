"""The k-space encoder: fastMRI's VarNet exactly, shapes, gradients, empty coils."""

from pathlib import Path

import fastmri
import pytest
import torch
from fastmri.models import VarNet
from torch import Tensor

from mrilib.model.encoder import INITIAL_TOKEN_SCALE, ConstantPrefix, KSpaceEncoder
from mrilib.physics import coils as coils_module
from mrilib.physics import fourier

SMALL = {
    "output_dim": 24, "img_size": 32, "vit_embed_dim": 16, "vit_num_layers": 2, "vit_num_heads": 2,
    "num_cascades": 2, "chans": 3, "pools": 2, "sens_chans": 2, "sens_pools": 2,
}  # fmt: skip


def encoder(**changes: int | bool) -> KSpaceEncoder:
    torch.manual_seed(0)
    model = KSpaceEncoder(**{**SMALL, **changes})
    with torch.no_grad():  # larger weights than it starts with show a mistake sooner
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model


def measured(batch: int = 2, coils: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Masked k-space of unit root mean square, its energy in the centre as anatomy's is, and a mask a slice."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(batch, coils, height, width, dtype=torch.complex64, generator=generator)
    y = (torch.arange(height) - height // 2)[:, None] / height
    x = (torch.arange(width) - width // 2) / width
    full = full / (0.02 + y**2 + x**2)
    mask = torch.rand(batch, width, generator=generator) < 0.4
    mask[:, width // 2 - 3 : width // 2 + 4] = True
    masked = torch.where(mask[:, None, None], full, 0)
    return masked / masked.abs().square().mean((1, 2, 3), keepdim=True).sqrt(), mask


def test_the_full_size_varnet_has_the_published_parameters() -> None:
    with torch.device("meta"):
        model = KSpaceEncoder()
    assert sum(p.numel() for p in model.varnet.parameters()) == 29_936_966
    assert model.num_tokens == 400 and model.projection.in_features == 768 and model.projection.out_features == 2048
    assert len(model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer) == 6


@pytest.mark.parametrize(
    ("coils", "height", "width"), [(2, 32, 32), (5, 32, 27), (3, 33, 45), (4, 20, 70), (1, 64, 40)]
)
def test_tokens_have_one_shape_for_all_coils_and_sizes(coils: int, height: int, width: int) -> None:
    model = encoder().eval()
    with torch.no_grad():
        tokens = model(*measured(2, coils, height, width))
    assert tokens.shape == (2, 4 + 2, 24) and tokens.dtype == torch.float32 and tokens.isfinite().all()
    assert torch.equal(tokens[:, 0], model.start.expand(2, -1)) and torch.equal(tokens[:, -1], model.end.expand(2, -1))
    assert not torch.allclose(tokens[0, 1:-1], tokens[1, 1:-1])


@pytest.mark.parametrize("width", [32, 27])
def test_the_refined_image_is_that_of_fastmris_varnet(width: int) -> None:
    model = encoder().eval()
    data, mask = measured(2, 4, 32, width)
    with torch.no_grad():
        expected = model.varnet(torch.view_as_real(data), mask[:, None, None, :, None])
        maps = model.varnet.sens_net(torch.view_as_real(data), mask[:, None, None, :, None])
        steps = torch.view_as_real(data)
        for cascade in model.varnet.cascades:
            steps = cascade(steps, torch.view_as_real(data), mask[:, None, None, :, None], maps)
        coil_images = fourier.ifft2c(torch.view_as_complex(steps))
        torch.testing.assert_close(fourier.rss(coil_images), expected)
        combined = coils_module.combine(coil_images, torch.view_as_complex(maps))
        torch.testing.assert_close(model.refined_image(data, mask), combined)


def test_slices_of_a_batch_do_not_matter_to_each_other() -> None:
    model = encoder().eval()
    data, mask = measured(3)
    with torch.no_grad():
        together = model(data, mask)
        alone = torch.cat([model(data[i : i + 1], mask[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_tokens_are_the_projected_patches_of_the_vit_without_its_class_token() -> None:
    model = encoder().eval()
    with torch.no_grad():
        hidden = model.vit(pixel_values=model.pixels(*measured())).last_hidden_state  # transformers' own forward
        assert hidden.shape == (2, 1 + 4, 16)
        torch.testing.assert_close(model(*measured())[:, 1:-1], model.projection(hidden[:, 1:]))


def test_tokens_do_not_depend_on_the_phase_or_the_scale_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder().eval()
    data, mask = measured()
    with torch.no_grad():
        (image, start), tokens = model._refine(data, mask), model(data, mask)
        turn = torch.polar(torch.tensor(1.0), torch.tensor(0.7))
        monkeypatch.setattr(model, "_refine", lambda kspace, mask: (3 * image * turn, start * turn))
        torch.testing.assert_close(model(data, mask), tokens, rtol=1e-3, atol=1e-3)


def test_tokens_are_in_row_major_order_of_their_patches() -> None:
    """Only the patch embeddings are looked at: attention spreads everything."""
    embed = encoder().vit.embeddings.patch_embeddings
    pixels = torch.zeros(1, 2, 32, 32)
    pixels[:, :, :16, 16:] = torch.rand(1, 2, 16, 16)
    with torch.no_grad():
        changed = (embed(pixels) - embed(torch.zeros_like(pixels))).abs().amax(-1)[0]
    assert (changed > 0).tolist() == [False, True, False, False]
    values = embed(torch.randn(2, 2, 32, 32))
    torch.testing.assert_close(values.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)  # the description's LayerNorm
    torch.testing.assert_close(values.var(-1, unbiased=False), torch.ones(2, 4), atol=1e-2, rtol=0)


def test_activation_checkpointing_changes_no_gradient() -> None:
    data, mask = measured()
    gradients = []
    for on in (False, True):
        model = encoder(activation_checkpointing=on).train()
        tokens = model(data, mask)
        tokens.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_gradient_reaches_every_parameter() -> None:
    model = encoder().train()
    data, mask = measured()
    tokens = model(data, mask)
    (tokens * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    nothing = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # the first cascade's data consistency compares the data with itself
    assert nothing == {"varnet.cascades.0.dc_weight"}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("rest", [0.0, 1e-44, 1e-9])
def test_empty_coils_and_slices_go_around_the_varnet(rest: float) -> None:
    model = encoder().eval()
    data, mask = measured(3, 4)
    whole = data.clone()
    data[0, 1] *= rest
    data[1, [0, 3]] *= rest
    data[2] = 0
    with torch.no_grad():
        image = model.refined_image(data, mask)
        tokens = model(data, mask)
        alone = model.refined_image(whole[:1, [0, 2, 3]], mask[:1])
    assert torch.view_as_real(image).isfinite().all() and tokens.isfinite().all()
    torch.testing.assert_close(image[:1], alone)  # as if the coil were not there
    assert not image[2].any()
    model.train()
    model(data, mask).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compression_beyond_the_rank_makes_no_nan() -> None:
    model = encoder().eval()
    data, mask = measured(1, 2)
    mixed = torch.cat([data[0], data[0] * 0.5, torch.zeros(16, 32, 32), data[0] * 1j])
    compressed = coils_module.compress_coils(mixed, 16)
    with torch.no_grad():
        assert model(compressed[None], mask).isfinite().all()


def test_autocast_keeps_the_fourier_transforms_in_float32() -> None:
    model = encoder().eval()
    data, mask = measured()
    with torch.no_grad():
        expected = model.refined_image(data, mask)
        with torch.autocast("cpu", torch.bfloat16):
            image, tokens = model.refined_image(data, mask), model(data, mask)
    assert image.dtype == torch.complex64 and tokens.dtype == torch.float32 and tokens.isfinite().all()
    assert (image - expected).norm() < 0.1 * expected.norm()


def test_first_tokens_are_small_beside_the_backbones_embeddings() -> None:
    model = encoder()
    model.match_embeddings(0.3)
    with torch.no_grad():
        tokens = model(*measured())
    assert tokens[:, 1:-1].square().mean().sqrt().item() == pytest.approx(INITIAL_TOKEN_SCALE * 0.3, rel=0.3)
    assert torch.cat([model.start, model.end]).square().mean().sqrt().item() == pytest.approx(0.3, rel=0.4)


def test_published_weights_load_strictly(tmp_path: Path) -> None:
    source, model = encoder(), encoder()
    with torch.no_grad():
        for parameter in source.varnet.parameters():
            parameter.add_(1)
    state = source.varnet.state_dict()
    torch.save(state, tmp_path / "varnet.pt")
    model.load_varnet(tmp_path / "varnet.pt")
    assert all(torch.equal(state[name], value) for name, value in model.varnet.state_dict().items())

    misfits = [{**state, "extra": torch.zeros(1)}, dict(list(state.items())[1:]), encoder(chans=4).varnet.state_dict()]
    for misfit in [*misfits, [1, 2], {"state_dict": state}]:
        torch.save(misfit, tmp_path / "misfit.pt")
        with pytest.raises(ValueError, match=r"varnet_weights: .*misfit.pt does not fit the encoder's VarNet: \S"):
            model.load_varnet(tmp_path / "misfit.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match=r"varnet_weights: .*text.pt holds more than plain tensors, or is damaged"):
        model.load_varnet(tmp_path / "text.pt")


def test_the_published_layout_loads_strictly_and_gives_what_fastmris_varnet_gives(tmp_path: Path) -> None:
    """At full size: fastMRI's own VarNet with the sizes of brain_leaderboard_state_dict.pt, saved and loaded."""
    torch.manual_seed(3)
    published = VarNet(num_cascades=12, sens_chans=8, sens_pools=4, chans=18, pools=4).eval()
    torch.save(published.state_dict(), tmp_path / "brain_leaderboard_state_dict.pt")
    model = KSpaceEncoder(24, 32, 16, 1, 2).eval()
    model.load_varnet(tmp_path / "brain_leaderboard_state_dict.pt")
    data, mask = measured(2, 3, 40, 36)
    with torch.no_grad():
        real, line = torch.view_as_real(data), mask[:, None, None, :, None]
        theirs = published(real, line)
        assert torch.equal(model.varnet(real, line), theirs)
        # and the encoder's own image is the coil combination of the very same refined coil images
        maps = torch.view_as_complex(published.sens_net(real, line))
        refined = real
        for cascade in published.cascades:
            refined = cascade(refined, real, line, torch.view_as_real(maps))
        coil_images = fourier.ifft2c(torch.view_as_complex(refined))
        torch.testing.assert_close(fastmri.rss(fastmri.complex_abs(torch.view_as_real(coil_images)), dim=1), theirs)
        # 12 cascades of random weights pass rounding on, grown
        combined = coils_module.combine(coil_images, maps)
        torch.testing.assert_close(model.refined_image(data, mask), combined, rtol=1e-4, atol=1e-3)


def test_a_size_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="img_size 40 is not a multiple of 16"):
        encoder(img_size=40)


def test_the_control_is_as_long_and_sees_nothing() -> None:
    torch.manual_seed(0)
    control = ConstantPrefix(400, 64, 0.2)
    data, mask = measured()
    tokens = control(data, mask)
    assert tokens.requires_grad and tokens.shape == (2, 402, 64)
    assert torch.equal(tokens, control(measured(seed=5)[0], ~mask)) and torch.equal(tokens[0], tokens[1])
    assert tokens.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.05)
    tokens.sum().backward()
    assert control.prefix.grad is not None and (control.prefix.grad == 2).all()


@pytest.mark.parametrize("map_network", [True, False])
def test_sensitivity_maps_start_as_the_images_of_the_centre_lines(map_network: bool) -> None:
    torch.manual_seed(0)
    width = 30
    model = KSpaceEncoder(**{**SMALL, "sens_chans": 4, "map_network": map_network})
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(1, 3, 32, width, dtype=torch.complex64, generator=generator)
    mask = torch.zeros(1, width, dtype=torch.bool)
    mask[:, width // 2 - 4 : width // 2 + 4] = True
    data = data * mask[:, None, None]
    with torch.no_grad():
        maps = model.varnet.sens_net(torch.view_as_real(data), mask[:, None, None, :, None])
    maps = torch.view_as_complex(maps.contiguous())
    images = fourier.ifft2c(data)
    expected = images / fourier.rss(images).unsqueeze(-3)
    if not map_network:
        torch.testing.assert_close(maps, expected)
    # NormUnet takes each part's mean off and puts it back; the instance norms inside find it gone already.
    assert (maps * expected.conj()).real.sum(1).mean() > 0.99


def test_without_a_map_network_there_is_nothing_to_train_in_the_maps() -> None:
    model = encoder(map_network=False)
    assert not list(model.varnet.sens_net.parameters())
    model(*measured()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
