"""Sweeps: one run for each combination of parameter values, methods and seeds, then their comparison."""

import argparse
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mrilib.config import NOTEBOOKS, ROOT, ParameterError, Parameters, display_path, read_yaml, resolve
from mrilib.model.decoders import uses_tokens
from mrilib.runs.notebooks import selected_notebooks
from mrilib.runs.overrides import format_value, parse_grid
from mrilib.runs.record import read_record

MRILIB = (sys.executable, "-m", "mrilib")
MAX_RUNS = 1000
CHECKPOINTS = ("stage1_checkpoint", "constant_prefix_checkpoint", "stage2_checkpoint", "no_token_decoder_checkpoint")
WRITTEN_LATER = ("data_dir", *CHECKPOINTS)
SET_BY_RUN = (*WRITTEN_LATER, "output_dir", "interactive", "runs", "resume")  # not compared with a finished run


class Variant(NamedTuple):
    """One run of a sweep."""

    name: str  # of the run folder
    parameters: dict[str, Any]  # "stage1.learning_rate" → value
    notebooks: tuple[str, ...] = ()  # that it executes

    def of(self, notebook: str) -> dict[str, Any]:
        """Return the parameters of one notebook: name → value."""
        prefix = f"{notebook}."
        return {key.removeprefix(prefix): value for key, value in self.parameters.items() if key.startswith(prefix)}

    def config(self, notebook: str, folder: Path) -> Parameters:
        """Return a notebook's parameters with the values of its params file in `folder`."""
        values = {**read_yaml(folder / f"{notebook}.yaml"), **self.of(notebook)}
        return NOTEBOOKS[notebook][1].create(values, written_later=WRITTEN_LATER)


def read_methods(folder: Path, names: str | None) -> dict[str, dict[str, Any]]:
    """Read params files in ``methods/``: method → the stage-2 parameters that it changes.

    `names` are separated by commas; "all" stands for every file.
    """
    files = {path.stem: path for path in sorted((folder / "methods").glob("*.yaml"))}
    chosen = list(files) if names == "all" else names.split(",") if names else []
    for name in chosen:
        if name not in files:
            raise ParameterError(
                f"--methods: '{display_path(folder / 'methods' / name)}.yaml' does not exist; there are: "
                f"{', '.join(files) or 'none'}"
            )
    return {name: {f"stage2.{key}": value for key, value in read_yaml(files[name]).items()} for name in chosen}


def parse_seeds(text: str | None) -> list[int]:
    """Parse ``0,1`` → [0, 1]."""
    try:
        return [int(seed) for seed in text.split(",")] if text else []
    except ValueError:
        raise ParameterError(f"--seeds {text}: give whole numbers separated by commas: 0,1") from None


def variants(
    base: str,
    grid: dict[str, list[Any]],
    methods: Mapping[str, dict[str, Any]] | None = None,
    seeds: Sequence[int] = (),
) -> list[Variant]:
    """Return all combinations; their names contain what varies, such as ``demo-stage1.learning_rate-1e-4``.

    Parameters
    ----------
    base : str
        First part of the names.
    grid : dict
        "stage1.learning_rate" → values.
    methods : mapping, optional
        Method → the stage-2 parameters that it changes.
    seeds : sequence of int
        Each is the seed of both stages.

    Raises
    ------
    ParameterError
        If nothing varies, or two combinations have the same name.
    """
    varying = [name for name, values in grid.items() if len(values) > 1]
    _check_grid(grid, {**{name: grid[name] for name in varying}, "--methods": methods or (), "--seeds": seeds})
    combinations = []
    all_seeds: list[int | None] = [*seeds] or [None]
    for method, seed, values in itertools.product(methods or [""], all_seeds, itertools.product(*grid.values())):
        chosen = dict(zip(grid, values, strict=True))
        parts = [base, *([method] if method else []), *(f"{name}-{_name_part(chosen[name])}" for name in varying)]
        parameters = {**methods[method], **chosen} if methods else chosen
        if seed is not None:
            parts.append(f"seed-{seed}")
            parameters = {**parameters, "stage1.seed": seed, "stage2.seed": seed}
        combinations.append(Variant("-".join(parts), parameters))
    names = [variant.name for variant in combinations]
    if len(set(names)) < len(names):
        raise ParameterError(f"two of the values give the same folder name: {', '.join(names)}")
    return combinations


