"""Comparison of run records: selection, differing parameters, metrics, histories and one common slice."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mrilib.config import NOTEBOOKS, CompareParameters, ParameterError, display_path, resolve
from mrilib.data.fastmri_file import Volume, read_volume
from mrilib.display.curves import STAGES
from mrilib.evaluation import reconstructions
from mrilib.evaluation.reconstructions import Comparison
from mrilib.files import read_json
from mrilib.metrics.methods import method_label
from mrilib.runs.record import all_runs, read_record
from mrilib.training.history import History, read_history

IGNORED_PARAMETERS = ("output_dir", "interactive")  # no part of an experiment
IGNORED_NOTEBOOKS = ("explore", "compare", "pretrain")  # do not affect a run's numbers


def select_runs(config: CompareParameters, own: Path) -> dict[str, Path]:
    """Select the runs to compare, by name: those of ``config.runs``, or every finished run under outputs/.

    Parameters
    ----------
    config : CompareParameters
    own : Path
        The run folder of the comparison. It counts as finished if it has metrics: comparing is its last step.

    Raises
    ------
    ParameterError
        If a named folder is no run, or there is nothing to compare.
    """
    if config.runs:
        paths = [resolve(name) for name in config.runs]
        for path in paths:
            if not (path / "run.json").is_file():
                raise ParameterError(f"runs: '{display_path(path)}' is no run folder, it has no run.json")
    else:
        own_finished = (own / "metrics.json").is_file()
        paths = [path for path in all_runs() if _is_finished(path) or (path == own and own_finished)]
        if own not in paths and own_finished:
            paths.append(own)
    if not paths:
        raise ParameterError("runs: no finished run under outputs/; make one first: python -m mrilib run params/demo")
    names = [path.name for path in paths]
    return {path.name if names.count(path.name) == 1 else display_path(path): path for path in paths}


def _is_finished(path: Path) -> bool:
    record = read_record(path)
    return record["status"] == "done" and not {"stage1", "stage2", "evaluate"}.isdisjoint(record["notebooks"])


def states(runs: Mapping[str, Path]) -> dict[str, str]:
    """Describe the state of each run: "done", the failed notebook with its error, or the missing notebooks."""
    texts = {}
    for run, path in runs.items():
        record = read_record(path)
        failed = [(name, entry) for name, entry in record["notebooks"].items() if entry.get("status") == "failed"]
        missing = [name for name in record["planned"] if record["notebooks"].get(name, {}).get("status") != "done"]
        if failed:
            name, entry = failed[-1]
            error = str(entry.get("error") or "no error is recorded").splitlines()[0]
            texts[run] = f"failed in {NOTEBOOKS[name][0]}: {error}"
        elif not missing or missing == ["compare"]:  # comparing is a run's last step
            texts[run] = "done"
        else:
            texts[run] = f"{record['status']}, without {', '.join(NOTEBOOKS[name][0] for name in missing)}"
    return texts


def differing_parameters(runs: Mapping[str, Path]) -> pd.DataFrame:
    """Tabulate the parameters that differ between runs: a row per parameter (notebook.name), a column per run.

    A notebook that some runs have not executed gets its own row; its parameters are compared among the others.
    """
    configs = {run: _configs(path) for run, path in runs.items()}
    rows: dict[str, dict[str, str]] = {}
    for notebook in dict.fromkeys(name for config in configs.values() for name in config):
        having = [run for run in runs if notebook in configs[run]]
        if len(having) < len(runs):
            rows[notebook] = {run: "run" if run in having else "not run" for run in runs}
        for name in dict.fromkeys(name for run in having for name in configs[run][notebook]):
            values = {run: configs[run][notebook].get(name, "–") for run in having}
            if len(set(values.values())) > 1:
                rows[f"{notebook}.{name}"] = {run: values.get(run, "–") for run in runs}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(runs))


def _configs(run: Path) -> dict[str, dict[str, str]]:
    """Read notebook → parameter → value of a run."""
    configs = {}
    for notebook, entry in read_record(run)["notebooks"].items():
        if notebook not in IGNORED_NOTEBOOKS:
            values = entry.get("config", {}).items()
            configs[notebook] = {
                name: _relative(value, run) for name, value in values if name not in IGNORED_PARAMETERS
            }
    return configs


def _relative(value: Any, run: Path) -> str:
    """Format a parameter; paths inside the run folder are relative to it, as they differ by its name only."""
    inside = isinstance(value, str) and value and resolve(value).is_relative_to(run)
    return f"<run>/{resolve(value).relative_to(run).as_posix()}" if inside else str(value)


def metrics_table(runs: Mapping[str, Path]) -> pd.DataFrame:
    """Tabulate the main metrics of each run; "–" where a run was not evaluated."""
    rows = {}
    for run, path in runs.items():
        row: dict[str, str] = {}
        metrics = read_json(path / "metrics.json") if (path / "metrics.json").is_file() else {}
        for acceleration, methods in metrics.get("reconstruction", {}).items():
            for method in ("zero_filled", "model"):
                if method in methods:
                    label = f"{acceleration}x {method_label(method)}"
                    row[f"{label} SSIM"] = f"{methods[method]['ssim']:.3f}"
                    row[f"{label} PSNR [dB]"] = f"{methods[method]['psnr']:.2f}"
        scores, cost = metrics.get("analysis", {}), metrics.get("cost", {})
        for name, label in (
            ("cross_entropy", "cross-entropy [nats per token]"),
            ("contrast_accuracy", "contrast accuracy"),
            ("finding_f1", "finding F1"),
        ):
            if scores.get(name) is not None:
                row[label] = f"{scores[name]:.3f}"
        for name, label in (("stage1_seconds", "stage 1 training [s]"), ("stage2_seconds", "stage 2 training [s]")):
            if name in cost:
                row[label] = f"{cost[name]:.0f}"
        rows[run] = row
    return pd.DataFrame(rows).fillna("–")


def read_histories(runs: Mapping[str, Path]) -> dict[str, dict[str, History]]:
    """Read run → stage → history, for `curves.compare_curves`."""
    histories = {run: {stage: read_history(path, stage) for stage in STAGES} for run, path in runs.items()}
    return {run: {stage: one for stage, one in entry.items() if one is not None} for run, entry in histories.items()}


def same_slice(runs: Mapping[str, Path]) -> tuple[list[Comparison], list[str]]:
    """Read one test slice of as many evaluated runs as possible, at each acceleration that they share.

    It is the middle slice of the file that most runs have reconstructed. Only runs with the same target are shown: file
    names recur in data sets of other sizes. Zero-filled images are those of the first run shown.

    Returns
    -------
    list of Comparison
    list of str
        Evaluated runs that are not shown: their test files differ or have moved.
    """
    evaluated = {run: path for run, path in runs.items() if (path / "reconstructions" / "model").is_dir()}
    files = {run: _reconstructed_files(path) for run, path in evaluated.items()}
    counts = Counter(name for pairs in files.values() for name in {name for _, name in pairs})
    if not counts:
        return [], list(evaluated)
    file = min(counts, key=lambda name: (-counts[name], name))
    groups: dict[tuple[tuple[int, ...], bytes], dict[str, Volume]] = {}  # runs with the same target
    for run, path in evaluated.items():
        if any(name == file for _, name in files[run]) and (volume := _find_volume(path, file)) is not None:
            target = reconstructions.read_target(volume, volume.slices // 2)
            groups.setdefault((target.shape, target.tobytes()), {})[run] = volume
    if not groups:
        return [], list(evaluated)
    shown = max(groups.values(), key=len)
    accelerations = set.intersection(*({acc for acc, name in files[run] if name == file} for run in shown))
    folders = {run: evaluated[run] / "reconstructions" for run in shown}
    comparisons = [_comparison(folders, next(iter(shown.values())), acc) for acc in sorted(accelerations, key=float)]
    return comparisons, [run for run in evaluated if run not in shown or not comparisons]


def _comparison(folders: Mapping[str, Path], volume: Volume, acceleration: str) -> Comparison:
    """Read the middle slice of a volume from the reconstructions of several runs."""
    slice_num = volume.slices // 2
    first, images = next(iter(folders.values())), {}
    if (first / "zero_filled" / acceleration / volume.path.name).is_file():
        images["zero_filled"] = reconstructions.read_slice(first, "zero_filled", acceleration, volume, slice_num)
    for run, folder in folders.items():
        images[run] = reconstructions.read_slice(folder, "model", acceleration, volume, slice_num)
    title = f"{volume.acquisition}\nslice {slice_num}, {acceleration}x"
    target = reconstructions.read_target(volume, slice_num)
    return Comparison(target, images, volume.maximum, title=title, pixel=volume.pixel)


def _reconstructed_files(run: Path) -> set[tuple[str, str]]:
    """List (acceleration, file) of the model's reconstructions."""
    return {(path.parent.name, path.name) for path in (run / "reconstructions" / "model").glob("*/*.h5")}


def _find_volume(run: Path, file: str) -> Volume | None:
    """Find the test file of a run; None if it has moved."""
    config = read_record(run)["notebooks"]["evaluate"]["config"]
    for folder in (resolve(config[name]) for name in ("test_dir", "data_dir") if config[name]):
        if (folder / file).is_file():
            return read_volume(folder / file)
    return None
