"""fastMRI brain files, slice by slice: h5 → Slice → Batch.

What reaches the model comes from the masked k-space alone: scale, coil compression and coil maps. Target, maximum and
attributes are for the loss and the metrics.
"""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mrilib.config import DataParameters, ParameterError, resolve
from mrilib.data import annotations as annotations_module
from mrilib.data import findings
from mrilib.data.annotations import Annotations, Box, Report
from mrilib.data.fastmri_file import (
    SMALLEST_SCALE,
    DataError,
    Volume,
    dataset,
    told,
)
from mrilib.data.findings import Facts
from mrilib.physics import coils as coils_module
from mrilib.physics import fourier, masks

logger = logging.getLogger("mrilib")


class Slice(NamedTuple):
    """One undersampled slice; all tensors on the CPU."""

    kspace: Tensor  # complex64 (coil, readout, phase): masked, divided by its root mean square
    mask: Tensor  # bool (phase,)
    scale: float  # [file units]: normalised value × scale = file value
    target: Tensor | None  # float32 (h, w) RSS of the fully sampled data [file units]
    maximum: float  # of the target volume [file units]
    image_shape: tuple[int, int]  # h, w of the evaluated image
    acceleration: int
    file: str
    slice_num: int
    patient: str
    facts: Facts
    report: Report | None
    acquired: Tensor | None = None  # bool (phase,): False on the header's padding; None: every line was acquired
    tokens: Tensor | None = None  # image tokens (N, hidden) if a token cache holds them, in the backbone's own type
    pixel: tuple[float, float] | None = None  # readout, phase [mm]; None if the file does not tell
    boxes: tuple[Box, ...] | None = None  # of the evaluated image; None: nobody reviewed the volume
    look: int = 0  # which of the epoch's looks at the slice this is, each with a mask of its own
    mirrored: bool = False  # the encoder is to see the image flipped left to right; the facts are, the rest is as read


class Batch(NamedTuple):
    """Slices of equal shape, stacked; B is their number."""

    kspace: Tensor  # complex64 (B, coil, readout, phase)
    mask: Tensor  # bool (B, phase)
    scale: Tensor  # float32 (B,) [file units]
    target: Tensor | None  # float32 (B, h, w) [file units]
    maximum: Tensor  # float32 (B,) [file units]
    image_shape: tuple[int, int]
    slices: list[Slice]  # what is not stacked above; without their tensors
    acquired: Tensor | None = None  # bool (B, phase)
    tokens: Tensor | None = None  # image tokens (B, N, hidden) if a token cache holds them for all the slices

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor)
        }
        return self._replace(**moved)

    def chunks(self, size: int) -> Iterator["Batch"]:
        """The batch in parts of `size` slices at most."""
        if len(self.slices) <= size:
            yield self
            return
        for start in range(0, len(self.slices), size):
            part = slice(start, start + size)
            cut: dict[str, Any] = {
                name: value[part] for name, value in self._asdict().items() if isinstance(value, Tensor)
            }
            yield self._replace(**cut, slices=self.slices[part])


def _require_unchanged(h5: h5py.File, volume: Volume) -> None:
    """Refuse a file that is no longer the one that the run began with."""
    wanted: dict[str, tuple[int, ...]] = {"kspace": (volume.slices, volume.coils, *volume.matrix)}
    if volume.has_target:
        wanted["reconstruction_rss"] = (volume.slices, *volume.image_shape)
    if volume.has_mask:
        wanted["mask"] = volume.matrix[1:]
    for name, shape in wanted.items():
        stored = dataset(h5, name)
        if stored is None or stored.shape != shape or stored.dtype.kind != {"kspace": "c"}.get(name, stored.dtype.kind):
            now = "is gone" if stored is None else f"is {stored.dtype} {stored.shape} now"
            raise DataError(
                f"{volume.path.name}: the file was replaced while it was in use: {name} {now}, was {shape}; put the "
                "old file back, or begin a new run"
            )


def loading_error(error: RuntimeError) -> DataError | None:
    """What to do where a process that loads data was killed; None if that is not what the error says."""
    if "DataLoader worker" not in str(error):
        return None
    return DataError(
        f"a process that loads data has ended ({told(error)}), most often for want of memory; lower num_workers or "
        "batch_size, then resume"
    )


