"""Runs of a sweep as methods: scores, lesions, cost and distribution shifts, with intervals over seeds and patients.

The name of a run folder gives its method and its seed: ``comparison-varnet-seed-1`` is the method "varnet". All methods
are scored on the same test volumes, from the images that their runs have written.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mrilib.config import ComparisonParameters, DataParameters, ParameterError, display_path, resolve
from mrilib.data.fastmri_file import Volume, read_volume
from mrilib.data.splits import load_annotations
from mrilib.evaluation.examples import zoom_on
from mrilib.evaluation.reconstructions import Comparison, evaluate_volumes, pick_slices, read_slice, read_target
from mrilib.files import read_json
from mrilib.metrics.image import BOOTSTRAP_SAMPLES, VolumeScore
from mrilib.metrics.lesions import Lesion, volume_lesions
from mrilib.metrics.methods import METHOD_LABELS, in_order, method_label
from mrilib.runs.record import read_record
from mrilib.runs.sweep import SET_BY_RUN
from mrilib.training.history import read_history

REFERENCES = ("bart", "nearest_training_slice", "zero_filled")  # in each run's evaluation, the same in all of them
ORACLES = ("nearest_training_slice",)  # look at the target, so they are not ranked
SAME_DATA = ("data_dir", "val_dir", "test_dir", "val_fraction", "test_fraction", "split_seed", "annotations_dir")
SAME_INPUT = (*SAME_DATA, "crop", "mask_type", "accelerations", "center_fractions")


class Estimate(NamedTuple):
    """A mean and its 95% interval."""

    mean: float
    interval: tuple[float, float] | None  # None with one seed and one patient


class MethodComparison(NamedTuple):
    """What the runs of several methods have measured on the same test volumes."""

    methods: dict[str, list[Path]]  # method → run folders, one per seed
    volumes: dict[str, list[Volume]]  # acceleration → test volumes
    scores: pd.DataFrame  # a row per method, run, acceleration and volume
    lesions: pd.DataFrame  # a row per method, run, acceleration and lesion; empty if there are none
    costs: pd.DataFrame  # index method: minutes, steps, parameters
    shifts: pd.DataFrame  # method × shift: loss of SSIM inside the head; empty if none was evaluated
    left_out: list[str]  # runs without a finished evaluation

    @property
    def names(self) -> list[str]:
        """Methods with scores, in the order of tables and figures."""
        return ordered(self.scores["method"])

    def estimate(self, method: str, acceleration: str, value: str) -> Estimate:
        """Estimate the mean of "ssim_head", "psnr_head" or "is_lost" of a method."""
        frame = self._part(method, acceleration, value)
        return _estimate(float(frame[value].mean()), resampled_means(frame, value), frame)

    def difference(self, method: str, other: str, acceleration: str, value: str) -> Estimate:
        """Estimate the mean of `method` minus that of `other`, over the same patients."""
        own, reference = (self._part(name, acceleration, value) for name in (method, other))
        changes = resampled_means(own, value, 1) - resampled_means(reference, value, 2)
        return _estimate(float(own[value].mean() - reference[value].mean()), changes, own, reference)

    def _part(self, method: str, acceleration: str, value: str) -> pd.DataFrame:
        frame = self.lesions if value == "is_lost" else self.scores
        return frame[(frame["method"] == method) & (frame["acceleration"] == acceleration)]


# ------------------------------------------------------------------------------------------------- intervals


def resampled_means(frame: pd.DataFrame, value: str, stream: int = 0) -> NDArray[np.float64]:
    """Resample the mean of a column hierarchically: seeds with replacement, and patients with replacement.

    Parameters
    ----------
    frame : DataFrame
        Columns "run", "patient" and `value`; every run has the same patients.
    value : str
    stream : int
        Runs are drawn independently in each stream, patients are the same in all of them. The difference of two methods
        is therefore paired by patient.

    Returns
    -------
    array, float, shape (BOOTSTRAP_SAMPLES,)
        All equal for one run of one patient; not a number where a sample has no row.
    """
    pivot: Any = {"index": "run", "columns": "patient", "values": value, "fill_value": 0}
    sums, counts = (frame.pivot_table(aggfunc=how, **pivot).to_numpy(float) for how in ("sum", "count"))
    runs, patients = sums.shape
    picked_patients = np.random.default_rng(0).integers(patients, size=(BOOTSTRAP_SAMPLES, 1, patients))
    picked_runs = np.random.default_rng([1, stream]).integers(runs, size=(BOOTSTRAP_SAMPLES, runs, 1))
    totals = counts[picked_runs, picked_patients].sum((1, 2))
    picked = sums[picked_runs, picked_patients].sum((1, 2))
    return np.divide(picked, totals, out=np.full(len(totals), np.nan), where=totals > 0)


def _estimate(mean: float, samples: NDArray[np.float64], *frames: pd.DataFrame) -> Estimate:
    if all(frame[["run", "patient"]].drop_duplicates().shape[0] == 1 for frame in frames):
        return Estimate(mean, None)
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return Estimate(mean, (float(low), float(high)))


# ------------------------------------------------------------------------------------------------- runs


def method_of(run: str) -> str:
    """Return the method in the name of a run folder: "comparison-varnet-seed-1" → "varnet".

    What a sweep's grid adds to the name stays in it. A name without a known method is the method, without its seed.
    """
    name = re.sub(r"-seed-\d+$", "", run)
    known = "|".join(sorted(METHOD_LABELS, key=len, reverse=True))
    found = re.search(rf"(?:^|-)((?:{known})(?:-.*)?)$", name)
    return found[1] if found else name


def label(method: str) -> str:
    """Return the label of a method: that of `METHOD_LABELS`, and what a sweep's grid adds to it."""
    name, separator, rest = method.partition("-")
    return f"{method_label(name)}, {rest}" if separator and name in METHOD_LABELS else method_label(method)


