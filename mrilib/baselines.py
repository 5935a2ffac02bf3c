"""What people would use instead: fastMRI's U-Net and VarNet, in the image decoder's place.

Each is a module with the decoder's own call, without image tokens (``token_dim`` 0) or anything else of the encoder:
masked k-space to the magnitude image in file units. So `TwoStageModel` holds it as it holds an `ImageDecoder`, and the
same loop trains it on the same batches with the same loss.
"""

import fastmri
import torch
from fastmri.models import Unet, VarNet
from torch import Tensor, nn

from mrilib import kspace as physics
from mrilib.decoder import zero_filled
from mrilib.encoder import around_empty_coils
from mrilib.model import count_parameters


class UNetBaseline(nn.Module):
    """fastMRI's U-Net on the zero-filled RSS image, normalised as fastMRI's `UnetDataTransform` does.

    Mean and standard deviation of each cropped input image are taken off, the result is clamped to ±6, and they are put
    back on the output.

    Parameters
    ----------
    chans, pools : int
        Channels of the first level and number of down-samplings.
    """

    token_dim, encoder_image = 0, False

    def __init__(self, chans: int = 32, pools: int = 4) -> None:
        super().__init__()
        self.unet = Unet(in_chans=1, out_chans=1, chans=chans, num_pool_layers=pools)

    def forward(
        self,
        tokens: None,
        kspace: Tensor,
        mask: Tensor,
        scale: Tensor,
        recon: tuple[int, int],
        acquired: Tensor | None = None,
    ) -> Tensor:
        """As `ImageDecoder.forward`, with `tokens` None; (B, h, w) [file units]."""
        image = zero_filled(kspace, torch.ones_like(scale), recon)[:, None]
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

    token_dim, encoder_image = 0, False

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
        recon: tuple[int, int],
        acquired: Tensor | None = None,
    ) -> Tensor:
        """As `ImageDecoder.forward`, with `tokens` None; (B, h, w) [file units]."""
        known = mask if acquired is None else mask | ~acquired  # what no scan acquires is zero in the target too
        image = around_empty_coils(self._image, kspace, torch.stack([mask, known], dim=1), torch.float32)
        return physics.center_crop_or_pad(image, recon) * scale[:, None, None]

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


def chans_for(parameters: int, num_cascades: int, pools: int, sens_chans: int, sens_pools: int) -> int:
    """Width of a VarNet's cascades that comes nearest to a number of parameters.

    Parameters
    ----------
    parameters : int
        Wanted number of trainable parameters of the whole VarNet.

    Raises
    ------
    ValueError
        If even one channel has more parameters than half as many again.
    """

    def count(chans: int) -> int:
        with torch.device("meta"):  # counted without memory
            return count_parameters(VarNet(num_cascades, sens_chans, sens_pools, chans, pools))

    low, high = 1, 2
    while count(high) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    best = min((low, high), key=lambda chans: abs(count(chans) - parameters))
    if count(best) > 1.5 * parameters:
        raise ValueError(f"a VarNet of {num_cascades} cascades and {pools} pools has more than {parameters} parameters")
    return best
