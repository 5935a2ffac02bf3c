"""The SSIM loss equals fastMRI's, in any unit and precision."""

import numpy as np
import pytest
import torch
from fastmri.losses import SSIMLoss

from mrilib.training.losses import VolumeSSIMLoss


def test_loss_equals_fastmris_in_any_unit() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 20, 23, generator=generator)
    image = target + 0.1 * torch.rand(3, 20, 23, generator=generator)
    maximum = torch.tensor([1.0, 0.8, 2.0])
    loss = VolumeSSIMLoss()
    losses = loss(image, target, maximum)
    expected = [SSIMLoss()(image[i][None, None], target[i][None, None], maximum[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss(image * 1e-12, target * 1e-12, maximum * 1e-12), losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss(target, target, maximum), torch.zeros(3), atol=1e-6, rtol=0)


def test_loss_equals_the_official_metric() -> None:
    from skimage.metrics import structural_similarity

    rng = np.random.default_rng(0)
    target = rng.random((40, 36)).astype(np.float32) * 1e-4
    image = target + 2e-5 * rng.random((40, 36)).astype(np.float32)
    official = structural_similarity(target, image, data_range=target.max())  # without border, like the loss
    maximum = torch.tensor([float(target.max())])
    loss = VolumeSSIMLoss()(torch.from_numpy(image)[None], torch.from_numpy(target)[None], maximum)
    assert 1 - float(loss) == pytest.approx(official, abs=1e-4)


def test_loss_stays_in_float32_under_autocast() -> None:
    target = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0))
    loss = VolumeSSIMLoss()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(target * 1.01, target, torch.ones(1))
    assert inside.dtype == torch.float32 and torch.equal(inside, loss(target * 1.01, target, torch.ones(1)))


def test_loss_of_an_all_zero_volume_is_finite() -> None:
    image = torch.zeros(2, 20, 20, requires_grad=True)
    losses = VolumeSSIMLoss()(image, torch.zeros(2, 20, 20), torch.zeros(2))
    torch.testing.assert_close(losses, torch.zeros(2))
    losses.sum().backward()
    assert image.grad is not None and image.grad.isfinite().all()
