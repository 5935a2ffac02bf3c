"""The k-space encoder: fastMRI's VarNet, then a ViT, then a linear map to the backbone's width.

masked k-space (B, coil, readout, phase) → VarNet's refined coil images → one complex image, combined with VarNet's own
sensitivity maps → 16×16 patches → tokens
(B, (img_size/16)², vit_embed_dim) (+ what maps of findings say of each patch, if they are asked for) → between a
learned start and end vector (B, (img_size/16)² + 2, output_dim).
"""

import functools
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastmri.models import VarNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTModel
from transformers.models.vit.modeling_vit import ViTPatchEmbeddings

from mrilib.model.finding_maps import PATCH, FindingMaps, FindingWords
from mrilib.physics import coils, fourier

FIRST_TOKENS = 0.01  # size of an untrained encoder's image tokens, in units of the word embeddings' root mean square


class NormalizedPatchEmbeddings(ViTPatchEmbeddings):
    """transformers' patch embeddings, then the LayerNorm that the description puts before the k-space encoder's ViT."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, channels, img_size, img_size) → (B, (img_size/16)², vit_embed_dim)."""
        return self.norm(super().forward(pixel_values))


class EncoderOutput(NamedTuple):
    """Tokens and detection maps of a batch."""

    tokens: Tensor  # float32 (B, (img_size/16)² + 2, output_dim)
    maps: Tensor | None  # logits of the detection maps, float32 (B, labels, img_size, img_size); None without labels