def _norm(lines: Tensor) -> float:
    """Euclidean length in double precision: no file's unit makes the squares too small or too large."""
    return torch.linalg.vector_norm(torch.view_as_real(lines), dtype=torch.float64).item()


class FastMRIDataset(Dataset[Slice]):
    """Masked, normalised slices of fastMRI volumes.

    Parameters
    ----------
    volumes : sequence of Volume
    config : DataParameters
        num_coils, img_size, crop, mask_type, accelerations, center_fractions, seed, reports_path.
    annotations : Annotations, optional
        fastMRI+ findings; without them the findings of every slice are unknown.
    training : bool
        Training masks come from (seed, file, slice, mask number), others from the file name, as fastMRI's do.
    masks_per_slice : int
        Training masks a slice sees in turn, epoch by epoch (where an epoch sees it again, those of the epochs to come);
        0: a new one every epoch, and each time that an epoch sees the slice.
    acceleration : int, optional
        Use this one alone (one of config.accelerations).
    max_slices : int
        Take so many slices, evenly spread; 0: all.
    mirror_fraction : float
        Chance of a training slice to be `mirrored`, drawn anew each epoch from (seed, file, slice, epoch), and each
        time that an epoch sees it. A slice with a report of the user's own never is: its words may name sides.

    Raises
    ------
    DataError
        If ``crop: image`` meets a file with its own mask, a file cannot be read, or a mask leaves the centre line out.
    """

    _COILS = 4  # read at a time

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
        self.texts_only = False
        self.masks_per_slice, self.mirror_fraction = masks_per_slice, mirror_fraction
        self.epoch = 0
        self._buffer = np.empty((0, 0, 0), np.complex64)
        paired = zip(config.center_fractions, config.accelerations, strict=True)
        pairs = [(fraction, a) for fraction, a in paired if acceleration in (None, a)]
        if not pairs:
            raise ParameterError(f"acceleration {acceleration} is not one of accelerations {config.accelerations}")
        for width in {config.img_size if config.crop == "image" else v.matrix[1] for v in volumes if not v.has_mask}:
            for pair in pairs:
                masks.check_mask(config.mask_type, *pair, width)
        self.mask_func = masks.make_mask_func(config.mask_type, *zip(*pairs, strict=True))
        self.reports = annotations_module.read_reports(resolve(config.reports_path)) if config.reports_path else {}
        slices = {volume.file: volume.slices for volume in self.volumes}
        for file, slice_num in self.reports:
            if slice_num >= slices.get(file, slice_num + 1):
                raise DataError(
                    f"reports_path: a report of {file}, slice {slice_num}, but the file has {slices[file]} slices, "
                    "counted from 0"
                )
        if config.crop == "image" and (own := [v.file for v in self.volumes if v.has_mask]):
            raise DataError(f"crop: image changes the acquisition, but {own[0]} brings its own mask; use crop: readout")
        samples = [(v, s) for v, volume in enumerate(self.volumes) for s in range(volume.slices)]
        if max_slices and max_slices < len(samples):
            samples = [samples[i] for i in np.linspace(0, len(samples) - 1, max_slices).round().astype(int)]
        self.samples = samples
        if annotations is not None:
            for index in range(len(samples)):  # a box outside of its image is told now, not after a night
                self.facts(index)

    def __len__(self) -> int:
        return len(self.samples)

    def without_kspace(self) -> "FastMRIDataset":
        """The same slices in the same order with empty tensors, for a control that sees none: nothing is read."""
        other = copy.copy(self)
        other.texts_only = True
        return other

    def uncompressed(self) -> "FastMRIDataset":
        """The same slices under the same masks with all their coils, for what needs no compression."""
        other = FastMRIDataset.__new__(FastMRIDataset)  # of a cached dataset too, whose entries are compressed
        vars(other).update(vars(self))
        most = max(self.config.num_coils, *(volume.coils for volume in self.volumes))
        other.config = self.config.model_copy(update={"num_coils": most})
        return other

    @property
    def compresses(self) -> bool:
        """Whether any of its files has more than num_coils coils."""
        return any(volume.coils > self.config.num_coils for volume in self.volumes)

    def shape_key(self, index: int) -> tuple[int, ...]:
        """What must be equal for slices to be stacked: coils, k-space matrix and evaluated image."""
        volume = self.volumes[self.samples[index][0]]
        if self.config.crop == "image":
            return (min(volume.coils, self.config.num_coils), int(volume.has_target))
        coils = min(volume.coils, self.config.num_coils)
        return (coils, volume.readout, volume.matrix[1], *volume.image_shape, int(volume.has_target))

    def facts(self, index: int) -> Facts:
        """Contrast, level and findings of a slice, for its text and its scores; not for its input."""
        volume, slice_num = self._sample(index)
        return findings.slice_facts(
            self.annotations, volume.file, slice_num, volume.slices, volume.acquisition, volume.image_shape
        )

    def boxes(self, index: int) -> tuple[Box, ...] | None:
        """Boxes of a slice's findings on the evaluated image; None where they are unknown."""
        volume, slice_num = self._sample(index)
        if self.annotations is None or not self.annotations.reviewed(volume.file):
            return None
        boxes = self.annotations.boxes(volume.file, slice_num, volume.image_shape[0])
        if self.config.crop == "image":  # as `kspace.center_crop_or_pad` crops and pads
            size = self.config.img_size
            down, across = ((size - n) // 2 if n < size else -((n - size) // 2) for n in volume.image_shape)
            boxes = tuple(replace(box, x=box.x + across, y=box.y + down) for box in boxes)
        return boxes

    def _sample(self, index: int) -> tuple[Volume, int]:
        volume, slice_num = self.samples[index]
        return self.volumes[volume], slice_num

    def __getitem__(self, index: int | tuple[int, int]) -> Slice:
        """A slice by its index, or by (index, look): what an epoch sees again has another mask, and may be flipped."""
        index, look = index if isinstance(index, tuple) else (index, 0)
        volume, slice_num = self._sample(index)
        if self.texts_only:
            nothing = torch.zeros(0)
            return self._slice(
                index, nothing.to(torch.complex64), nothing.bool(), 1.0, None, volume.image_shape, 0, look
            )
        padding, image_shape, readout, width = volume.padding, volume.image_shape, volume.readout, volume.matrix[1]
        if cropped := self.config.crop == "image":
            image_shape = (self.config.img_size, self.config.img_size)
            padding, readout, width = (0, image_shape[1]), image_shape[0], image_shape[1]
        try:
            with h5py.File(volume.path, "r") as h5:
                _require_unchanged(h5, volume)
                if volume.has_mask:
                    mask, acceleration = torch.from_numpy(h5["mask"][()].astype(bool)), volume.acceleration
                    mask[: padding[0]] = False
                    mask[padding[1] :] = False
                else:
                    seed = self._mask_seed(volume, slice_num, look)
                    mask, acceleration = masks.sample_mask(self.mask_func, width, seed, padding)
                target = None
                if volume.has_target:
                    target = torch.from_numpy(h5["reconstruction_rss"][slice_num].astype(np.float32, copy=False))
                measured = mask.nonzero().squeeze(1)
                if cropped:
                    raw = torch.from_numpy(h5["kspace"][slice_num].astype(np.complex64, copy=False))
                    lines = fourier.fft2c(fourier.center_crop_or_pad(fourier.ifft2c(raw), image_shape))[..., measured]
                else:
                    lines = self._read_lines(h5["kspace"], slice_num, measured)
        except (OSError, RuntimeError) as error:  # h5py raises both on a damaged chunk
            raise DataError(f"{volume.path.name}, slice {slice_num}: cannot be read ({told(error)})") from None
        if cropped and target is not None:
            target = fourier.center_crop_or_pad(target, image_shape)
        if not mask[width // 2]:  # coil maps, VarNet's as the decoder's, come from the centre lines
            raise DataError(
                f"{volume.path.name}, slice {slice_num}: the mask does not sample the centre of k-space; "
                "raise center_fractions, or leave this file out if it brings the mask itself"
            )
        # From here on only measured lines are seen, and worked on: readout crop and compression know nothing of phase.
        lines = fourier.remove_readout_oversampling(lines, readout)
        norm = _norm(lines)
        if not math.isfinite(norm):
            where = f"{volume.path.name}, slice {slice_num}"
            raise DataError(f"{where}: NaN or infinity in the measured lines; python -m mrilib check tells more")
        if len(lines) > self.config.num_coils:
            lines = coils_module.compress_coils(lines, self.config.num_coils)
            norm = _norm(lines)
        masked = torch.zeros(*lines.shape[:-1], width, dtype=lines.dtype)
        scale = norm / masked.numel() ** 0.5
        if 0 < scale < SMALLEST_SCALE:
            raise DataError(f"{volume.path.name}, slice {slice_num}: too small for single precision; scale the file")
        masked[..., measured] = lines / scale if scale else lines
        return self._slice(index, masked, mask, scale or 1.0, target, image_shape, acceleration, look)

    def _read_lines(self, stored: h5py.Dataset, slice_num: int, measured: Tensor) -> Tensor:
        """The measured lines (coil, readout, line) of a slice, the readout being the fastest axis in memory.

        A few coils at a time are read, into the same memory over and over: that stays in the processor's cache, while
        fresh memory for a slice's 26 MB costs as much as reading them. Not for several threads on one dataset.
        """
        coils, readout, phase = stored.shape[1:]
        lines = torch.empty(coils, len(measured), readout, dtype=torch.complex64)
        # a chunk is uncompressed as a whole: one that holds more coils would be so again and again
        step = coils if stored.chunks and stored.chunks[1] > self._COILS else self._COILS
        if self._buffer.shape != (step, readout, phase):
            self._buffer = np.empty((step, readout, phase), np.complex64)
        for first in range(0, coils, step):
            part = self._buffer[: coils - first]
            coil = slice(first, first + len(part))
            if stored.dtype == part.dtype:
                stored.read_direct(part, np.s_[slice_num, coil])
            else:
                part[:] = stored[slice_num, coil]
            lines[coil] = torch.from_numpy(part).mT[:, measured]
        return lines.mT

    def _slice(
        self,
        index: int,
        masked: Tensor,
        mask: Tensor,
        scale: float,
        target: Tensor | None,
        image_shape: tuple[int, int],
        acceleration: int,
        look: int = 0,
    ) -> Slice:
        volume, slice_num = self._sample(index)
        acquired = torch.ones_like(mask)
        if self.config.crop == "readout":  # the other crop mixes acquired lines and others
            acquired[: volume.padding[0]] = False
            acquired[volume.padding[1] :] = False
        report = self.reports.get((volume.file, slice_num))
        mirrored = False
        if self.training and report is None:
            again = [look] if look else []
            words = [self.config.seed, slice_num, self.epoch, *again, *volume.file.encode()]
            mirrored = bool(np.random.default_rng(words).random() < self.mirror_fraction)
        return Slice(
            kspace=masked,
            mask=mask,
            scale=scale,
            target=target,
            maximum=volume.maximum,
            image_shape=image_shape,
            acceleration=acceleration,
            file=volume.file,
            slice_num=slice_num,
            patient=volume.patient,
            facts=findings.mirrored(self.facts(index)) if mirrored else self.facts(index),
            report=report,
            acquired=acquired,
            pixel=volume.pixel,
            boxes=self.boxes(index),
            look=look,
            mirrored=mirrored,
        )

    def _mask_seed(self, volume: Volume, slice_num: int, look: int = 0) -> int | tuple[int, ...]:
        if not self.training:
            return masks.validation_seed(volume.path.name)
        words = self.config.seed, volume.file, slice_num
        if self.masks_per_slice:
            return masks.training_seed(*words, (self.epoch + look) % self.masks_per_slice)
        return masks.training_seed(*words, self.epoch, look)


class _Loader(DataLoader[Any]):
    """A DataLoader that tells a data error of a loading process in the error's own words, without its traceback."""

    def __iter__(self) -> Any:
        return self._told(super().__iter__())

    @staticmethod
    def _told(batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except DataError as error:
            raise DataError(str(error).rpartition(f"{DataError.__name__}: ")[2].strip()) from None
