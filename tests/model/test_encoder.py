"""The k-space encoder: agreement with fastMRI's VarNet, shapes, gradients, empty coils."""

from pathlib import Path

import pytest
import torch
from fastmri.models import VarNet
from torch import Tensor

from mrilib.model.encoder import INITIAL_TOKEN_SCALE, ConstantPrefix, KSpaceEncoder, varnet_coil_maps
from mrilib.physics import coils as coils_module
from mrilib.physics import fourier

SMALL = {
    "output_dim": 24, "img_size": 32, "vit_embed_dim": 16, "vit_num_layers": 2, "vit_num_heads": 2,
    "num_cascades": 2, "chans": 3, "pools": 2, "sens_chans": 2, "sens_pools": 2,
}  # fmt: skip


def encoder(**changes: int | bool) -> KSpaceEncoder:
    torch.manual_seed(0)
    model = KSpaceEncoder(**{**SMALL, **changes})
    with torch.no_grad():  # weights larger than the initial ones make errors visible
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model


def measured(batch: int = 2, coils: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Masked k-space of unit root mean square with most energy in the centre, and a mask for each slice."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(batch, coils, height, width, dtype=torch.complex64, generator=generator)
    y = (torch.arange(height) - height // 2)[:, None] / height
    x = (torch.arange(width) - width // 2) / width
    full = full / (0.02 + y**2 + x**2)
    mask = torch.rand(batch, width, generator=generator) < 0.4
    mask[:, width // 2 - 3 : width // 2 + 4] = True
    masked = torch.where(mask[:, None, None], full, 0)
    return masked / masked.abs().square().mean((1, 2, 3), keepdim=True).sqrt(), mask


def fastmri_inputs(kspace: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.view_as_real(kspace), mask[:, None, None, :, None]


def test_full_size_matches_the_published_varnet() -> None:
    with torch.device("meta"):
        model = KSpaceEncoder()
    assert sum(p.numel() for p in model.varnet.parameters()) == 29_936_966
    assert model.projection.in_features == 768 and model.projection.out_features == 2048
    assert len(model.vit.layers) == 6


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
def test_refined_image_equals_fastmris_varnet(width: int) -> None:
    model = encoder().eval()
    kspace, mask = measured(2, 4, 32, width)
    data, lines = fastmri_inputs(kspace, mask)
    with torch.no_grad():
        maps, refined = model.varnet.sens_net(data, lines), data
        for cascade in model.varnet.cascades:
            refined = cascade(refined, data, lines, maps)
        coil_images = fourier.ifft2c(torch.view_as_complex(refined))
        torch.testing.assert_close(fourier.rss(coil_images), model.varnet(data, lines))
        combined = coils_module.combine(coil_images, torch.view_as_complex(maps))
        torch.testing.assert_close(model.refined_image(kspace, mask), combined)


@pytest.mark.parametrize("width", [32, 27])
def test_coil_maps_equal_those_of_fastmris_map_network(width: int) -> None:
    """The number of centre lines differs from slice to slice; fastMRI takes one line if all are sampled."""
    model = encoder().eval()
    kspace, mask = measured(4, 3, 32, width)
    mask[1] = torch.arange(width) == width // 2
    mask[2] = True
    mask[3] = (torch.arange(width) - width // 2).abs() < 6
    with torch.no_grad():
        expected = model.varnet.sens_net(*fastmri_inputs(kspace, mask))
        assert torch.equal(varnet_coil_maps(model.varnet.sens_net, kspace, mask), torch.view_as_complex(expected))


def test_slices_of_a_batch_are_independent() -> None:
    model = encoder().eval()
    kspace, mask = measured(3)
    with torch.no_grad():
        together = model(kspace, mask)
        separate = torch.cat([model(kspace[i : i + 1], mask[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, separate, rtol=1e-4, atol=1e-5)


def test_tokens_are_the_projected_vit_output_without_its_class_token() -> None:
    model = encoder().eval()
    with torch.no_grad():
        pixels = model.pixels(model.phase_corrected_image(*measured()))
        hidden = model.vit(pixel_values=pixels).last_hidden_state  # transformers' own forward
        assert hidden.shape == (2, 1 + 4, 16)
        torch.testing.assert_close(model(*measured())[:, 1:-1], model.projection(hidden[:, 1:]))


def test_tokens_do_not_depend_on_background_phase_and_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder().eval()
    kspace, mask = measured()
    with torch.no_grad():
        (image, initial), tokens = model._refine(kspace, mask), model(kspace, mask)
        phase = torch.polar(torch.tensor(1.0), torch.tensor(0.7))
        monkeypatch.setattr(model, "_refine", lambda kspace, mask: (3 * image * phase, initial * phase))
        torch.testing.assert_close(model(kspace, mask), tokens, rtol=1e-3, atol=1e-3)


def test_patch_embeddings_are_in_row_major_order_and_normalised() -> None:
    embed = encoder().vit.embeddings.patch_embeddings
    pixels = torch.zeros(1, 2, 32, 32)
    pixels[:, :, :16, 16:] = torch.rand(1, 2, 16, 16)
    with torch.no_grad():
        change = (embed(pixels) - embed(torch.zeros_like(pixels))).abs().amax(-1)[0]
    assert (change > 0).tolist() == [False, True, False, False]
    values = embed(torch.randn(2, 2, 32, 32))
    torch.testing.assert_close(values.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.var(-1, unbiased=False), torch.ones(2, 4), atol=1e-2, rtol=0)


def test_activation_checkpointing_keeps_every_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = encoder(activation_checkpointing=checkpointing).train()
        model(*measured()).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_gradient_reaches_every_parameter() -> None:
    model = encoder().train()
    tokens = model(*measured())
    (tokens * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"varnet.cascades.0.dc_weight"}  # the first data consistency compares the data with itself
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("factor", [0.0, 1e-44, 1e-9])
def test_empty_coils_and_slices_bypass_the_varnet(factor: float) -> None:
    model = encoder().eval()
    kspace, mask = measured(3, 4)
    full = kspace.clone()
    kspace[0, 1] *= factor
    kspace[1, [0, 3]] *= factor
    kspace[2] = 0
    with torch.no_grad():
        image = model.refined_image(kspace, mask)
        tokens = model(kspace, mask)
        three_coils = model.refined_image(full[:1, [0, 2, 3]], mask[:1])
    assert torch.view_as_real(image).isfinite().all() and tokens.isfinite().all()
    torch.testing.assert_close(image[:1], three_coils)
    assert not image[2].any()
    model.train()
    model(kspace, mask).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_autocast_keeps_fourier_transforms_in_float32() -> None:
    model = encoder().eval()
    kspace, mask = measured()
    with torch.no_grad():
        expected = model.refined_image(kspace, mask)
        with torch.autocast("cpu", torch.bfloat16):
            image, tokens = model.refined_image(kspace, mask), model(kspace, mask)
    assert image.dtype == torch.complex64 and tokens.dtype == torch.float32 and tokens.isfinite().all()
    assert (image - expected).norm() < 0.1 * expected.norm()


def test_initial_tokens_are_small_relative_to_word_embeddings() -> None:
    model = encoder()
    model.match_embeddings(0.3)
    with torch.no_grad():
        tokens = model(*measured())
    assert tokens[:, 1:-1].square().mean().sqrt().item() == pytest.approx(INITIAL_TOKEN_SCALE * 0.3, rel=0.3)
    assert torch.cat([model.start, model.end]).square().mean().sqrt().item() == pytest.approx(0.3, rel=0.4)


def test_varnet_weights_load_strictly(tmp_path: Path) -> None:
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


def test_published_layout_loads_at_full_size(tmp_path: Path) -> None:
    """fastMRI's VarNet with the sizes of brain_leaderboard_state_dict.pt, saved and loaded."""
    torch.manual_seed(3)
    published = VarNet(num_cascades=12, sens_chans=8, sens_pools=4, chans=18, pools=4).eval()
    torch.save(published.state_dict(), tmp_path / "brain_leaderboard_state_dict.pt")
    model = KSpaceEncoder(24, 32, 16, 1, 2).eval()
    model.load_varnet(tmp_path / "brain_leaderboard_state_dict.pt")
    inputs = fastmri_inputs(*measured(2, 3, 40, 36))
    with torch.no_grad():
        assert torch.equal(model.varnet(*inputs), published(*inputs))


def test_img_size_must_be_a_multiple_of_the_patch() -> None:
    with pytest.raises(ValueError, match="img_size 40 is not a multiple of 16"):
        encoder(img_size=40)


def test_constant_prefix_ignores_the_scan() -> None:
    torch.manual_seed(0)
    prefix = ConstantPrefix(400, 64, 0.2)
    kspace, mask = measured()
    tokens = prefix(kspace, mask)
    assert tokens.shape == (2, 402, 64)
    assert torch.equal(tokens, prefix(measured(seed=5)[0], ~mask)) and torch.equal(tokens[0], tokens[1])
    assert tokens.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.05)
    tokens.sum().backward()
    assert prefix.prefix.grad is not None and (prefix.prefix.grad == 2).all()


@pytest.mark.parametrize("map_network", [True, False])
def test_initial_coil_maps_are_the_images_of_the_centre_lines(map_network: bool) -> None:
    torch.manual_seed(0)
    width = 30
    model = KSpaceEncoder(**{**SMALL, "sens_chans": 4, "map_network": map_network})
    kspace = torch.randn(1, 3, 32, width, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, width, dtype=torch.bool)
    mask[:, width // 2 - 4 : width // 2 + 4] = True
    kspace = kspace * mask[:, None, None]
    with torch.no_grad():
        maps = model._coil_maps(kspace, mask)
    images = fourier.ifft2c(kspace)
    expected = images / fourier.rss(images).unsqueeze(-3)
    if not map_network:
        torch.testing.assert_close(maps, expected)
    # With the network the agreement is close, not exact: its instance norms see inputs that NormUnet has normalised.
    assert (maps * expected.conj()).real.sum(1).mean() > 0.99


def test_without_a_map_network_coil_maps_have_no_parameters() -> None:
    model = encoder(map_network=False)
    assert not list(model.varnet.sens_net.parameters())
    model(*measured()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
