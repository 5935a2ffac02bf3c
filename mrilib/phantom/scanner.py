"""A simulated scanner: any image stack to multi-coil k-space, and k-space to fastMRI's h5 files.

Readout is along rows with twofold oversampling, phase encoding along columns; in an axial head scan with fastMRI's
orientation rows run from posterior to anterior and columns from the patient's right to the left.
"""

import os
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from mrilib.physics.fourier import center_crop_or_pad, fft2c, ifft2c, rss

Complex = NDArray[np.complex64]

OVERSAMPLING = 2  # of the readout, as in fastMRI
SLICE_THICKNESS = 4.5  # [mm]
NODES = 21  # a side of the coarse grid of the coil fields; within the head 81 differ by less than 1e-3 of the RSS
STRIP = 20.0  # half width of the coils' copper [mm]: softens the field where a wire passes a corner of the image


CONTRASTS = ("AXT1", "AXT2", "AXFLAIR")


class Sequence(NamedTuple):
    """Timing of a spin-echo sequence, with inversion if `ti` is not zero."""

    tr: float  # repetition time [ms]
    te: float  # (effective) echo time [ms]
    ti: float  # inversion time [ms], 0 without inversion
    flip_angle: float  # of the refocusing train, for the header alone [degrees]


SEQUENCES = {
    "AXT1": Sequence(500.0, 9.0, 0.0, 90.0),
    "AXT2": Sequence(5500.0, 100.0, 0.0, 150.0),
    "AXFLAIR": Sequence(9000.0, 90.0, 2500.0, 150.0),
}


def spin_echo_signal(tissue: tuple[float, float, float], sequence: Sequence) -> float:
    """Magnitude of the (inversion recovery) spin-echo signal [1].

    Parameters
    ----------
    tissue : (T1 [ms], T2 [ms], proton density [1])
    sequence : Sequence

    Notes
    -----
    PD·(1 − e^(−TR/T1))·e^(−TE/T2); with inversion PD·|1 − 2e^(−TI/T1) + e^(−TR/T1)|·e^(−TE/T2), for TE ≪ TR
    (Bernstein, King, Zhou: Handbook of MRI Pulse Sequences, 2004, chapter 14).
    """
    t1, t2, density = tissue
    recovery = 1 - np.exp(-sequence.tr / t1)
    if sequence.ti:
        recovery = abs(1 - 2 * np.exp(-sequence.ti / t1) + np.exp(-sequence.tr / t1))
    return float(density * recovery * np.exp(-sequence.te / t2))


