"""fastMRI brain files, slice by slice: h5 → Slice → Batch.

Scale, coil compression and coil maps come from the masked k-space alone. The decoder also receives the image size and
the acquired lines from the header. Only the loss and the metrics use target, maximum and annotations.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from fastmri.data.subsample import MaskFunc
from torch import Tensor
from torch.utils.data import Dataset

from mrilib.config import DataParameters, ParameterError, resolve
from mrilib.data import annotations as annotations_module
from mrilib.data import findings
from mrilib.data.annotations import Annotations, Box, Report
from mrilib.data.fastmri_file import SMALLEST_SCALE, DataError, Volume, first_line, require_unchanged
from mrilib.data.findings import Facts
from mrilib.physics import coils as coils_module
from mrilib.physics import fourier, masks
from mrilib.transfer import to_device


class Slice(NamedTuple):
    """One undersampled slice; all tensors on the CPU."""

    kspace: Tensor  # complex64 (coil, readout, phase): masked, divided by its root mean square
    mask: Tensor  # bool (phase,)
    scale: float  # [file units]: normalised value × scale = file value
    target: Tensor | None  # float32 (h, w): RSS of the fully sampled data [file units]
    maximum: float  # of the target volume [file units]
    image_shape: tuple[int, int]  # (h, w) of the evaluated image [pixels]
    acceleration: int
    file: str
    slice_num: int
    patient: str
    facts: Facts
    report: Report | None
    acquired: Tensor | None = None  # bool (phase,): False on lines that the header marks as not acquired; None: all
    tokens: Tensor | None = None  # image tokens (N, hidden) from a token cache
    pixel: tuple[float, float] | None = None  # (readout, phase) [mm]; None if the header lacks it
    boxes: tuple[Box, ...] | None = None  # on the evaluated image, never mirrored; None: volume not reviewed
    repeat: int = 0  # number of earlier uses of the slice in this epoch; each has its own mask
    mirrored: bool = False  # the encoder flips the image left to right; the facts are flipped already


class Batch(NamedTuple):
    """B stacked slices of equal shape."""

    kspace: Tensor  # complex64 (B, coil, readout, phase)
    mask: Tensor  # bool (B, phase)
    scale: Tensor  # float32 (B,) [file units]
    target: Tensor | None  # float32 (B, h, w) [file units]
    maximum: Tensor  # float32 (B,) [file units]
    image_shape: tuple[int, int]  # (h, w) [pixels]
    slices: list[Slice]  # without k-space, target and tokens
    acquired: Tensor | None = None  # bool (B, phase)
    tokens: Tensor | None = None  # image tokens (B, N, hidden) if a token cache holds them for all slices

    def to(self, device: torch.device | str) -> "Batch":
        """Copy with the tensors on `device`."""
        moved: dict[str, Any] = {name: to_device(value, device) for name, value in self._tensors()}
        return self._replace(**moved)

    def chunks(self, size: int) -> Iterator["Batch"]:
        """Split into batches of at most `size` slices."""
        if len(self.slices) <= size:
            yield self
            return
        for start in range(0, len(self.slices), size):
            part = slice(start, start + size)
            yield self._replace(slices=self.slices[part], **{name: value[part] for name, value in self._tensors()})

    def _tensors(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in self._asdict().items() if isinstance(value, Tensor)]


class FastMRIDataset(Dataset[Slice]):
    """Masked, normalised slices of fastMRI volumes.

    Parameters
    ----------
    volumes : sequence of Volume
    config : DataParameters
        num_coils, img_size, crop, mask_type, accelerations, center_fractions, seed, reports_path.
    annotations : Annotations, optional
        fastMRI+ findings; without them the findings of all slices are unknown.
    training : bool
        True: masks seeded by (seed, file, slice, mask number), and mirrored slices. False: fastMRI's validation masks,
        seeded by the file name.
    masks_per_slice : int
        Number of different training masks per slice. Epochs cycle through them, and so do repeats within an epoch.
        0: a new mask for each epoch and repeat.
    acceleration : int, optional
        Use only this one of config.accelerations.
    max_slices : int
        Use only so many slices, evenly spread; 0: all.
    mirror_fraction : float
        Probability that a training slice is mirrored, drawn from (seed, file, slice, epoch, repeat). A slice with a
        user's report is never mirrored, since the report may name sides.

    Attributes
    ----------
    epoch : int
        Set it before each pass over the data.

    Raises
    ------
    DataError
        If ``crop: image`` is used with a file that has its own mask, if a file cannot be read, or if a mask omits the
        centre line.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        config: DataParameters,
        annotations: Annotations | None = None,
        *,
        training: bool = False,
        masks_per_slice: int = 0,
        acceleration: int | None = None,
        max_slices: int = 0,
        mirror_fraction: float = 0.0,
    ) -> None:
        self.volumes = list(volumes)
        self.config = config
        self.annotations = annotations
        self.training = training
        self.masks_per_slice, self.mirror_fraction = masks_per_slice, mirror_fraction
        self.epoch = 0
        self.texts_only = False
        self._reader = _LineReader()
        self.mask_func = self._make_mask_func(acceleration)
        self.reports = _read_reports(config.reports_path, self.volumes)
        if config.crop == "image" and (own := [v.file for v in self.volumes if v.has_mask]):
            raise DataError(f"crop: image changes the acquisition, but {own[0]} has its own mask; use crop: readout")
        self.samples = [(v, s) for v, volume in enumerate(self.volumes) for s in range(volume.slices)]
        if 0 < max_slices < len(self.samples):
            chosen = np.linspace(0, len(self.samples) - 1, max_slices).round().astype(int)
            self.samples = [self.samples[i] for i in chosen]
        if annotations is not None:
            for index in range(len(self)):
                self.facts(index)  # refuses a box outside its image now rather than during training

    def _make_mask_func(self, acceleration: int | None) -> MaskFunc:
        config = self.config
        paired = zip(config.center_fractions, config.accelerations, strict=True)
        pairs = [(fraction, a) for fraction, a in paired if acceleration in (None, a)]
        if not pairs:
            raise ParameterError(f"acceleration {acceleration} is not one of accelerations {config.accelerations}")
        for width in {self._after_crop(volume).matrix[1] for volume in self.volumes if not volume.has_mask}:
            for pair in pairs:
                masks.check_mask(config.mask_type, *pair, width)
        return masks.make_mask_func(config.mask_type, *zip(*pairs, strict=True))

    def __len__(self) -> int:
        return len(self.samples)

    def without_kspace(self) -> "FastMRIDataset":
        """Copy with empty tensors for all slices; no file is read."""
        other = copy.copy(self)
        other.texts_only = True
        return other

    def uncompressed(self) -> "FastMRIDataset":
        """Copy with the same slices and masks, without coil compression."""
        other = FastMRIDataset.__new__(FastMRIDataset)  # not type(self): the cache's subclass holds compressed slices
        vars(other).update(vars(self))
        most = max(self.config.num_coils, *(volume.coils for volume in self.volumes))
        other.config = self.config.model_copy(update={"num_coils": most})
        return other

    @property
    def compresses(self) -> bool:
        """Whether any file has more than num_coils coils."""
        return any(volume.coils > self.config.num_coils for volume in self.volumes)

    def shape_key(self, index: int) -> tuple[int, ...]:
        """Shape of a slice; slices with equal keys can be stacked."""
        volume, _ = self._sample(index)
        coils = min(volume.coils, self.config.num_coils)
        if self.config.crop == "image":
            return (coils, int(volume.has_target))
        return (coils, volume.readout, volume.matrix[1], *volume.image_shape, int(volume.has_target))

    def facts(self, index: int) -> Facts:
        """Contrast, level and findings of a slice: for its text and its scores, not for the model's input."""
        volume, slice_num = self._sample(index)
        return findings.slice_facts(
            self.annotations, volume.file, slice_num, volume.slices, volume.acquisition, volume.image_shape
        )

    def boxes(self, index: int) -> tuple[Box, ...] | None:
        """Boxes of a slice's findings on the evaluated image; None if the volume was not reviewed."""
        volume, slice_num = self._sample(index)
        if self.annotations is None or not self.annotations.reviewed(volume.file):
            return None
        boxes = self.annotations.boxes(volume.file, slice_num, volume.image_shape[0])
        if self.config.crop == "image":  # shifted as `center_crop_or_pad` shifts the image
            size = self.config.img_size
            down, across = ((size - n) // 2 if n < size else -((n - size) // 2) for n in volume.image_shape)
            boxes = tuple(replace(box, x=box.x + across, y=box.y + down) for box in boxes)
        return boxes

    def _sample(self, index: int) -> tuple[Volume, int]:
        volume, slice_num = self.samples[index]
        return self.volumes[volume], slice_num

    def _after_crop(self, volume: Volume) -> Volume:
        """Apply the parameter `crop` to the shapes and the padding of a volume."""
        if self.config.crop == "readout":
            return volume
        size = self.config.img_size
        return volume._replace(image_shape=(size, size), readout=size, matrix=(size, size), padding=(0, size))

    def __getitem__(self, index: int | tuple[int, int]) -> Slice:
        """Slice by its index, or by (index, repeat) if the epoch has used it `repeat` times before."""
        index, repeat = index if isinstance(index, tuple) else (index, 0)
        volume, slice_num = self._sample(index)
        if self.texts_only:
            kspace, mask = torch.zeros(0, dtype=torch.complex64), torch.zeros(0, dtype=torch.bool)
            return self._slice(index, kspace, mask, 1.0, None, volume.image_shape, 0, repeat)
        cropped = self._after_crop(volume)
        place = f"{volume.path.name}, slice {slice_num}"
        try:
            with h5py.File(volume.path, "r") as h5:
                require_unchanged(h5, volume)
                mask, acceleration = self._mask(h5, cropped, slice_num, repeat)
                measured = mask.nonzero().squeeze(1)
                if self.config.crop == "image":
                    raw = torch.from_numpy(h5["kspace"][slice_num].astype(np.complex64, copy=False))
                    image = fourier.center_crop_or_pad(fourier.ifft2c(raw), cropped.image_shape)
                    lines = fourier.fft2c(image)[..., measured]
                else:
                    lines = self._reader.read(h5["kspace"], slice_num, measured)
                target = None
                if volume.has_target:
                    target = torch.from_numpy(h5["reconstruction_rss"][slice_num].astype(np.float32, copy=False))
                    target = fourier.center_crop_or_pad(target, cropped.image_shape)
        except (OSError, RuntimeError) as error:  # h5py raises both on a damaged chunk
            raise DataError(f"{place}: cannot be read ({first_line(error)})") from None
        if not mask[len(mask) // 2]:  # coil maps come from the centre lines
            raise DataError(
                f"{place}: the mask does not sample the centre of k-space; raise center_fractions, or remove the file "
                "if it has its own mask"
            )
        lines = fourier.remove_readout_oversampling(lines, cropped.readout)
        masked, scale = _normalise(lines, mask, self.config.num_coils, place)
        return self._slice(index, masked, mask, scale, target, cropped.image_shape, acceleration, repeat)

    def _mask(self, h5: h5py.File, volume: Volume, slice_num: int, repeat: int) -> tuple[Tensor, int]:
        """Mask of a slice (phase,) and its acceleration; padding is not sampled."""
        if not volume.has_mask:
            seed = self._mask_seed(volume, slice_num, repeat)
            return masks.sample_mask(self.mask_func, volume.matrix[1], seed, volume.padding)
        mask = torch.from_numpy(h5["mask"][()].astype(bool))
        mask[: volume.padding[0]] = False
        mask[volume.padding[1] :] = False
        return mask, volume.acceleration

    def _mask_seed(self, volume: Volume, slice_num: int, repeat: int = 0) -> int | tuple[int, ...]:
        if not self.training:
            return masks.validation_seed(volume.path.name)
        words = self.config.seed, volume.file, slice_num
        if self.masks_per_slice:
            return masks.training_seed(*words, (self.epoch + repeat) % self.masks_per_slice)
        return masks.training_seed(*words, self.epoch, repeat)

    def _slice(
        self,
        index: int,
        kspace: Tensor,
        mask: Tensor,
        scale: float,
        target: Tensor | None,
        image_shape: tuple[int, int],
        acceleration: int,
        repeat: int = 0,
    ) -> Slice:
        volume, slice_num = self._sample(index)
        acquired = torch.ones_like(mask)
        if self.config.crop == "readout":  # `crop: image` mixes acquired lines with padding
            acquired[: volume.padding[0]] = False
            acquired[volume.padding[1] :] = False
        facts, mirrored = self.facts(index), self._is_mirrored(index, repeat)
        return Slice(
            kspace=kspace,
            mask=mask,
            scale=scale,
            target=target,
            maximum=volume.maximum,
            image_shape=image_shape,
            acceleration=acceleration,
            file=volume.file,
            slice_num=slice_num,
            patient=volume.patient,
            facts=findings.mirrored(facts) if mirrored else facts,
            report=self.reports.get((volume.file, slice_num)),
            acquired=acquired,
            pixel=volume.pixel,
            boxes=self.boxes(index),
            repeat=repeat,
            mirrored=mirrored,
        )

    def _is_mirrored(self, index: int, repeat: int) -> bool:
        volume, slice_num = self._sample(index)
        if not self.training or (volume.file, slice_num) in self.reports:
            return False
        words = [self.config.seed, slice_num, self.epoch, *([repeat] if repeat else []), *volume.file.encode()]
        return bool(np.random.default_rng(words).random() < self.mirror_fraction)


def _read_reports(path: str, volumes: Sequence[Volume]) -> dict[tuple[str, int], Report]:
    reports = annotations_module.read_reports(resolve(path)) if path else {}
    slices = {volume.file: volume.slices for volume in volumes}
    for file, slice_num in reports:
        if slice_num >= slices.get(file, slice_num + 1):
            raise DataError(
                f"reports_path: a report of {file}, slice {slice_num}, but the file has {slices[file]} slices, counted "
                "from 0"
            )
    return reports


class _LineReader:
    """Reads the measured lines of a slice through one reused buffer.

    The buffer usually holds four coils and fits in the processor's cache. Allocating 26 MB per slice takes as long as
    reading the file. Threads must not share a reader.
    """

    COILS = 4  # read at a time

    def __init__(self) -> None:
        self._buffer = np.empty((0, 0, 0), np.complex64)

    def read(self, kspace: h5py.Dataset, slice_num: int, measured: Tensor) -> Tensor:
        """Read the lines `measured`: (coil, readout, line), with the readout contiguous in memory."""
        coils, readout, phase = kspace.shape[1:]
        lines = torch.empty(coils, len(measured), readout, dtype=torch.complex64)
        # A chunk that holds more coils would be decompressed once for each part.
        step = coils if kspace.chunks and kspace.chunks[1] > self.COILS else self.COILS
        if self._buffer.shape != (step, readout, phase):
            self._buffer = np.empty((step, readout, phase), np.complex64)
        for first in range(0, coils, step):
            part = self._buffer[: coils - first]
            coil = slice(first, first + len(part))
            if kspace.dtype == part.dtype:
                kspace.read_direct(part, np.s_[slice_num, coil])
            else:
                part[:] = kspace[slice_num, coil]
            lines[coil] = torch.from_numpy(part).mT[:, measured]
        return lines.mT


def _normalise(lines: Tensor, mask: Tensor, num_coils: int, place: str) -> tuple[Tensor, float]:
    """Masked k-space, compressed and divided by its root mean square, and this scale (1 for a slice of zeros)."""
    norm = _norm(lines)
    if not math.isfinite(norm):
        raise DataError(f"{place}: NaN or infinity in the measured lines; for details run python -m mrilib check")
    if len(lines) > num_coils:
        lines = coils_module.compress_coils(lines, num_coils)
        norm = _norm(lines)
    masked = torch.zeros(*lines.shape[:-1], len(mask), dtype=lines.dtype)
    scale = norm / masked.numel() ** 0.5
    if 0 < scale < SMALLEST_SCALE:
        raise DataError(f"{place}: too small for single precision; scale the file")
    masked[..., mask] = lines / scale if scale else lines
    return masked, scale or 1.0


def _norm(lines: Tensor) -> float:
    """Euclidean norm in double precision: the squares of single precision can overflow or underflow."""
    return torch.linalg.vector_norm(torch.view_as_real(lines), dtype=torch.float64).item()