def ordered(methods: Sequence[str] | pd.Series) -> list[str]:
    """Sort methods, without repeats, by `METHOD_LABELS`; those with additions of a grid follow their own."""
    order = in_order(method.partition("-")[0] for method in methods)
    return sorted(dict.fromkeys(methods), key=lambda method: (order.index(method.partition("-")[0]), method))


def select_runs(config: ComparisonParameters) -> tuple[list[Path], list[str]]:
    """Select the evaluated runs of ``config.runs``, or of every finished run outputs/comparison-*.

    Returns
    -------
    list of Path
    list of str
        Runs without a finished evaluation.

    Raises
    ------
    ParameterError
        If a folder is no run, no run is evaluated, or two runs have other data, masks or crop.
    """
    paths = [resolve(name) for name in config.runs]
    for path in paths:
        if not (path / "run.json").is_file():
            raise ParameterError(f"runs: '{display_path(path)}' is no run folder, it has no run.json")
    if not paths:
        found = sorted(path.parent for path in resolve("outputs").glob("comparison-*/run.json"))
        paths = [path for path in found if read_record(path)["status"] == "done" and _evaluation(path)]
    evaluated = [path for path in paths if _evaluation(path)]
    if not evaluated:
        raise ParameterError(
            "runs: there is no evaluated run; make them first: "
            "python -m mrilib sweep params/comparison --methods all --seeds 0,1"
        )
    for path in evaluated[1:]:
        _require_same(evaluated[0], path)
    return evaluated, [display_path(path) for path in paths if path not in evaluated]


def _evaluation(run: Path) -> dict[str, Any]:
    """Return the parameters of a run's finished evaluation; empty if there is none."""
    entry = read_record(run)["notebooks"].get("evaluate", {})
    return entry["config"] if entry.get("status") == "done" and (run / "metrics.json").is_file() else {}


def _require_same(first: Path, other: Path) -> None:
    for name in SAME_INPUT:
        expected, value = (_evaluation(run).get(name) for run in (first, other))
        if expected != value:
            raise ParameterError(
                f"runs: '{display_path(other)}' was evaluated with {name} {value!r}, '{display_path(first)}' with "
                f"{expected!r}; list only runs of the same data, masks and crop"
            )


def _group(runs: Sequence[Path]) -> dict[str, list[Path]]:
    """Group the runs by method; refuse runs of one method that differ in more than the seed."""
    methods: dict[str, list[Path]] = {}
    for run in runs:
        methods.setdefault(method_of(run.name), []).append(run)
    for method, folders in methods.items():
        first, *others = (read_record(run)["notebooks"] for run in folders)
        for folder, notebooks in zip(folders[1:], others, strict=True):
            for stage in ("stage1", "stage2"):
                expected, values = (record.get(stage, {}).get("config", {}) for record in (first, notebooks))
                differing = [name for name in expected | values if expected.get(name) != values.get(name)]
                if differing := [name for name in differing if name not in (*SET_BY_RUN, "seed")]:
                    raise ParameterError(
                        f"runs: '{display_path(folder)}' and '{display_path(folders[0])}' are both {method} but differ "
                        f"in {stage}.{differing[0]}; list one of them, or rename its folder"
                    )
    return methods


