"""The k-space encoder: VarNet, then a ViT, then a linear map to the width of the backbone.

::

    masked k-space (B, coil, readout, phase)
      ─► VarNet: refined coil images, combined with VarNet's coil maps ─► complex image (B, readout, phase)
      ─► background phase removed, cropped, unit power ─► real and imaginary part (B, 2, img_size, img_size)
      ─► ViT on 16×16 patches ─► (B, (img_size/16)², vit_embed_dim)
      ─► linear map (+ vectors of the detected findings), start and end vector ─► (B, (img_size/16)² + 2, output_dim)
"""

import functools
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fastmri
import torch
from fastmri.models import VarNet
from fastmri.models.varnet import SensitivityModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel
from transformers.models.vit.modeling_vit import ViTPatchEmbeddings

from mrilib.model.finding_maps import FindingEmbedding, FindingMaps
from mrilib.model.unet import PATCH, run
from mrilib.physics import coils, fourier

SMALLEST_SIGNAL = 1e-18  # largest value of a coil, relative to the slice's RMS; single precision holds its square
INITIAL_TOKEN_SCALE = 0.01  # RMS of an untrained encoder's k-space tokens, relative to the backbone's word embeddings


class EncoderOutput(NamedTuple):
    """Tokens and detection maps of a batch."""

    tokens: Tensor  # float32 (B, (img_size/16)² + 2, output_dim)
    maps: Tensor | None  # logits, float32 (B, labels, img_size, img_size); None without finding_labels


