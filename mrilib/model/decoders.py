"""The image decoders that stage 2's parameter `decoder` can name. Register your own decoder at the end of this file.

A decoder has the arguments of `ImageDecoder.forward`, which gives their shapes and units. An example, with
`baselines.zero_filled`::

    class ScaledImage(nn.Module):
        token_dim = 0  # width of the image tokens that it uses; 0: none

        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, tokens, kspace, mask, scale, image_shape, acquired=None):
            return self.factor * zero_filled(kspace, scale, image_shape)  # (B, h, w) [file units]

    DECODERS["scaled"] = DecoderEntry("scaled zero-filled image", False, lambda config, token_dim: ScaledImage())

With ``decoder: scaled``, notebook 03 and `python -m mrilib train` train it, 04 scores it and 05 compares it. A decoder
that uses tokens is also built with a token width of 0: it is trained without tokens as the control.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from mrilib.config import ParameterError, Stage2Parameters
from mrilib.model.baselines import CombinedVarNet, UNetBaseline, VarNetBaseline
from mrilib.model.decoder import ImageDecoder


class DecoderEntry(NamedTuple):
    """A decoder in `DECODERS`."""

    label: str  # what the decoder is, in a few words
    uses_tokens: bool  # False: neither stage 1 nor the backbone is needed
    build: Callable[[Stage2Parameters, int], nn.Module]  # from stage 2's parameters and the image tokens' width, or 0


def find_decoder(name: str) -> DecoderEntry:
    """Look a decoder up by its name.

    Raises
    ------
    ParameterError
        If the name is unknown; the message names the nearest decoder, or all decoders.
    """
    if name not in DECODERS:
        nearest = difflib.get_close_matches(name, DECODERS, n=1, cutoff=0.5)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"there are {', '.join(DECODERS)}"
        raise ParameterError(f"decoder: '{name}' is not known; {hint}")
    return DECODERS[name]


def uses_tokens(values: Mapping[str, Any]) -> bool:
    """Whether the decoder in stage 2's parameters uses image tokens, and so needs stage 1."""
    return find_decoder(str(values.get("decoder", Stage2Parameters.model_fields["decoder"].default))).uses_tokens


def build_decoder(config: Stage2Parameters, token_dim: int) -> nn.Module:
    """Build the untrained decoder of stage 2's parameters.

    Parameters
    ----------
    config : Stage2Parameters
    token_dim : int
        Width of the image tokens, the backbone's hidden size; 0: no tokens.
    """
    decoder = find_decoder(config.decoder).build(config, token_dim)
    return decoder.to(memory_format=torch.channels_last)


def _image_decoder(config: Stage2Parameters, token_dim: int) -> ImageDecoder:
    return ImageDecoder(
        decoder_type=config.decoder_type,
        token_dim=token_dim,
        decoder_hidden_dim=config.decoder_hidden_dim,
        img_size=config.img_size,
        use_bilinear_upsample=config.use_bilinear_upsample,
        image_skip=config.image_skip,
        sense=config.sense,
        activation_checkpointing=config.activation_checkpointing,
    )


def _sizes(config: Stage2Parameters) -> tuple[int, int, int]:
    return config.baseline_cascades, config.baseline_chans, config.baseline_pools


DECODERS: dict[str, DecoderEntry] = {
    "unet_dc": DecoderEntry("U-Net with data consistency, from image tokens and measured data", True, _image_decoder),
    "no_token_decoder": DecoderEntry(
        "decoder trained without tokens", False, lambda config, _: _image_decoder(config, 0)
    ),
    "varnet": DecoderEntry("fastMRI's VarNet", False, lambda config, _: VarNetBaseline(*_sizes(config))),
    "varnet_measured_lines": DecoderEntry(
        "VarNet with measured lines",
        False,
        lambda config, _: VarNetBaseline(*_sizes(config), measured_lines=True),
    ),
    "varnet_combined": DecoderEntry(
        "VarNet's cascades on the combined image", False, lambda config, _: CombinedVarNet(*_sizes(config))
    ),
    "fastmri_unet": DecoderEntry(
        "fastMRI's U-Net", False, lambda config, _: UNetBaseline(config.baseline_chans, config.baseline_pools)
    ),
}
