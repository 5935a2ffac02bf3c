"""The bench's tables and figures, from the files that its parts have left; what is not there yet is left out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mrilib import bart, charts, figures
from mrilib.bench import METHODS as bench_methods
from mrilib.bench import SCORES, Bench, shift_name
from mrilib.data import Volume
from mrilib.evaluation import METRICS, VolumeScore, evaluate_volumes, pick_slices
from mrilib.inference import comparisons
from mrilib.lesions import Lesion, lesion_table, lesions_of
from mrilib.runs import read_json, write_json
from mrilib.style import METHODS, WIDTH, RecordFigure, method_label, styled

Scores = dict[str, dict[str, dict[int, list[VolumeScore]]]]  # acceleration → method → seed → volumes


def _whole(folder: Path, volumes: Sequence[Volume]) -> bool:
    return all((folder / volume.path.name).exists() for volume in volumes)


def _ordered(names: Sequence[str]) -> list[str]:
    return [name for name in METHODS if name in names] + [name for name in names if name not in METHODS]


def scores_of(bench: Bench, volumes: Sequence[Volume], below: str) -> Scores:
    """Scores of everything whole in ``seedN/<below>/<method>/<acceleration>``.

    They are kept beside the images, in ``scores.json``: what has been scored is known without them.
    """
    scores: Scores = {}
    for seed in bench.config.bench_seeds:
        for folder in sorted((bench.directory / f"seed{seed}" / below).glob("*/*")):
            path = folder / SCORES
            if not path.exists() and _whole(folder, volumes):
                rows = [score._asdict() for score in evaluate_volumes(volumes, folder)]
                write_json(path, {"volumes": rows})
            if path.exists():
                methods = scores.setdefault(folder.name, {})
                kept = [VolumeScore(**row) for row in read_json(path)["volumes"]]
                methods.setdefault(folder.parent.name, {})[seed] = kept
    return scores


def seed_means(seeds: Mapping[int, Sequence[VolumeScore]], metric: str) -> list[float]:
    """A metric's mean over the volumes, one for each seed."""
    return [float(np.mean([getattr(score, metric) for score in scores])) for scores in seeds.values()]


def _with_spread(given: Sequence[float | None], form: str) -> str:
    values = [value for value in given if value is not None]
    if not values:
        return "–"
    told = form.format(np.mean(values))
    return told if len(values) < 2 else f"{told} ± {form.format((max(values) - min(values)) / 2)}"


def score_table(bench: Bench, scores: Scores) -> pd.DataFrame:
    """Every method at every acceleration: mean over the seeds ± half their range; PSNR in [dB].

    Where BART is not installed its row says so.
    """
    rows = []
    for acceleration, methods in scores.items():
        for method in _ordered(list(methods)):
            seeds = methods[method]
            row: dict[str, Any] = {"acceleration": f"{acceleration}x", "method": method_label(method)}
            for metric, label, form in (
                ("ssim", "SSIM", "{:.3f}"),
                ("psnr", "PSNR [dB]", "{:.2f}"),
                ("ssim_head", "SSIM in head", "{:.3f}"),
                ("psnr_head", "PSNR in head [dB]", "{:.2f}"),
            ):
                row[label] = _with_spread(seed_means(seeds, metric), form)
            cost = _cost(bench, method)
            row["steps"] = cost["steps"] if cost else "–"
            row["trained [s]"] = f"{cost['seconds']:.0f}" if cost else "–"
            row["parameters"] = f"{cost['parameters']:,}" if cost else "–"
            row["seeds"] = len(seeds)
            rows.append(row)
        if "bart" not in methods and not bart.version():
            rows.append({"acceleration": f"{acceleration}x", "method": f"{method_label('bart')}: {bart.MISSING}"})
    return pd.DataFrame(rows).fillna("–")


def _cost(bench: Bench, method: str) -> dict[str, Any] | None:
    """Steps, mean seconds over the seeds, parameters; the model without its tokens at test cost what the model did."""
    name = "model" if method in ("no_tokens", "other_patient_tokens") else method
    done = [bench.directory / f"seed{seed}" / name / "done.json" for seed in bench.config.bench_seeds]
    found = [read_json(path) for path in done if path.exists()]
    return {**found[0], "seconds": np.mean([one["seconds"] for one in found])} if found else None


