"""Sweeps: a params folder with some parameters varied, one run folder for each combination, then the comparison."""

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mrilib.config import NOTEBOOKS, ROOT, ParameterError, display_path, parse_yaml, read_yaml, resolve
from mrilib.errors import shortened
from mrilib.model.decoders import uses_tokens
from mrilib.runs.record import read_record

MRILIB = (sys.executable, "-m", "mrilib")
MAX_RUNS = 1000
LATER = (
    "data_dir",
    "stage1_checkpoint",
    "constant_prefix_checkpoint",
    "stage2_checkpoint",
    "no_token_decoder_checkpoint",
)


class Variant(NamedTuple):
    """One run of a sweep."""

    name: str  # of the run folder
    parameters: dict[str, Any]  # "stage1.learning_rate" → value
    notebooks: tuple[str, ...] = ()  # that it runs


def parse_grid(given: Sequence[str]) -> dict[str, list[Any]]:
    """``-p stage1.learning_rate=1e-4,3e-4`` → {"stage1.learning_rate": ["1e-4", "3e-4"]}.

    The values are the items of a YAML list without its brackets; lists among them keep theirs: ``[4],[4, 8]``.

    Raises
    ------
    ParameterError
        Anything else than NOTEBOOK.NAME=VALUE,VALUE, an unknown notebook or parameter, one that is given twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in given:
        name, equals, values = text.partition("=")
        notebook, dot, parameter = name.partition(".")
        if not (equals and dot and notebook in NOTEBOOKS):
            raise ParameterError(
                f"-p {shortened(text)}: NOTEBOOK.NAME=VALUE,VALUE is wanted, NOTEBOOK one of {', '.join(NOTEBOOKS)}"
            )
        if name in grid:
            raise ParameterError(f"-p {shortened(text)}: {name} is given twice; separate its values by commas")
        if parameter not in NOTEBOOKS[notebook][1].model_fields:
            NOTEBOOKS[notebook][1].create({parameter: None})  # tells the nearest known name
        grid[name] = parse_yaml(f"[{values}\n]", f"-p {text}")
        if not grid[name]:
            raise ParameterError(f"-p {shortened(text)}: no value is given")
    return grid


def methods_of(folder: Path, given: str | None) -> dict[str, dict[str, Any]]:
    """Method → what its file in ``methods/`` changes in the folder's stage2.yaml, of the methods that are asked for.

    Raises
    ------
    ParameterError
        A method without a file.
    """
    files = {path.stem: path for path in sorted((folder / "methods").glob("*.yaml"))}
    names = list(files) if given == "all" else (given or "").split(",") if given else []
    for name in names:
        if name not in files:
            raise ParameterError(
                f"--methods: '{display_path(folder / 'methods' / name)}.yaml' does not exist; there are: "
                f"{', '.join(files) or 'none'}"
            )
    return {name: {f"stage2.{key}": value for key, value in read_yaml(files[name]).items()} for name in names}


def parse_seeds(given: str | None) -> list[int]:
    """``0,1`` → [0, 1]."""
    try:
        return [int(one) for one in given.split(",")] if given else []
    except ValueError:
        raise ParameterError(f"--seeds {given}: whole numbers are wanted, separated by commas: 0,1") from None


def variants(
    base: str,
    grid: dict[str, list[Any]],
    methods: Mapping[str, dict[str, Any]] | None = None,
    seeds: Sequence[int] = (),
) -> list[Variant]:
    """All combinations, named after what varies: ``demo-stage1.learning_rate-1e-4``, ``comparison-varnet-seed-0``.

    Parameters
    ----------
    base : str
    grid : dict
        "stage1.learning_rate" → values.
    methods : mapping, optional
        Method → the stage-2 parameters that it changes.
    seeds : sequence of int
        Each is the seed of both stages.

    Raises
    ------
    ParameterError
        If nothing varies, or two values would give folders of one name.
    """
    varying = [name for name, values in grid.items() if len(values) > 1]
    if not varying and not methods and not seeds:
        raise ParameterError(
            "nothing to sweep: give a parameter several values, -p stage1.epochs=3,6, or --methods, --seeds"
        )
    count = math.prod(map(len, grid.values())) * max(1, len(methods or {})) * max(1, len(seeds))
    if count > MAX_RUNS:
        what = [*varying, *(["--methods"] if methods else []), *(["--seeds"] if seeds else [])]
        raise ParameterError(f"the values of {', '.join(what)} make {count} runs; at most {MAX_RUNS} are allowed")
    for name, given in grid.items():
        if len({_number_or_text(value) for value in given}) < len(given):
            raise ParameterError(f"{name}: a value is given twice; leave one of them out")
    found = []
    chosen_seeds: list[int | None] = [*seeds] or [None]
    for method, seed, values in itertools.product(methods or [""], chosen_seeds, itertools.product(*grid.values())):
        chosen = dict(zip(grid, values, strict=True))
        parts = [base, *([method] if method else []), *(f"{name}-{_word(chosen[name])}" for name in varying)]
        parameters = {**methods[method], **chosen} if methods else chosen
        if seed is not None:
            parts.append(f"seed-{seed}")
            parameters = {**parameters, "stage1.seed": seed, "stage2.seed": seed}
        found.append(Variant("-".join(parts), parameters))
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise ParameterError(f"two of the values give one folder name: {', '.join(names)}")
    return found


def _number_or_text(value: Any) -> float | str:
    """A value such that 1e-3 and 0.001 are equal."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return repr(value)