def read_comparison(config: ComparisonParameters) -> MethodComparison:
    """Read and score the selected runs; see `select_runs` for what is refused."""
    evaluated, left_out = select_runs(config)
    shifted = [run for run in evaluated if _evaluation(run).get("shift")]
    methods = _group([run for run in evaluated if run not in shifted])
    if not methods:
        raise ParameterError("runs: all of them have a distribution shift; add the runs without one")
    volumes = _read_volumes([run for runs in methods.values() for run in runs])
    scores, lesions = _measure(methods, volumes)
    return MethodComparison(
        methods, volumes, scores, lesions, _costs(methods), _shift_losses(methods, shifted), left_out
    )


def _read_volumes(runs: Sequence[Path]) -> dict[str, list[Volume]]:
    """Read the test volumes of each acceleration; all runs must have reconstructed the same files."""
    files = {run: sorted((run / "reconstructions" / "model").glob("*/*.h5")) for run in runs}
    places = {run: [(path.parent.name, path.name) for path in paths] for run, paths in files.items()}
    for run in runs[1:]:
        if places[run] != places[runs[0]]:
            raise ParameterError(
                f"runs: '{display_path(run)}' has reconstructed other test files than '{display_path(runs[0])}'; "
                "evaluate both again, or list one of them"
            )
    config = _evaluation(runs[0])
    folder = resolve(config["test_dir"] or config["data_dir"])
    volumes: dict[str, list[Volume]] = {}
    for acceleration, name in places[runs[0]]:
        if not (folder / name).is_file():
            raise ParameterError(f"runs: the test file '{display_path(folder / name)}' does not exist; restore it")
        volumes.setdefault(acceleration, []).append(read_volume(folder / name))
    return {acceleration: volumes[acceleration] for acceleration in sorted(volumes, key=int)}


def _folders(
    methods: Mapping[str, Sequence[Path]], accelerations: Sequence[str]
) -> Iterator[tuple[dict[str, str], Path]]:
    """Yield the folder of reconstructions for each method, run and acceleration; references come from one run."""
    for acceleration in accelerations:
        for method, runs in methods.items():
            for run in runs:
                columns = {"method": method, "run": display_path(run), "acceleration": acceleration}
                yield columns, run / "reconstructions" / "model" / acceleration
        for method in REFERENCES:
            for run in (run for runs in methods.values() for run in runs):
                folder = run / "reconstructions" / method / acceleration
                if folder.is_dir():
                    yield {"method": method, "run": display_path(run), "acceleration": acceleration}, folder
                    break