class KSpaceEncoder(nn.Module):
    """Encoder of undersampled multi-coil k-space into tokens for a language model.

    Parameters
    ----------
    output_dim : int
        Hidden size of the backbone.
    img_size : int
        Side of the ViT's input [pixels], a multiple of 16. The image is cropped or zero-padded to it.
    vit_embed_dim, vit_num_layers, vit_num_heads : int
        Sizes of the ViT (transformers' own). Its MLP is four times as wide.
    num_cascades, chans, pools, sens_chans, sens_pools : int
        Sizes of fastMRI's VarNet. The defaults have its published 29,936,966 parameters.
    map_network : bool
        True: VarNet estimates coil maps with its network. False: coil maps are the centre lines' coil images over their
        RSS. The text loss alone trains the map network poorly, and changing coil maps change the image.
    finding_labels : sequence of str
        fastMRI+ labels to detect. A U-Net on VarNet's image gives one detection map per label. Each detected finding
        adds a vector to the token of its patch. Empty: no detection maps.
    finding_chans : int
        Width of the detection maps' U-Net.
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
            raise ValueError(f"img_size {img_size} is not a multiple of {PATCH}, the side of a ViT patch")
        self.img_size = img_size
        self.activation_checkpointing = activation_checkpointing
        self.finding_labels = tuple(finding_labels)
        self.varnet = VarNet(num_cascades, sens_chans, sens_pools, chans, pools)
        if map_network:
            initialize_coil_maps_as_identity(self.varnet)
        else:
            self.varnet.sens_net.norm_unet = nn.Identity()
        self.finding_maps = FindingMaps(finding_labels, finding_chans) if finding_labels else None
        self.vit = build_vit(img_size, vit_embed_dim, vit_num_layers, vit_num_heads)
        if activation_checkpointing:
            self.vit.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.patch_features: nn.Linear | None = None
        if self.finding_maps is not None:
            self.patch_features = nn.Linear(self.finding_maps.features, vit_embed_dim)
            # The output has the scale of the patch embeddings that it is added to.
            nn.init.normal_(self.patch_features.weight, std=self.finding_maps.features**-0.5)
            nn.init.zeros_(self.patch_features.bias)
        self.projection = nn.Linear(vit_embed_dim, output_dim)
        # A FindingEmbedding; the attribute keeps the name that checkpoints use.
        self.finding_words = FindingEmbedding(len(finding_labels), output_dim) if finding_labels else None
        self.start = nn.Parameter(torch.randn(output_dim) * 0.02)
        self.end = nn.Parameter(torch.randn(output_dim) * 0.02)

    def forward(self, kspace: Tensor, mask: Tensor) -> Tensor:
        """Encode a batch of slices.

        Parameters
        ----------
        kspace : Tensor, complex64, shape (B, coil, readout, phase)
            Masked k-space divided by its root mean square.
        mask : Tensor, bool, shape (B, phase)

        Returns
        -------
        Tensor, float32, shape (B, (img_size/16)² + 2, output_dim)
            Start, tokens in row-major order of the patches, end.
        """
        return self.tokens_and_maps(kspace, mask).tokens

    def tokens_and_maps(self, kspace: Tensor, mask: Tensor, mirrored: Tensor | None = None) -> EncoderOutput:
        """Compute the tokens of `forward` and the detection maps.

        Where `mirrored`, bool (B,), is true, VarNet's image is flipped left to right.
        """
        image = self.phase_corrected_image(kspace, mask)
        pixels = self.pixels(image, mirrored)
        maps = features = None
        if self.finding_maps is not None:
            maps, features = self._detect(pixels)
        tokens = self.projection(self._vit_tokens(pixels, features))
        if self.finding_words is not None:
            tokens = tokens + self.finding_words(maps)
        start, end = (vector.to(tokens.dtype).expand(len(tokens), 1, -1) for vector in (self.start, self.end))
        return EncoderOutput(torch.cat([start, tokens, end], dim=1).float(), maps)

    def phase_corrected_image(self, kspace: Tensor, mask: Tensor) -> Tensor:
        """Compute VarNet's image without the background phase of the cascades' initial image.

        Phase added by the cascades is kept, since it can carry information for the ViT.

        Returns
        -------
        Tensor, complex64, shape (B, readout, phase)
            In the units of `kspace`.
        """

        def corrected(kspace: Tensor, mask: Tensor) -> Tensor:
            image, initial = self._refine(kspace, mask)
            return coils.remove_background_phase(image, like=initial)

        return skip_empty_slices(corrected, kspace, mask)

    def refined_image(self, kspace: Tensor, mask: Tensor) -> Tensor:
        """Combine VarNet's refined coil images with its coil maps: complex64 (B, readout, phase)."""
        return skip_empty_slices(lambda *inputs: self._refine(*inputs)[0], kspace, mask)

    def _refine(self, kspace: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Compute VarNet's combined image and the initial image of its cascades, each (B, readout, phase).

        `VarNet.forward` returns an RSS image. These are its steps with its weights, up to the complex image.
        """
        maps = self._coil_maps(kspace, mask)
        initial = coils.combine(fourier.ifft2c(kspace), maps)
        checkpointing = self.activation_checkpointing
        return run_cascades(self.varnet.cascades, kspace, mask, maps, initial, checkpointing), initial

    def _coil_maps(self, kspace: Tensor, mask: Tensor) -> Tensor:
        """Compute VarNet's coil maps, complex64 (B, coil, readout, phase).

        The map network processes every coil at full size, which takes most of the encoder's activation memory. With
        activation checkpointing it processes one slice at a time.
        """
        if not self.activation_checkpointing:
            return varnet_coil_maps(self.varnet.sens_net, kspace, mask)
        compute = functools.partial(varnet_coil_maps, self.varnet.sens_net)
        slices = zip(kspace.split(1), mask.split(1), strict=True)
        return torch.cat([run(compute, *inputs, checkpointing=True) for inputs in slices])

    def pixels(self, image: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Compute the input of ViT and detection maps, float32 (B, 2, img_size, img_size), from VarNet's image.

        The channels are the real and imaginary part. The image is divided by its RMS magnitude, because the scale of
        VarNet's image depends on the number of coils. Its mean is not subtracted.
        """
        image = fourier.center_crop_or_pad(image, (self.img_size, self.img_size))
        if mirrored is not None:
            image = torch.where(mirrored[:, None, None], image.flip(-1), image)
        power = torch.view_as_real(image).square().sum(-1).mean((-2, -1), keepdim=True)
        image = image * power.clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        return torch.view_as_real(image).movedim(-1, 1)

    def _detect(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute detection maps and U-Net features; outside of training, average the maps over mirroring."""
        assert self.finding_maps is not None
        maps, features = run(self.finding_maps, pixels, checkpointing=self.activation_checkpointing)
        if not self.training:
            mirrored, _ = run(self.finding_maps, pixels.flip(-1), checkpointing=self.activation_checkpointing)
            maps = (maps + mirrored.flip(-1)) / 2
        return maps, features

    def _vit_tokens(self, pixels: Tensor, features: Tensor | None) -> Tensor:
        """Run the ViT: (B, (img_size/16)², vit_embed_dim).

        Patch embeddings are a linear map of the pixels, plus one of the U-Net's features (hybrid ViT, Dosovitskiy et
        al., ICLR 2021): a linear map of pixels cannot represent local contrast at edges, U-Net features can. The
        features are detached, so the text loss does not train the U-Net.
        """
        patches = self.vit.embeddings(pixels)
        if self.patch_features is not None:
            assert features is not None
            added = self.patch_features(F.layer_norm(features.detach(), features.shape[-1:]))
            patches = patches + F.pad(added, (0, 0, 1, 0))  # zero for the class token, which comes first
        for layer in self.vit.layers:
            patches = layer(patches)
        return self.vit.layernorm(patches)[:, 1:]

    def match_embeddings(self, rms: float) -> None:
        """Draw projection, start, end and finding vectors again, in the scale of the backbone's word embeddings.

        Start and end vectors have the RMS of the word embeddings. K-space tokens and finding vectors start at
        `INITIAL_TOKEN_SCALE` times that RMS. Larger random tokens would dominate the backbone's hidden states before
        the encoder has learned anything.

        Parameters
        ----------
        rms : float
            Root mean square of the backbone's word embeddings.
        """
        with torch.no_grad():
            # The ViT ends in a LayerNorm, so its outputs have a root mean square of 1.
            self.projection.weight.normal_(std=INITIAL_TOKEN_SCALE * rms / self.projection.in_features**0.5)
            self.projection.bias.zero_()
            self.start.normal_(std=rms)
            self.end.normal_(std=rms)
            for table in self.finding_words.tables if self.finding_words is not None else ():
                table.normal_(std=INITIAL_TOKEN_SCALE * rms)

    def load_varnet(self, path: str | Path) -> None:
        """Load fastMRI's published VarNet weights (brain_leaderboard_state_dict.pt); all names must match.

        Raises
        ------
        ValueError
            If names or shapes differ (they are listed), or if the file is damaged or holds more than tensors.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"varnet_weights: {path} holds more than plain tensors, or is damaged") from error
        try:
            self.varnet.load_state_dict(state)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(f"varnet_weights: {path} does not fit the encoder's VarNet: {error}") from None


