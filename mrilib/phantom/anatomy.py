"""Anatomy of the phantom: one real head, warped for each patient, with lesions and spin-echo contrasts.

Brain tissue comes from the ICBM 152 2009a nonlinear symmetric template (Fonov et al., NeuroImage 54:313, 2011) in the
1 mm copies of the package nilearn: T1, grey matter, white matter. The template is skull stripped, so dura, skull,
temporal muscle, fat and skin are added as shells of irregular thickness around the brain's envelope.

Patient coordinates r = (x, y, z) [mm]: x to the patient's right, y anterior, z superior, origin near the head's centre.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes, distance_transform_edt, gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from mrilib.phantom.scanner import Sequence, spin_echo_signal

Array = NDArray[np.float32]

# T1 [ms], T2 [ms] and proton density [1] at 3 T. White matter: Wansapura et al., JMRI 9:531 (1999). Grey matter:
# between Wansapura (T1 1331) and Stanisz et al., MRM 54:507 (2005; T1 1820). Muscle: Stanisz. Cerebrospinal fluid: Lin
# et al., Proc. ISMRM 9:1391 (2001), with T2 shortened by flow. Fat and marrow: de Bazelaire et al., Radiology 230:652
# (2004), with the longer T2 of fat in an echo train, and a lower density for septa and vessels. Skin and lesions:
# typical values that give the textbook appearance in the three contrasts.
TISSUES: dict[str, tuple[float, float, float]] = {
    "grey": (1450.0, 100.0, 0.84),
    "white": (832.0, 79.6, 0.70),
    "csf": (4163.0, 900.0, 1.00),
    "dura": (1000.0, 30.0, 0.30),
    "bone": (800.0, 8.0, 0.12),
    "marrow": (586.0, 55.0, 0.45),
    "muscle": (1412.0, 45.0, 0.75),
    "fat": (382.0, 95.0, 0.50),
    "skin": (900.0, 35.0, 0.60),
    "gliosis": (1700.0, 230.0, 0.90),
    "cavity": (3700.0, 800.0, 1.00),
    "tumour": (1650.0, 150.0, 0.86),
    "necrosis": (2700.0, 380.0, 0.95),
    "oedema": (1500.0, 165.0, 0.85),
}
_SHELLS = ("dura", "bone", "marrow", "bone", "muscle", "fat", "skin")  # from the brain outwards
_HEAD_CENTRE = np.array((0.0, -17.0, 20.0))
_VENTRICLE_CENTRE = np.array((0.0, -12.0, 15.0))
_TEXTURE_VOXEL = 2.0  # [mm]
_DIAMETERS = {  # range for each lesion label [mm]
    "Nonspecific white matter lesion": (5.5, 11.0),
    "Lacunar infarct": (6.0, 10.0),
    "Mass": (14.0, 32.0),
    "Encephalomalacia": (18.0, 32.0),
}


class Template(NamedTuple):
    """Maps of the template head; their first voxel lies at `origin` in MNI space."""

    white: Array  # (X, Y, Z) fraction of white matter [1], 1 mm
    csf: Array  # (X, Y, Z) fraction of cerebrospinal fluid [1], 1 mm; grey matter is the rest
    white_core: Array  # (X/2, Y/2, Z/2) white matter averaged over about 6 mm [1], 2 mm
    outside: Array  # (X/2, Y/2, Z/2) signed distance from the brain's envelope [mm], negative inside, 2 mm
    origin: NDArray[np.float64]  # (3,) [mm]


@lru_cache(maxsize=1)
def load_template() -> Template:
    """Read the ICBM 152 maps from the package nilearn, and derive fluid and envelope.

    Raises
    ------
    FileNotFoundError
        If the installed nilearn lacks the maps.
    """
    folder = files("nilearn") / "datasets" / "data"
    maps = {}
    for name in ("t1", "gm", "wm"):
        path = folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
        if not path.is_file():
            raise FileNotFoundError(f"nilearn lacks '{path.name}'; install the version in constraints.txt")
        volume = nib.load(str(path))
        maps[name] = np.asarray(volume.dataobj)[:, :, 10:].astype(np.float32)  # type: ignore[attr-defined]
    origin = volume.affine[:3, 3] + (0.0, 0.0, 10.0)  # type: ignore[attr-defined]
    grey, white = maps["gm"] / 255, maps["wm"] / 255
    # The tissue maps barely resolve the sulci, which the T1 map shows darker than grey matter (about 165).
    sulci = np.clip((150 - maps["t1"]) / 75, 0, 1) * (1 - white)
    csf = np.maximum(np.clip(1 - grey - white, 0, 1), sulci)
    brain = binary_fill_holes(maps["t1"][::2, ::2, ::2] > 0)
    reach = 9.0  # [mm]: closes sulci and fissures
    dilated = 2 * distance_transform_edt(~brain) < reach
    envelope = 2 * distance_transform_edt(dilated) > reach
    outside = 2 * (distance_transform_edt(~envelope) - distance_transform_edt(envelope))
    return Template(
        (white * (1 - csf) / np.maximum(grey + white, 1e-3)).clip(0, 1),
        csf.astype(np.float32),
        gaussian_filter(white, 2.5)[::2, ::2, ::2].copy(),
        gaussian_filter(outside.astype(np.float32), 1.5),
        origin,
    )


@dataclass(frozen=True)
class Lesion:
    """One lesion at a fixed place in the patient's head."""

    label: str  # of fastMRI+
    centre: NDArray[np.float64]  # (3,) [mm]
    radii: NDArray[np.float64]  # (3,) half axes [mm]
    axes: NDArray[np.float64]  # (3, 3) rotation onto the half axes
    texture_shift: NDArray[np.float64]  # (3,) [mm]: shift of the noise field that roughens edge and inside
    tissue_scale: tuple[float, float]  # factors of T1 and T2
    around: "Lesion | None" = None  # mass inside an oedema


