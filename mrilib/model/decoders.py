"""The image decoders that `decoder` of 03_train_stage2 names: this project's, the baselines, and yours.

A decoder is an `nn.Module` with the call of `ImageDecoder.forward`,

    (tokens, kspace, mask, scale, image_shape, acquired) → image (B, h, w) [file units],

and an attribute `token_dim`, 0 if it uses no image tokens. To add one, write the module and give it an entry in
`DECODERS`. Notebook 03 and `python -m mrilib train` then train it, 04 scores it and 05 compares it with the others.
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

    label: str  # in tables and figures
    uses_tokens: bool  # False: neither stage 1 nor the backbone is needed
    build: Callable[[Stage2Parameters, int], nn.Module]  # from stage 2's parameters and the backbone's hidden size


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


def _varnet(config: Stage2Parameters, measured_lines: bool = False) -> VarNetBaseline:
    sizes = config.baseline_cascades, config.baseline_chans, config.baseline_pools
    return VarNetBaseline(*sizes, measured_lines=measured_lines)


def _combined_varnet(config: Stage2Parameters) -> CombinedVarNet:
    return CombinedVarNet(config.baseline_cascades, config.baseline_chans, config.baseline_pools)


DECODERS: dict[str, DecoderEntry] = {
    "unet_dc": DecoderEntry("U-Net with data consistency, from image tokens and measured data", True, _image_decoder),
    "no_token_decoder": DecoderEntry(
        "decoder trained without tokens", False, lambda config, _: _image_decoder(config, 0)
    ),
    "varnet": DecoderEntry("fastMRI's VarNet", False, lambda config, _: _varnet(config)),
    "varnet_measured_lines": DecoderEntry(
        "VarNet, measured lines put back", False, lambda config, _: _varnet(config, measured_lines=True)
    ),
    "varnet_combined": DecoderEntry(
        "VarNet's cascades on the combined image", False, lambda config, _: _combined_varnet(config)
    ),
    "fastmri_unet": DecoderEntry(
        "fastMRI's U-Net", False, lambda config, _: UNetBaseline(config.baseline_chans, config.baseline_pools)
    ),
}


def find_decoder(name: str) -> DecoderEntry:
    """The entry of a name.

    Raises
    ------
    ParameterError
        Naming the nearest decoder, or all of them.
    """
    if name not in DECODERS:
        near = difflib.get_close_matches(name, DECODERS, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(DECODERS)}"
        raise ParameterError(f"decoder: '{name}' is not known; {hint}")
    return DECODERS[name]


def uses_tokens(values: Mapping[str, Any]) -> bool:
    """Whether the decoder that stage 2's parameters name uses image tokens, and with them stage 1."""
    return find_decoder(str(values.get("decoder", Stage2Parameters.model_fields["decoder"].default))).uses_tokens


def build_decoder(config: Stage2Parameters, token_dim: int) -> nn.Module:
    """The untrained decoder of stage 2's parameters.

    Parameters
    ----------
    config : Stage2Parameters
    token_dim : int
        Width of the image tokens, the backbone's hidden size; unused by a decoder without tokens.
    """
    decoder = find_decoder(config.decoder).build(config, token_dim)
    return decoder.to(memory_format=torch.channels_last)