class KSpaceEncoder(nn.Module):
    """Turns undersampled multi-coil k-space into tokens for a language model.

    Parameters
    ----------
    output_dim : int
        Hidden size of the backbone.
    img_size : int
        Side of the ViT's input [pixels], a multiple of 16; the image is cropped or zero-padded to it.
    vit_embed_dim, vit_num_layers, vit_num_heads : int
        The ViT (transformers' own), with an MLP four times as wide.
    num_cascades, chans, pools, sens_chans, sens_pools : int
        fastMRI's VarNet; the defaults have its published 29,936,966 parameters.
    map_network : bool
        VarNet's sensitivity maps come out of its network. Without it they are what goes into the network, the centre
        lines' coil images over their root sum of squares: few steps on text alone do not teach a network coils, it
        changes the maps, and with them the scan, from under the rest.
    finding_labels : sequence of str
        Findings that a U-Net maps on VarNet's image; what it finds is added to the tokens where it lies. Empty: none.
    finding_chans : int
        Its width.
    activation_checkpointing : bool
        Recompute each cascade and ViT layer in the backward pass.
    """

    def __init__(
        self,
        output_dim: int = 2048,
        img_size: int = 320,
        vit_embed_dim: int = 768,
        vit_num_layers: int = 6,
        vit_num_heads: int = 12,
        num_cascades: int = 12,
        chans: int = 18,
        pools: int = 4,
        sens_chans: int = 8,
        sens_pools: int = 4,
        map_network: bool = True,
        finding_labels: Sequence[str] = (),
        finding_chans: int = 32,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if img_size % PATCH:
            raise ValueError(f"img_size {img_size} is not a multiple of {PATCH}, the ViT's patch")
        self.img_size = img_size
        self.output_dim = output_dim
        self.activation_checkpointing = activation_checkpointing
        self.varnet = VarNet(num_cascades, sens_chans, sens_pools, chans, pools)
        if map_network:
            initialize_maps_as_identity(self.varnet)
        else:
            self.varnet.sens_net.norm_unet = nn.Identity()
        self.finding_labels = tuple(finding_labels)
        self.finding_maps = FindingMaps(finding_labels, finding_chans) if finding_labels else None
        vit_config = ViTConfig(
            hidden_size=vit_embed_dim,
            num_hidden_layers=vit_num_layers,
            num_attention_heads=vit_num_heads,
            intermediate_size=4 * vit_embed_dim,
            image_size=img_size,
            patch_size=PATCH,
            num_channels=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.vit = ViTModel(vit_config, add_pooling_layer=False)
        self.vit.embeddings.patch_embeddings = NormalizedPatchEmbeddings(vit_config)
        initialize_vit(self.vit)
        self.patch_features: nn.Linear | None = None
        if self.finding_maps is not None:
            self.patch_features = nn.Linear(self.finding_maps.features, vit_embed_dim)
            # as loud as the patches that it is added to
            nn.init.normal_(self.patch_features.weight, std=self.finding_maps.features**-0.5)
            nn.init.zeros_(self.patch_features.bias)
        if activation_checkpointing:
            self.vit.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.projection = nn.Linear(vit_embed_dim, output_dim)
        self.finding_words = FindingWords(len(finding_labels), output_dim) if finding_labels else None
        self.start = nn.Parameter(torch.randn(output_dim) * 0.02)
        self.end = nn.Parameter(torch.randn(output_dim) * 0.02)

    @property
    def num_tokens(self) -> int:
        """Image tokens, without start and end: (img_size/16)²."""
        return (self.img_size // PATCH) ** 2

    def match_embeddings(self, rms: float) -> None:
        """Scale the start of the projection, and the start and end vectors, by the backbone's word embeddings.

        Image tokens begin as random vectors of `FIRST_TOKENS` times their size. At full size they would say random
        things to the frozen model, louder than the little that an encoder knows at first; near zero they say nothing,
        and the first that is heard is what the loss has put there.

        Parameters
        ----------
        rms : float
            Root mean square of the backbone's embedding matrix. The ViT ends in a LayerNorm, so its outputs have a root
            mean square of 1.
        """
        with torch.no_grad():
            width = self.projection.in_features
            self.projection.weight.normal_(std=FIRST_TOKENS * rms / width**0.5)
            self.projection.bias.zero_()
            self.start.normal_(std=rms)
            self.end.normal_(std=rms)
            for words in self.finding_words.tables if self.finding_words is not None else ():
                words.normal_(std=FIRST_TOKENS * rms)

    def load_varnet(self, path: str | Path) -> None:
        """Load fastMRI's published VarNet weights (brain_leaderboard_state_dict.pt), names strict.

        Raises
        ------
        ValueError
            If the names or shapes differ; they are listed. If the file is damaged or would run code.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"varnet_weights: {path} holds more than plain tensors, or is damaged") from error
        try:
            self.varnet.load_state_dict(state)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(f"varnet_weights: {path} does not fit the encoder's VarNet: {error}") from None

    def forward(self, kspace: Tensor, mask: Tensor) -> Tensor:
        """Tokens of a batch of slices.

        Parameters
        ----------
        kspace : Tensor, complex64, shape (B, coil, readout, phase)
            Masked k-space divided by its root mean square.
        mask : Tensor, bool, shape (B, phase)

        Returns
        -------
        Tensor, float32, shape (B, (img_size/16)² + 2, output_dim)
            start, tokens in row-major order of the patches, end.
        """
        return self.tokens_and_maps(kspace, mask).tokens

    def tokens_and_maps(self, kspace: Tensor, mask: Tensor, mirrored: Tensor | None = None) -> EncoderOutput:
        """The tokens of `forward`, and the detection maps.

        Where `mirrored`, bool (B,), is true, ViT and maps see VarNet's image flipped left to right. Outside of training
        the maps are the mean of those of the image and of the flipped image.
        """
        pixels = self.pixels(kspace, mask, mirrored)
        maps = features = None
        if self.finding_maps is not None:
            maps, features = self._step(self.finding_maps, pixels)
            if not self.training:
                maps = (maps + self._step(self.finding_maps, pixels.flip(-1))[0].flip(-1)) / 2
        tokens = self.projection(self._patches(pixels, features))
        if maps is not None:
            assert self.finding_words is not None
            tokens = tokens + self.finding_words(maps)
        batch = tokens.shape[0]
        start, end = (vector.to(tokens.dtype).expand(batch, 1, -1) for vector in (self.start, self.end))
        return EncoderOutput(torch.cat([start, tokens, end], dim=1).float(), maps)

    def _patches(self, pixels: Tensor, features: Tensor | None) -> Tensor:
        """What the ViT makes of the patches, (B, (img_size/16)², vit_embed_dim).

        Each is a linear map of its pixels, and of the features of the maps' U-Net (the hybrid of Dosovitskiy et al.,
        ICLR 2021): whether grey matter is darker than white is seen in folds and edges, not in a sum of pixels. As with
        what is found, no gradient of the text goes back that way.
        """
        patches = self.vit.embeddings(pixels)
        if self.patch_features is not None:
            assert features is not None
            added = self.patch_features(F.layer_norm(features.detach(), features.shape[-1:]))
            patches = patches + F.pad(added, (0, 0, 1, 0))  # not to the class token, which comes first
        for layer in self.vit.layers:
            patches = layer(patches)
        return self.vit.layernorm(patches)[:, 1:]  # the class token says nothing of a place

    def pixels(self, kspace: Tensor, mask: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Input of ViT and detection maps, float32 (B, 2, img_size, img_size): the image's real and imaginary part.

        The mean square is 1: VarNet's maps, and with them the image's scale, depend on the number of coils. A mean has
        no meaning for a complex image and is not taken off.
        """
        image = fourier.center_crop_or_pad(self.phase_corrected_image(kspace, mask), (self.img_size, self.img_size))
        if mirrored is not None:
            image = torch.where(mirrored[:, None, None], image.flip(-1), image)
        power = torch.view_as_real(image).square().sum(-1).mean((-2, -1), keepdim=True)
        image = image * power.clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        return torch.view_as_real(image).movedim(-1, 1)

    def refined_image(self, kspace: Tensor, mask: Tensor) -> Tensor:
        """VarNet's refined coil images combined with its own sensitivity maps.

        Returns
        -------
        Tensor, complex64, shape (B, readout, phase)
        """
        return refine_nonempty_slices(lambda *measured: self._refine(*measured)[0], kspace, mask, torch.complex64)

    def phase_corrected_image(self, kspace: Tensor, mask: Tensor) -> Tensor:
        """The refined image without the background phase of the one that the cascades start from.

        Not without its own: VarNet's U-Nets may then say what they find in the image's sign and imaginary part too.

        Returns
        -------
        Tensor, complex64, shape (B, readout, phase); in the units of `kspace`
        """

        def upright(*measured: Tensor) -> Tensor:
            refined, start = self._refine(*measured)
            return coils.remove_background_phase(refined, like=start)

        return refine_nonempty_slices(upright, kspace, mask, torch.complex64)

    def _refine(self, kspace: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """VarNet's refined image, and the one that its cascades start from, each (B, readout, phase).

        VarNet.forward ends in an RSS image; here its steps are taken one by one, with its weights, for the complex
        image of the last: k ← k − η (k − y) on the measured lines − F S D(Sᴴ F⁻¹ k).
        """
        maps = self._maps(torch.view_as_real(kspace), mask[:, None, None, :, None])
        maps = torch.view_as_complex(maps.float().contiguous())
        lines = mask[:, None, None]
        image = start = coils.combine(fourier.ifft2c(kspace), maps)
        refined = kspace
        for number, cascade in enumerate(self.varnet.cascades):
            last = number + 1 == len(self.varnet.cascades)
            refined, image = self._step(
                functools.partial(cascade_step, cascade, last), refined, image, kspace, lines, maps
            )
        return image, start

    def _maps(self, measured: Tensor, fastmri_mask: Tensor) -> Tensor:
        """VarNet's sensitivity maps. Its U-Net sees every coil at full size, by far the most activations of all steps.

        Where memory is to be saved it takes one slice at a time, which to it is all the same.
        """
        if not self.activation_checkpointing:
            return self.varnet.sens_net(measured, fastmri_mask)
        pairs = zip(measured.split(1), fastmri_mask.split(1), strict=True)
        return torch.cat([self._step(self.varnet.sens_net, one, mask) for one, mask in pairs])

    def _step(self, module: Callable[..., Any], *inputs: Tensor) -> Any:
        if self.activation_checkpointing and torch.is_grad_enabled():
            # Not reentrant: the first input needs no gradient, and a reentrant checkpoint would then return none.
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)


def cascade_step(
    cascade: nn.Module, last: bool, refined: Tensor, image: Tensor, kspace: Tensor, lines: Tensor, maps: Tensor
) -> tuple[Tensor, Tensor]:
    """A cascade's k-space and its image, from those before it; of the last one the image alone is right."""
    network: Any = cascade.model
    strength: Any = cascade.dc_weight
    change = torch.view_as_complex(network(torch.view_as_real(image)[:, None]).float().contiguous())[:, 0]
    refined = refined - torch.where(lines, strength * (refined - kspace), 0)
    if last:  # the network's image needs no way to k-space and back
        return refined, coils.combine(fourier.ifft2c(refined), maps) - fourier.rss(maps).square() * change
    refined = refined - fourier.fft2c(coils.expand(change, maps))
    return refined, coils.combine(fourier.ifft2c(refined), maps)


def refine_nonempty_slices(
    varnet: Callable[[Tensor, Tensor], Tensor], kspace: Tensor, mask: Tensor, dtype: torch.dtype
) -> Tensor:
    """What a VarNet makes of k-space (B, coil, readout, phase) and mask (B, phase): (B, readout, phase) of `dtype`.

    An empty coil makes fastMRI's NormUnet divide zero by zero, so slices that have one go through the VarNet alone,
    without it, and an all-zero slice goes around the VarNet and stays zero.
    """
    alive = torch.view_as_real(kspace).abs().amax((-1, -2, -3)) > 0  # (B, coil)
    if bool(alive.all()):
        return varnet(kspace, mask)
    images = [
        varnet(kspace[i : i + 1, alive[i]], mask[i : i + 1])
        if bool(alive[i].any())
        else torch.zeros_like(kspace[i : i + 1, 0], dtype=dtype)
        for i in range(kspace.shape[0])
    ]
    return torch.cat(images)


@torch.no_grad()
def initialize_vit(vit: ViTModel) -> None:
    """Initialize a ViT so that a narrow one learns from few images; everything is trained on from there.

    Linear maps keep the size of their input (LeCun: variance 1 / inputs; twice that deviation before the MLP's
    nonlinearity) where transformers' fixed 0.02 suits widths of 768 and long training. Patch filters are random
    mixtures of the 4×4 lowest cosines, smooth where noise and aliasing are not. Their biases are as large as a bright
    patch, because the LayerNorm behind them would otherwise take a patch's brightness off and leave its pattern. The
    embeddings of the positions are as large as that LayerNorm's output: how bright a patch is says little of the
    contrast before it is known where it lies, and 0.02 would take longer to grow than a short training lasts.
    """
    for layer in vit.layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                gain = 2.0 if name.endswith("fc1") else 1.0
                nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
    projection = vit.embeddings.patch_embeddings.projection
    place = (torch.arange(PATCH) + 0.5) / PATCH
    waves = torch.cos(torch.pi * torch.arange(4)[:, None] * place) * (2**0.5 / PATCH) ** 0.5  # (wave, pixel)
    mixture = torch.randn(*projection.weight.shape[:2], 4, 4) / 4
    projection.weight.copy_(torch.einsum("dcuv,ux,vy->dcxy", mixture, waves, waves))
    assert projection.bias is not None
    nn.init.normal_(projection.bias, std=3.0)
    nn.init.normal_(vit.embeddings.position_embeddings, std=1.0)


@torch.no_grad()
def initialize_maps_as_identity(varnet: VarNet) -> None:
    """Initialize a VarNet's sensitivity U-Net to pass its input on, so that maps start as the centre lines' images.

    fastMRI's random start gives random maps, which cancel the coils against each other; a reconstruction loss soon
    mends that and a loss on text does not. No shape changes; everything is trained on from there.

    Parameters
    ----------
    varnet : VarNet
        With at least 4 sensitivity channels, which passing a complex image through a leaky ReLU takes; with fewer its
        random start is kept.
    """
    unet = varnet.sens_net.norm_unet.unet
    if unet.chans < 4:
        return
    # The finest level's skip connection carries (a, −a) for the real and the imaginary part: with slope s below zero,
    # lrelu(a) − lrelu(−a) = (1 + s) a, and the instance norms find what NormUnet has normalised already.
    down, (up, last) = unet.down_sample_layers[0].layers, unet.up_conv[-1]
    inputs: list[list[tuple[int, float]]] = [[(0, 1.0)], [(1, 1.0)]]  # real, imaginary
    pairs: list[list[tuple[int, float]]] = [[(0, 1.0), (1, -1.0)], [(2, 1.0), (3, -1.0)]]
    skipped = [[(unet.chans + channel, sign) for channel, sign in part] for part in pairs]
    for conv, sources in ((down[0], inputs), (down[4], pairs), (up.layers[0], skipped), (up.layers[4], pairs)):
        conv.weight[:4] = 0
        for part, terms in enumerate(sources):
            for channel, sign in terms:
                conv.weight[2 * part, channel, 1, 1] = sign
                conv.weight[2 * part + 1, channel, 1, 1] = -sign
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    slope = up.layers[2].negative_slope
    for part, terms in enumerate(pairs):
        for channel, sign in terms:
            last.weight[part, channel, 0, 0] = sign / (1 + slope)


class LearnedPrefix(nn.Module):
    """The control that sees no k-space: one learned vector a position, the same for every slice.

    Parameters
    ----------
    num_tokens : int
        Image tokens; start and end come on top, so that it is as long as the encoder's output.
    output_dim : int
        Hidden size of the backbone.
    rms : float
        Root mean square of the start values.
    """

    def __init__(self, num_tokens: int, output_dim: int, rms: float) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.prefix = nn.Parameter(torch.randn(num_tokens + 2, output_dim) * rms)

    def forward(self, kspace: Tensor, mask: Tensor) -> Tensor:
        """(B, num_tokens + 2, output_dim); of `kspace` nothing but its batch size is used."""
        return self.prefix.expand(kspace.shape[0], -1, -1)
