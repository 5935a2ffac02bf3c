"""Simulated scanner: multi-coil k-space from an image stack, and fastMRI h5 files from k-space.

Readout is along rows, with twofold oversampling, and phase encoding along columns. In fastMRI's axial head scans, rows
run from posterior to anterior and columns from the patient's right to left.
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
NODES = 21  # per side of the coarse grid of coil fields; 81 change the fields in the head by less than 1e-3 of the RSS
STRIP = 20.0  # half width of the coil conductor [mm]; limits the field near a wire
CONTRASTS = ("AXT1", "AXT2", "AXFLAIR")


class Sequence(NamedTuple):
    """Timing of a spin-echo sequence."""

    tr: float  # repetition time [ms]
    te: float  # (effective) echo time [ms]
    ti: float  # inversion time [ms], 0 without inversion
    flip_angle: float  # of the refocusing train, used in the header only [degrees]


SEQUENCES = {
    "AXT1": Sequence(500.0, 9.0, 0.0, 90.0),
    "AXT2": Sequence(5500.0, 100.0, 0.0, 150.0),
    "AXFLAIR": Sequence(9000.0, 90.0, 2500.0, 150.0),
}


def spin_echo_signal(tissue: tuple[float, float, float], sequence: Sequence) -> float:
    """Magnitude of the spin-echo signal [1] of a tissue (T1 [ms], T2 [ms], proton density [1]).

    PD·(1 − e^(−TR/T1))·e^(−TE/T2), or with inversion PD·abs(1 − 2e^(−TI/T1) + e^(−TR/T1))·e^(−TE/T2), for TE ≪ TR
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
    """Receive sensitivities of circular loops on a helmet around the head.

    Fields are computed on a coarse grid of each slice and interpolated by cubic splines, since they are smooth within
    the helmet.

    Parameters
    ----------
    coils : int
        Number of loops; 10 or more form two rings.
    shape : (H, W)
    voxel_size : (row, column) [mm]
    slice_positions : sequence of float
        z of the slices [mm].
    rng : numpy.random.Generator
        Draws the positions of the loops.

    Returns
    -------
    ndarray, complex64, shape (slices, coils, H, W)
        Scaled to a mean RSS of 1 in the central third of the slices [1].
    """
    row = (np.arange(shape[0]) - shape[0] // 2) * voxel_size[0]
    column = -(np.arange(shape[1]) - shape[1] // 2) * voxel_size[1]
    wires = _loops(coils, (shape[1] * voxel_size[1], shape[0] * voxel_size[0]), rng)
    row_nodes, column_nodes = (np.linspace(axis.min(), axis.max() + 1e-3, NODES) for axis in (row, column))
    row_spline, column_spline = (
        CubicSpline(nodes, np.eye(NODES))(axis) for nodes, axis in ((row_nodes, row), (column_nodes, column))
    )
    maps = np.empty((len(slice_positions), coils, *shape), np.complex64)
    y, x = np.meshgrid(row_nodes, column_nodes, indexing="ij")
    for index, z in enumerate(slice_positions):
        points = np.stack([x, y, np.full_like(x, z)], -1)
        for coil, wire in enumerate(wires):
            maps[index, coil] = row_spline @ _field(wire, points) @ column_spline.T
    third = np.s_[:, :, shape[0] // 3 : -(shape[0] // 3) or None, shape[1] // 3 : -(shape[1] // 3) or None]
    return maps / np.sqrt((np.abs(maps[third]) ** 2).sum(1)).mean()


def _loops(coils: int, field_of_view: tuple[float, float], rng: np.random.Generator) -> NDArray[np.float64]:
    """Wires of randomly placed loops around a field of view (x, y) [mm]: points (coils, 33, 3) [mm], closed."""
    rings = 1 if coils < 10 else 2
    ring = np.arange(coils) % rings
    per_ring = np.bincount(ring, minlength=rings)[ring]
    angle = 2 * np.pi * (np.arange(coils) // rings + 0.5 * ring) / per_ring
    angle = angle + rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.06, coils)
    height = (15.0 if rings == 1 else np.where(ring == 0, -25.0, 45.0)) + rng.normal(0, 5, coils)
    half_axes = np.maximum((126.0, 144.0), 0.6 * np.array(field_of_view))  # keeps the wires outside the field of view
    circumference = np.pi * half_axes.sum()
    radius = np.clip(0.6 * circumference / per_ring, 40, 80)  # neighbouring loops overlap
    outward = np.stack([np.cos(angle), np.sin(angle), np.clip(height / 150, -0.5, 0.5)], 1)
    centre = np.stack([half_axes[0] * np.cos(angle), half_axes[1] * np.sin(angle), height], 1)
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    across = np.cross(outward, (0.0, 0.0, 1.0))
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    along = np.cross(outward, across)
    turn = np.linspace(0, 2 * np.pi, 33)
    return centre[:, None] + radius[:, None, None] * (
        np.cos(turn)[None, :, None] * across[:, None] + np.sin(turn)[None, :, None] * along[:, None]
    )


def _field(wire: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Receive field Bx − i·By of a wire (segments + 1, 3) at points (..., 3), with B0 along z.

    Biot-Savart's law over straight segments (Hoult, Concepts Magn. Reson. 12:173, 2000).
    """
    step, middle = np.diff(wire, axis=0), (wire[1:] + wire[:-1]) / 2
    offset = points[..., None, :] - middle
    inverse_cube = ((offset**2).sum(-1) + STRIP**2) ** -1.5
    bx = ((step[:, 1] * offset[..., 2] - step[:, 2] * offset[..., 1]) * inverse_cube).sum(-1)
    by = ((step[:, 2] * offset[..., 0] - step[:, 0] * offset[..., 2]) * inverse_cube).sum(-1)
    return bx - 1j * by


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
    """Simulate fully sampled multi-coil k-space of an image stack, with twofold readout oversampling.

    The simulation adds a smooth transmit shading and phase, coil sensitivities, and complex white Gaussian noise with a
    correlation of 0.1 between neighbouring coils.

    Parameters
    ----------
    image : ndarray, real or complex, shape (slices, H, W)
        H along readout, W along phase encoding, in any unit. The k-space has the same unit.
    coils : int
    rng : numpy.random.Generator
        Draws shading, phase and noise.
    coil_rng : numpy.random.Generator, optional
        Draws the positions of the coils; by default `rng`.
    voxel_size : (row, column) [mm]
    slice_positions : sequence of float, optional
        z of the slices [mm]; by default 5 mm apart about the centre of the coils.
    snr : float
        Root mean square of the image in the object (see `object_rms`) over the standard deviation of a coil's noise in
        the real or the imaginary part [1].
    padding : (left, right)
        Numbers of unacquired phase-encoding lines at the edges, which are zero.

    Returns
    -------
    ndarray, complex64, shape (slices, coils, 2·H, W)

    Raises
    ------
    ValueError
        If the image is not a stack, is zero or not finite, or a parameter is out of range.
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
    if slice_positions is None:
        slice_positions = 5.0 * (np.arange(slices) - slices // 2) + 10.0
    maps = coil_maps(coils, (height, width), voxel_size, slice_positions, coil_rng or rng)
    coil_images = torch.from_numpy(maps * _with_shading_and_phase(image, rng)[:, None])
    kspace = fft2c(center_crop_or_pad(coil_images, (OVERSAMPLING * height, width))).numpy()
    noise = rng.standard_normal((2, *kspace.shape), dtype=np.float32)
    neighbours = np.eye(coils) + 0.1 * (np.roll(np.eye(coils), 1, 0) + np.roll(np.eye(coils), -1, 0)) * (coils > 2)
    mixing = np.linalg.cholesky(neighbours).astype(np.float32)
    sigma = np.float32(object_rms(magnitude) / snr)
    for part, target in ((noise[0], kspace.real), (noise[1], kspace.imag)):
        target += sigma * np.tensordot(mixing, part, (1, 1)).swapaxes(0, 1)
    kspace[..., : padding[0]] = 0
    kspace[..., width - padding[1] :] = 0
    return kspace


def _with_shading_and_phase(image: NDArray, rng: np.random.Generator) -> Complex:
    """Image stack with a random smooth transmit shading and phase (off-resonance, echo position)."""
    slices, height, width = image.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    smooth = np.stack([x, y, x * y, x**2, y**2, x**3, y**3, np.ones_like(x)])
    shading = 1 + np.tensordot(rng.normal(0, 0.04, 5), smooth[:5], 1)
    weights = rng.normal(0, (1.2, 1.2, 0.8, 1.2, 1.2, 0.5, 0.5, np.pi))
    phase = np.tensordot(weights + rng.normal(0, 0.15, (slices, 8)), smooth, 1)  # differs slightly between slices
    return (image * shading * np.exp(1j * phase)).astype(np.complex64)


def object_rms(magnitude: NDArray) -> float:
    """Root mean square of the pixels above a tenth of the 99th percentile of an image or stack."""
    values = magnitude[magnitude > 0.1 * np.percentile(magnitude, 99)]
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


_HEADER = """<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
  <measurementInformation><protocolName>{acquisition}</protocolName></measurementInformation>
  <acquisitionSystemInformation>
    <systemVendor>simulated</systemVendor>
    <systemFieldStrength_T>3.0</systemFieldStrength_T>
    <receiverChannels>{coils}</receiverChannels>
  </acquisitionSystemInformation>
  <experimentalConditions><H1resonanceFrequency_Hz>127731000</H1resonanceFrequency_Hz></experimentalConditions>
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
    padding: tuple[int, int] = (0, 0),
    attributes: Mapping[str, str] | None = None,
) -> None:
    """Write fully sampled k-space as a fastMRI brain multi-coil file, atomically.

    Parameters
    ----------
    path : path
        Ends in .h5.
    kspace : ndarray, complex64, shape (slices, coils, readout, phase)
    image_shape : (h, w) [pixels]
        Shape of `reconstruction_rss`, the centre of the RSS image.
    acquisition : str
        Such as AXT2.
    patient_id : str
    sequence : Sequence
        For the header.
    voxel_size : (row, column) [mm]
        For the fields of view in the header.
    padding : (left, right)
        Numbers of unacquired phase-encoding lines at the edges, for the header.
    attributes : mapping, optional
        Further attributes of the file.

    Raises
    ------
    ValueError
        If k-space has other axes, is not zero in the padding, or is smaller than `image_shape`.
    """
    path = Path(path)
    if kspace.ndim != 4:
        raise ValueError(f"{path.name}: kspace must be (slices, coils, readout, phase), not of shape {kspace.shape}")
    readout, width = kspace.shape[2:]
    if image_shape[0] > readout or image_shape[1] > width:
        raise ValueError(f"{path.name}: image_shape {image_shape} exceeds the k-space of {(readout, width)}")
    if kspace[..., : padding[0]].any() or kspace[..., width - padding[1] :].any():
        raise ValueError(f"{path.name}: kspace is not zero in the padding {padding}; correct k-space or padding")
    images = [rss(ifft2c(torch.from_numpy(one_slice.astype(np.complex64)))) for one_slice in kspace]
    reconstruction = center_crop_or_pad(torch.stack(images), image_shape).numpy()
    temporary = path.with_suffix(".tmp")
    with h5py.File(temporary, "w") as file:
        file["kspace"] = kspace.astype(np.complex64, copy=False)
        file["reconstruction_rss"] = reconstruction
        file["ismrmrd_header"] = _header(kspace.shape, image_shape, acquisition, sequence, voxel_size, padding).encode()
        file.attrs["acquisition"] = acquisition
        file.attrs["max"] = float(reconstruction.max())
        file.attrs["norm"] = float(np.linalg.norm(reconstruction.astype(np.float64)))
        file.attrs["patient_id"] = patient_id
        file.attrs.update(attributes or {})
    os.replace(temporary, path)


def _header(
    kspace_shape: tuple[int, ...],
    image_shape: tuple[int, int],
    acquisition: str,
    sequence: Sequence,
    voxel_size: tuple[float, float],
    padding: tuple[int, int],
) -> str:
    slices, coils, readout, width = kspace_shape
    return _HEADER.format(
        acquisition=acquisition, coils=coils, enc_x=readout, enc_y=width, rec_x=image_shape[0], rec_y=image_shape[1],
        enc_fov_x=readout * voxel_size[0], enc_fov_y=width * voxel_size[1], rec_fov_x=image_shape[0] * voxel_size[0],
        rec_fov_y=image_shape[1] * voxel_size[1], thickness=SLICE_THICKNESS, maximum=width - sum(padding) - 1,
        center=width // 2 - padding[0], last_slice=slices - 1, tr=sequence.tr, te=sequence.te,
        ti=f"    <TI>{sequence.ti}</TI>\n" if sequence.ti else "", flip=sequence.flip_angle,
    )  # fmt: skip
