"""fastMRI brain files, slice by slice: h5 → Slice → Batch.

What reaches the model comes from the masked k-space alone: scale, coil compression and coil maps. Target, maximum and
attributes are for the loss and the metrics.
"""

import copy
import itertools
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mrilib import analysis, kspace
from mrilib.analysis import Annotations, Box, Facts, Report
from mrilib.check import h5_files, usable_volumes
from mrilib.config import DataParameters, ParameterError, display_path, resolve
from mrilib.volume import SMALLEST_SCALE, DataError, Volume, dataset, read_volume, told

logger = logging.getLogger("mrilib")


class Slice(NamedTuple):
    """One undersampled slice; all tensors on the CPU."""

    kspace: Tensor  # complex64 (coil, readout, phase): masked, divided by its root mean square
    mask: Tensor  # bool (phase,)
    scale: float  # [file units]: normalised value × scale = file value
    target: Tensor | None  # float32 (h, w) RSS of the fully sampled data [file units]
    maximum: float  # of the target volume [file units]
    recon: tuple[int, int]  # h, w of the evaluated image
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
    echo: int = 0  # and which of the times that it comes as part of the same batch
    mirrored: bool = False  # the encoder is to see the image flipped left to right; the facts are, the rest is as read
    forced: bool = False  # the text is learned from where the findings are, not from what maps of them show


class Batch(NamedTuple):
    """Slices of equal shape, stacked; B is their number."""

    kspace: Tensor  # complex64 (B, coil, readout, phase)
    mask: Tensor  # bool (B, phase)
    scale: Tensor  # float32 (B,) [file units]
    target: Tensor | None  # float32 (B, h, w) [file units]
    maximum: Tensor  # float32 (B,) [file units]
    recon: tuple[int, int]
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


def index_volumes(directory: str | Path) -> list[Volume]:
    """All h5 files of a folder, sorted by name, by their structure alone; `check.usable_volumes` reads them too.

    Raises
    ------
    DataError
        If there is none, or any of them cannot be used; all problems are listed.
    """
    volumes, problems = [], []
    for path in h5_files(directory):
        try:
            volumes.append(read_volume(path))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(f"{len(problems)} unusable files in {display_path(directory)}:\n" + "\n".join(problems))
    return volumes


class Split(dict[str, list[Volume]]):
    """The volumes of "train", "val" and "test".

    Attributes
    ----------
    skipped : list of dict
        ``file``, ``folder`` and ``problems`` of the files that were left out (``on_bad_file: skip``).
    """

    skipped: list[dict[str, Any]]


def split_volumes(config: DataParameters) -> Split:
    """Training, validation and test volumes; no patient is in two of them.

    Folders that are given are taken as they are; otherwise the patients of `data_dir` are shuffled with `split_seed`.
    Every file has been read to its end once (see `mrilib.check`).

    Raises
    ------
    DataError
        If a file cannot be used and is not to be skipped, a patient stands in two of the given folders, or a part comes
        out empty.
    """
    skipped: list[dict[str, Any]] = []

    def usable(directory: str) -> list[Volume]:
        found, left_out = usable_volumes(directory, config.on_bad_file, config.interactive)
        skipped.extend(left_out)
        return found

    volumes = usable(config.data_dir)
    parts = {
        "val": usable(config.val_dir) if config.val_dir else [],
        "test": usable(config.test_dir) if config.test_dir else [],
    }
    patients = sorted({volume.patient for volume in volumes})
    order = np.random.default_rng(config.split_seed).permutation(len(patients))
    shuffled = [patients[i] for i in order]
    for name, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
        if not parts[name] and fraction:
            count = max(1, round(fraction * len(patients)))
            chosen, shuffled = set(shuffled[:count]), shuffled[count:]
            parts[name] = [volume for volume in volumes if volume.patient in chosen]
    remaining = set(shuffled)
    split = Split({"train": [volume for volume in volumes if volume.patient in remaining], **parts})
    split.skipped = skipped
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        both = {v.patient for v in split[a]} & {v.patient for v in split[b]}
        if both:
            raise DataError(f"{len(both)} patients are in both {a} and {b}, for instance {sorted(both)[0]}")
    for name, part in split.items():
        if not part:
            advice = (
                "lower val_fraction or test_fraction, or give val_dir or test_dir"
                if name == "train"
                else f"give {name}_dir, or raise {name}_fraction"
            )
            raise DataError(f"no {name} volumes: data_dir has {len(patients)} patients; {advice}")
    files = {volume.file for part in split.values() for volume in part}
    warn_of_unknown_files(config, files | {Path(entry["file"]).stem for entry in skipped})
    return split