def coil_maps(
    coils: int,
    shape: tuple[int, int],
    voxel_size: tuple[float, float],
    slice_positions: Seq[float],
    rng: np.random.Generator,
) -> Complex:
    """Receive sensitivities of loops on a helmet around the head.

    The field of each circular loop by Biot-Savart's law over 32 straight segments, received as Bx − i·By with B0 along
    z (Hoult, Concepts Magn. Reson. 12:173, 2000). Fields are smooth within the helmet, so they are computed on a coarse
    grid of each slice and interpolated by cubic splines.

    Parameters
    ----------
    coils : int
        Number of loops; from 10 on they form two rings.
    shape : (H, W)
    voxel_size : (row, column) [mm]
    slice_positions : sequence of float
        z of the slices [mm].
    rng : numpy.random.Generator
        Places the loops.

    Returns
    -------
    ndarray, complex64, shape (slices, coils, H, W)
        Scaled so that the RSS over coils averages 1 over the central third of the slices [1].
    """
    rings = 1 if coils < 10 else 2
    ring = np.arange(coils) % rings
    per_ring = np.bincount(ring, minlength=rings)[ring]
    angle = 2 * np.pi * (np.arange(coils) // rings + 0.5 * ring) / per_ring
    angle = angle + rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.06, coils)
    height = (15.0 if rings == 1 else np.where(ring == 0, -25.0, 45.0)) + rng.normal(0, 5, coils)
    # Half axes of the helmet; it keeps clear of the field of view, where a wire would be a singularity.
    half_axes = np.maximum((126.0, 144.0), 0.6 * np.array((shape[1] * voxel_size[1], shape[0] * voxel_size[0])))
    circumference = np.pi * half_axes.sum()
    radius = np.clip(0.6 * circumference / per_ring, 40, 80)  # neighbouring loops overlap
    outward = np.stack([np.cos(angle), np.sin(angle), np.clip(height / 150, -0.5, 0.5)], 1)
    centre = np.stack([half_axes[0] * np.cos(angle), half_axes[1] * np.sin(angle), height], 1)
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    across = np.cross(outward, (0.0, 0.0, 1.0))
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    along = np.cross(outward, across)
    turn = np.linspace(0, 2 * np.pi, 33)
    wire = centre[:, None] + radius[:, None, None] * (
        np.cos(turn)[None, :, None] * across[:, None] + np.sin(turn)[None, :, None] * along[:, None]
    )
    step, middle = np.diff(wire, axis=1), (wire[:, 1:] + wire[:, :-1]) / 2  # (coils, 32, 3)

    row = (np.arange(shape[0]) - shape[0] // 2) * voxel_size[0]
    column = -(np.arange(shape[1]) - shape[1] // 2) * voxel_size[1]
    row_nodes, column_nodes = (np.linspace(axis.min(), axis.max() + 1e-3, NODES) for axis in (row, column))
    row_spline, column_spline = (
        CubicSpline(nodes, np.eye(NODES))(axis) for nodes, axis in ((row_nodes, row), (column_nodes, column))
    )
    maps = np.empty((len(slice_positions), coils, *shape), np.complex64)
    for index, z in enumerate(slice_positions):
        y, x = np.meshgrid(row_nodes, column_nodes, indexing="ij")
        points = np.stack([x, y, np.full_like(x, z)], -1)
        for coil in range(coils):
            offset = points[:, :, None] - middle[coil]  # (NODES, NODES, 32, 3)
            inverse_cube = ((offset**2).sum(-1) + STRIP**2) ** -1.5
            bx = ((step[coil, :, 1] * offset[..., 2] - step[coil, :, 2] * offset[..., 1]) * inverse_cube).sum(-1)
            by = ((step[coil, :, 2] * offset[..., 0] - step[coil, :, 0] * offset[..., 2]) * inverse_cube).sum(-1)
            maps[index, coil] = row_spline @ (bx - 1j * by) @ column_spline.T
    third = np.s_[:, :, shape[0] // 3 : -(shape[0] // 3) or None, shape[1] // 3 : -(shape[1] // 3) or None]
    return maps / np.sqrt((np.abs(maps[third]) ** 2).sum(1)).mean()


def simulate_volume(
    image: NDArray,
    coils: int,
    rng: np.random.Generator,
    *,
    coil_rng: np.random.Generator | None = None,
    voxel_size: tuple[float, float] = (1.7, 1.7),
    slice_positions: Seq[float] | None = None,
    snr: float = 40.0,
    padding: tuple[int, int] = (0, 0),
) -> Complex:
    """Turn an image stack into fully sampled multi-coil k-space with twofold readout oversampling.

    A smooth transmit shading and a smooth phase, both new for each volume, the coils' sensitivities, and complex white
    Gaussian noise, correlated by 0.1 between neighbouring coils.

    Parameters
    ----------
    image : ndarray, real or complex, shape (slices, H, W)
        H along readout, W along phase encoding; any unit, which is the unit of the k-space too.
    coils : int
    rng : numpy.random.Generator
        Draws shading, phase and noise.
    coil_rng : numpy.random.Generator, optional
        Places the coils; by default `rng` does. The same state gives the same coils.
    voxel_size : (row, column) [mm]
    slice_positions : sequence of float, optional
        z of the slices [mm]; by default 5 mm apart about the coils' centre.
    snr : float
        Root mean square of the image within the object (above a tenth of its 99th percentile) over the standard
        deviation of a coil's noise, in its real part as in its imaginary part [1].
    padding : (left, right)
        Phase-encoding lines at the edges that are not acquired: zero.

    Returns
    -------
    ndarray, complex64, shape (slices, coils, 2·H, W)

    Raises
    ------
    ValueError
        If the image is not a stack, holds nothing or numbers that are not finite, or a parameter is out of range.
    """
    if image.ndim != 3:
        raise ValueError(f"image must have axes (slices, H, W), not shape {image.shape}; image[None] adds a slice axis")
    if coils < 1 or snr <= 0 or min(padding) < 0 or sum(padding) >= image.shape[2]:
        raise ValueError(
            f"coils {coils} and snr {snr} must be positive, padding {padding} not negative and less than W "
            f"{image.shape[2]}"
        )
    slices, height, width = image.shape
    magnitude = np.abs(image)
    if not np.isfinite(magnitude).all() or not magnitude.any():
        raise ValueError("image is zero everywhere, or not finite; nothing can be simulated from it")
    level = object_rms(magnitude)
    if slice_positions is None:
        slice_positions = 5.0 * (np.arange(slices) - slices // 2) + 10.0
    maps = coil_maps(coils, (height, width), voxel_size, slice_positions, coil_rng or rng)
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    smooth = np.stack([x, y, x * y, x**2, y**2, x**3, y**3, np.ones_like(x)])
    shading = 1 + np.tensordot(rng.normal(0, 0.04, 5), smooth[:5], 1)
    # The phase of one volume: off-resonance and echo position; each slice differs a little.
    weights = rng.normal(0, (1.2, 1.2, 0.8, 1.2, 1.2, 0.5, 0.5, np.pi))
    phase = np.tensordot(weights + rng.normal(0, 0.15, (slices, 8)), smooth, 1)
    moved = (image * shading * np.exp(1j * phase)).astype(np.complex64)
    coil_images = torch.from_numpy(maps * moved[:, None])
    kspace = fft2c(center_crop_or_pad(coil_images, (OVERSAMPLING * height, width))).numpy()
    noise = rng.standard_normal((2, *kspace.shape), dtype=np.float32)
    neighbours = np.eye(coils) + 0.1 * (np.roll(np.eye(coils), 1, 0) + np.roll(np.eye(coils), -1, 0)) * (coils > 2)
    mixing = np.linalg.cholesky(neighbours).astype(np.float32)
    sigma = np.float32(level / snr)
    for part, target in ((noise[0], kspace.real), (noise[1], kspace.imag)):
        target += sigma * np.tensordot(mixing, part, (1, 1)).swapaxes(0, 1)
    kspace[..., : padding[0]] = 0
    kspace[..., width - padding[1] :] = 0
    return kspace


def object_rms(magnitude: NDArray) -> float:
    """Root mean square over the object: pixels above a tenth of the 99th percentile of an image or stack."""
    values = magnitude[magnitude > 0.1 * np.percentile(magnitude, 99)]
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


_HEADER = """<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
  <measurementInformation><protocolName>{acquisition}</protocolName></measurementInformation>
  <acquisitionSystemInformation>
    <systemVendor>{vendor}</systemVendor>
    <systemFieldStrength_T>{field:.1f}</systemFieldStrength_T>
    <receiverChannels>{coils}</receiverChannels>
  </acquisitionSystemInformation>
  <experimentalConditions><H1resonanceFrequency_Hz>{larmor}</H1resonanceFrequency_Hz></experimentalConditions>
  <encoding>
    <encodedSpace>
      <matrixSize><x>{enc_x}</x><y>{enc_y}</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>{enc_fov_x:.3f}</x><y>{enc_fov_y:.3f}</y><z>{thickness:.3f}</z></fieldOfView_mm>
    </encodedSpace>
    <reconSpace>
      <matrixSize><x>{rec_x}</x><y>{rec_y}</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>{rec_fov_x:.3f}</x><y>{rec_fov_y:.3f}</y><z>{thickness:.3f}</z></fieldOfView_mm>
    </reconSpace>
    <encodingLimits>
      <kspace_encoding_step_1><minimum>0</minimum><maximum>{maximum}</maximum><center>{center}</center></kspace_encoding_step_1>
      <slice><minimum>0</minimum><maximum>{last_slice}</maximum><center>0</center></slice>
    </encodingLimits>
    <trajectory>cartesian</trajectory>
  </encoding>
  <sequenceParameters>
    <TR>{tr}</TR>
    <TE>{te}</TE>
{ti}    <flipAngle_deg>{flip}</flipAngle_deg>
  </sequenceParameters>
</ismrmrdHeader>
"""


def write_h5(
    path: str | Path,
    kspace: Complex,
    image_shape: tuple[int, int],
    acquisition: str,
    patient_id: str,
    *,
    sequence: Sequence,
    voxel_size: tuple[float, float] = (1.7, 1.7),
    slice_thickness: float = SLICE_THICKNESS,
    padding: tuple[int, int] = (0, 0),
    vendor: str = "simulated",
    field_strength: float = 3.0,
    attributes: Mapping[str, str] | None = None,
) -> None:
    """Write fully sampled k-space as a fastMRI brain multi-coil file, under a temporary name first.

    Parameters
    ----------
    path : path
        Ends in .h5.
    kspace : ndarray, complex64, shape (slices, coils, readout, phase)
    image_shape : (h, w) [pixels]
        Of `reconstruction_rss`, the centre of the RSS image.
    acquisition : str
        Such as AXT2.
    patient_id : str
    sequence : Sequence
        For the header.
    voxel_size : (row, column) [mm]
        For the header's fields of view.
    slice_thickness : float [mm]
    padding : (left, right)
        Phase-encoding lines that were not acquired; the header's centre and maximum follow from them.
    attributes : mapping, optional
        Further attributes of the file; nothing of them reaches a model.

    Raises
    ------
    ValueError
        If k-space has other axes, is not zero in the padding or is smaller than `image_shape`.
    """
    path = Path(path)
    if kspace.ndim != 4:
        raise ValueError(f"{path.name}: kspace must be (slices, coils, readout, phase), not of shape {kspace.shape}")
    slices, coils, readout, width = kspace.shape
    height, recon_width = image_shape
    if height > readout or recon_width > width:
        raise ValueError(f"{path.name}: image_shape {image_shape} exceeds the k-space of {(readout, width)}")
    left, right = padding
    acquired = width - left - right
    if kspace[..., :left].any() or kspace[..., width - right :].any():
        raise ValueError(f"{path.name}: kspace is not zero in the padding {padding}; zero it there or mend the padding")
    images = [rss(ifft2c(torch.from_numpy(one.astype(np.complex64)))) for one in kspace]
    reconstruction = center_crop_or_pad(torch.stack(images), image_shape).numpy()
    header = _HEADER.format(
        acquisition=acquisition, vendor=vendor, field=field_strength, coils=coils,
        larmor=round(42.577e6 * field_strength), enc_x=readout, enc_y=width, rec_x=height, rec_y=recon_width,
        enc_fov_x=readout * voxel_size[0], enc_fov_y=width * voxel_size[1],
        rec_fov_x=height * voxel_size[0], rec_fov_y=recon_width * voxel_size[1], thickness=slice_thickness,
        maximum=acquired - 1, center=width // 2 - left, last_slice=slices - 1, tr=sequence.tr, te=sequence.te,
        ti=f"    <TI>{sequence.ti}</TI>\n" if sequence.ti else "", flip=sequence.flip_angle,
    )  # fmt: skip
    temporary = path.with_suffix(".tmp")
    with h5py.File(temporary, "w") as file:
        file["kspace"] = kspace.astype(np.complex64, copy=False)
        file["reconstruction_rss"] = reconstruction
        file["ismrmrd_header"] = header.encode()
        file.attrs["acquisition"] = acquisition
        file.attrs["max"] = float(reconstruction.max())
        file.attrs["norm"] = float(np.linalg.norm(reconstruction.astype(np.float64)))
        file.attrs["patient_id"] = patient_id
        file.attrs.update(attributes or {})
    os.replace(temporary, path)
