"""torch.compile for the blocks that the networks repeat."""

from typing import Any

import torch
from fastmri.models.unet import ConvBlock, TransposeConvBlock
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mrilib.model.unet import ResidualBlock, Upsample

# Not the whole networks: Fourier transforms, fastMRI's paddings and the detections run between the blocks.
BLOCKS = (ConvBlock, TransposeConvBlock, ResidualBlock, Upsample, GradientCheckpointingLayer)
LIMIT = 1024  # versions of the blocks: one for each shape, for training and for validation


def compile_blocks(model: nn.Module, backbone: PreTrainedModel | None = None, backend: Any = "inductor") -> int:
    """Compile the blocks of a model in place, and return their number. Names in its state dict do not change.

    A block is compiled at its first call with inputs of a new shape. Shapes are fixed in the compiled code.

    Parameters
    ----------
    model : nn.Module
    backbone : PreTrainedModel, optional
        A part of `model`; the layers that it declares (``_no_split_modules``) are compiled too.
    backend : str or callable
        As for `torch.compile`.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(LIMIT, limits.recompile_limit)
    limits.accumulated_recompile_limit = max(LIMIT, limits.accumulated_recompile_limit)
    layers = set(getattr(backbone, "_no_split_modules", None) or ())
    blocks = [part for part in model.modules() if isinstance(part, BLOCKS) or type(part).__name__ in layers]
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    return len(blocks)