def cost_table(bench: Bench) -> pd.DataFrame:
    """What trainings cost: steps times a step's median seconds over the rounds, whose range is told.

    And with stage 1, for a method that reads its tokens or its image; and all of them for all seeds, trained or still
    to be, where `seeds_at_once` take the time of one.
    """
    path = bench.directory / "costs" / "done.json"
    if not path.exists():
        return pd.DataFrame()
    rounds, config = bench.measure_costs(), bench.config  # or refused, where they are another comparison's
    each = {name: float(np.median(seconds)) for name, seconds in rounds.items()}
    steps = {"stage1": config.stage1_steps, "control": bench.control_steps}
    steps |= dict(zip(config.methods, config.steps, strict=True))
    for name in steps:  # as trained, which is a whole number for each validation
        done = (_cost(bench, "stage1") or {}).get("control") if name == "control" else _cost(bench, name)
        steps[name] = done["steps"] if done else steps[name]
    before = steps["stage1"] * each["stage1"]
    labels = {"stage1": "stage 1", "control": "its control without k-space"}
    rows: list[dict[str, Any]] = []
    total = 0.0
    for name in (*labels, *_ordered(config.methods)):
        count = steps[name]
        own = count * each[name]
        total += own
        both = own + before if name in bench_methods and bench.reads_encoder(name) else own
        rows.append(
            {
                "training": labels.get(name) or method_label(name),
                "steps": str(count),
                "a step [s]": f"{each[name]:.3f}",
                "from, to [s]": f"{min(rounds[name]):.3f}, {max(rounds[name]):.3f}",
                "all steps [s]": f"{own:.0f}",
                "with what it needs before [s]": f"{both:.0f}",
            }
        )
    seeds, at_once = len(config.bench_seeds), min(config.seeds_at_once, len(config.bench_seeds))
    told = f"all, {seeds} seed{'s'[: seeds > 1]}" + (f", {at_once} at once" if at_once > 1 else "")
    last = dict.fromkeys(rows[0], "")
    last |= {"training": told, "all steps [s]": f"{-(-seeds // at_once) * total:.0f}"}
    return pd.DataFrame([*rows, last])


def differences(scores: Scores, own: str = "model") -> pd.DataFrame:
    """Own method minus each other one inside the head, seed by seed: mean, and the least over the seeds."""
    rows = []
    for acceleration, methods in scores.items():
        for method in _ordered([name for name in methods if name != own]):
            row: dict[str, Any] = {
                "acceleration": f"{acceleration}x",
                f"{method_label(own)} minus": method_label(method),
            }
            for metric, label, form in (
                ("ssim_head", "SSIM in head", "{:+.4f}"),
                ("psnr_head", "PSNR in head", "{:+.2f}"),
            ):
                mine, others = (seed_means(methods[name], metric) for name in (own, method))
                change = [a - b for a in mine for b in others]  # every pair of seeds
                row[f"{label}, mean"] = form.format(np.mean(change))
                row[f"{label}, least"] = form.format(min(change))
            rows.append(row)
    return pd.DataFrame(rows)


def shift_table(bench: Bench, home: Scores) -> pd.DataFrame:
    """SSIM and PSNR [dB] inside the head away from home, and their fall from home (both accelerations' mean).

    Of another acceleration the home is the mean of the trained ones. Both are of the seeds that were away. Where the
    patients are others too ("patients", "folder", "head nibabel"), other images are compared, easier or harder ones.
    """
    rows = []
    for shift in bench.config.shifts:
        volumes = bench.shifted(shift)[0]
        away = scores_of(bench, volumes, f"shifts/{shift_name(shift)}")
        names = {name for methods in away.values() for name in methods}
        for method in _ordered(sorted(names)):
            row: dict[str, Any] = {"condition": shift, "method": method_label(method)}
            seeds = {seed for methods in away.values() for seed in methods.get(method, ())}  # compared with themselves
            for metric, label, form in (
                ("ssim_head", "SSIM in head", "{:.3f}"),
                ("psnr_head", "PSNR in head", "{:.2f}"),
            ):
                there, here = (
                    [
                        np.mean(seed_means({seed: methods[method][seed] for seed in seeds}, metric))
                        for methods in of.values()
                        if seeds <= set(methods.get(method, ()))
                    ]
                    for of in (away, home)
                )
                row[label] = form.format(np.mean(there))
                row[f"{label}, fall"] = form.format(np.mean(here) - np.mean(there)) if here else "–"
            rows.append(row)
    return pd.DataFrame(rows)


def lesions(bench: Bench, seed: int) -> tuple[pd.DataFrame, str]:
    """Lesion contrast and lesions lost of one seed, and a sentence on what was left out."""
    found: dict[str, dict[str, list[Lesion]]] = {}
    left_out = 0
    if bench.annotations is None:
        return pd.DataFrame(), "No annotations: no lesion is known."
    for folder in sorted((bench.directory / f"seed{seed}" / "reconstructions").glob("*/*")):
        path = folder / "lesions.json"
        if not path.exists() and _whole(folder, bench.volumes["test"]):
            measured, left = lesions_of(bench.volumes["test"], bench.annotations, folder)
            write_json(path, {"left_out": left, "lesions": [lesion._asdict() for lesion in measured]})
        if path.exists():
            kept = read_json(path)
            one, left_out = [Lesion(**row) for row in kept["lesions"]], kept["left_out"]
            found.setdefault(folder.name, {})[folder.parent.name] = one
    ordered = {acceleration: {name: of[name] for name in _ordered(list(of))} for acceleration, of in found.items()}
    told = f"Left out of every method: {left_out} boxes whose lesion the target itself hardly shows."
    return lesion_table(ordered), told