class ConstantPrefix(nn.Module):
    """The baseline without k-space: one learned vector for each position, the same for every slice.

    Parameters
    ----------
    num_tokens : int
        Number of k-space tokens. Start and end vectors are added, so the prefix is as long as the encoder's output.
    output_dim : int
        Hidden size of the backbone.
    rms : float
        Root mean square of the initial values.
    """

    def __init__(self, num_tokens: int, output_dim: int, rms: float) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(num_tokens + 2, output_dim) * rms)

    def forward(self, kspace: Tensor, mask: Tensor) -> Tensor:
        """Repeat the vectors for each slice: (B, num_tokens + 2, output_dim)."""
        return self.prefix.expand(kspace.shape[0], -1, -1)


def run_cascades(
    cascades: Iterable[nn.Module], kspace: Tensor, mask: Tensor, maps: Tensor, image: Tensor, checkpointing: bool
) -> Tensor:
    """Run VarNet's cascades k ← k − η M (k − y) − F S D(Sᴴ F⁻¹ k), and return the last combined image.

    y: measured k-space; M: mask; S: coil maps; D: the cascade's U-Net; η: its learned data-consistency weight.

    `kspace` and `maps` are complex64 (B, coil, readout, phase), `mask` is bool (B, phase). `image` is the combined
    image of `kspace`, complex64 (B, readout, phase), as is the result.
    """
    blocks = list(cascades)
    lines, refined = mask[:, None, None], kspace
    for block in blocks:
        step = functools.partial(_cascade, block, block is blocks[-1])
        refined, image = run(step, refined, image, kspace, lines, maps, checkpointing=checkpointing)
    return image


def _cascade(
    block: nn.Module, is_last: bool, refined: Tensor, image: Tensor, kspace: Tensor, lines: Tensor, maps: Tensor
) -> tuple[Tensor, Tensor]:
    """Return k-space and combined image after a cascade; after the last, k-space lacks the U-Net's correction."""
    network: Any = block.model
    weight: Any = block.dc_weight
    change = torch.view_as_complex(network(torch.view_as_real(image)[:, None]).float().contiguous())[:, 0]
    refined = refined - torch.where(lines, weight * (refined - kspace), 0)
    if is_last:  # Sᴴ F⁻¹ F S x = rss(S)² x, so the last correction needs no Fourier transform
        return refined, coils.combine(fourier.ifft2c(refined), maps) - fourier.rss(maps).square() * change
    refined = refined - fourier.fft2c(coils.expand(change, maps))
    return refined, coils.combine(fourier.ifft2c(refined), maps)


def varnet_coil_maps(network: SensitivityModel, kspace: Tensor, mask: Tensor) -> Tensor:
    """Compute coil maps by the steps of fastMRI's `SensitivityModel.forward`; the map of an empty coil is zero.

    fastMRI reads the bounds of the centre lines of every slice, and its NormUnet divides an empty coil's zeros by zero.

    Parameters
    ----------
    network : SensitivityModel
    kspace : Tensor, complex64, shape (B, coil, readout, phase)
        Masked k-space divided by its root mean square.
    mask : Tensor, bool, shape (B, phase)

    Returns
    -------
    Tensor, complex64, shape (B, coil, readout, phase)
    """
    start, count = network.get_pad_and_num_low_freqs(mask[:, None, None, :, None])
    lines = torch.arange(kspace.shape[-1], device=kspace.device)
    is_center = (lines >= start[:, None]) & (lines < (start + count)[:, None])
    has_signal = coils_with_signal(kspace)[:, :, None, None]
    center = torch.where(is_center[:, None, None], torch.where(has_signal, kspace, _impulses(kspace)), 0)
    images, batch_size = network.chans_to_batch_dim(fastmri.ifft2c(torch.view_as_real(center)))
    maps = network.batch_chans_to_chan_dim(network.norm_unet(images), batch_size)
    maps = network.divide_root_sum_of_squares(torch.where(has_signal[..., None], maps, 0))
    return torch.view_as_complex(maps.float().contiguous())