def _check_grid(grid: dict[str, list[Any]], varying: Mapping[str, Collection[Any]]) -> None:
    counts = {name: len(values) for name, values in varying.items() if values}
    if not counts:
        raise ParameterError(
            "nothing to sweep: give a parameter several values, -p stage1.epochs=3,6, or --methods, --seeds"
        )
    total = math.prod(counts.values())
    if total > MAX_RUNS:
        raise ParameterError(f"the values of {', '.join(counts)} give {total} runs; at most {MAX_RUNS} are allowed")
    for name, values in grid.items():
        if len({_comparable(value) for value in values}) < len(values):
            raise ParameterError(f"{name}: a value is given twice; leave one of them out")


def _comparable(value: Any) -> float | str:
    """Convert a value so that "1e-3" and 0.001 are equal."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return repr(value)


def _name_part(value: Any) -> str:
    """Return a value as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", str(value)).strip("_")[-40:] or "empty"


def _with_notebooks(folder: Path, variant: Variant, available: Sequence[str]) -> Variant:
    """Add the notebooks to a variant; remove stage 1 and its parameters if the decoder uses no tokens."""
    if "stage1" not in available:
        parameters = {name: value for name, value in variant.parameters.items() if name != "stage1.seed"}
        variant = variant._replace(parameters=parameters)
    if "stage2" not in available or uses_tokens({**read_yaml(folder / "stage2.yaml"), **variant.of("stage2")}):
        return variant._replace(notebooks=tuple(available))
    parameters = {name: value for name, value in variant.parameters.items() if not name.startswith("stage1.")}
    return Variant(variant.name, parameters, tuple(name for name in available if name != "stage1"))


def check(folder: Path, planned: Sequence[Variant]) -> None:
    """Refuse wrong parameters of any variant before the first run starts; name the variant and the parameter."""
    for variant in planned:
        unused = {name.partition(".")[0] for name in variant.parameters} - set(variant.notebooks)
        if unused:
            raise ParameterError(f"'{folder}' has no {' and no '.join(sorted(unused))}.yaml that this sweep uses")
        for notebook in variant.notebooks:
            try:
                variant.config(notebook, folder)
            except ParameterError as error:
                raise ParameterError(f"{variant.name}: {notebook}: {error}") from None


def sweep(options: argparse.Namespace) -> int:
    """Execute every variant, then 05_compare_runs and, for methods, 06_comparison.

    A failed variant does not stop the others.

    Return 0 if all variants are done, else 1.
    """
    folder: Path = options.params
    if not folder.is_dir():
        raise ParameterError(f"the params folder '{folder}' does not exist")
    if options.name is not None and not options.name.strip():
        raise ParameterError("--name is empty; give the first part of the run folders' names, or leave --name out")
    base = options.name or folder.resolve().name
    available = [name for name in selected_notebooks(options) if os.path.lexists(folder / f"{name}.yaml")]
    methods, seeds = read_methods(folder, options.methods), parse_seeds(options.seeds)
    combinations = variants(base, parse_grid(options.parameter), methods, seeds)
    planned = [_with_notebooks(folder, variant, available) for variant in combinations]
    check(folder, planned)
    if not options.overwrite:
        _check_existing(folder, planned, options.resume)
    states: dict[Path, str] = {}
    for number, variant in enumerate(planned, 1):
        print(f"══ {number} of {len(planned)}: {variant.name}", flush=True)
        states[_directory(variant)] = _execute(variant, options)
    for directory, state in states.items():
        print(f"{state:7} {display_path(directory)}")
    if "done" not in states.values():
        print("error: every run of the sweep has failed; there is nothing to compare", file=sys.stderr)
        return 1
    # The comparison lists the failed runs as well.
    recorded = [directory for directory in states if (directory / "run.json").is_file()]
    evaluated = [run for run in recorded if "evaluate" in read_record(run)["notebooks"] and _status(run) == "done"]
    runs = {"compare": recorded, **({"comparison": evaluated} if methods and evaluated else {})}
    return 1 if _compare(folder, resolve("outputs") / f"{base}-sweep", runs) or "failed" in states.values() else 0


