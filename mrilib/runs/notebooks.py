"""Runs: the notebooks of a params folder, executed by papermill one after the other into one run folder."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mrilib.config import (
    NOTEBOOKS,
    ROOT,
    DataParameters,
    ExploreParameters,
    ParameterError,
    Parameters,
    Stage2Parameters,
    TrainingParameters,
    display_path,
    read_yaml,
    resolve,
)
from mrilib.errors import STOPPED
from mrilib.files import write_text
from mrilib.model.decoders import uses_tokens
from mrilib.phantom import dataset
from mrilib.physics.masks import find_mask
from mrilib.processes import child_process_options, end_process, lock_run, stop_on_signals
from mrilib.runs.overrides import Overrides, merge_overrides, parse_overrides, read_overrides
from mrilib.runs.record import REFUSALS, Run, read_record
from mrilib.training.resume import check_folder

PIPELINE = tuple(NOTEBOOKS)  # a params folder has files for some of them
Values = dict[str, dict[str, Any]]  # notebook → all its parameters
# Checkpoints that a notebook reads from its own run: parameter → path in the run folder
OWN_CHECKPOINTS = {
    "stage2": {"stage1_checkpoint": "stage1_checkpoints/stage1_best_model.pt"},
    "evaluate": {
        "stage1_checkpoint": "stage1_checkpoints/stage1_best_model.pt",
        "constant_prefix_checkpoint": "stage1_checkpoints/constant_prefix_best_model.pt",
        "stage2_checkpoint": "stage2_checkpoints/stage2_best_model.pt",
        "no_token_decoder_checkpoint": "stage2_checkpoints/no_token_decoder_best_model.pt",
    },
}
WITHOUT_TOKENS: Values = {  # parameters of a run with a decoder that uses no tokens
    "stage2": {"stage1_checkpoint": "", "train_control": False},
    "evaluate": {"stage1_checkpoint": "", "constant_prefix_checkpoint": "", "no_token_decoder_checkpoint": ""},
}


@dataclass(frozen=True)
class Plan:
    """Notebooks of a run, their parameters, and the run folder."""

    directory: Path  # run folder
    params: Path  # folder of the params files; when resuming, the copy in the run folder
    notebooks: tuple[str, ...]
    given: Overrides  # from this command line
    overrides: Overrides  # the given ones and, when resuming, the stored ones
    is_resumed: bool


def make_plan(options: argparse.Namespace) -> Plan:
    """Return the plan of ``run`` for its command-line options; raise a ParameterError for contradictory ones."""
    _check_options(options)
    folder: Path = options.params
    directory = resolve("outputs") / (options.name or folder.resolve().name)
    is_resumed = options.resume and (directory / "run.json").exists()
    if options.resume and not is_resumed:
        print(f"'{display_path(directory)}' does not exist yet; the run starts from the beginning", flush=True)
    notebooks = selected_notebooks(options)
    given = parse_overrides(options.parameter, notebooks)
    if is_resumed:
        lock_run(directory)
        planned = tuple(read_record(directory)["planned"])
        stored = directory / "params" / "overrides.yaml"
        overrides = merge_overrides(read_overrides(stored) if stored.is_file() else {}, given)
        return Plan(directory, directory / "params", planned, given, overrides, True)
    notebooks = tuple(name for name in notebooks if os.path.lexists(folder / f"{name}.yaml"))
    if not notebooks:
        raise ParameterError(f"'{folder}' contains no params file of a notebook ({', '.join(PIPELINE)})")
    if "stage2" in notebooks and not _uses_tokens(folder, given):  # nothing would read the tokens of stage 1
        notebooks = tuple(name for name in notebooks if name != "stage1")
    overrides = given
    if options.checkpoint is not None:
        checkpoint = {"stage2": {"stage1_checkpoint": str(options.checkpoint.resolve())}}
        overrides = merge_overrides(checkpoint, given)
    return Plan(directory, folder, notebooks, given, overrides, False)


def selected_notebooks(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the notebooks that --stage1-only and --stage2-only select."""
    return ("stage1",) if options.stage1_only else ("stage2",) if options.stage2_only else PIPELINE


