"""Run records side by side: which runs, what differs, their histories, one slice from each."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mrilib.config import NOTEBOOKS, CompareParameters, ParameterError, display_path, resolve
from mrilib.data.fastmri_file import Volume, read_volume
from mrilib.evaluation import reconstructions
from mrilib.evaluation.reconstructions import Comparison
from mrilib.files import read_json
from mrilib.metrics.methods import method_label
from mrilib.runs.record import all_runs, read_record
from mrilib.training.history import History, read_history

STAGES = {
    "stage1": "stage1",
    "constant_prefix": "stage1",
    "stage2": "stage2",
    "no_token_decoder": "stage2",
}  # history → its notebook
UNTOLD = ("output_dir", "interactive")  # parameters that are no part of an experiment


def select_runs(config: CompareParameters, own: Path) -> dict[str, Path]:
    """The runs to compare, by name: those of ``config.runs``, else every finished one under outputs/.

    Parameters
    ----------
    config : CompareParameters
    own : Path
        The folder that the comparison itself is recorded in. It counts as finished if it has metrics: comparing is its
        last step.

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
        paths = [path for path in all_runs() if _finished(path) or (path == own and (own / "metrics.json").is_file())]
        if own not in paths and (own / "metrics.json").is_file():
            paths.append(own)
    if not paths:
        raise ParameterError("runs: no finished run under outputs/; make one first: python -m mrilib run params/demo")
    names = [path.name for path in paths]
    return {path.name if names.count(path.name) == 1 else display_path(path): path for path in paths}


def _finished(path: Path) -> bool:
    record = read_record(path)
    return record["status"] == "done" and not {"stage1", "stage2", "evaluate"}.isdisjoint(record["notebooks"])


def states(runs: Mapping[str, Path]) -> dict[str, str]:
    """What became of each run: "done", or what failed and why, or what is missing."""
    told = {}
    for run, path in runs.items():
        record = read_record(path)
        failed = [(name, one) for name, one in record["notebooks"].items() if one.get("status") == "failed"]
        missing = [name for name in record["planned"] if record["notebooks"].get(name, {}).get("status") != "done"]
        if failed:
            name, one = failed[-1]
            error = str(one.get("error") or "no error is recorded").splitlines()[0]
            told[run] = f"failed in {NOTEBOOKS[name][0]}: {error}"
        elif not missing or missing == ["compare"]:  # comparing is a run's last step
            told[run] = "done"
        else:
            told[run] = f"{record['status']}, without {', '.join(NOTEBOOKS[name][0] for name in missing)}"
    return told


def differing_parameters(runs: Mapping[str, Path]) -> pd.DataFrame:
    """Parameters that are not the same in all runs: one row a parameter (notebook.name), one column a run.

    A notebook that some runs have not executed is a row of its own, and its parameters are compared among the others.
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
    """Notebook → parameter → value of a run; without the notebooks that decide nothing of its numbers."""
    entries = read_record(run)["notebooks"]
    return {
        notebook: {name: _relative(value, run) for name, value in entry.get("config", {}).items() if name not in UNTOLD}
        for notebook, entry in entries.items()
        if notebook not in ("explore", "compare", "pretrain")
    }


def _relative(value: Any, run: Path) -> str:
    """A parameter as text; a path into the run's own folder without the folder, which differs by name alone."""
    inside = isinstance(value, str) and value and resolve(value).is_relative_to(run)
    return f"<run>/{resolve(value).relative_to(run).as_posix()}" if inside else str(value)


def metrics_table(runs: Mapping[str, Path]) -> pd.DataFrame:
    """Headline metrics of each run; "–" where a run was not evaluated."""
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
        for name, label, form in (
            ("cross_entropy", "cross-entropy [nats per token]", "{:.3f}"),
            ("contrast_accuracy", "contrast named rightly", "{:.3f}"),
            ("finding_f1", "finding F1", "{:.3f}"),
        ):
            if scores.get(name) is not None:
                row[label] = form.format(scores[name])
        for stage in ("stage1", "stage2"):
            if f"{stage}_seconds" in cost:
                row[f"{stage} [s]"] = f"{cost[f'{stage}_seconds']:.0f}"
        rows[run] = row
    return pd.DataFrame(rows).fillna("–")


def read_histories(runs: Mapping[str, Path]) -> dict[str, dict[str, History]]:
    """Run → stage → history, for `charts.compare_curves`."""
    found = {run: {name: read_history(path, name) for name in STAGES} for run, path in runs.items()}
    return {run: {name: one for name, one in entry.items() if one is not None} for run, entry in found.items()}


def reconstructed_runs(runs: Mapping[str, Path]) -> dict[str, Path]:
    """Those of the runs that have reconstructions."""
    return {run: path for run, path in runs.items() if (path / "reconstructions" / "model").is_dir()}


def same_slice(runs: Mapping[str, Path]) -> tuple[list[Comparison], list[str]]:
    """One test slice that as many evaluated runs as possible have reconstructed, at each acceleration that they share.

    It is the middle slice of the first file that most of them have. Files are the same if their target is: names recur
    in data sets of other sizes. Zero-filled images are those of the first run shown.

    Returns
    -------
    list of Comparison
    list of str
        The evaluated runs that are not shown: their test files are others, or no longer where they were.
    """
    evaluated = reconstructed_runs(runs)
    made = {run: _reconstructed(path) for run, path in evaluated.items()}
    counts = Counter(name for pairs in made.values() for name in {name for _, name in pairs})
    if not counts:
        return [], list(evaluated)
    file = min(counts, key=lambda name: (-counts[name], name))
    groups: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
    for run, path in evaluated.items():
        if not any(name == file for _, name in made[run]) or (volume := _find_volume(path, file)) is None:
            continue
        target = reconstructions.read_target(volume, volume.slices // 2)
        groups.setdefault((target.shape, target.tobytes()), []).append(run)
    if not groups:
        return [], list(evaluated)
    shown = max(groups.values(), key=len)
    first = evaluated[shown[0]]
    volume = _find_volume(first, file)
    assert volume is not None
    slice_num = volume.slices // 2
    target = reconstructions.read_target(volume, slice_num)
    comparisons = []
    shared = set.intersection(*({acceleration for acceleration, name in made[run] if name == file} for run in shown))
    for acceleration in sorted(shared, key=float):
        images = {}
        if (first / "reconstructions" / "zero_filled" / acceleration / file).is_file():
            images["zero_filled"] = _slice(first, "zero_filled", acceleration, volume, slice_num)
        images |= {run: _slice(evaluated[run], "model", acceleration, volume, slice_num) for run in shown}
        title = f"{volume.acquisition}\nslice {slice_num}, {acceleration}x"
        comparisons.append(Comparison(target, images, volume.maximum, title=title, pixel=volume.pixel))
    return comparisons, [run for run in evaluated if run not in shown or not comparisons]


def _reconstructed(run: Path) -> set[tuple[str, str]]:
    return {(path.parent.name, path.name) for path in (run / "reconstructions" / "model").glob("*/*.h5")}


def _slice(run: Path, method: str, acceleration: str, volume: Volume, slice_num: int) -> Any:
    return reconstructions.read_slice(run / "reconstructions", method, acceleration, volume, slice_num)


def _find_volume(run: Path, file: str) -> Volume | None:
    """The test file as the run had it; None where it is not any more."""
    config = read_record(run)["notebooks"]["evaluate"]["config"]
    for folder in (resolve(config[name]) for name in ("test_dir", "data_dir") if config[name]):
        if (folder / file).is_file():
            return read_volume(folder / file)
    return None