def _measure(
    methods: Mapping[str, Sequence[Path]], volumes: Mapping[str, Sequence[Volume]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score all reconstructions, and measure their lesions."""
    values = _evaluation(next(iter(methods.values()))[0])
    config = DataParameters.create({name: values[name] for name in DataParameters.model_fields if name in values})
    annotations = load_annotations(config) if config.crop == "readout" else None
    scores, lesions = [], []
    for columns, folder in _folders(methods, list(volumes)):
        part = volumes[columns["acceleration"]]
        scores += [columns | score._asdict() for score in evaluate_volumes(part, folder)]
        for lesion in volume_lesions(part, annotations, folder)[0] if annotations is not None else ():
            lesions.append(columns | {"patient": lesion.patient, "is_lost": lesion.is_lost, "lesion": lesion})
    if not scores:
        raise ParameterError("runs: no test volume has a target, so nothing can be compared")
    return pd.DataFrame(scores), pd.DataFrame(lesions)


def _costs(methods: Mapping[str, Sequence[Path]]) -> pd.DataFrame:
    """Tabulate training minutes and trainable parameters of all stages, mean over seeds, and each stage's steps."""
    rows = {}
    for method, runs in methods.items():
        costs = [read_json(run / "metrics.json")["cost"] for run in runs]
        seconds = [sum(cost.get(f"{stage}_seconds", 0) for stage in ("stage1", "stage2")) for cost in costs]
        stages = costs[0]["trainable_parameters"]
        histories = [read_history(runs[0], stage) for stage in sorted(stages)]
        rows[method] = {
            "minutes": float(np.mean(seconds)) / 60,
            "steps": " + ".join(f"{history.steps[-1]['step']:.0f}" if history else "?" for history in histories),
            "parameters": sum(stages.values()),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _shift_losses(methods: Mapping[str, Sequence[Path]], shifted: Sequence[Path]) -> pd.DataFrame:
    """Tabulate SSIM inside the head on the test set minus that under each shift: mean over accelerations and seeds.

    A run with a shift belongs to the run that holds its checkpoint of stage 2.
    """
    owners = {run: method for method, runs in methods.items() for run in runs}
    rows = []
    for run in shifted:
        config = _evaluation(run)
        owner = resolve(config["stage2_checkpoint"]).parent.parent
        if owner not in owners:
            raise ParameterError(
                f"runs: '{display_path(run)}' has the shift '{config['shift']}' of '{display_path(owner)}', "
                "which is not compared; list it too"
            )
        before, after = (read_json(folder / "metrics.json")["reconstruction"] for folder in (owner, run))
        for key in ("model", "bart", "zero_filled"):
            losses = [
                before[acceleration][key]["ssim_head"] - after[acceleration][key]["ssim_head"]
                for acceleration in after
                if key in before.get(acceleration, {}) and key in after[acceleration]
            ]
            method = owners[owner] if key == "model" else key
            rows += [{"method": method, "shift": config["shift"], "loss": loss} for loss in losses]
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows).pivot_table(index="method", columns="shift", values="loss", aggfunc="mean")
    return table.loc[ordered(list(table.index))]


# ------------------------------------------------------------------------------------------------- pictures


def example_slices(comparison: MethodComparison, acceleration: str) -> list[Comparison]:
    """Read one slice of all methods (each one's first run) and, around a lesion, a zoom; images are by label.

    The lesion is the largest that some methods lose and others keep, else the largest. Without lesions it is the middle
    slice of the median volume, without a zoom.
    """
    folders = {
        columns["method"]: folder.parent.parent
        for columns, folder in reversed(list(_folders(comparison.methods, [acceleration])))
        if columns["method"] not in ORACLES
    }
    by_file = {volume.file: volume for volume in comparison.volumes[acceleration]}
    kept = _lesions_by_method(comparison, acceleration)
    lesion = _pick_lesion(kept)
    if lesion is None:
        part = comparison.scores[comparison.scores["acceleration"] == acceleration]
        part = part[part["run"] == part["run"].iloc[0]]
        part = part[part["method"] == part["method"].iloc[0]]
        scores = [VolumeScore(**row) for row in part[list(VolumeScore._fields)].to_dict("records")]
        picked = pick_slices(scores, list(by_file.values()))[len(scores) > 2]
        volume, slice_num = picked.volume, picked.slice_num
    else:
        volume, slice_num = by_file[lesion.file], lesion.slice_num
    images = {
        label(method): read_slice(
            folders[method], method if method in REFERENCES else "model", acceleration, volume, slice_num
        )
        for method in ordered(list(folders))
    }
    title = f"{volume.acquisition}, slice {slice_num}, {acceleration}x"
    whole = Comparison(read_target(volume, slice_num), images, volume.maximum, title=title, pixel=volume.pixel)
    if lesion is None:
        return [whole]
    place = next(iter(kept.values())).index(lesion)
    retention = {label(method): {"retention": kept[method][place].retention} for method in folders}
    zoom = zoom_on(lesion.box, volume.image_shape)
    return [
        whole._replace(boxes=[lesion.box]),
        whole._replace(boxes=[lesion.box], title=lesion.box.label, scores=retention, zoom=zoom),
    ]


def _lesions_by_method(comparison: MethodComparison, acceleration: str) -> dict[str, list[Lesion]]:
    """Return the lesions of each method's first run, the same ones in the same order."""
    if comparison.lesions.empty:
        return {}
    part = comparison.lesions[comparison.lesions["acceleration"] == acceleration]
    firsts = {method: group[group["run"] == group["run"].iloc[0]] for method, group in part.groupby("method")}
    return {str(method): list(group["lesion"]) for method, group in firsts.items() if method not in ORACLES}


def _pick_lesion(lesions: Mapping[str, Sequence[Lesion]]) -> Lesion | None:
    if not lesions:
        return None
    same = list(zip(*lesions.values(), strict=True))
    disputed = [group for group in same if len({lesion.is_lost for lesion in group}) == 2]
    return max((group[0] for group in disputed or same), key=lambda lesion: lesion.size)
