"""The image decoder: a U-Net from the backbone's image tokens, and the measured data, to the image.

    zero-filled image, combined with centre-line coil maps ─► 2×2 pixels as channels ─► down, down, down ─┐
                                          image tokens ─► LayerNorm ─► linear ─► (n × n) map ─────────────┤ bottleneck
    RSS ◄─ data consistency ◄─ complex image ◄─ 2×2 pixels from channels ◄─ up, up, up ◄──────────────────┘
     └────────────◄───────────── noise power ◄────────────┘

With ``sense`` the U-Net sees a SENSE image too, and another SENSE solve precedes the data consistency. With
``encoder_image`` it sees what the frozen encoder made of the scan in the SENSE image's place, as it is and brought into
line with the data, and starts from the latter: two networks with the data between them.
With ``image_skip=False`` there is no down path: tokens alone, magnitude out, the description's literal reading.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrilib import kspace as physics
from mrilib.encoder import PATCH, SENSE_START
from mrilib.unet import FOLD, Depth, UNet

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
    encoder_image : bool
        The U-Net also sees the frozen encoder's image (`KSpaceEncoder.restored_image`), as it is and brought into line
        with the measured lines, and starts from the latter, not from SENSE's image: what stage 1 has learned of images
        need not be learned again. Four inputs of the stem.
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
        encoder_image: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if decoder_type not in DEPTHS:
            raise ValueError(f"decoder_type '{decoder_type}' is not one of {', '.join(DEPTHS)}")
        if decoder_hidden_dim % 4:
            raise ValueError(f"decoder_hidden_dim {decoder_hidden_dim} is not a multiple of 4")
        if img_size % PATCH:
            raise ValueError(f"img_size {img_size} is not a multiple of {PATCH}")
        for name, wanted in (("sense", sense), ("encoder_image", encoder_image)):
            if wanted and not image_skip:
                raise ValueError(f"{name} works on the measured data; set image_skip: true")
        if not token_dim and not image_skip:
            raise ValueError("a decoder needs image tokens, the measured data (image_skip), or both")
        self.token_dim, self.img_size, self.image_skip = token_dim, img_size, image_skip
        self.sense, self.encoder_image = sense, encoder_image
        hidden = decoder_hidden_dim
        if token_dim:
            self.token_norm = nn.LayerNorm(token_dim)
            self.token_projection = nn.Linear(token_dim, hidden)
        self.token_pixels = nn.Linear(token_dim, PATCH * PATCH) if token_pixels and token_dim else None
        self.unet = UNet(
            inputs=2 + (4 if encoder_image else 2 * sense) + (self.token_pixels is not None) if image_skip else 0,
            outputs=3 if image_skip else 1,
            width=hidden // 4,
            depth=DEPTHS[decoder_type],
            joined=hidden if token_dim else 0,
            modulated=token_modulation,
            bilinear=use_bilinear_upsample,
            activation_checkpointing=activation_checkpointing,
        )
        if image_skip:  # start from the zero-filled image, SENSE's or the encoder's: data consistency alone
            nn.init.zeros_(self.unet.head.weight)
            nn.init.zeros_(self.unet.head.bias)  # type: ignore[arg-type]

    def forward(
        self,
        tokens: Tensor | None,
        kspace: Tensor,
        mask: Tensor,
        scale: Tensor,
        recon: tuple[int, int],
        acquired: Tensor | None = None,
        starts: Tensor | None = None,
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
        starts : Tensor, complex64, shape (B, 2, readout, phase), optional
            `start_images` of the same `kspace` and `mask`, which `encoder_image` needs.

        Returns
        -------
        Tensor, float32, shape (B, h, w) [file units]
        """
        self._check(tokens)
        normed = None if tokens is None else self.token_norm(tokens.to(self.token_norm.weight.dtype))
        if not self.image_skip:
            square = (self.img_size, self.img_size)
            features = self.unet(None, self._token_map(normed, kspace, square))
            if self.token_pixels is not None:
                features = features + self._token_image(normed, kspace, square)
            image = F.softplus(features[:, 0].float())
            return physics.center_crop_or_pad(image, recon) * scale[:, None, None]
        maps = physics.center_coil_maps(kspace, mask)
        measured = physics.ifft2c(kspace)  # coil images
        zero_filled = physics.combine(measured, maps)
        power = torch.view_as_real(zero_filled).square().sum(-1).mean((-2, -1))
        size = power.clamp_min(torch.finfo(torch.float32).tiny).sqrt()[:, None, None, None]
        height, width = zero_filled.shape[-2:]
        padded = (self._padded(height), self._padded(width))
        seen = [zero_filled]
        if self.encoder_image:
            if starts is None:
                raise ValueError("encoder_image: this decoder starts from the encoder's image, and none was given")
            seen += starts.unbind(1)
        elif self.sense:
            seen.append(physics.sense(kspace, mask, maps, iterations=SENSE_START, zero_filled=zero_filled))
        channels = [torch.view_as_real(image).movedim(-1, 1) / size for image in seen]
        inputs = physics.center_crop_or_pad(torch.cat(channels, dim=1), padded)
        if self.token_pixels is not None:
            inputs = torch.cat([inputs, self._token_image(normed, kspace, padded).to(inputs.dtype)], dim=1)
        residual = self.unet(inputs, self._token_map(normed, kspace, padded)).float()
        if self.token_dim and normed is None and self.training:
            # Tokens join later (`tokens_from`): until then what reads them has a gradient of zeros rather than none.
            reading = [m for m in (self.token_norm, self.token_projection, self.token_pixels) if m is not None]
            residual = residual + 0 * sum(p.sum() for module in reading for p in module.parameters())
        residual = physics.center_crop_or_pad(residual, (height, width))
        pixels = (channels[-1] + residual[:, :2]) * size
        image = torch.view_as_complex(pixels.movedim(1, -1).contiguous())
        if self.sense:
            image = self._consistent(image, kspace, mask, maps, zero_filled, measured)
        coil_images = physics.data_consistency(image, maps, kspace, mask, acquired, measured)
        # The target is an RSS of noisy lines: the missing ones' noise too adds to its power, and no image predicts it.
        power = physics.rss(coil_images).square() + residual[:, 2] * size[:, 0].square()
        magnitude = power.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        return physics.center_crop_or_pad(magnitude, recon) * scale[:, None, None]

    @torch.no_grad()
    def start_with(self, restoration: UNet) -> None:
        """Start with the weights of the U-Net that restores the encoder's image, at work on the image started from.

        What stage 1 has learned of images need not be learned again, here in the weights. What that U-Net does not
        have begins as it is: the other inputs of the stem at a tenth, the noise power at zero, the tokens' map in the
        bottleneck's first convolution alone, whose norm it takes part in. Without tokens the decoder's first output is
        that U-Net's.

        Parameters
        ----------
        restoration : UNet
            `KSpaceEncoder.restoration`: two inputs, two outputs, the decoder's width and depth.

        Raises
        ------
        ValueError
            If the widths or depths differ, or the decoder starts from no image of the encoder.
        """
        if not self.encoder_image:
            raise ValueError("the decoder does not start from the encoder's image")
        own, given = self.unet.state_dict(), restoration.state_dict()
        of_tokens = ("bottleneck.0.shortcut.", "modulate.")
        if {name for name in own if not name.startswith(of_tokens)} != given.keys():
            raise ValueError("the decoder's U-Net is not as deep as the encoder's")
        wide, other = (state["head.weight"].shape[1] for state in (own, given))
        if wide != other:
            raise ValueError(f"the decoder's U-Net is {wide} wide and the encoder's {other}")
        # The image that it starts from is the last of three complex ones; a token image may come after.
        stem, end = given.pop("stem.weight"), 6 * FOLD**2
        own["stem.weight"].mul_(0.1)[:, end - stem.shape[1] : end] = stem
        for name, tensor in given.items():
            # further outputs come after, and further inputs too: the tokens' map at the bottleneck
            own[name][tuple(slice(length) for length in tensor.shape)] = tensor
        joined = own.get("bottleneck.0.shortcut.weight")
        if joined is not None:  # where nothing joins it is the identity
            features = joined.shape[0]
            joined.zero_()[:, :features, 0, 0] = torch.eye(features)

    @torch.no_grad()
    def start_images(self, kspace: Tensor, mask: Tensor, refined: Tensor) -> Tensor:
        """What a decoder with `encoder_image` starts from: the encoder's image, as it is and in line with the data.

        Nothing of this is learned. In line with the data the image says what the encoder's networks have left out or
        made up.

        Parameters
        ----------
        kspace, mask
            As of `forward`.
        refined : Tensor, complex64, shape (B, readout, phase)
            `KSpaceEncoder.restored_image` of them, of any size and phase: what taught the encoder cares for neither.

        Returns
        -------
        Tensor, complex64, shape (B, 2, readout, phase)
        """
        maps, measured = physics.center_coil_maps(kspace, mask), physics.ifft2c(kspace)
        zero_filled = physics.combine(measured, maps)
        start = refined * physics.background_phase(zero_filled)
        start = start * physics.fitted_scale(start, mask, maps, zero_filled)
        return torch.stack([start, self._consistent(start, kspace, mask, maps, zero_filled, measured)], dim=1)

    def _consistent(
        self, image: Tensor, kspace: Tensor, mask: Tensor, maps: Tensor, zero_filled: Tensor, measured: Tensor
    ) -> Tensor:
        """An image brought into line with the measured lines."""
        if self.sense:
            return physics.sense(
                kspace, mask, maps, SENSE_WEIGHT, SENSE_ITERATIONS, prior=image, zero_filled=zero_filled
            )
        return physics.combine(physics.data_consistency(image, maps, kspace, mask, None, measured), maps)

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
    """1 − SSIM on the evaluated crop, the volume's maximum as data range, as fastMRI's `SSIMLoss`; always in float32.

    The same 7×7 means of the same five images. A mean over a window is a product with a band matrix from each side,
    which takes a processor a tenth of the time of fastMRI's convolutions.
    """

    WINDOW, K1, K2 = 7, 0.01, 0.03

    def forward(self, image: Tensor, target: Tensor, maximum: Tensor, weights: Tensor | None = None) -> Tensor:
        """Loss of each slice.

        Parameters
        ----------
        image, target : Tensor, float32, shape (B, h, w) [file units]
            At least 7×7.
        maximum : Tensor, float32, shape (B,) [file units]
        weights : Tensor, float32, shape (B, h, w), optional
            What a window counts by its centre, beside its share in the mean; the weighted sum of 1 − SSIM is added.

        Returns
        -------
        Tensor, float32, shape (B,)
        """
        # File units are about 1e-5, whose squares and products SSIM subtracts: divided by the maximum they are about 1.
        unit = positive(maximum)[:, None, None]
        with torch.autocast(image.device.type, enabled=False):
            x, y = image.float() / unit, target.float() / unit
            rows, columns = (self._means(length, x.device) for length in x.shape[-2:])
            stack = rows @ torch.stack([x, y, x * x, y * y, x * y], dim=1) @ columns.mT
            mean_x, mean_y, square_x, square_y, product = stack.unbind(1)
            unbiased = self.WINDOW**2 / (self.WINDOW**2 - 1)
            variances = unbiased * (square_x - mean_x**2 + square_y - mean_y**2)
            covariance = unbiased * (product - mean_x * mean_y)
            first, second = self.K1**2, self.K2**2
            similarity = (2 * mean_x * mean_y + first) * (2 * covariance + second)
            similarity = similarity / ((mean_x**2 + mean_y**2 + first) * (variances + second))
            losses = 1 - similarity.mean((-2, -1))
            if weights is not None:
                rim = self.WINDOW // 2
                losses = losses + (weights[:, rim:-rim, rim:-rim] * (1 - similarity)).sum((-2, -1))
            return losses

    def _means(self, length: int, device: torch.device) -> Tensor:
        """(length − 6, length): each row averages a window."""
        offset = torch.arange(length, device=device) - torch.arange(length - self.WINDOW + 1, device=device)[:, None]
        return ((offset >= 0) & (offset < self.WINDOW)) / self.WINDOW


def positive(maximum: Tensor) -> Tensor:
    """A volume's maximum to divide by: 1 for a volume of zeros, which would otherwise divide zero by zero."""
    return torch.where(maximum > 0, maximum, 1)
