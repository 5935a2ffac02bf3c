"""The image decoder: a U-Net from image tokens and measured data to the image.

::

    zero-filled image, combined with centre-line coil maps ─► 2×2 pixels as channels ─► down, down, down ─┐
                                          image tokens ─► LayerNorm ─► linear ─► (n × n) map ─────────────┤ bottleneck
    RSS ◄─ data consistency ◄─ complex image ◄─ 2×2 pixels from channels ◄─ up, up, up ◄──────────────────┘
     └────────────◄───────────── noise power ◄────────────┘

With ``sense`` the U-Net also gets a SENSE image, and a second SENSE solve precedes the data consistency.
With ``image_skip=False`` the U-Net has no downward path: it gets tokens alone and gives the magnitude.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrilib.model.unet import PATCH, Depth, UNet
from mrilib.physics import coils, fourier
from mrilib.physics import sense as sense_module

INITIAL_SENSE_ITERATIONS = 5  # conjugate gradient steps of the SENSE image that enters the U-Net
FINAL_SENSE_WEIGHT, FINAL_SENSE_ITERATIONS = 0.1, 3  # of the SENSE solve with the U-Net's image as prior
TINY = torch.finfo(torch.float32).tiny

# 160M and 80M parameters at token_dim 2048 and decoder_hidden_dim 512 (tested to 2%), and 35M.
DEPTHS = {"full": Depth(12, (1, 1, 2)), "lightweight": Depth(4, (1, 2, 2)), "small": Depth(1, (1, 1, 1))}


class ImageDecoder(nn.Module):
    """U-Net from image tokens (and, with `image_skip`, the measured data) to the magnitude image.

    Parameters
    ----------
    decoder_type : {"full", "lightweight", "small"}
        160M, 80M or 35M parameters at the defaults. The first two are the sizes of the Nirvana paper, the third is for
        CPUs.
    token_dim : int
        Width of the image tokens, the backbone's hidden size; 0: a decoder without tokens.
    decoder_hidden_dim : int
        Width of the token map. The U-Net's widths are 1/4, 1/2, 1 and 3/2 of it, the first at half the image size.
    img_size : int
        Side of the ViT's input [pixels]. There are (img_size/16)² tokens.
    use_bilinear_upsample : bool
        True: bilinear upsampling. False: transposed convolutions.
    image_skip : bool
        Use the measured data. False: image tokens alone.
    sense : bool
        Give the U-Net a regularised SENSE image too, as the image that it corrects. After the U-Net, a second SENSE
        solve with its image as prior fits the measured lines of all coils (`physics.sense`, as in MoDL: Aggarwal et
        al., IEEE TMI 38:394, 2019). This adds no parameters except the stem's two input channels.
    activation_checkpointing : bool
        Recompute each level in the backward pass.
    """

    def __init__(
        self,
        decoder_type: str = "full",
        token_dim: int = 2048,
        decoder_hidden_dim: int = 512,
        img_size: int = 320,
        use_bilinear_upsample: bool = True,
        image_skip: bool = True,
        sense: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if decoder_type not in DEPTHS:
            raise ValueError(f"decoder_type '{decoder_type}' is not one of {', '.join(DEPTHS)}")
        if decoder_hidden_dim % 4:
            raise ValueError(f"decoder_hidden_dim {decoder_hidden_dim} is not a multiple of 4")
        if img_size % PATCH:
            raise ValueError(f"img_size {img_size} is not a multiple of {PATCH}")
        if sense and not image_skip:
            raise ValueError("sense needs the measured data; set image_skip: true")
        if not token_dim and not image_skip:
            raise ValueError("a decoder needs image tokens, the measured data (image_skip), or both")
        self.token_dim, self.img_size, self.image_skip, self.sense = token_dim, img_size, image_skip, sense
        if token_dim:
            self.token_norm = nn.LayerNorm(token_dim)
            self.token_projection = nn.Linear(token_dim, decoder_hidden_dim)
        self.unet = UNet(
            in_channels=2 + 2 * sense if image_skip else 0,
            out_channels=3 if image_skip else 1,
            width=decoder_hidden_dim // 4,
            depth=DEPTHS[decoder_type],
            map_channels=decoder_hidden_dim if token_dim else 0,
            bilinear=use_bilinear_upsample,
            activation_checkpointing=activation_checkpointing,
        )
        if image_skip:  # the untrained decoder returns its input image after data consistency
            nn.init.zeros_(self.unet.head.weight)
            nn.init.zeros_(self.unet.head.bias)  # type: ignore[arg-type]

    def forward(
        self,
        tokens: Tensor | None,
        kspace: Tensor,
        mask: Tensor,
        scale: Tensor,
        image_shape: tuple[int, int],
        acquired: Tensor | None = None,
    ) -> Tensor:
        """Reconstruct a batch of slices.

        Parameters
        ----------
        tokens : Tensor, float, shape (B, (img_size/16)², token_dim), or None
            None: an all-zero token map (zero tokens). A decoder with token_dim 0 accepts only None.
        kspace : Tensor, complex64, shape (B, coil, readout, phase)
            Masked k-space divided by its root mean square.
        mask : Tensor, bool, shape (B, phase)
        scale : Tensor, float32, shape (B,) [file units]
        image_shape : (h, w) [pixels]
        acquired : Tensor, bool, shape (B, phase), optional
            False on lines that were not acquired; default: all True.

        Returns
        -------
        Tensor, float32, shape (B, h, w) [file units]
        """
        token_map = self._token_map(tokens, batch_size=len(kspace), device=kspace.device)
        if self.image_skip:
            magnitude = self._correct_measured_image(token_map, kspace, mask, acquired)
        else:
            magnitude = F.softplus(self.unet(None, token_map)[:, 0].float())
        return fourier.center_crop_or_pad(magnitude, image_shape) * scale[:, None, None]

    def _correct_measured_image(
        self, token_map: Tensor | None, kspace: Tensor, mask: Tensor, acquired: Tensor | None
    ) -> Tensor:
        """Magnitude image, (B, readout, phase), in the units of `kspace`."""
        maps = coils.center_coil_maps(kspace, mask)
        measured = fourier.ifft2c(kspace)
        zero_filled = coils.combine(measured, maps)
        power = torch.view_as_real(zero_filled).square().sum(-1).mean((-2, -1))
        rms = power.clamp_min(TINY).sqrt()[:, None, None, None]
        images = [zero_filled]
        if self.sense:
            iterations = INITIAL_SENSE_ITERATIONS
            images.append(sense_module.sense(kspace, mask, maps, iterations=iterations, zero_filled=zero_filled))
        channels = [torch.view_as_real(image).movedim(-1, 1) / rms for image in images]
        residual = self._residual(torch.cat(channels, dim=1), token_map)
        pixels = (channels[-1] + residual[:, :2]) * rms
        image = torch.view_as_complex(pixels.movedim(1, -1).contiguous())
        if self.sense:
            image = sense_module.sense(
                kspace, mask, maps, FINAL_SENSE_WEIGHT, FINAL_SENSE_ITERATIONS, prior=image, zero_filled=zero_filled
            )
        coil_images = sense_module.data_consistency(image, maps, kspace, mask, acquired, measured)
        # The target is the RSS of noisy, fully sampled data. The U-Net predicts the noise power of the missing lines.
        power = fourier.rss(coil_images).square() + residual[:, 2] * rms[:, 0].square()
        return power.clamp_min(TINY).sqrt()

    def _residual(self, pixels: Tensor, token_map: Tensor | None) -> Tensor:
        """Run the U-Net: corrections of real and imaginary part, and noise power, (B, 3, readout, phase)."""
        height, width = pixels.shape[-2:]
        padded = self._padded(height), self._padded(width)
        if token_map is not None:
            token_map = fourier.center_crop_or_pad(token_map, (padded[0] // PATCH, padded[1] // PATCH))
        output = self.unet(fourier.center_crop_or_pad(pixels, padded), token_map).float()
        return fourier.center_crop_or_pad(output, (height, width))

    def _padded(self, length: int) -> int:
        """Round up to img_size plus a multiple of two patches, so that patches and bottleneck positions coincide."""
        return self.img_size + max(0, -(-(length - self.img_size) // (2 * PATCH))) * 2 * PATCH

    def _token_map(self, tokens: Tensor | None, batch_size: int, device: torch.device) -> Tensor | None:
        """Projected tokens as a map, (B, hidden, img_size/16, img_size/16); None for a decoder without tokens."""
        side = self.img_size // PATCH
        if not self.token_dim:
            if tokens is not None:
                raise ValueError("this decoder was built without image tokens (token_dim 0); pass tokens=None")
            return None
        if tokens is None:
            projected = torch.zeros(batch_size, side * side, self.token_projection.out_features, device=device)
        elif tokens.shape[1:] != (side * side, self.token_dim):
            raise ValueError(f"image tokens {tuple(tokens.shape)} are not (B, {side * side}, {self.token_dim})")
        else:
            projected = self.token_projection(self.token_norm(tokens.to(self.token_norm.weight.dtype)))
        return projected.transpose(1, 2).unflatten(2, (side, side))