def _check_options(options: argparse.Namespace) -> None:
    folder: Path = options.params
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ParameterError(f"the params folder '{folder}' {reason}; give a folder such as params/demo")
    if options.stage2_only and options.checkpoint is None and not options.resume:
        raise ParameterError("--stage2-only needs -c CHECKPOINT")
    if options.checkpoint is not None and not options.stage2_only:
        raise ParameterError("-c CHECKPOINT needs --stage2-only")
    name = options.name
    if name is not None and not name.strip():
        raise ParameterError("--name is empty; give the run folder's name, or leave --name out")
    if name and not Path(name).is_absolute() and (Path(name).name != name or name == ".."):
        raise ParameterError(f"--name {name}: give the name of a folder in outputs/, or an absolute path")


def _uses_tokens(params: Path, overrides: Overrides) -> bool:
    """Return whether the decoder of a params folder uses tokens; True without a stage 2."""
    stage2 = params / "stage2.yaml"
    return not stage2.is_file() or uses_tokens({**read_yaml(stage2), **overrides.get("stage2", {})})


def notebook_values(plan: Plan, name: str) -> dict[str, Any]:
    """Return a notebook's parameters: its params file, the run's folder and checkpoints, then the overrides."""
    path = plan.params / f"{name}.yaml"
    from_file = read_yaml(path)
    try:
        NOTEBOOKS[name][1].check_replaced(from_file, ("output_dir", "interactive"))
    except ParameterError as error:
        raise ParameterError(f"{display_path(path)}: {error}") from None
    overrides = plan.overrides.get(name, {})
    if "output_dir" in overrides:
        raise ParameterError(f"-p {name}.output_dir: --name sets the folder of the run; leave output_dir out")
    values = {**from_file, "output_dir": display_path(plan.directory), "interactive": False}
    for key, relative in OWN_CHECKPOINTS.get(name, {}).items():
        default = NOTEBOOKS[name][1].model_fields[key].default
        if values.get(key, default):  # an empty value leaves the checkpoint out
            values[key] = display_path(plan.directory / relative)
    if not _uses_tokens(plan.params, plan.overrides):
        values |= WITHOUT_TOKENS.get(name, {})
    if name == "compare":
        values["runs"] = [display_path(plan.directory)]
    if plan.is_resumed and name in ("stage1", "stage2"):
        values["resume"] = True
    return {**values, **overrides}


def check_plan(plan: Plan, values: Values) -> ExploreParameters | None:
    """Check the parameters of all notebooks before the first one starts, so that none fails after hours.

    Return those of the phantom data, if the params folder describes any.
    """
    phantom: Any = None
    if "explore" in values:
        phantom = check_values("explore", values["explore"], plan.directory)
    elif os.path.lexists(plan.params / "explore.yaml"):
        phantom = ExploreParameters.from_yaml(plan.params / "explore.yaml")
    phantom_dir = resolve(phantom.data_dir) if phantom is not None and phantom.phantom_volumes else None
    for name in plan.notebooks:
        config = check_values(name, values[name], plan.directory, phantom_dir)
        if plan.is_resumed:
            check_resumed(name, config, plan.given.get(name, {}), plan.directory)
    check_baselines(values, plan.directory)
    return phantom


def check_values(name: str, values: dict[str, Any], directory: Path, phantom_dir: Path | None = None) -> Parameters:
    """Validate a notebook's parameters; the run's own checkpoints and `phantom_dir` need not exist yet."""
    cls = NOTEBOOKS[name][1]
    later = [
        key
        for key, field in cls.model_fields.items()
        if (value := values.get(key, field.default))
        and (
            (key.endswith("_checkpoint") and resolve(value).is_relative_to(directory))
            or (key == "data_dir" and resolve(value) == phantom_dir)
        )
    ]
    try:
        config = cls.create(values, written_later=later)
        if isinstance(config, DataParameters):
            find_mask(config.mask_type)
        if isinstance(config, Stage2Parameters) and uses_tokens(values) and "stage1_checkpoint" not in later:
            config.require_path("stage1_checkpoint")
        return config
    except ParameterError as error:
        raise ParameterError(f"{name}: {error}") from None


def check_resumed(name: str, config: Parameters, given: dict[str, Any], directory: Path) -> None:
    """Refuse to change parameters that a resumed run has already used."""
    section = read_record(directory)["notebooks"].get(name, {})
    if section.get("status") == "done":
        used = section.get("config", {})
        for key in given:
            if key in used and config.to_dict()[key] != used[key]:
                raise ParameterError(
                    f"-p {name}.{key}: {name} is done, with {key}: {used[key]}; leave it out, or choose another --name "
                    "for a new run"
                )
    elif isinstance(config, TrainingParameters):
        check_folder(directory, config)


