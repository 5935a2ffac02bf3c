"""The baselines: fastMRI's U-Net and VarNet, and VarNet's cascades on the combined image.

Each has the call of `ImageDecoder.forward` and uses no image tokens (``token_dim`` 0), so stage 2 trains it as it
trains an `ImageDecoder`: by the same loop, on the same batches, with the same loss. `decoders` names them.
"""

import fastmri
import torch
from fastmri.models import Unet, VarNet
from torch import Tensor, nn

from mrilib.data.dataset import Slice
from mrilib.model.encoder import cascade_step, refine_nonempty_slices
from mrilib.physics import coils, fourier, sense


class UNetBaseline(nn.Module):
    """fastMRI's U-Net on the zero-filled RSS image, normalised as fastMRI's `UnetDataTransform` does.

    Mean and standard deviation of each cropped input image are taken off, the result is clamped to ±6, and they are put
    back on the output.

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
        """As `ImageDecoder.forward`, with `tokens` None; (B, h, w) [file units]."""
        image = zero_filled(kspace, torch.ones_like(scale), image_shape)[:, None]
        mean = image.mean((-2, -1), keepdim=True)
        deviation = image.std((-2, -1), keepdim=True) + 1e-11  # fastMRI's normalize_instance
        output = self.unet(((image - mean) / deviation).clamp(-6, 6)).float()
        return (output * deviation + mean)[:, 0] * scale[:, None, None]


class VarNetBaseline(nn.Module):
    """fastMRI's end-to-end VarNet (Sriram et al., MICCAI 2020), its RSS image cropped about the centre as fastMRI does.

    Parameters
    ----------
    num_cascades, chans, pools, sens_chans, sens_pools : int
        As fastMRI names them.
    measured_lines : bool
        Put the measured lines back into its last k-space, which its own soft data consistency does not keep.
    """

    token_dim = 0

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

    def forward(
        self,
        tokens: None,
        kspace: Tensor,
        mask: Tensor,
        scale: Tensor,
        image_shape: tuple[int, int],
        acquired: Tensor | None = None,
    ) -> Tensor:
        """As `ImageDecoder.forward`, with `tokens` None; (B, h, w) [file units]."""
        known = mask if acquired is None else mask | ~acquired  # what no scan acquires is zero in the target too
        image = refine_nonempty_slices(self._image, kspace, torch.stack([mask, known], dim=1), torch.float32)
        return fourier.center_crop_or_pad(image, image_shape) * scale[:, None, None]

    def _image(self, kspace: Tensor, masks: Tensor) -> Tensor:
        measured, (lines, known) = torch.view_as_real(kspace), masks[:, :, None, None, :, None].unbind(1)
        if not self.measured_lines:
            return self.varnet(measured, lines)
        maps = self.varnet.sens_net(measured, lines)
        refined = measured.clone()
        for cascade in self.varnet.cascades:
            refined = cascade(refined, measured, lines, maps)
        refined = torch.where(known, measured, refined)
        return fastmri.rss(fastmri.complex_abs(fastmri.ifft2c(refined.float())), dim=1)


class CombinedVarNet(nn.Module):
    """VarNet's cascades on the combined image, with coil maps from the centre lines and the measured lines put back.

    Each cascade is fastMRI's: k ← k − η (k − y) on the measured lines − F S D(Sᴴ F⁻¹ k), with S from
    `kspace.center_coil_maps` where VarNet has a network for it. The last combined image becomes coil images by
    `kspace.data_consistency`, and their RSS is the output.

    Parameters
    ----------
    num_cascades, chans, pools : int
        As fastMRI names them.
    """

    token_dim = 0

    def __init__(self, num_cascades: int = 12, chans: int = 18, pools: int = 4) -> None:
        super().__init__()
        self.cascades = VarNet(num_cascades, chans=chans, pools=pools).cascades

    def forward(
        self,
        tokens: None,
        kspace: Tensor,
        mask: Tensor,
        scale: Tensor,
        image_shape: tuple[int, int],
        acquired: Tensor | None = None,
    ) -> Tensor:
        """As `ImageDecoder.forward`, with `tokens` None; (B, h, w) [file units]."""
        acquired = torch.ones_like(mask) if acquired is None else acquired
        image = refine_nonempty_slices(self._image, kspace, torch.stack([mask, acquired], dim=1), torch.float32)
        return fourier.center_crop_or_pad(image, image_shape) * scale[:, None, None]

    def _image(self, kspace: Tensor, masks: Tensor) -> Tensor:
        mask, acquired = masks.unbind(1)
        maps, measured = coils.center_coil_maps(kspace, mask), fourier.ifft2c(kspace)
        refined, image = kspace, coils.combine(measured, maps)
        for number, cascade in enumerate(self.cascades, 1):
            last = number == len(self.cascades)
            refined, image = cascade_step(cascade, last, refined, image, kspace, mask[:, None, None], maps)
        return fourier.rss(sense.data_consistency(image, maps, kspace, mask, acquired, measured))


def zero_filled(kspace: Tensor, scale: Tensor, image_shape: tuple[int, int]) -> Tensor:
    """The baseline: RSS of the inverse Fourier transform of the masked k-space, cropped [file units].

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
    """RSS of the inverse Fourier transform of a slice's measured k-space, cropped: (h, w) [file units], not flipped."""
    return zero_filled(one.kspace[None], torch.tensor([one.scale]), one.image_shape)[0]