def _directory(variant: Variant) -> Path:
    return resolve("outputs") / variant.name


def _check_existing(folder: Path, planned: Sequence[Variant], resume: bool) -> None:
    """Refuse existing runs that are unfinished, unless they are resumed, or that have other parameters."""
    existing = [variant for variant in planned if _directory(variant).exists()]
    unfinished = [variant.name for variant in existing if _status(_directory(variant)) != "done"]
    if unfinished and not resume:
        advice = "--resume resumes them, --overwrite repeats all runs"
        raise ParameterError(f"not finished: {', '.join(unfinished)}; {advice}")
    for variant in existing:
        _check_same(folder, variant)


def _status(directory: Path) -> str:
    return str(read_record(directory)["status"]) if (directory / "run.json").is_file() else "no run"


def _check_same(folder: Path, variant: Variant) -> None:
    """Refuse an existing run with other notebooks or parameters than the variant's."""
    directory, advice = _directory(variant), "choose another --name, or --overwrite"
    if not (directory / "run.json").is_file():
        raise ParameterError(f"'{display_path(directory)}' is not a run folder; {advice}")
    record = read_record(directory)
    if set(record["planned"]) != set(variant.notebooks):
        difference = f"consists of {', '.join(record['planned'])}, not of {', '.join(variant.notebooks)}"
        raise ParameterError(f"'{display_path(directory)}' {difference}; {advice}")
    for notebook, section in record["notebooks"].items():
        for name, value in variant.config(notebook, folder).to_dict().items():
            used = section["config"].get(name)
            if name not in SET_BY_RUN and used != value:
                raise ParameterError(
                    f"'{display_path(directory)}' was run with {notebook}.{name} {used!r}, not {value!r}; {advice}"
                )


def _execute(variant: Variant, options: argparse.Namespace) -> str:
    """Execute a variant by ``mrilib run``, unless it is done; return "done" or "failed"."""
    exists = _directory(variant).exists() and not options.overwrite
    if exists and _status(_directory(variant)) == "done":
        print("   done before", flush=True)
        return "done"
    command = ["run", str(options.params), "--name", variant.name]
    command += ["--overwrite"] if options.overwrite else ["--resume"] if exists else []
    command += ["--stage1-only"] if options.stage1_only else []
    command += ["--stage2-only", "-c", str(options.checkpoint)] if options.stage2_only else []
    for name, value in variant.parameters.items():
        command += ["-p", f"{name}={format_value(value)}"]
    return "done" if _mrilib(command) == 0 else "failed"


class SweepStopped(Exception):
    """The sweep received a signal; the current run received it too and has ended."""


def _mrilib(command: Sequence[str]) -> int:
    """Run a command of mrilib in a child process, forward signals to it, and return its exit status.

    The child has its own session, so that a Ctrl-C reaches it once. It is not killed, so that it can save its state.
    """
    process = subprocess.Popen([*MRILIB, *command], cwd=ROOT, start_new_session=True)
    received: list[int] = []

    def forward(number: int, _: Any) -> None:
        received.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise SweepStopped(signal.Signals(received[0]).name)
    return status


def _compare(folder: Path, directory: Path, runs: Mapping[str, Sequence[Path]]) -> int:
    """Execute notebooks that compare runs in their own run folder, replacing an earlier comparison.

    `runs` maps "compare" and "comparison" to the runs that the notebook compares.
    """
    print(f"══ comparison → {display_path(directory)}", flush=True)
    if directory.exists():
        if _status(directory) == "no run" or not set(read_record(directory)["planned"]) <= {"compare", "comparison"}:
            raise ParameterError(f"'{display_path(directory)}' exists and is no comparison; choose another --name")
        shutil.rmtree(directory)
    with tempfile.TemporaryDirectory() as temporary:
        command = ["run", temporary, "--name", str(directory)]
        for notebook, compared in runs.items():
            params = folder / f"{notebook}.yaml"
            text = params.read_text() if params.is_file() else "interactive: false\n"
            (Path(temporary) / params.name).write_text(text)
            command += ["-p", f"{notebook}.runs={format_value([display_path(run) for run in compared])}"]
        return _mrilib(command)