def warn_of_unknown_files(config: DataParameters, files: Collection[str]) -> None:
    """Warn of reports and annotations of files that are not there, with the nearest name: they are not used.

    Parameters
    ----------
    config : DataParameters
    files : collection of str
        Stems of the h5 files of all the data folders.
    """
    reports = analysis.read_reports(resolve(config.reports_path)) if config.reports_path else {}
    annotations = load_annotations(config)
    named = {
        f"reports_path '{config.reports_path}'": {file for file, _ in reports},
        f"annotations_dir '{config.annotations_dir or config.data_dir}'": annotations.files if annotations else set(),
    }
    for where, mentioned in named.items():
        unknown = sorted(mentioned - set(files))
        if unknown:
            near = get_close_matches(unknown[0], files, n=1, cutoff=0.9)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            logger.warning(
                "%s: %d of %d files are in no data folder and are not used, for instance '%s'%s",
                *(where, len(unknown), len(mentioned), unknown[0], hint),
            )


def load_annotations(config: DataParameters) -> Annotations | None:
    """fastMRI+ annotations: those of `annotations_dir`, else the data folder's own, else None (nothing is known)."""
    folder = resolve(config.annotations_dir or config.data_dir)
    tables = folder / "brain.csv", folder / "brain_file_list.csv"
    if not config.annotations_dir and not any(table.exists() for table in tables):
        return None
    for table in tables:
        if not table.exists():
            raise ParameterError(f"annotations_dir: '{display_path(table)}' does not exist")
    return analysis.read_annotations(*tables)


def require_targets(volumes: Sequence[Volume], what: str = "training the image decoder") -> None:
    """Refuse volumes that `what` needs the images of; DataError naming them."""
    without = [volume.path.name for volume in volumes if not volume.has_target]
    if without:
        raise DataError(
            f"{len(without)} files have no reconstruction_rss, which {what} needs: "
            f"{', '.join(without[:5])}{', …' if len(without) > 5 else ''}; give test files as test_dir"
        )


def require_boxes(dataset: "FastMRIDataset", labels: Sequence[str]) -> None:
    """Refuse findings to be mapped that no slice of the training volumes has a box of.

    Raises
    ------
    ParameterError
        Naming the label, the nearest of those that are there, and all of them.
    """
    there = _labels_with_boxes(dataset)
    for label in labels:
        if label not in there:
            near = get_close_matches(label, there, n=1)
            raise ParameterError(
                f"finding_labels: no training slice has a box of '{label}'"
                + (f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(sorted(there)) or 'none'}")
                + ("" if there else ". Boxes come with annotations_dir")
            )


def require_lesions(dataset: "FastMRIDataset") -> None:
    """Refuse a `lesion_weight` where no slice of the training volumes has a box.

    Raises
    ------
    ParameterError
    """
    if not _labels_with_boxes(dataset):
        raise ParameterError("lesion_weight: no training slice has a box; set it to 0, or give annotations_dir")


def _labels_with_boxes(dataset: "FastMRIDataset") -> set[str]:
    annotations = dataset.annotations
    if annotations is None:
        return set()
    return {
        box.label
        for volume in dataset.volumes
        for number in range(volume.slices if annotations.reviewed(volume.file) else 0)
        for box in annotations.boxes(volume.file, number, volume.recon[0])
    }