@styled
def quality_curves(bench: Bench) -> Figure:
    """Validation SSIM and PSNR of the learned methods against optimizer steps; thin lines are single seeds."""
    figure = RecordFigure(WIDTH, 3.6)
    axes = figure.subplots(1, 2)
    for number, name in enumerate(_ordered(bench.config.methods)):
        paths = [bench.directory / f"seed{seed}" / name / "done.json" for seed in bench.config.bench_seeds]
        done = [read_json(path)["validation"] for path in paths if path.exists()]
        if not done:
            continue
        color = METHODS[name][1]
        for axis, metric in zip(axes, ("val_ssim", "val_psnr"), strict=True):
            steps = [point["step"] for point in done[0]]
            values = np.array([[point[metric] for point in points] for points in done])
            for single in values if len(values) > 1 else []:
                axis.plot(steps, single, color=color, linewidth=0.6, alpha=0.6)
            # methods of one family share a colour
            style: Any = {"marker": charts.MARKERS[number % 6], "linestyle": charts.DASHES[number % 3]}
            axis.plot(steps, values.mean(0), color=color, markersize=4, label=method_label(name), **style)
    for axis, label in zip(axes, ("SSIM of validation volumes", "PSNR of validation volumes [dB]"), strict=True):
        axis.set_xlabel("optimizer steps")
        axis.set_ylabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    charts._legend_below(figure, list(axes), columns=3)
    return figure


def pictures(bench: Bench, scores: Scores, seed: int, per_figure: int = 6) -> dict[str, Figure]:
    """Median and worst volume of the model at each acceleration, every method on one window, errors below.

    Returns
    -------
    dict
        "median_4x_1" → Figure; so many methods a figure at most.
    """
    directory = bench.directory / f"seed{seed}" / "reconstructions"
    shown: dict[str, Figure] = {}
    for acceleration, methods in scores.items():
        if seed not in methods.get("model", {}):
            continue
        names = [
            name
            for name in _ordered(list(methods))
            if _whole(directory / name / acceleration, bench.volumes["test"])  # a kept score has no image
        ]
        if "model" not in names:
            continue
        pages = -(-len(names) // per_figure)
        columns = -(-len(names) // pages)  # alike, not a last one of two methods
        picked = pick_slices(methods["model"][seed], bench.volumes["test"], 3)
        for one in picked:
            if one.role not in ("median", "worst"):
                continue
            for number, start in enumerate(range(0, len(names), columns), 1):
                rows = comparisons(directory, acceleration, [one], names[start : start + columns])
                shown[f"{one.role}_{acceleration}x_{number}"] = figures.reconstruction_comparison(rows)
    return shown


def metrics_section(scores: Scores) -> dict[str, Any]:
    """The comparison as metrics.json holds it: acceleration → method → metric → one value a seed."""
    return {
        acceleration: {
            method: {metric: seed_means(seeds, metric) for metric in METRICS} for method, seeds in methods.items()
        }
        for acceleration, methods in scores.items()
    }


def text_table(bench: Bench) -> pd.DataFrame:
    """What stage 1 reads in the scan, at each acceleration: mean over the seeds ± half their range.

    And the F1's standard error by which patients were tested, the mean over the seeds.
    """
    paths = [bench.directory / f"seed{seed}" / "texts.json" for seed in bench.config.bench_seeds]
    done = [read_json(path) for path in paths if path.exists()]
    rows = []
    for acceleration in done[0] if done else ():
        row: dict[str, Any] = {"acceleration": acceleration if acceleration == "all" else f"{acceleration}x"}
        for name, label in (
            ("contrast_accuracy", "contrast named rightly"),
            ("finding_f1", "finding F1"),
            ("finding_f1_without_kspace", "control without k-space"),
            ("finding_f1_best_constant", "best constant answer"),
            ("cross_entropy", "cross-entropy [nats per token]"),
            ("cross_entropy_without_kspace", "of the control"),
        ):
            row[label] = _with_spread([scores[acceleration][name] for scores in done], "{:.3f}")
            errors = [scores[acceleration].get(f"{name}_se") for scores in done]
            if name == "finding_f1":
                row["its standard error (patients)"] = "–" if None in errors else f"{np.mean(errors):.3f}"
        rows.append(row)
    return pd.DataFrame(rows)
