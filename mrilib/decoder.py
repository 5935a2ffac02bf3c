"""The image decoder: a U-Net from the backbone's image tokens, and the measured data, to the image.

    zero-filled image, combined with centre-line coil maps ─► down, down, down, down ─┐
                              image tokens ─► LayerNorm ─► linear ─► (n × n) map ─────┤ bottleneck
    RSS ◄─ data consistency ◄─ complex image ◄─ up, up, up, up ◄──────────────────────┘

With ``sense`` the U-Net sees a SENSE image too, and another SENSE solve precedes the data consistency.
With ``image_skip=False`` there is no down path: tokens alone, magnitude out, the description's literal reading.
"""

from typing import NamedTuple

import torch
from fastmri.losses import SSIMLoss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mrilib import kspace as physics
from mrilib.encoder import PATCH


class Depth(NamedTuple):
    """Residual blocks at the bottleneck and at each other level of the U-Net, finest first."""

    bottleneck: int
    levels: tuple[int, int, int, int]


SENSE_WEIGHT, SENSE_ITERATIONS = 0.1, 3  # how the U-Net's image is brought into line with the coils
# Found by counting: 160M and 80M parameters at token_dim 2048, decoder_hidden_dim 512 (a test holds them to 2%).
DEPTHS = {"full": Depth(6, (1, 2, 3, 2)), "lightweight": Depth(2, (1, 1, 1, 2))}


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with group norm and SiLU, and a shortcut: (B, in, H, W) → (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(_groups(in_channels), in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.GroupNorm(_groups(out_channels), out_channels),
            nn.SiLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H, W)."""
        return self.shortcut(x) + self.body(x)


def _groups(channels: int) -> int:
    return next(groups for groups in (8, 4, 2, 1) if channels % groups == 0)


class Upsample(nn.Module):
    """Twice the size, half the channels: bilinear and a 3×3 convolution, or a transposed 2×2 convolution."""

    def __init__(self, channels: int, bilinear: bool) -> None:
        super().__init__()
        self.bilinear = bilinear
        half = channels // 2
        self.conv = (
            nn.Conv2d(channels, half, 3, padding=1) if bilinear else nn.ConvTranspose2d(channels, half, 2, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C/2, 2H, 2W)."""
        if self.bilinear:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.conv(x)


class ImageDecoder(nn.Module):
    """U-Net from image tokens (and, with `image_skip`, the measured data) to the magnitude image.

    Parameters
    ----------
    decoder_type : {"full", "lightweight"}
        160M or 80M parameters at the defaults.
    token_dim : int
        Width of the image tokens, the backbone's hidden size; 0 makes a decoder without tokens (the control).
    decoder_hidden_dim : int
        Width of the token map; the U-Net's widths are 1/8, 1/4, 1/2, 1 and 2 times it.
    img_size : int
        Side of the ViT's input [pixels]; tokens are (img_size/16)².
    use_bilinear_upsample : bool
        False: transposed convolutions.
    image_skip : bool
        False: image tokens alone.
    token_modulation : bool
        Image tokens also scale and shift the features at every level of the way up (Perez et al., AAAI 2018), each
        where it lies; at the start by nothing. Without it they join at the bottleneck alone, 16-fold down.
    token_pixels : bool
        Each image token is also mapped to the 16×16 pixels of its patch, and the image that they make is one more
        input beside the measured data (without `image_skip`: added to the output).
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
        token_modulation: bool = False,
        token_pixels: bool = False,
        sense: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if decoder_type not in DEPTHS:
            raise ValueError(f"decoder_type '{decoder_type}' is not one of {', '.join(DEPTHS)}")
        if decoder_hidden_dim % 8:
            raise ValueError(f"decoder_hidden_dim {decoder_hidden_dim} is not a multiple of 8")
        if img_size % PATCH:
            raise ValueError(f"img_size {img_size} is not a multiple of {PATCH}")
        if sense and not image_skip:
            raise ValueError("sense works on the measured data; set image_skip: true")
        if not token_dim and not image_skip:
            raise ValueError("a decoder needs image tokens, the measured data (image_skip), or both")
        self.token_dim, self.img_size, self.image_skip, self.sense = token_dim, img_size, image_skip, sense
        self.activation_checkpointing = activation_checkpointing
        depth = DEPTHS[decoder_type]
        hidden = decoder_hidden_dim
        widths = [hidden // 8, hidden // 4, hidden // 2, hidden]
        bottom = 2 * hidden

        if token_dim:
            self.token_norm = nn.LayerNorm(token_dim)
            self.token_projection = nn.Linear(token_dim, hidden)
        self.token_pixels = nn.Linear(token_dim, PATCH * PATCH) if token_pixels and token_dim else None
        if image_skip:
            inputs = 2 + 2 * sense + (self.token_pixels is not None)
            self.stem = nn.Conv2d(inputs, widths[0], 3, padding=1)
            self.down = nn.ModuleList()
            self.shrink = nn.ModuleList()
            for width, blocks in zip(widths, depth.levels, strict=True):
                self.down.append(nn.Sequential(*(ResidualBlock(width, width) for _ in range(blocks))))
                self.shrink.append(nn.Conv2d(width, 2 * width, 2, stride=2))
        joined = (bottom if image_skip else 0) + (hidden if token_dim else 0)
        self.bottleneck = nn.Sequential(
            ResidualBlock(joined, bottom), *(ResidualBlock(bottom, bottom) for _ in range(depth.bottleneck - 1))
        )
        self.grow = nn.ModuleList()
        self.up = nn.ModuleList()
        for width, blocks in zip(reversed(widths), reversed(depth.levels), strict=True):
            self.grow.append(Upsample(2 * width, use_bilinear_upsample))
            first = ResidualBlock(2 * width if image_skip else width, width)
            self.up.append(nn.Sequential(first, *(ResidualBlock(width, width) for _ in range(blocks - 1))))
        self.modulate: nn.ModuleList | None = None
        if token_modulation and token_dim:
            self.modulate = nn.ModuleList(nn.Conv2d(hidden, 2 * width, 1) for width in reversed(widths))
            for layer in self.modulate:
                for tensor in layer.parameters():
                    nn.init.zeros_(tensor)
        self.head = nn.Conv2d(widths[0], 2 if image_skip else 1, 1)
        if image_skip:  # start from the zero-filled image, or SENSE's: data consistency alone
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(
        self,
        tokens: Tensor | None,
        kspace: Tensor,
        mask: Tensor,
        scale: Tensor,
        recon: tuple[int, int],
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
        recon : (h, w) [pixels]
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
            features = self._unet(None, self._token_map(normed, kspace, square))
            if self.token_pixels is not None:
                features = features + self._token_image(normed, kspace, square)
            image = F.softplus(features[:, 0].float())
            return physics.center_crop_or_pad(image, recon) * scale[:, None, None]
        maps = physics.center_coil_maps(kspace, mask)
        zero_filled = physics.combine(physics.ifft2c(kspace), maps)
        power = torch.view_as_real(zero_filled).square().sum(-1).mean((-2, -1))
        size = power.clamp_min(torch.finfo(torch.float32).tiny).sqrt()[:, None, None, None]
        height, width = zero_filled.shape[-2:]
        padded = (self._padded(height), self._padded(width))
        seen = [zero_filled] + ([physics.sense(kspace, mask, maps)] if self.sense else [])
        channels = [torch.view_as_real(image).movedim(-1, 1) / size for image in seen]
        inputs = physics.center_crop_or_pad(torch.cat(channels, dim=1), padded)
        if self.token_pixels is not None:
            inputs = torch.cat([inputs, self._token_image(normed, kspace, padded).to(inputs.dtype)], dim=1)
        residual = self._unet(inputs, self._token_map(normed, kspace, padded)).float()
        if self.token_dim and normed is None and self.training:
            # Tokens join later (`tokens_from`): until then what reads them has a gradient of zeros rather than none.
            reading = [m for m in (self.token_norm, self.token_projection, self.token_pixels) if m is not None]
            residual = residual + 0 * sum(p.sum() for module in reading for p in module.parameters())
        pixels = (channels[-1] + physics.center_crop_or_pad(residual, (height, width))) * size
        image = torch.view_as_complex(pixels.movedim(1, -1).contiguous())
        if self.sense:
            image = physics.sense(kspace, mask, maps, SENSE_WEIGHT, SENSE_ITERATIONS, prior=image)
        coil_images = physics.data_consistency(image, maps, kspace, mask, acquired)
        return physics.center_crop_or_pad(physics.rss(coil_images), recon) * scale[:, None, None]

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
        return physics.center_crop_or_pad(grid, (padded[0] // PATCH, padded[1] // PATCH))

    def _token_image(self, normed: Tensor | None, kspace: Tensor, padded: tuple[int, int]) -> Tensor:
        """Normalised tokens as an image (B, 1, padded); zeros in the place of none."""
        if normed is None:
            return kspace.real.new_zeros(kspace.shape[0], 1, *padded)
        assert self.token_pixels is not None
        image = from_patches(self.token_pixels(normed), self.img_size)
        return physics.center_crop_or_pad(image[:, None], padded)

    def _unet(self, pixels: Tensor | None, token_map: Tensor | None) -> Tensor:
        skips: list[Tensor] = []
        joined: list[Tensor] = []
        if pixels is not None:
            x = self.stem(pixels)
            for blocks, shrink in zip(self.down, self.shrink, strict=True):
                x = self._step(blocks, x)
                skips.append(x)
                x = shrink(x)
            joined.append(x)
        if token_map is not None:
            joined.append(token_map.to(joined[0].dtype) if joined else token_map)
        x = self._step(self.bottleneck, torch.cat(joined, dim=1))
        for level, (grow, blocks) in enumerate(zip(self.grow, self.up, strict=True)):
            x = grow(x)
            if skips:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self._step(blocks, x)
            if self.modulate is not None and token_map is not None:
                here = F.interpolate(token_map, x.shape[-2:], mode="bilinear", align_corners=False)
                factor, shift = self.modulate[level](here).to(x.dtype).chunk(2, dim=1)
                x = x * (1 + factor) + shift
        return self.head(x)

    def _step(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, x, use_reentrant=False)
        return module(x)


def from_patches(pixels: Tensor, img_size: int) -> Tensor:
    """The pixels of 16×16 patches in row-major order, (B, (img_size/16)², 256) → (B, img_size, img_size)."""
    side = img_size // PATCH
    grid = pixels.unflatten(1, (side, side)).unflatten(3, (PATCH, PATCH))  # (B, row, column, row in it, column in it)
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def zero_filled(kspace: Tensor, scale: Tensor, recon: tuple[int, int]) -> Tensor:
    """The baseline: RSS of the inverse Fourier transform of the masked k-space, cropped [file units].

    Parameters
    ----------
    kspace : Tensor, complex64, shape (B, coil, readout, phase)
    scale : Tensor, float32, shape (B,) [file units]
    recon : (h, w) [pixels]

    Returns
    -------
    Tensor, float32, shape (B, h, w) [file units]
    """
    return physics.center_crop_or_pad(physics.rss(physics.ifft2c(kspace)), recon) * scale[:, None, None]


class VolumeSSIMLoss(nn.Module):
    """1 − SSIM on the evaluated crop, the volume's maximum as data range: fastMRI's own loss, always in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.ssim = SSIMLoss()

    def forward(self, image: Tensor, target: Tensor, maximum: Tensor) -> Tensor:
        """Loss of each slice.

        Parameters
        ----------
        image, target : Tensor, float32, shape (B, h, w) [file units]
        maximum : Tensor, float32, shape (B,) [file units]

        Returns
        -------
        Tensor, float32, shape (B,)
        """
        # File units are about 1e-5, whose squares and products SSIM subtracts: divided by the maximum they are about 1.
        unit = positive(maximum)[:, None, None, None]
        with torch.autocast(image.device.type, enabled=False):
            losses = self.ssim(
                image.float()[:, None] / unit, target[:, None] / unit, torch.ones_like(maximum), reduced=False
            )
        return losses.mean((1, 2, 3))


def positive(maximum: Tensor) -> Tensor:
    """A volume's maximum to divide by: 1 for a volume of zeros, which would otherwise divide zero by zero."""
    return torch.where(maximum > 0, maximum, 1)