def _word(value: Any) -> str:
    """A value as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", str(value)).strip("_")[-40:] or "empty"


def _used(folder: Path, variant: Variant, there: Sequence[str]) -> Variant:
    """A variant with its notebooks: without stage 1 and its parameters where the decoder uses no tokens."""
    given = {n.partition(".")[2]: v for n, v in variant.parameters.items() if n.startswith("stage2.")}
    if "stage1" not in there:
        kept = {name: value for name, value in variant.parameters.items() if name != "stage1.seed"}
        variant = variant._replace(parameters=kept)
    if "stage2" not in there or uses_tokens({**read_yaml(folder / "stage2.yaml"), **given}):
        return variant._replace(notebooks=tuple(there))
    parameters = {name: value for name, value in variant.parameters.items() if not name.startswith("stage1.")}
    return Variant(variant.name, parameters, tuple(name for name in there if name != "stage1"))


def check(folder: Path, planned: Sequence[Variant]) -> None:
    """Refuse what a run would refuse, before the first of them starts.

    Raises
    ------
    ParameterError
        Names the variant and the parameter.
    """
    for one in planned:
        unused = {name.partition(".")[0] for name in one.parameters} - set(one.notebooks)
        if unused:
            raise ParameterError(f"'{folder}' holds no {' and no '.join(sorted(unused))}.yaml that this sweep runs")
        for notebook in one.notebooks:
            given = {n.partition(".")[2]: v for n, v in one.parameters.items() if n.partition(".")[0] == notebook}
            try:
                NOTEBOOKS[notebook][1].create({**read_yaml(folder / f"{notebook}.yaml"), **given}, written_later=LATER)
            except ParameterError as error:
                raise ParameterError(f"{one.name}: {notebook}: {error}") from None


def sweep(options: argparse.Namespace) -> int:
    """Run every variant, a failed one not stopping the others, then 05_compare_runs over those that are done.

    Returns
    -------
    int
        0 if all of them are done, else 1.
    """
    folder: Path = options.params
    if not folder.is_dir():
        raise ParameterError(f"the params folder '{folder}' does not exist")
    if options.name is not None and not options.name.strip():
        raise ParameterError("--name is empty; give the beginning of the run folders' names, or leave it out")
    base = options.name or folder.resolve().name
    only = ["stage1"] if options.stage1_only else ["stage2"] if options.stage2_only else None
    steps = only or ["explore", "stage1", "stage2", "evaluate", "compare"]
    files = [name for name in steps if os.path.lexists(folder / f"{name}.yaml")]
    methods, seeds = methods_of(folder, options.methods), parse_seeds(options.seeds)
    planned = [_used(folder, one, files) for one in variants(base, parse_grid(options.parameter), methods, seeds)]
    check(folder, planned)
    own = {one.name: resolve("outputs") / one.name for one in planned}
    comparison = resolve("outputs") / f"{base}-sweep"
    if not options.overwrite:
        unfinished = [name for name, path in own.items() if path.exists() and _status(path) != "done"]
        if unfinished and not options.resume:
            told = "--resume goes on with them, --overwrite runs all anew"
            raise ParameterError(f"not finished: {', '.join(unfinished)}; {told}")
        for one in planned:
            if own[one.name].exists():
                _check_same(own[one.name], folder, one)

    states: dict[str, str] = {}
    for number, one in enumerate(planned, 1):
        print(f"══ {number} of {len(planned)}: {one.name}", flush=True)
        there = own[one.name].exists() and not options.overwrite
        if there and _status(own[one.name]) == "done":
            print("   done before", flush=True)
            states[one.name] = "done"
            continue
        command = [
            "run",
            str(folder),
            "--name",
            one.name,
            *(["--overwrite"] if options.overwrite else ["--resume"] * there),
        ]
        command += ["--stage1-only"] if options.stage1_only else []
        command += ["--stage2-only", "-c", str(options.checkpoint)] if options.stage2_only else []
        for name, value in one.parameters.items():
            command += ["-p", f"{name}={_flow(value)}"]
        states[one.name] = "done" if _mrilib(command) == 0 else "failed"
    for name, state in states.items():
        print(f"{state:7} {display_path(own[name])}")
    done = [own[name] for name, state in states.items() if state == "done"]
    failed = len(done) < len(planned)
    if not done:
        print("error: every run of the sweep has failed; there is nothing to compare", file=sys.stderr)
        return 1
    recorded = [
        path for path in own.values() if (path / "run.json").is_file()
    ]  # failed ones are named among the others
    return 1 if _compare(folder, comparison, recorded) or failed else 0


def _status(path: Path) -> str:
    return str(read_record(path)["status"]) if (path / "run.json").is_file() else "no run"


def _check_same(path: Path, folder: Path, one: Variant) -> None:
    """Take a run that is there, or go on with it, only if it has the notebooks and parameters asked for now."""
    if not (path / "run.json").is_file():
        raise ParameterError(f"'{display_path(path)}' is no run folder; choose another --name, or --overwrite")
    record = read_record(path)
    made = record["notebooks"]
    if set(record["planned"]) != set(one.notebooks):
        told = f"consists of {', '.join(record['planned'])}, not of {', '.join(one.notebooks)}"
        raise ParameterError(f"'{display_path(path)}' {told}; choose another --name, or --overwrite")
    for notebook, section in made.items():
        given = {n.partition(".")[2]: v for n, v in one.parameters.items() if n.partition(".")[0] == notebook}
        values = {**read_yaml(folder / f"{notebook}.yaml"), **given}
        wanted = NOTEBOOKS[notebook][1].create(values, written_later=LATER).to_dict()
        for name, value in wanted.items():
            if name in (*LATER, "output_dir", "interactive", "runs", "resume"):
                continue
            made_with = section["config"].get(name)
            if made_with != value:
                raise ParameterError(
                    f"'{display_path(path)}' was made with {notebook}.{name} {made_with!r}, not "
                    f"{value!r}; choose another --name, or --overwrite"
                )


def _flow(value: Any) -> str:
    """A value as YAML on one line, for a -p of `run`."""
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()


class Stopped(Exception):
    """The sweep was told to stop; the run that was under way has been told and has ended."""


def _mrilib(command: Sequence[str]) -> int:
    """Run a command of mrilib in a process of its own, and hand signals on to it; its exit status.

    It has a session of its own, so that a Ctrl-C reaches it once, and it may take its time to save what it has.
    """
    process = subprocess.Popen([*MRILIB, *command], cwd=ROOT, start_new_session=True)
    told: list[int] = []

    def forward(number: int, _: Any) -> None:
        told.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        raise Stopped(signal.Signals(told[0]).name)
    return status


def _compare(folder: Path, directory: Path, recorded: Sequence[Path]) -> int:
    """05_compare_runs over the runs, in a run folder of its own; it is made anew each time."""
    print(f"══ comparison → {display_path(directory)}", flush=True)
    if directory.exists():
        if _status(directory) == "no run" or set(read_record(directory)["planned"]) != {"compare"}:
            raise ParameterError(f"'{display_path(directory)}' exists and is no comparison; choose another --name")
        shutil.rmtree(directory)
    with tempfile.TemporaryDirectory() as temporary:
        given = folder / "compare.yaml"
        path = Path(temporary) / "compare.yaml"
        path.write_text(given.read_text() if given.is_file() else "interactive: false\n")
        runs = _flow([display_path(run) for run in recorded])
        return _mrilib(["run", temporary, "--name", str(directory), "-p", f"compare.runs={runs}"])
