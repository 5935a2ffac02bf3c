"""Baselines in the place of the image decoder: fastMRI's U-Net and VarNet, and VarNet's cascades on the combined image.

Each has the arguments of `ImageDecoder.forward` and uses no image tokens (``token_dim`` 0). Stage 2 trains it with the
same loop, batches and loss as an `ImageDecoder`. `decoders.DECODERS` lists them.
"""

from typing import Any

import fastmri
import torch
from fastmri.models import Unet, VarNet
from torch import Tensor, nn

from mrilib.data.dataset import Slice
from mrilib.model.encoder import run_cascades, skip_empty_slices, varnet_coil_maps
from mrilib.physics import coils, fourier, sense


class UNetBaseline(nn.Module):
    """fastMRI's U-Net on the zero-filled RSS image, normalised as in fastMRI's `UnetDataTransform`.

    The input is the cropped image minus its mean, divided by its standard deviation and clamped to ±6. The output is
    scaled back.

    Parameters
    ----------
    chans, pools : int
        Channels of the first level and number of down-samplings.
    """

    token_dim = 0

    def __init__(self, chans: int = 32, pools: int = 4) -> None:
        super().__init__()
        self.unet = Unet(in_chans=1, out_chans=1, chans=chans, num_pool_layers=pools)

    def forward(
        self,
        tokens: None,
        kspace: Tensor,
        mask: Tensor,
        scale: Tensor,
        image_shape: tuple[int, int],
        acquired: Tensor | None = None,
    ) -> Tensor:
        """Reconstruct a batch as `ImageDecoder.forward` does: (B, h, w) [file units]."""
        image = zero_filled(kspace, torch.ones_like(scale), image_shape)[:, None]
        mean = image.mean((-2, -1), keepdim=True)
        deviation = image.std((-2, -1), keepdim=True) + 1e-11  # as in fastMRI's normalize_instance
        output = self.unet(((image - mean) / deviation).clamp(-6, 6)).float()
        return (output * deviation + mean)[:, 0] * scale[:, None, None]


class _Unrolled(nn.Module):
    """Base of the unrolled networks: the crop of their RSS image. Empty slices bypass the network."""

    token_dim = 0

    def forward(
        self,
        tokens: None,
        kspace: Tensor,
        mask: Tensor,
        scale: Tensor,
        image_shape: tuple[int, int],
        acquired: Tensor | None = None,
    ) -> Tensor:
        """Reconstruct a batch as `ImageDecoder.forward` does: (B, h, w) [file units]."""
        acquired = torch.ones_like(mask) if acquired is None else acquired
        image = skip_empty_slices(self._rss_image, kspace, torch.stack([mask, acquired], dim=1))
        return fourier.center_crop_or_pad(image, image_shape) * scale[:, None, None]

    def _rss_image(self, kspace: Tensor, masks: Tensor) -> Tensor:
        """Compute the RSS image (B, readout, phase) from k-space and the stacked masks, bool (B, 2, phase)."""
        raise NotImplementedError


class VarNetBaseline(_Unrolled):
    """fastMRI's end-to-end VarNet (Sriram et al., MICCAI 2020) with fastMRI's centre crop of the RSS image.

    Parameters
    ----------
    num_cascades, chans, pools, sens_chans, sens_pools : int
        As fastMRI names them.
    measured_lines : bool
        Replace the measured lines of the last k-space by their measured values, which VarNet's soft data consistency
        changes. Lines that are not acquired count as measured: they are zero in the target too.
    """

    def __init__(
        self,
        num_cascades: int = 12,
        chans: int = 18,
        pools: int = 4,
        sens_chans: int = 8,
        sens_pools: int = 4,
        measured_lines: bool = False,
    ) -> None:
        super().__init__()
        self.varnet = VarNet(num_cascades, sens_chans, sens_pools, chans, pools)
        self.measured_lines = measured_lines

    def _rss_image(self, kspace: Tensor, masks: Tensor) -> Tensor:
        """`VarNet.forward`, without its copies to the device and with a finite gradient for empty coils."""
        maps = torch.view_as_real(varnet_coil_maps(self.varnet.sens_net, kspace, masks[:, 0]))
        measured, (lines, acquired) = torch.view_as_real(kspace), masks[:, :, None, None, :, None].unbind(1)
        refined = measured
        for cascade in self.varnet.cascades:
            network: Any = cascade
            change = network.sens_expand(network.model(network.sens_reduce(refined, maps)), maps)
            refined = refined - torch.where(lines, refined - measured, 0) * network.dc_weight - change
        if self.measured_lines:
            refined = torch.where(lines | ~acquired, measured, refined)
        return fastmri.rss_complex(fastmri.ifft2c(refined.float()), dim=1)


class CombinedVarNet(_Unrolled):
    """VarNet's cascades on the combined image, followed by data consistency.

    The cascades are fastMRI's (`encoder.run_cascades`). Coil maps come from the centre lines (`coils.center_coil_maps`)
    instead of a network. The output is the RSS of `sense.data_consistency` of the last combined image.

    Parameters
    ----------
    num_cascades, chans, pools : int
        As fastMRI names them.
    """

    def __init__(self, num_cascades: int = 12, chans: int = 18, pools: int = 4) -> None:
        super().__init__()
        self.cascades = VarNet(num_cascades, chans=chans, pools=pools).cascades

    def _rss_image(self, kspace: Tensor, masks: Tensor) -> Tensor:
        mask, acquired = masks.unbind(1)
        maps, measured = coils.center_coil_maps(kspace, mask), fourier.ifft2c(kspace)
        initial = coils.combine(measured, maps)
        image = run_cascades(self.cascades, kspace, mask, maps, initial, checkpointing=False)
        return fourier.rss(sense.data_consistency(image, maps, kspace, mask, acquired, measured))


def zero_filled(kspace: Tensor, scale: Tensor, image_shape: tuple[int, int]) -> Tensor:
    """Compute the zero-filled image: RSS of the inverse Fourier transform of the masked k-space, cropped.

    Parameters
    ----------
    kspace : Tensor, complex64, shape (B, coil, readout, phase)
    scale : Tensor, float32, shape (B,) [file units]
    image_shape : (h, w) [pixels]

    Returns
    -------
    Tensor, float32, shape (B, h, w) [file units]
    """
    return fourier.center_crop_or_pad(fourier.rss(fourier.ifft2c(kspace)), image_shape) * scale[:, None, None]


def zero_filled_image(one: Slice) -> Tensor:
    """Compute the zero-filled image of one slice, (h, w) [file units], not flipped."""
    return zero_filled(one.kspace[None], torch.tensor([one.scale]), one.image_shape)[0]