def _require_unchanged(h5: h5py.File, volume: Volume) -> None:
    """Refuse a file that is no longer the one that the run began with."""
    wanted: dict[str, tuple[int, ...]] = {"kspace": (volume.slices, volume.coils, *volume.matrix)}
    if volume.has_target:
        wanted["reconstruction_rss"] = (volume.slices, *volume.recon)
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
    mirror_share : float
        Chance of a training slice to be `mirrored`, drawn anew each epoch from (seed, file, slice, epoch), and each
        time that an epoch sees it. A slice with a report of the user's own never is: its words may name sides.
    teacher_forcing : float
        Chance of a training slice to be `forced`, drawn with the former.

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
        mirror_share: float = 0.0,
        teacher_forcing: float = 0.0,
    ) -> None:
        self.volumes = list(volumes)
        self.config = config
        self.annotations = annotations
        self.training = training
        self.texts_only = False
        self.masks_per_slice, self.mirror_share = masks_per_slice, mirror_share
        self.teacher_forcing = teacher_forcing
        self.epoch = 0
        self._buffer = np.empty((0, 0, 0), np.complex64)
        paired = zip(config.center_fractions, config.accelerations, strict=True)
        pairs = [(fraction, a) for fraction, a in paired if acceleration in (None, a)]
        if not pairs:
            raise ParameterError(f"acceleration {acceleration} is not one of accelerations {config.accelerations}")
        for width in {config.img_size if config.crop == "image" else v.matrix[1] for v in volumes if not v.has_mask}:
            for pair in pairs:
                kspace.check_mask(config.mask_type, *pair, width)
        self.mask_func = kspace.make_mask_func(config.mask_type, *zip(*pairs, strict=True))
        self.reports = analysis.read_reports(resolve(config.reports_path)) if config.reports_path else {}
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
        return (coils, volume.readout, volume.matrix[1], *volume.recon, int(volume.has_target))

    def facts(self, index: int) -> Facts:
        """Contrast, level and findings of a slice, for its text and its scores; not for its input."""
        volume, slice_num = self._sample(index)
        return analysis.slice_facts(
            self.annotations, volume.file, slice_num, volume.slices, volume.acquisition, volume.recon
        )

    def boxes(self, index: int) -> tuple[Box, ...] | None:
        """Boxes of a slice's findings on the evaluated image; None where they are unknown."""
        volume, slice_num = self._sample(index)
        if self.annotations is None or not self.annotations.reviewed(volume.file):
            return None
        boxes = self.annotations.boxes(volume.file, slice_num, volume.recon[0])
        if self.config.crop == "image":  # as `kspace.center_crop_or_pad` crops and pads
            size = self.config.img_size
            down, across = ((size - n) // 2 if n < size else -((n - size) // 2) for n in volume.recon)
            boxes = tuple(replace(box, x=box.x + across, y=box.y + down) for box in boxes)
        return boxes

    def text_length(self, index: int) -> int:
        """Characters of a slice's prompt and analysis."""
        volume, slice_num = self._sample(index)
        report = self.reports.get((volume.file, slice_num))
        if report is not None:
            return len(report.prompt) + len(report.response)
        return len(analysis.prompt()) + len(analysis.answer(self.facts(index)))

    def _sample(self, index: int) -> tuple[Volume, int]:
        volume, slice_num = self.samples[index]
        return self.volumes[volume], slice_num

    def __getitem__(self, index: int | tuple[int, ...]) -> Slice:
        """A slice by its index, by (index, look), or by (index, look, echo).

        What an epoch sees again has another mask, and may be flipped; an echo has the same mask, and may be flipped.
        """
        index, look, echo = (*index, 0)[:3] if isinstance(index, tuple) else (index, 0, 0)
        volume, slice_num = self._sample(index)
        if self.texts_only:
            nothing = torch.zeros(0)
            return self._slice(
                index, nothing.to(torch.complex64), nothing.bool(), 1.0, None, volume.recon, 0, look, echo
            )
        padding, recon, readout, width = volume.padding, volume.recon, volume.readout, volume.matrix[1]
        if cropped := self.config.crop == "image":
            recon = (self.config.img_size, self.config.img_size)
            padding, readout, width = (0, recon[1]), recon[0], recon[1]
        try:
            with h5py.File(volume.path, "r") as h5:
                _require_unchanged(h5, volume)
                if volume.has_mask:
                    mask, acceleration = torch.from_numpy(h5["mask"][()].astype(bool)), volume.acceleration
                    mask[: padding[0]] = False
                    mask[padding[1] :] = False
                else:
                    seed = self._mask_seed(volume, slice_num, look)
                    mask, acceleration = kspace.sample_mask(self.mask_func, width, seed, padding)
                target = None
                if volume.has_target:
                    target = torch.from_numpy(h5["reconstruction_rss"][slice_num].astype(np.float32, copy=False))
                measured = mask.nonzero().squeeze(1)
                if cropped:
                    raw = torch.from_numpy(h5["kspace"][slice_num].astype(np.complex64, copy=False))
                    lines = kspace.fft2c(kspace.center_crop_or_pad(kspace.ifft2c(raw), recon))[..., measured]
                else:
                    lines = self._read_lines(h5["kspace"], slice_num, measured)
        except (OSError, RuntimeError) as error:  # h5py raises both on a damaged chunk
            raise DataError(f"{volume.path.name}, slice {slice_num}: cannot be read ({told(error)})") from None
        if cropped and target is not None:
            target = kspace.center_crop_or_pad(target, recon)
        if not mask[width // 2]:  # coil maps, VarNet's as the decoder's, come from the centre lines
            raise DataError(
                f"{volume.path.name}, slice {slice_num}: the mask does not sample the centre of k-space; "
                "raise center_fractions, or leave this file out if it brings the mask itself"
            )
        # From here on only measured lines are seen, and worked on: readout crop and compression know nothing of phase.
        lines = kspace.remove_readout_oversampling(lines, readout)
        norm = _norm(lines)
        if not math.isfinite(norm):
            where = f"{volume.path.name}, slice {slice_num}"
            raise DataError(f"{where}: NaN or infinity in the measured lines; python -m mrilib check tells more")
        if len(lines) > self.config.num_coils:
            lines = kspace.compress_coils(lines, self.config.num_coils)
            norm = _norm(lines)
        masked = torch.zeros(*lines.shape[:-1], width, dtype=lines.dtype)
        scale = norm / masked.numel() ** 0.5
        if 0 < scale < SMALLEST_SCALE:
            raise DataError(f"{volume.path.name}, slice {slice_num}: too small for single precision; scale the file")
        masked[..., measured] = lines / scale if scale else lines
        return self._slice(index, masked, mask, scale or 1.0, target, recon, acceleration, look, echo)

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
        recon: tuple[int, int],
        acceleration: int,
        look: int = 0,
        echo: int = 0,
    ) -> Slice:
        volume, slice_num = self._sample(index)
        acquired = torch.ones_like(mask)
        if self.config.crop == "readout":  # the other crop mixes acquired lines and others
            acquired[: volume.padding[0]] = False
            acquired[volume.padding[1] :] = False
        report = self.reports.get((volume.file, slice_num))
        mirrored = forced = False
        if self.training and report is None:
            again = [look, echo] if echo else [look] if look else []
            words = [self.config.seed, slice_num, self.epoch, *again, *volume.file.encode()]
            drawn = np.random.default_rng(words).random(2)
            mirrored, forced = bool(drawn[0] < self.mirror_share), bool(drawn[1] < self.teacher_forcing)
        return Slice(
            kspace=masked,
            mask=mask,
            scale=scale,
            target=target,
            maximum=volume.maximum,
            recon=recon,
            acceleration=acceleration,
            file=volume.file,
            slice_num=slice_num,
            patient=volume.patient,
            facts=analysis.mirrored(self.facts(index)) if mirrored else self.facts(index),
            report=report,
            acquired=acquired,
            pixel=volume.pixel,
            boxes=self.boxes(index),
            look=look,
            echo=echo,
            mirrored=mirrored,
            forced=forced,
        )

    def _mask_seed(self, volume: Volume, slice_num: int, look: int = 0) -> int | tuple[int, ...]:
        if not self.training:
            return kspace.validation_seed(volume.path.name)
        words = self.config.seed, volume.file, slice_num
        if self.masks_per_slice:
            return kspace.training_seed(*words, (self.epoch + look) % self.masks_per_slice)
        return kspace.training_seed(*words, self.epoch, look)


class ShapeBatchSampler(Sampler[list[int | tuple[int, ...]]]):
    """Batches of slices of equal shape and about equal number, in an order that depends on (seed, epoch) alone.

    Parameters
    ----------
    dataset : FastMRIDataset
    batch_size : int
    seed : int
    shuffle : bool
        Without it the order is the dataset's.
    group_by_length : bool
        Put slices with texts of about equal length together, within every `WINDOW` batches of the shuffled order.
    finding_share : float
        So much of a shuffled epoch, drawn anew each time, gives its place to random slices of its shape that have a
        finding, where there are any; some may come twice.
    echo : int
        Times that each batch comes, the same slices under the same masks, about `ECHO_SPAN` batches apart (data
        echoing: Choi et al., arXiv:1907.05550): for a stage that keeps what it has made of a batch the first time
        (`Echoes`). What may be flipped is so anew each time.

    Attributes
    ----------
    skip : int
        Leave out so many batches at the start, unread.
    share : (int, int)
        This process's number and how many processes take turns.
    step : int
        Batches that an optimizer step takes, of all processes: all between a batch and its echo are a multiple of that,
        so that echoes fall into other steps and each process gets its own batches again. But for those of an epoch's
        last step, where that has fewer.
    echoed : (int, int), optional
        From which to which batch of the epoch, in the order in which they come, batches come again; all beside come
        once, as many of them, so that the epoch is as long. All if left out.
    """

    WINDOW = 8
    ECHO_SPAN = 24  # batches: what is kept for echoes must fit in memory, yet neighbours should not repeat

    def __init__(
        self,
        dataset: FastMRIDataset,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        group_by_length: bool = False,
        finding_share: float = 0.0,
        echo: int = 1,
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch_size, seed, shuffle
        self.echo = echo
        self.finding_share = finding_share if shuffle else 0.0
        self.found: dict[tuple[int, ...], list[int]] = defaultdict(list)  # slices with a finding, by shape
        for index in range(len(dataset)) if self.finding_share else ():
            if dataset.facts(index).findings:
                self.found[dataset.shape_key(index)].append(index)
        if self.finding_share and not self.found:
            raise ValueError(
                f"finding_share: {finding_share:g}, but no training slice is known to have a finding; set it to 0, or "
                "give annotations_dir"
            )
        self.lengths = [dataset.text_length(index) for index in range(len(dataset))] if group_by_length else []
        self.skip, self.share, self.step = 0, (0, 1), 1
        self.echoed: tuple[int, int] | None = None

    @property
    def total(self) -> int:
        """Batches of the dataset's epoch, of all processes, with their echoes."""
        return len(self.plan()) * self.echo

    def draw(self, count: int) -> list[list[int]]:
        """So many batches of the dataset's epoch, in as many passes over its slices as that takes."""
        batches: list[list[int]] = []
        number = 0
        while len(batches) < count:
            batches += self.plan(number)
            number += 1
        return batches[:count]

    def plan(self, number: int = 0) -> list[list[int]]:
        """The batches of the dataset's epoch, of all processes, each once; `number` of a further pass in the epoch."""
        rng = np.random.default_rng([self.seed, self.dataset.epoch, *([number] if number else [])])
        order: Iterable[int] = rng.permutation(len(self.dataset)) if self.shuffle else range(len(self.dataset))
        if self.finding_share:
            order = [self._with_finding(int(index), rng) for index in order]
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index in order:
            groups[self.dataset.shape_key(int(index))].append(int(index))
        if self.lengths:
            groups = {key: self._by_length(group) for key, group in groups.items()}
        # As few batches as it takes, about equally large: the last one's few slices would else weigh as much as many.
        batches = [
            batch.tolist()
            for group in groups.values()
            for batch in np.array_split(group, math.ceil(len(group) / self.batch_size))
        ]
        return [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches

    def _with_finding(self, index: int, rng: np.random.Generator) -> int:
        """The slice, or a random one of its shape that has a finding: every epoch has as many batches."""
        others = self.found.get(self.dataset.shape_key(index), [])
        return int(rng.choice(others)) if others and rng.random() < self.finding_share else index

    def _by_length(self, group: list[int]) -> list[int]:
        width = self.WINDOW * self.batch_size
        windows = [group[start : start + width] for start in range(0, len(group), width)]
        return [index for window in windows for index in sorted(window, key=self.lengths.__getitem__)]

    def __iter__(self) -> Iterator[list[int | tuple[int, ...]]]:
        """Batches of indices, of (index, look) where the epoch has seen the slice before, and (index, look, echo)."""
        number, count = self.share
        seen: Counter[int] = Counter()
        batches: list[list[tuple[int, int]]] = []
        first, last = self.echoed or (0, self.total)
        again = -(-(last - first) // self.echo)
        for plain in self.draw(first + again + self.total - last):
            batches.append([])
            for index in plain:
                batches[-1].append((index, seen[index]))
                seen[index] += 1
        before, between, after = batches[:first], batches[first : first + again], batches[first + again :]
        echoed = [(echo, batch) for block in self._blocks(between) for echo in range(self.echo) for batch in block]
        order = [*((0, batch) for batch in before), *echoed[: last - first], *((0, batch) for batch in after)]
        for echo, batch in order[self.skip + number :: count]:
            yield [(index, look, echo) if echo else (index, look) if look else index for index, look in batch]

    def _blocks(self, batches: list[Any]) -> list[list[Any]]:
        """An epoch's batches in blocks of about equal length, after each of which its echoes come."""
        steps = len(batches) // self.step
        count = max(1, round(steps * self.step / self.ECHO_SPAN))
        ends = [self.step * (steps * number // count) for number in range(count + 1)]
        parts = [*itertools.pairwise(ends), (ends[-1], len(batches))]
        return [batches[start:end] for start, end in parts if start < end]

    def __len__(self) -> int:
        number, count = self.share
        return len(range(self.skip + number, self.total, count))


def collate(slices: list[Slice]) -> Batch:
    """Stack slices of equal shape."""
    targets = [s.target for s in slices if s.target is not None]
    tokens = [s.tokens for s in slices if s.tokens is not None]
    return Batch(
        kspace=torch.stack([s.kspace for s in slices]),
        mask=torch.stack([s.mask for s in slices]),
        scale=torch.tensor([s.scale for s in slices], dtype=torch.float32),
        target=torch.stack(targets) if len(targets) == len(slices) else None,
        maximum=torch.tensor([s.maximum for s in slices], dtype=torch.float32),
        recon=slices[0].recon,
        # stacked here; not sent twice
        slices=[s._replace(kspace=s.kspace[:0], target=None, tokens=None) for s in slices],
        acquired=torch.stack([torch.ones_like(s.mask) if s.acquired is None else s.acquired for s in slices]),
        tokens=torch.stack(tokens) if len(tokens) == len(slices) else None,
    )


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


def make_loader(
    dataset: FastMRIDataset,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = False,
    group_by_length: bool = False,
    finding_share: float = 0.0,
    echo: int = 1,
) -> DataLoader:
    """A loader of equal-shape batches; set ``dataset.epoch`` before each pass. See `ShapeBatchSampler`."""
    return _Loader(
        dataset,
        batch_sampler=ShapeBatchSampler(dataset, batch_size, seed, shuffle, group_by_length, finding_share, echo),
        collate_fn=collate,
        num_workers=dataset.config.num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # its own: the model's random numbers must not depend on it
    )