def check_baselines(values: Values, directory: Path) -> None:
    """Refuse an evaluation of a baseline that is not in the run folder and will not be trained."""
    for stage, key in (("stage1", "constant_prefix_checkpoint"), ("stage2", "no_token_decoder_checkpoint")):
        checkpoint = values.get("evaluate", {}).get(key)
        if stage not in values or not checkpoint or resolve(checkpoint).exists():
            continue
        trained = values[stage].get("train_control", NOTEBOOKS[stage][1].model_fields["train_control"].default)
        if resolve(checkpoint).is_relative_to(directory) and not trained:
            raise ParameterError(
                f"evaluate: {key}: {stage} does not train this baseline (train_control: false); "
                f'set {stage}.train_control to true, or leave the baseline out (evaluate.{key}: "")'
            )


def run(plan: Plan, overwrite: bool = False) -> int:
    """Check the plan, write phantom data if needed, prepare the run folder, and execute the notebooks.

    `overwrite` deletes an existing run in the folder. Return the exit status.
    """
    values = {name: notebook_values(plan, name) for name in plan.notebooks}
    phantom = check_plan(plan, values)
    if not plan.is_resumed:
        check_free(plan.directory, overwrite)  # before phantom data are made, which takes minutes
    if phantom is not None:
        dataset.make_if_absent(phantom)
    if not plan.is_resumed:
        claim_folder(plan.directory, overwrite)
        (plan.directory / "params").mkdir()
        for name in plan.notebooks:
            shutil.copy(plan.params / f"{name}.yaml", plan.directory / "params")
    overrides_path = plan.directory / "params" / "overrides.yaml"
    stored = overrides_path.read_text() if overrides_path.is_file() else ""
    if plan.overrides:
        write_text(overrides_path, yaml.safe_dump(plan.overrides))
    if not plan.is_resumed:  # last, because a folder with a record must be complete enough to resume
        Run(plan.directory, list(plan.notebooks)).save()
    failed, status = execute(plan, values)
    if failed and plan.is_resumed and plan.given:
        error = str(read_record(plan.directory)["notebooks"].get(failed, {}).get("error"))
        if error.startswith(REFUSALS):  # a refused override must not remain
            write_text(overrides_path, stored)
    return status


def check_free(directory: Path, overwrite: bool) -> None:
    """Refuse a folder for a new run that has a run, unless `overwrite`, or anything else in it."""
    name = display_path(directory)
    has_record = (directory / "run.json").exists()
    if has_record and not overwrite:
        raise ParameterError(
            f"'{name}' exists; choose another --name, --resume to resume it, or --overwrite to delete it first"
        )
    # A start that was killed before its record was written leaves only these.
    if not has_record and directory.exists() and {path.name for path in directory.iterdir()} - {".lock", "params"}:
        raise ParameterError(f"'{name}' exists and is not a run folder (it has no run.json); choose another --name")


def summaries(directory: Path) -> list[str]:
    """Return the sentences that a run's notebooks have recorded as their summary."""
    sections = read_record(directory)["notebooks"].values()
    return [line for section in sections for line in section.get("summary", [])]


def claim_folder(directory: Path, overwrite: bool) -> None:
    """Lock and empty the folder of a new run, which `check_free` accepts."""
    check_free(directory, overwrite)
    lock_run(directory)
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def execute(plan: Plan, values: Values) -> tuple[str, int]:
    """Execute the notebooks that are not done; return the one that failed, if any, and the exit status."""
    record = Run(plan.directory, [])
    todo = []
    for name in plan.notebooks:
        if record.record["notebooks"].get(name, {}).get("status") == "done":
            print(f"── {NOTEBOOKS[name][0]} is done", flush=True)
        else:
            todo.append(name)
    if plan.is_resumed and todo:
        record.resumed()
    notebook: Notebook | None = None

    def stop(signals: int) -> None:
        if notebook is not None:
            notebook.stop(signals)

    with stop_on_signals(plan.directory, stop) as received:
        for name in todo:
            notebook = Notebook(name, values[name], plan.directory)
            if status := execute_one(notebook, received):
                return name, status
    return "", 0