@dataclass(frozen=True)
class Patient:
    """Head shape, tissue values and lesions of a patient, shared by the contrasts."""

    affine: NDArray[np.float64]  # (3, 3), patient to template [mm/mm]
    waves: NDArray[np.float64]  # (3, K) wave vectors of the warp [rad/mm]
    wave_phases: NDArray[np.float64]  # (K,) [rad]
    wave_amplitudes: NDArray[np.float64]  # (K, 5) of x, y, z displacement, skull and scalp thickness [mm]
    ventricles: float  # relative widening of the lateral ventricles [1]
    atrophy: float  # relative widening of the sulci [1]
    gap: float  # fluid between brain and dura [mm]
    skull: float  # [mm]
    scalp: float  # [mm]
    tissues: dict[str, tuple[float, float, float]]
    texture: Array  # (N, N, N) periodic noise of unit variance
    lesions: tuple[Lesion, ...] = ()

    def to_template(self, points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Map patient coordinates (P, 3) [mm] to template coordinates (P, 3) [mm] and shell noise (P, 2) [mm]."""
        waves = np.sin((points @ self.waves + self.wave_phases).astype(np.float32)) @ self.wave_amplitudes
        mapped = points @ self.affine.T + _HEAD_CENTRE + waves[:, :3]
        # Pulling the coordinates towards the centre of the ventricles enlarges the ventricles.
        offset = mapped - _VENTRICLE_CENTRE
        pull = self.ventricles * np.exp(-0.5 * ((offset / (26.0, 40.0, 24.0)) ** 2).sum(1, keepdims=True))
        return mapped - pull * offset * (1.0, 0.5, 0.7), waves[:, 3:]

    def noise(self, points: NDArray[np.float64], scale: float = 1.0) -> Array:
        """Periodic noise of about unit variance at points (P, 3); `scale` > 1 makes it coarser."""
        coordinates = (points / (_TEXTURE_VOXEL * scale)).T
        return map_coordinates(self.texture, coordinates, order=1, mode="grid-wrap", output=np.float32)


def draw_patient(rng: np.random.Generator) -> Patient:
    """Draw one patient's head, without lesions.

    Randomised are size (about 0.93 of the template, which is larger than most heads), rotation, shear, a smooth warp of
    about 2 mm rms, ventricles, sulci, skull, scalp, and tissue values.
    """
    scale = rng.uniform(0.89, 0.97) * rng.uniform(0.97, 1.03, 3)
    rotation = Rotation.from_euler("xyz", rng.uniform(-1, 1, 3) * (5.0, 2.5, 5.0), degrees=True).as_matrix()
    shear = np.eye(3) + np.triu(rng.uniform(-0.04, 0.04, (3, 3)), 1)
    count = 12
    directions = rng.standard_normal((3, count))
    waves = 2 * np.pi * directions / np.linalg.norm(directions, axis=0) / rng.uniform(75.0, 180.0, count)
    amplitudes = rng.normal(0.0, (0.9, 0.9, 0.9, 0.35, 0.45), (count, 5))
    noise = rng.standard_normal((64, 64, 64), dtype=np.float32)
    texture = gaussian_filter(noise, 0.7, mode="wrap")
    coarse = gaussian_filter(noise, 2.5, mode="wrap")
    texture = texture / texture.std() + coarse / coarse.std()
    varied = {
        name: (t1 * np.exp(rng.normal(0, 0.03)), t2 * np.exp(rng.normal(0, 0.04)), pd * np.exp(rng.normal(0, 0.02)))
        for name, (t1, t2, pd) in TISSUES.items()
    }
    return Patient(
        affine=rotation @ shear @ np.diag(1 / scale),
        waves=waves,
        wave_phases=rng.uniform(0, 2 * np.pi, count),
        wave_amplitudes=amplitudes,
        ventricles=rng.uniform(-0.25, 0.4),
        atrophy=rng.uniform(-0.15, 0.5),
        gap=rng.uniform(0.0, 2.2),
        skull=rng.uniform(5.0, 7.5),
        scalp=rng.uniform(3.5, 6.5),
        tissues=varied,
        texture=texture / texture.std(),
    )


class Composition(NamedTuple):
    """Tissues of the healthy head at P points."""

    fractions: Array  # (3 + shells, P): grey, white, csf, shells; the sum is 1 in the head, 0 in air
    white_core: Array  # (P,)
    outside: Array  # (P,) signed distance from the brain's envelope [mm]
    template: NDArray[np.float64]  # (P, 3) template coordinates [mm]


def compose(patient: Patient, points: NDArray[np.float64]) -> Composition:
    """Tissue fractions of the healthy head at (P, 3) patient coordinates [mm]."""
    head = load_template()
    template, shell_noise = patient.to_template(points)
    index = (template - head.origin).T
    white = map_coordinates(head.white, index, order=1, output=np.float32)
    csf = map_coordinates(head.csf, index, order=1, cval=1.0, output=np.float32)
    outside = map_coordinates(head.outside, index / 2, order=1, mode="nearest", output=np.float32)
    core = map_coordinates(head.white_core, index / 2, order=1, output=np.float32)
    csf = np.clip(csf * (1 + patient.atrophy * np.clip(1 + outside / 25, 0, 1)), 0, 1)  # near the surface only
    white = np.minimum(white, 1 - csf)
    # Temporal muscle between skull and scalp.
    x, y, z = template.T
    temple = np.clip((np.abs(x) - 38) / 25, 0, 1) * np.exp(-0.5 * (((y - 12) / 24) ** 2 + ((z + 4) / 22) ** 2))
    skull = np.maximum(patient.skull + shell_noise[:, 0], 3.0)
    scalp = np.maximum(patient.scalp + shell_noise[:, 1], 2.5)
    thickness = (1.0, 0.28 * skull, 0.42 * skull, 0.30 * skull, 0.3 + 11 * temple, scalp - 1.5, 1.5)
    edge = patient.gap + 0.35 * shell_noise[:, 0]
    within = np.clip(edge - outside + 0.5, 0, 1)
    fractions = [(1 - csf - white) * within, white * within, csf * within]
    for layer in thickness:
        edge = edge + layer
        reached = np.clip(edge - outside + 0.5, 0, 1)
        fractions.append(reached - within)
        within = reached
    return Composition(np.stack(fractions).astype(np.float32), core, outside, template)


def _radius(patient: Patient, lesion: Lesion, points: NDArray[np.float64], roughness: float) -> Array:
    """Distance (P,) from a lesion's centre relative to its rough edge [1]."""
    q = np.linalg.norm((points - lesion.centre) @ lesion.axes.T / lesion.radii, axis=1)
    coarseness = max(float(lesion.radii.min()) / 7, 0.6)
    return (q + roughness * patient.noise(points + lesion.texture_shift, coarseness)).astype(np.float32)


def _fill(radius: Array, size: float, edge: float, at: float = 1.0) -> Array:
    """Soft step from 1 to 0 at relative radius `at`, `edge` [mm] wide, for a half axis of `size` [mm]."""
    return np.clip((at - radius) * size / edge + 0.5, 0, 1)


def _lesion_layers(
    patient: Patient, lesion: Lesion, points: NDArray[np.float64], healthy: Composition
) -> list[tuple[Array, str]]:
    """Opacity (P,) and tissue of each layer of a lesion, bottom layer first."""
    size = float(lesion.radii.min())
    brain = healthy.fractions[:3].sum(0)
    tissue = healthy.fractions[0] + healthy.fractions[1]
    if lesion.label == "Nonspecific white matter lesion":
        radius = _radius(patient, lesion, points, 0.08)
        return [(_fill(radius, size, 1.5) * tissue, "gliosis")]
    if lesion.label == "Lacunar infarct":
        radius = _radius(patient, lesion, points, 0.05)
        return [(_fill(radius, size, 1.0) * brain, "gliosis"), (_fill(radius, size, 1.0, 0.78) * brain, "cavity")]
    if lesion.label == "Encephalomalacia":
        radius = _radius(patient, lesion, points, 0.17)
        return [(_fill(radius, size, 3.0) * brain, "gliosis"), (_fill(radius, size, 2.5, 0.74) * brain, "cavity")]
    if lesion.label == "Mass":
        radius = _radius(patient, lesion, points, 0.07)
        patches = patient.noise(points - lesion.texture_shift, size / 9)
        necrosis = np.clip(0.4 + 1.1 * patches, 0, 1) * _fill(radius, size, 3.0, 0.75)
        return [(_fill(radius, size, 1.5) * brain, "tumour"), (necrosis * brain, "necrosis")]
    if lesion.label == "Edema" and lesion.around is not None:
        radius = _radius(patient, lesion, points, 0.16)
        mass = _lesion_layers(patient, lesion.around, points, healthy)[0][0]
        # Oedema spreads along white matter and spares the cortex.
        spread = np.clip(healthy.fractions[1] * 1.15 + 0.25 * healthy.fractions[0], 0, 0.95)
        return [(_fill(radius, size, 4.0) * spread * (1 - mass), "oedema")]
    raise ValueError(f"unknown lesion label '{lesion.label}'")


def render(patient: Patient, points: NDArray[np.float64], sequence: Sequence) -> tuple[Array, list[Array]]:
    """Signal at points (P, 3) of a patient's head [mm].

    Returns
    -------
    signal : ndarray, float32, shape (P,)
        Transverse magnetisation, for a proton density of water of 1 [1].
    opacities : list of ndarray, float32, shape (P,)
        For each of `patient.lesions`, the fraction of the voxel that it fills [1].
    """
    healthy = compose(patient, points)
    signals = {name: spin_echo_signal(values, sequence) for name, values in patient.tissues.items()}
    levels = np.array([signals[name] for name in ("grey", "white", "csf", *_SHELLS)], np.float32)
    texture = patient.noise(points)
    image = levels @ healthy.fractions
    opacities = []
    for lesion in patient.lesions:
        near = np.abs(points - lesion.centre).max(1) < 1.6 * lesion.radii.max() + 3
        opacity = np.zeros_like(image)
        if near.any():
            healthy_near = Composition(healthy.fractions[:, near], *(values[near] for values in healthy[1:]))
            for layer, tissue in _lesion_layers(patient, lesion, points[near], healthy_near):
                t1, t2, density = patient.tissues[tissue]
                varied = (t1 * lesion.tissue_scale[0], t2 * lesion.tissue_scale[1], density)
                image[near] += layer * (spin_echo_signal(varied, sequence) - image[near])
                opacity[near] = np.maximum(opacity[near], layer)
        opacities.append(opacity)
    return image * (1 + 0.035 * texture), opacities


def add_lesions(patient: Patient, rng: np.random.Generator, slice_positions: NDArray[np.float64]) -> Patient:
    """Copy of a patient with lesions in suitable tissue; later lesions cover earlier ones.

    Lesions lie within 1.5 mm of a slice centre z [mm], so that widely spaced slices show them too.
    """
    spacing = float(np.diff(slice_positions).mean()) if len(slice_positions) > 1 else np.inf
    lesions: list[Lesion] = []
    masses = 0
    for position in slice_positions:
        if rng.random() > 0.82 * min(1.0, spacing / 9):
            continue
        for _ in range(rng.choice((1, 2, 3), p=(0.6, 0.28, 0.12))):
            label = rng.choice(
                ("Nonspecific white matter lesion", "Lacunar infarct", "Mass", "Encephalomalacia"),
                p=(0.4, 0.34, 0.18, 0.08),
            )
            if label == "Mass" and masses == 2:
                label = "Nonspecific white matter lesion"
            lesion = _place(patient, rng, str(label), float(position), lesions)
            if lesion is None and label != "Nonspecific white matter lesion":  # no suitable tissue in the slice
                label = "Nonspecific white matter lesion"
                lesion = _place(patient, rng, label, float(position), lesions)
            if lesion is None:
                continue
            if label == "Mass":
                masses += 1
                if rng.random() < 0.75:
                    grown = lesion.radii * rng.uniform(1.5, 1.9)
                    lesions.append(replace(lesion, label="Edema", radii=grown, around=lesion))
            lesions.append(lesion)
    # Other lesions cover oedema.
    return replace(patient, lesions=tuple(sorted(lesions, key=lambda lesion: lesion.label != "Edema")))


def _place(
    patient: Patient, rng: np.random.Generator, label: str, position: float, others: list[Lesion]
) -> Lesion | None:
    """Place a lesion of this label in suitable tissue near one slice; None if there is none."""
    diameter = rng.uniform(*_DIAMETERS[label])
    radii = diameter / 2 * rng.uniform(0.8, 1.15, 3)
    size = float(radii.max())
    grid = np.arange(-100.0, 100.0, 3.0)
    x, y = np.meshgrid(grid, grid, indexing="ij")
    points = np.stack([x.ravel(), y.ravel(), np.full(x.size, position)], 1)
    points += rng.uniform(-1.5, 1.5, 3)
    here = compose(patient, points)
    white_core, csf, depth = here.white_core, here.fractions[2], -here.outside
    tx, ty, tz = here.template.T
    side = np.abs(tx)
    if label == "Nonspecific white matter lesion":
        suitable = (white_core > 0.86) & (side > np.where(tz < 20, 20, 13))  # outside the internal capsule
    elif label == "Lacunar infarct":  # basal ganglia, internal capsule, thalamus, corona radiata
        suitable = (side > 9) & (side < 36) & (ty > -32) & (ty < 22) & (tz > -8) & (tz < 32) & (csf < 0.05)
        suitable &= depth > 20
    elif label == "Mass":
        suitable = (side > 0.8 * size + 3) & (depth > size + 1) & (white_core > 0.35) & (csf < 0.2)
    else:  # a cortical defect
        suitable = (side > 0.7 * size + 4) & (depth > 0.35 * size) & (depth < 0.9 * size)
    for other in others:
        distance = np.linalg.norm(points - other.centre, axis=1)
        suitable &= distance > size + float(other.radii.max()) + 4
    if not suitable.any():
        return None
    return Lesion(
        label=label,
        centre=points[rng.choice(np.flatnonzero(suitable))],
        radii=radii,
        axes=Rotation.random(random_state=rng).as_matrix(),
        texture_shift=rng.uniform(-60, 60, 3),
        tissue_scale=(float(np.exp(rng.normal(0, 0.06))), float(np.exp(rng.normal(0, 0.08)))),
    )
