"""The image decoder: a U-Net from the backbone's image tokens, and the measured data, to the image.

    zero-filled image, combined with centre-line coil maps ─► 2×2 pixels as channels ─► down, down, down ─┐
                                          image tokens ─► LayerNorm ─► linear ─► (n × n) map ─────────────┤ bottleneck
    RSS ◄─ data consistency ◄─ complex image ◄─ 2×2 pixels from channels ◄─ up, up, up ◄──────────────────┘
     └────────────◄───────────── noise power ◄────────────┘

With ``sense`` the U-Net sees a SENSE image too, and another SENSE solve precedes the data consistency.
With ``image_skip=False`` there is no down path: tokens alone, magnitude out, the description's literal reading.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrilib.model.encoder import PATCH
from mrilib.model.unet import Depth, UNet
from mrilib.physics import coils, fourier
from mrilib.physics import sense as sense_module

SENSE_START = 5  # steps of conjugate gradients to the SENSE image that `sense` starts from


SENSE_WEIGHT, SENSE_ITERATIONS = 0.1, 3  # how the U-Net's image is brought into line with the coils


# Found by counting: 160M and 80M parameters at token_dim 2048, decoder_hidden_dim 512 (a test holds them to 2%).
DEPTHS = {"full": Depth(12, (1, 1, 2)), "lightweight": Depth(4, (1, 2, 2)), "small": Depth(1, (1, 1, 1))}


class ImageDecoder(nn.Module):
    """U-Net from image tokens (and, with `image_skip`, the measured data) to the magnitude image.

    Parameters
    ----------
    decoder_type : {"full", "lightweight", "small"}
        160M or 80M parameters at the defaults, the description's two; "small", 35M, is for processors.
    token_dim : int
        Width of the image tokens, the backbone's hidden size; 0 makes a decoder without tokens (the control).
    decoder_hidden_dim : int
        Width of the token map; the U-Net's widths are 1/4, 1/2, 1 and 3/2 times it, the first at half size.
    img_size : int
        Side of the ViT's input [pixels]; tokens are (img_size/16)².
    use_bilinear_upsample : bool
        False: transposed convolutions.
    image_skip : bool
        False: image tokens alone.
    sense : bool
        The U-Net also sees a regularised SENSE image and starts from it instead of the zero-filled one, and what it
        makes is brought into line with all coils' measured lines (`physics.sense`, as in MoDL: Aggarwal et al., IEEE
        TMI 38:394, 2019) before these are put back. Physics alone: no parameter more but the stem's two inputs.
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
            raise ValueError("sense works on the measured data; set image_skip: true")
        if not token_dim and not image_skip:
            raise ValueError("a decoder needs image tokens, the measured data (image_skip), or both")
        self.token_dim, self.img_size, self.image_skip = token_dim, img_size, image_skip
        self.sense = sense
        hidden = decoder_hidden_dim
        if token_dim:
            self.token_norm = nn.LayerNorm(token_dim)
            self.token_projection = nn.Linear(token_dim, hidden)
        self.unet = UNet(
            inputs=2 + 2 * sense if image_skip else 0,
            outputs=3 if image_skip else 1,
            width=hidden // 4,
            depth=DEPTHS[decoder_type],
            joined=hidden if token_dim else 0,
            bilinear=use_bilinear_upsample,
            activation_checkpointing=activation_checkpointing,
        )
        if image_skip:  # start from the zero-filled image or SENSE's: data consistency alone
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
            None puts a zero map in the tokens' place.
        kspace : Tensor, complex64, shape (B, coil, readout, phase)
            Masked k-space divided by its root mean square.
        mask : Tensor, bool, shape (B, phase)
        scale : Tensor, float32, shape (B,) [file units]
        image_shape : (h, w) [pixels]
        acquired : Tensor, bool, shape (B, phase), optional
            False on lines that no scan of this acquisition has; by default all are.

        Returns
        -------
        Tensor, float32, shape (B, h, w) [file units]
        """
        self._check(tokens)
        normed = None if tokens is None else self.token_norm(tokens.to(self.token_norm.weight.dtype))
        if not self.image_skip:
            square = (self.img_size, self.img_size)
            features = self.unet(None, self._token_map(normed, kspace, square))
            image = F.softplus(features[:, 0].float())
            return fourier.center_crop_or_pad(image, image_shape) * scale[:, None, None]
        maps = coils.center_coil_maps(kspace, mask)
        measured = fourier.ifft2c(kspace)  # coil images
        zero_filled = coils.combine(measured, maps)
        power = torch.view_as_real(zero_filled).square().sum(-1).mean((-2, -1))
        size = power.clamp_min(torch.finfo(torch.float32).tiny).sqrt()[:, None, None, None]
        height, width = zero_filled.shape[-2:]
        padded = (self._padded(height), self._padded(width))
        seen = [zero_filled]
        if self.sense:
            seen.append(sense_module.sense(kspace, mask, maps, iterations=SENSE_START, zero_filled=zero_filled))
        channels = [torch.view_as_real(image).movedim(-1, 1) / size for image in seen]
        inputs = fourier.center_crop_or_pad(torch.cat(channels, dim=1), padded)
        residual = self.unet(inputs, self._token_map(normed, kspace, padded)).float()
        residual = fourier.center_crop_or_pad(residual, (height, width))
        pixels = (channels[-1] + residual[:, :2]) * size
        image = torch.view_as_complex(pixels.movedim(1, -1).contiguous())
        if self.sense:
            image = sense_module.sense(
                kspace, mask, maps, SENSE_WEIGHT, SENSE_ITERATIONS, prior=image, zero_filled=zero_filled
            )
        coil_images = sense_module.data_consistency(image, maps, kspace, mask, acquired, measured)
        # The target is an RSS of noisy lines: the missing ones' noise too adds to its power, and no image predicts it.
        power = fourier.rss(coil_images).square() + residual[:, 2] * size[:, 0].square()
        magnitude = power.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        return fourier.center_crop_or_pad(magnitude, image_shape) * scale[:, None, None]

    def _padded(self, length: int) -> int:
        # img_size plus a multiple of 32: the ViT's crop then starts on a token's edge; tokens meet their own pixels.
        return self.img_size + max(0, -(-(length - self.img_size) // (2 * PATCH))) * 2 * PATCH

    def _check(self, tokens: Tensor | None) -> None:
        if tokens is None:
            return
        if not self.token_dim:
            raise ValueError("this decoder was built without image tokens (token_dim 0); give it none")
        count = (self.img_size // PATCH) ** 2
        if tokens.shape[1:] != (count, self.token_dim):
            raise ValueError(f"image tokens {tuple(tokens.shape)} are not (B, {count}, {self.token_dim})")

    def _token_map(self, normed: Tensor | None, kspace: Tensor, padded: tuple[int, int]) -> Tensor | None:
        """Normalised tokens as a map (B, hidden, padded/16); zeros in the place of none."""
        if not self.token_dim:
            return None
        side = self.img_size // PATCH
        if normed is None:
            projected = kspace.real.new_zeros(kspace.shape[0], side * side, self.token_projection.out_features)
        else:
            projected = self.token_projection(normed)
        grid = projected.transpose(1, 2).unflatten(2, (side, side))
        return fourier.center_crop_or_pad(grid, (padded[0] // PATCH, padded[1] // PATCH))