def execute_one(notebook: "Notebook", signals: list[int]) -> int:
    """Execute one notebook, unless `signals` were received before; record a failure; return the exit status."""
    start = time.monotonic()
    name, directory, stem = notebook.name, notebook.directory, NOTEBOOKS[notebook.name][0]
    rendered = directory / f"{stem}.ipynb"
    print(f"── {stem} → {display_path(directory)}", flush=True)
    status = STOPPED if signals else notebook.execute()
    if not status and not signals:
        print(f"   done in {time.monotonic() - start:.0f} s", flush=True)
        return 0
    reason = f"stopped by {signal.Signals(signals[0]).name}" if signals else ""
    record = Run(directory, [])
    section = record.record["notebooks"].setdefault(name, {})
    if status and (signals or section.get("status") != "failed"):
        error = reason or _last_error(rendered) or f"papermill exited with status {status}"
        section.update(status="failed", error=error)
    record.save()
    if signals:
        outputs = resolve("outputs")
        run_name = directory.relative_to(outputs) if directory.is_relative_to(outputs) else directory
        command = f"python -m mrilib run {display_path(directory / 'params')} --name {run_name} --resume"
        print(f"{reason}; to resume: {command}", file=sys.stderr)
        return STOPPED
    print(f"error: {stem} failed; the notebook with the error is {display_path(rendered)}", file=sys.stderr)
    return 1


def _last_error(notebook: Path) -> str:
    """Return the last error in a rendered notebook in one line; it may precede the run's record."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        errors = [output for output in outputs if output["output_type"] == "error"]
        return f"{errors[-1]['ename']}: {errors[-1]['evalue']}".splitlines()[0] if errors else ""
    except (OSError, ValueError, KeyError):  # for example, killed while the notebook was written
        return ""


class Notebook:
    """One notebook, executed by papermill in a child process."""

    def __init__(self, name: str, values: dict[str, Any], directory: Path) -> None:
        self.name, self.values, self.directory = name, values, directory
        self.process: subprocess.Popen[str] | None = None
        self.is_stopped = False  # before or after its start

    def stop(self, signals: int) -> None:
        """React to a signal: the first lets training finish its step and save; otherwise the process ends at once."""
        if self.name in ("stage1", "stage2") and signals == 1:
            message = "training finishes its step and saves; a second signal ends it at once"
        else:
            message = "ending"
            self.is_stopped = True
            if self.process is not None:
                self.process.terminate()  # papermill ends its kernel
        print(f"   {message}", file=sys.stderr, flush=True)

    def execute(self) -> int:
        """Run papermill, print the notebook's log, and return papermill's exit status."""
        stem, logs = NOTEBOOKS[self.name][0], self.directory / "logs"
        command = [sys.executable, "-m", "papermill", f"notebooks/{stem}.ipynb"]
        command += [display_path(self.directory / f"{stem}.ipynb"), "--no-progress-bar"]
        command += ["-y", yaml.safe_dump(self.values)]
        old_logs = set(logs.glob("*.log"))
        options = child_process_options()
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)
        if self.is_stopped:  # the signal came during the start
            self.process.terminate()
        ended = threading.Event()
        follower = threading.Thread(target=_follow, args=(logs, old_logs, ended))
        follower.start()
        try:
            errors = self.process.communicate()[1]
        finally:
            ended.set()
            follower.join()
            end_process(self.process)
        if self.process.returncode:
            lines = [line for line in errors.splitlines() if line.strip()]
            print(lines[-1] if lines else "papermill failed", file=sys.stderr)
        return self.process.returncode


def _follow(folder: Path, old_logs: set[Path], ended: threading.Event) -> None:
    """Print the lines of a notebook's new log until the notebook has ended."""
    position = 0
    log: Path | None = None
    while True:
        is_last = ended.wait(1.0)
        if log is None:
            new_logs = sorted(set(folder.glob("*.log")) - old_logs)
            log = new_logs[0] if new_logs else None
        if log is not None:
            with open(log, encoding="utf-8") as file:
                file.seek(position)
                for line in file.read().splitlines():
                    date, clock, _, text = [*line.split(" ", 3), "", "", ""][:4]
                    print(f"   {clock[:8]} {text}" if date[:2] == "20" else f"   {line}", flush=True)
                position = file.tell()
        if is_last:
            return