def skip_empty_slices(reconstruct: Callable[[Tensor, Tensor], Tensor], kspace: Tensor, mask: Tensor) -> Tensor:
    """Apply `reconstruct`, and give all-zero slices a zero image: fastMRI's NormUnet divides their zeros by zero.

    `reconstruct` maps k-space, complex64 (B, coil, readout, phase), and mask, bool (B, …), to images
    (B, readout, phase). It gets other k-space for an all-zero slice. So no value is read from the device.
    """
    has_signal = coils_with_signal(kspace).any(1)
    image = reconstruct(torch.where(has_signal[:, None, None, None], kspace, _impulses(kspace)), mask)
    return torch.where(has_signal[:, None, None], image, 0)


def coils_with_signal(kspace: Tensor) -> Tensor:
    """Whether a coil has signal, bool (B, coil), from k-space divided by its root mean square."""
    return torch.view_as_real(kspace).abs().amax((-1, -2, -3)) > SMALLEST_SIGNAL


def _impulses(kspace: Tensor) -> Tensor:
    """K-space (readout, phase) of two points, one of them on the centre line.

    Neither its image nor the image combined with coil maps from the centre lines is constant.
    """
    impulses = torch.zeros_like(kspace[0, 0])
    readout, phase = impulses.shape
    impulses[readout // 2 - 1, phase // 2] = 1
    impulses[readout // 2, 0] = 1
    return impulses


@torch.no_grad()
def initialize_coil_maps_as_identity(varnet: VarNet) -> None:
    """Initialize VarNet's map network as the identity, so that coil maps start as the centre lines' coil images.

    fastMRI's random initialization gives random maps, which make the coils cancel each other. A reconstruction loss
    soon corrects this; a loss on text does not. A complex image needs 4 channels to pass a leaky ReLU
    unchanged. With fewer channels the random initialization is kept.
    """
    unet = varnet.sens_net.norm_unet.unet
    if unet.chans < 4:
        return
    # The finest level's skip connection carries (a, −a) for the real and for the imaginary part. With slope s below
    # zero, lrelu(a) − lrelu(−a) = (1 + s) a. The instance norms change nothing: NormUnet has normalised the input.
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


class NormalizedPatchEmbeddings(ViTPatchEmbeddings):
    """transformers' patch embeddings, followed by a LayerNorm."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, channels, img_size, img_size) → (B, (img_size/16)², vit_embed_dim)."""
        return self.norm(super().forward(pixel_values))


def build_vit(img_size: int, embed_dim: int, num_layers: int, num_heads: int) -> ViTModel:
    """Build an untrained ViT for two-channel images of img_size × img_size pixels."""
    config = ViTConfig(
        hidden_size=embed_dim,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=4 * embed_dim,
        image_size=img_size,
        patch_size=PATCH,
        num_channels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    vit = ViTModel(config, add_pooling_layer=False)
    vit.embeddings.patch_embeddings = NormalizedPatchEmbeddings(config)
    _initialize_vit(vit)
    return vit


@torch.no_grad()
def _initialize_vit(vit: ViTModel) -> None:
    """Initialize a ViT so that a narrow one learns from few images.

    - Linear weights have standard deviation 1/√inputs (LeCun), and 2/√inputs in the first MLP layer.
      transformers' fixed deviation of 0.02 suits a width of 768 and long training.
    - Patch filters are random mixtures of the 4×4 lowest cosines: smooth, unlike noise and aliasing.
    - Patch biases have standard deviation 3, comparable to a bright patch. Without them LayerNorm removes brightness.
    - Position embeddings have standard deviation 1, like the patch embeddings; 0.02 is too small for a short training.
    """
    for layer in vit.layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                gain = 2.0 if name.endswith("fc1") else 1.0
                nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
    projection = vit.embeddings.patch_embeddings.projection
    positions = (torch.arange(PATCH) + 0.5) / PATCH
    waves = torch.cos(torch.pi * torch.arange(4)[:, None] * positions) * (2**0.5 / PATCH) ** 0.5  # (wave, pixel)
    mixture = torch.randn(*projection.weight.shape[:2], 4, 4) / 4
    projection.weight.copy_(torch.einsum("dcuv,ux,vy->dcxy", mixture, waves, waves))
    assert projection.bias is not None
    nn.init.normal_(projection.bias, std=3.0)
    nn.init.normal_(vit.embeddings.position_embeddings, std=1.0)
