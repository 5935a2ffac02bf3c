"""The U-Net of the image decoder and of the detection maps.

The first layer stores each 2×2 pixel block in the channels of one position (`pixel_unshuffle`). A wide layer on a
quarter of the positions is faster than a narrow layer at full size. The bottleneck is three levels lower, at 1/16 of
the image size. Each of its positions corresponds to one 16×16 patch of the ViT.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BLOCK = 2  # side of the pixel block that the first layer stores in channels [pixels]
PATCH = 16  # side of a ViT patch, and of the image area of one bottleneck position [pixels]


class Depth(NamedTuple):
    """Number of residual blocks at the bottleneck and at each other level of the U-Net, finest first."""

    bottleneck: int
    levels: tuple[int, int, int]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position: (B, C, H, W) → (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x.movedim(1, -1), self.normalized_shape, weight, bias, self.eps).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3×3 convolution, SiLU, 3×3 convolution, plus a shortcut: (B, in, H, W) → (B, out, H, W).

    The norm is per position. A group norm is slower than the convolutions on a CPU and couples distant pixels.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        last = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        with torch.no_grad():
            last.weight.mul_(0.3)  # an untrained block is close to its shortcut
        first = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.body = nn.Sequential(ChannelNorm(in_channels), nn.SiLU(), first, nn.SiLU(), last)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H, W)."""
        return self.shortcut(x) + self.body(x)


class Upsample(nn.Module):
    """Upsampling by 2: a 1×1 convolution and bilinear interpolation, or a transposed 2×2 convolution."""

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
        x = self.conv(x)  # it commutes with the interpolation and is cheaper before it
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) if self.bilinear else x


class UNet(nn.Module):
    """U-Net from an image, a map at the bottleneck, or both, to an image of the same size.

    Parameters
    ----------
    in_channels : int
        Channels of the input image; 0: no image, and no downward path.
    out_channels : int
    width : int
        Channels of the finest level. The next levels have 2 and 4 times as many, the bottleneck 6 times.
    depth : Depth
    map_channels : int
        Channels of the map that enters at the bottleneck; 0: no map.
    bilinear : bool
        True: bilinear upsampling. False: transposed convolutions.
    activation_checkpointing : bool
        Recompute each level in the backward pass.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        depth: Depth,
        map_channels: int = 0,
        bilinear: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.bottleneck_channels = 6 * width
        widths = [width, 2 * width, 4 * width]
        lower_widths = [*widths[1:], self.bottleneck_channels]
        levels = list(zip(widths, lower_widths, depth.levels, strict=True))
        self.stem = nn.Conv2d(in_channels * BLOCK**2, width, 3, padding=1) if in_channels else None
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for channels, lower, count in levels if in_channels else ():
            self.down.append(_residual_blocks(channels, channels, count))
            self.shrink.append(nn.Conv2d(channels, lower, 2, stride=2))
        entering = (self.bottleneck_channels if in_channels else 0) + map_channels
        self.bottleneck = _residual_blocks(entering, self.bottleneck_channels, depth.bottleneck)
        self.grow, self.up = nn.ModuleList(), nn.ModuleList()
        for channels, lower, count in reversed(levels):
            self.grow.append(Upsample(lower, channels, bilinear))
            self.up.append(_residual_blocks(2 * channels if in_channels else channels, channels, count))
        self.head = nn.Conv2d(width, out_channels * BLOCK**2, 3, padding=1)

    def forward(self, image: Tensor | None, bottleneck_map: Tensor | None = None) -> Tensor:
        """Compute the output image.

        Parameters
        ----------
        image : Tensor, shape (B, in_channels, H, W), or None
            H and W are multiples of 16.
        bottleneck_map : Tensor, shape (B, map_channels, H/16, W/16), optional

        Returns
        -------
        Tensor, shape (B, out_channels, H, W)
        """
        return self.with_bottleneck(image, bottleneck_map)[0]

    def with_bottleneck(self, image: Tensor | None, bottleneck_map: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute the output image and the bottleneck's output, (B, bottleneck_channels, H/16, W/16)."""
        skips: list[Tensor] = []
        entering: list[Tensor] = []
        if self.stem is not None:
            assert image is not None
            x = self.stem(F.pixel_unshuffle(image, BLOCK).contiguous(memory_format=torch.channels_last))
            for blocks, shrink in zip(self.down, self.shrink, strict=True):
                x = self._run(blocks, x)
                skips.append(x)
                x = shrink(x)
            entering.append(x)
        if bottleneck_map is not None:
            entering.append(bottleneck_map.to(entering[0].dtype) if entering else bottleneck_map)
        x = bottleneck = self._run(self.bottleneck, torch.cat(entering, dim=1))
        for grow, blocks in zip(self.grow, self.up, strict=True):
            x = grow(x)
            if skips:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self._run(blocks, x)
        return F.pixel_shuffle(self.head(F.silu(x)), BLOCK), bottleneck

    def _run(self, blocks: nn.Module, x: Tensor) -> Tensor:
        return run(blocks, x, checkpointing=self.activation_checkpointing)


def run(module: Callable[..., Any], *inputs: Tensor, checkpointing: bool) -> Any:
    """Call a module. With `checkpointing`, its activations are recomputed in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        # A reentrant checkpoint gives the parameters no gradient if no input requires one.
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


def _residual_blocks(in_channels: int, channels: int, count: int) -> nn.Sequential:
    first = ResidualBlock(in_channels, channels)
    return nn.Sequential(first, *(ResidualBlock(channels, channels) for _ in range(count - 1)))
