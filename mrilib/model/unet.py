"""The U-Net of the image decoder and of the maps of findings.

Two pixels by two lie in the channels of one place from the first layer to the last: a quarter of the places with wider
layers costs far less than full size with narrow ones, and no pixel is lost. Three levels below that, 16-fold down, lies
the bottleneck, one place for each patch of the ViT; a map may join there.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

FOLD = 2  # pixels, each way, that lie in the channels of one place


class Depth(NamedTuple):
    """Residual blocks at the bottleneck and at each other level of the U-Net, finest first."""

    bottleneck: int
    levels: tuple[int, int, int]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place: (B, C, H, W) → (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x.movedim(1, -1), self.normalized_shape, weight, bias, self.eps).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3×3 convolution, SiLU, 3×3 convolution, and a shortcut: (B, in, H, W) → (B, out, H, W).

    A group norm would take a processor longer than the convolutions do, and ties each place to the rest of the image.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        last = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        with torch.no_grad():
            last.weight.mul_(0.3)  # a block begins as little more than its shortcut
        self.body = nn.Sequential(
            ChannelNorm(in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.SiLU(), last
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H, W)."""
        return self.shortcut(x) + self.body(x)


class Upsample(nn.Module):
    """Twice the size, fewer channels: a 1×1 convolution and bilinear, or a transposed 2×2 convolution."""

    def __init__(self, in_channels: int, out_channels: int, bilinear: bool) -> None:
        super().__init__()
        self.bilinear = bilinear
        self.conv = (
            nn.Conv2d(in_channels, out_channels, 1)
            if bilinear
            else nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, 2H, 2W)."""
        x = self.conv(x)  # which commutes with the interpolation, and is cheaper before it
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) if self.bilinear else x


class UNet(nn.Module):
    """U-Net from an image to an image of the same size, from a map at its bottleneck, or from both.

    Parameters
    ----------
    inputs : int
        Channels of the image; 0: none, and no way down.
    outputs : int
    width : int
        Of the finest level; those below have 2, 4 and, at the bottleneck, 6 times it.
    depth : Depth
    joined : int
        Channels of the map that joins at the bottleneck; 0: none.
    bilinear : bool
        False: transposed convolutions.
    activation_checkpointing : bool
        Recompute each level in the backward pass.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        depth: Depth,
        joined: int = 0,
        bilinear: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        widths = [width, 2 * width, 4 * width]
        self.features = bottom = 6 * width  # at the bottleneck
        below = [*widths[1:], bottom]
        self.stem = nn.Conv2d(inputs * FOLD**2, width, 3, padding=1) if inputs else None
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for wide, next_width, blocks in zip(widths, below, depth.levels, strict=True) if inputs else ():
            self.down.append(nn.Sequential(*(ResidualBlock(wide, wide) for _ in range(blocks))))
            self.shrink.append(nn.Conv2d(wide, next_width, 2, stride=2))
        first = ResidualBlock((bottom if inputs else 0) + joined, bottom)
        self.bottleneck = nn.Sequential(first, *(ResidualBlock(bottom, bottom) for _ in range(depth.bottleneck - 1)))
        self.grow, self.up = nn.ModuleList(), nn.ModuleList()
        for wide, from_width, blocks in zip(reversed(widths), reversed(below), reversed(depth.levels), strict=True):
            self.grow.append(Upsample(from_width, wide, bilinear))
            first = ResidualBlock(2 * wide if inputs else wide, wide)
            self.up.append(nn.Sequential(first, *(ResidualBlock(wide, wide) for _ in range(blocks - 1))))
        self.head = nn.Conv2d(width, outputs * FOLD**2, 3, padding=1)

    def forward(self, pixels: Tensor | None, joined: Tensor | None = None) -> Tensor:
        """Image (B, inputs, H, W), sides multiples of 16, and map (B, joined, H/16, W/16) → (B, outputs, H, W)."""
        return self.with_bottleneck(pixels, joined)[0]

    def with_bottleneck(self, pixels: Tensor | None, joined: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same, and what the bottleneck makes, (B, features, H/16, W/16)."""
        skips: list[Tensor] = []
        parts: list[Tensor] = []
        if self.stem is not None:
            assert pixels is not None
            x = self.stem(F.pixel_unshuffle(pixels, FOLD).contiguous(memory_format=torch.channels_last))
            for blocks, shrink in zip(self.down, self.shrink, strict=True):
                x = self._step(blocks, x)
                skips.append(x)
                x = shrink(x)
            parts.append(x)
        if joined is not None:
            parts.append(joined.to(parts[0].dtype) if parts else joined)
        x = bottleneck = self._step(self.bottleneck, torch.cat(parts, dim=1))
        for grow, blocks in zip(self.grow, self.up, strict=True):
            x = grow(x)
            if skips:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self._step(blocks, x)
        return F.pixel_shuffle(self.head(F.silu(x)), FOLD), bottleneck

    def _step(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, x, use_reentrant=False)
        return module(x)
