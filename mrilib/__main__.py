"""The commands: python -m mrilib run | sweep | train | cost | make-data | check | reconstruct | runs."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from mrilib.config import (
    NOTEBOOKS,
    ROOT,
    ParameterError,
    Parameters,
    Stage2Parameters,
    TrainingParameters,
    display_path,
    parse_yaml,
    printable,
    read_small,
    read_yaml,
    resolve,
)
from mrilib.errors import MAX_LINE_LENGTH, is_foreseen, log_traceback, one_line, shortened

STOPPED = 130  # exit status of what a signal has stopped, as shells have it for Ctrl-C
PIPELINE = ("explore", "stage1", "stage2", "evaluate", "compare")


class Parser(argparse.ArgumentParser):
    """argparse's parser; an error that repeats what was typed cannot send escape sequences to the terminal."""

    def error(self, message: str) -> NoReturn:
        """Print usage and the error, and exit with status 2."""
        super().error(shortened(message, MAX_LINE_LENGTH))


def folder(text: str) -> Path:
    """A folder's path; an empty text would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name of a folder is wanted")
    return Path(text)


def whole(lowest: int, highest: int) -> Callable[[str], int]:
    """A type of an option: a whole number within bounds."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shortened(repr(text))} is no whole number") from None
        if not lowest <= number <= highest:
            raise argparse.ArgumentTypeError(f"{shortened(text)} is out of range; {lowest} to {highest} is wanted")
        return number

    return convert


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line, a subparser for each command."""
    parser = Parser(prog="python -m mrilib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="execute the notebooks of a params folder into outputs/NAME")
    run.add_argument("params", type=Path, help="folder with one YAML file per notebook, e.g. params/demo")
    run.add_argument("--name", help="name of the run folder (default: the params folder's)")
    stages = run.add_mutually_exclusive_group()
    stages.add_argument("--stage1-only", action="store_true", help="train the k-space encoder alone")
    stages.add_argument("--stage2-only", action="store_true", help="train the image decoder alone; needs -c")
    run.add_argument("-c", "--checkpoint", type=Path, help="stage-1 checkpoint for --stage2-only (default: none)")
    run.add_argument(
        *("-p", "--parameter"), action="append", default=[], metavar="NOTEBOOK.NAME=VALUE",
        help="a parameter's value in place of the params file's; may be given several times (default: none)",
    )  # fmt: skip
    again = run.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="delete the run folder first, if it is there")
    again.add_argument("--resume", action="store_true", help="go on with the run folder's notebooks that are not done")

    train = commands.add_parser("train", help="train a stage without its notebook; what accelerate launch starts")
    train.add_argument("params", type=Path, help="params file of the stage, e.g. params/full/stage1.yaml")
    train.add_argument("--stage", type=int, choices=(1, 2), required=True, help="1: k-space encoder; 2: image decoder")
    train.add_argument(
        *("-p", "--parameter"), action="append", default=[], metavar="NAME=VALUE",
        help="a parameter's value in place of the params file's; may be given several times (default: none)",
    )  # fmt: skip
    train.add_argument("--resume", action="store_true", help="go on with output_dir's own training")
    train.add_argument(
        "--only", default="",
        help="train one network: stage1 or control (of stage 1), stage2 or plain (of stage 2) (default: both)",
    )  # fmt: skip
    train.add_argument("--dry-run", action="store_true", help="one batch, then memory, time and disk needed")

    sweep = commands.add_parser("sweep", help="a run for each combination of parameter values, then their comparison")
    sweep.add_argument("params", type=Path, help="folder with one YAML file per notebook, e.g. params/demo")
    sweep.add_argument("--name", help="the run folders' names begin with it (default: the params folder's)")
    sweep.add_argument(
        *("-p", "--parameter"), action="append", default=[], metavar="NOTEBOOK.NAME=VALUE,VALUE",
        help="values of a parameter, one run for each; may be given several times (default: none)",
    )  # fmt: skip
    sweep.add_argument(
        "--methods", help="files of the folder's methods/, e.g. varnet,unet; all: every one (default: none)"
    )
    sweep.add_argument("--seeds", help="seeds of both stages, e.g. 0,1 (default: those of the params files)")
    sweep_stages = sweep.add_mutually_exclusive_group()
    sweep_stages.add_argument("--stage1-only", action="store_true", help="train the k-space encoder alone")
    sweep_stages.add_argument("--stage2-only", action="store_true", help="train the image decoder alone; needs -c")
    sweep.add_argument("-c", "--checkpoint", type=Path, help="stage-1 checkpoint for --stage2-only (default: none)")
    sweep_again = sweep.add_mutually_exclusive_group()
    sweep_again.add_argument("--resume", action="store_true", help="go on with runs that are not finished")
    sweep_again.add_argument("--overwrite", action="store_true", help="run all anew, finished ones too")

    cost = commands.add_parser("cost", help="seconds and FLOPs of an optimizer step, and steps at equal compute")
    cost.add_argument("params", type=Path, nargs="+", help="params files of stage 1 or 2, or of a methods/ folder")
    cost.add_argument(
        "--reference",
        type=whole(1, 1000),
        default=1,
        help="the first so many files are the budget (default: %(default)s)",
    )
    cost.add_argument(
        "--rounds", type=whole(1, 1000), default=3, help="measurements of each file, in turn (default: %(default)s)"
    )
    cost.add_argument(
        "--steps", type=whole(1, 10**6), default=5, help="optimizer steps a measurement (default: %(default)s)"
    )

    data = commands.add_parser("make-data", help="write phantom brains in fastMRI's format")
    data.add_argument("directory", type=Path, help="folder to write to; it is made if it does not exist")
    data.add_argument(
        *("--volumes",), type=whole(1, 10**5), default=150,
        help="h5 files; each patient has three contrasts (default: %(default)s)",
    )  # fmt: skip
    data.add_argument("--slices", type=whole(1, 256), default=4, help="slices a volume (default: %(default)s)")
    data.add_argument(
        "--img-size", type=whole(16, 4096), default=128, help="reconstructed image side [pixels] (default: %(default)s)"
    )
    data.add_argument("--coils", type=whole(2, 128), default=8, help="typical coil count (default: %(default)s)")
    data.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="seed of the phantom (default: %(default)s)")

    check = commands.add_parser("check", help="read every h5 file of a folder and list every problem; exit 1 if any")
    check.add_argument("directory", type=Path, help="folder of fastMRI brain multicoil h5 files")
    check.add_argument("--processes", type=whole(1, 256), help="files read at once (default: one a core)")

    reconstruct = commands.add_parser("reconstruct", help="one file to images and analyses with a run's model")
    reconstruct.add_argument("run", type=Path, help="run folder, e.g. outputs/demo")
    reconstruct.add_argument("file", type=Path, help="fastMRI brain multicoil h5 file")
    reconstruct.add_argument(
        "--out", type=folder, default=Path("reconstructed"), help="output folder (default: %(default)s)"
    )
    reconstruct.add_argument(
        "--acceleration",
        type=whole(1, 1000),
        help="undersampling of a fully sampled file (default: the run's first)",
    )

    runs = commands.add_parser("runs", help="a table of the run records")
    runs.add_argument(
        "directory", type=Path, nargs="?", default=Path("outputs"), help="folder of run folders (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run one command, and return the exit status.

    This is the one place where an exception becomes a line for the user. If the exception was not foreseen, the line
    also names the log file that holds the traceback.
    """
    options = make_parser().parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print("error: stopped by SIGINT", file=sys.stderr)
        return STOPPED
    except Exception as error:
        line = one_line(error)
        if not is_foreseen(error):
            line += f" ({log_traceback(error)})"
        print(f"error: {line}", file=sys.stderr)
        return 1


def run_notebooks(options: argparse.Namespace) -> int:
    """Execute the notebooks of a params folder, one papermill process each, into one run folder."""
    from mrilib.config import ExploreParameters
    from mrilib.model.decoders import uses_tokens
    from mrilib.phantom import dataset
    from mrilib.processes import lock_run, stop_on_signals
    from mrilib.runs.record import REFUSALS, Run

    folder: Path = options.params
    if not folder.is_dir():
        why = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ParameterError(f"the params folder '{folder}' {why}; give a folder such as params/demo")
    if options.stage2_only and options.checkpoint is None and not options.resume:
        raise ParameterError("--stage2-only and -c CHECKPOINT go together")
    if options.checkpoint is not None and not options.stage2_only:
        raise ParameterError("-c CHECKPOINT and --stage2-only go together")
    if options.stage1_only or options.stage2_only:
        names: tuple[str, ...] = ("stage1",) if options.stage1_only else ("stage2",)
    else:
        names = PIPELINE
    name = options.name
    if name is not None and not name.strip():
        raise ParameterError("--name is empty; give the run folder's name, or leave it out")
    if name and not Path(name).is_absolute() and (Path(name).name != name or name == ".."):
        raise ParameterError(f"--name {name}: the name of a folder in outputs/ is wanted, or an absolute path")
    directory = resolve("outputs") / (options.name or folder.resolve().name)
    resumed = options.resume and (directory / "run.json").exists()
    if options.resume and not resumed:
        print(f"'{display_path(directory)}' is not there yet: the run starts from its beginning", flush=True)
    given = parse_overrides(options.parameter, names)
    if resumed:
        lock_run(directory)
        folder = directory / "params"
        names = tuple(Run(directory, []).record["planned"])
        stored = folder / "overrides.yaml"
        overrides = merge_overrides(read_nested(stored) if stored.is_file() else {}, given)
    else:
        names = tuple(name for name in names if os.path.lexists(folder / f"{name}.yaml"))
        if not names:
            raise ParameterError(f"'{folder}' holds no params file of a notebook ({', '.join(PIPELINE)})")
        overrides = given
        if "stage2" in names and not uses_tokens({**read_yaml(folder / "stage2.yaml"), **given.get("stage2", {})}):
            names = tuple(name for name in names if name != "stage1")  # nothing reads its tokens
        if options.checkpoint is not None:
            chosen = {"stage2": {"stage1_checkpoint": str(options.checkpoint.resolve())}}
            overrides = merge_overrides(chosen, given)

    # All parameters are checked before anything starts: a misspelt one must not be found after a night.
    values = {name: notebook_values(folder, name, overrides, directory, resumed) for name in names}
    explore = folder / "explore.yaml"
    phantom_of = None
    if "explore" in values:
        check_before_start("explore", values["explore"], directory)
        phantom_of = ExploreParameters.create(values["explore"])
    elif os.path.lexists(explore):
        phantom_of = ExploreParameters.from_yaml(explore)
    made = resolve(phantom_of.data_dir) if phantom_of is not None and phantom_of.phantom_volumes else None
    for name in names:
        config = check_before_start(name, values[name], directory, made)
        if resumed:
            check_resumed(name, config, given.get(name, {}), directory)
    check_baselines(values, directory)
    if phantom_of is not None:
        dataset.make_if_absent(phantom_of)

    if not resumed:
        claim_folder(directory, options.overwrite)
        (directory / "params").mkdir()
        for name in names:
            shutil.copy(folder / f"{name}.yaml", directory / "params")
    overrides_path = directory / "params" / "overrides.yaml"
    before = overrides_path.read_text() if overrides_path.is_file() else ""
    if overrides:
        write_text(overrides_path, yaml.safe_dump(overrides))
    if not resumed:  # last: a folder with a record has all that going on takes
        Run(directory, list(names)).save()
    record = Run(directory, [])
    todo = [name for name in names if record.record["notebooks"].get(name, {}).get("status") != "done"]
    for name in names:
        if name not in todo:
            print(f"── {NOTEBOOKS[name][0]} is done", flush=True)
    if resumed and todo:
        record.resumed()
    notebook: Notebook | None = None

    def stop(times: int) -> None:
        if notebook is not None:
            notebook.stop(times)

    with stop_on_signals(directory, stop) as came:
        for name in todo:
            notebook = Notebook(name, values[name], directory)
            status = run_one(notebook, came)
            if status:
                error = str(Run(directory, []).record["notebooks"].get(name, {}).get("error"))
                if resumed and given and error.startswith(REFUSALS):  # what is refused must not stick
                    write_text(overrides_path, before)
                return status
    if (directory / "metrics.json").is_file():
        from mrilib.display.tables import metrics_text

        print(metrics_text(directory / "metrics.json"))
    return 0


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it into place."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)


def claim_folder(directory: Path, overwrite: bool) -> None:
    """Hold a new run's folder; a run that is there already is deleted if that is asked for, and refused otherwise."""
    from mrilib.processes import lock_run

    name = display_path(directory)
    begun = (directory / "run.json").exists()
    if begun and not overwrite:
        raise ParameterError(
            f"'{name}' exists; choose another --name, --resume to go on with it, or --overwrite to delete it first"
        )
    # A start that was killed before its record was written leaves no more than these.
    if not begun and directory.exists() and {path.name for path in directory.iterdir()} - {".lock", "params"}:
        raise ParameterError(f"'{name}' exists and is no run folder (it has no run.json); choose another --name")
    lock_run(directory)
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _told_error(record: Path) -> str:
    """The error that a rendered notebook ends with, in one line; it may have come before the run folder was opened."""
    try:
        cells = json.loads(record.read_text(encoding="utf-8"))["cells"]
        errors = [one for cell in cells for one in cell.get("outputs", []) if one["output_type"] == "error"]
        return f"{errors[-1]['ename']}: {errors[-1]['evalue']}".splitlines()[0] if errors else ""
    except (OSError, ValueError, KeyError):  # killed while it was written, say
        return ""


def run_one(notebook: "Notebook", came: list[int]) -> int:
    """Execute one notebook and see to its record if it fails or is stopped; the exit status.

    Parameters
    ----------
    notebook : Notebook
    came : list of int
        The signals that have come, as `runs.stop_on_signals` gives it.
    """
    from mrilib.runs.record import Run

    start = time.monotonic()
    name, directory = notebook.name, notebook.directory
    print(f"── {NOTEBOOKS[name][0]} → {display_path(directory)}", flush=True)
    status = notebook.execute() if not came else STOPPED  # between two notebooks
    if not status and not came:
        print(f"   done in {time.monotonic() - start:.0f} s", flush=True)
        return 0
    record = Run(directory, [])
    section = record.record["notebooks"].setdefault(name, {})
    if status and (came or section.get("status") != "failed"):
        reason = f"stopped by {signal.Signals(came[0]).name}" if came else ""
        reason = (
            reason or _told_error(directory / f"{NOTEBOOKS[name][0]}.ipynb") or f"papermill ended with status {status}"
        )
        section.update(status="failed", error=reason)
    record.save()
    if came:
        outputs = resolve("outputs")
        named = directory.relative_to(outputs) if directory.is_relative_to(outputs) else directory
        command = f"python -m mrilib run {display_path(directory / 'params')} --name {named} --resume"
        print(f"stopped by {signal.Signals(came[0]).name}; to go on: {command}", file=sys.stderr)
        return STOPPED
    path = display_path(directory / (NOTEBOOKS[name][0] + ".ipynb"))
    print(f"error: {NOTEBOOKS[name][0]} failed; the record with the error is {path}", file=sys.stderr)
    return 1


def notebook_values(
    folder: Path, name: str, overrides: dict[str, dict[str, Any]], directory: Path, resumed: bool
) -> dict[str, Any]:
    """A notebook's parameters in a run: its file, the command line's, and the run's own folder and checkpoints."""
    from mrilib.model.decoders import uses_tokens

    path = folder / f"{name}.yaml"
    given = read_yaml(path)
    try:
        NOTEBOOKS[name][1].check_replaced(given, ("output_dir", "interactive"))
    except ParameterError as error:
        raise ParameterError(f"{display_path(path)}: {error}") from None
    if "output_dir" in overrides.get(name, {}):
        raise ParameterError(f"-p {name}.output_dir: a run has one folder, which --name names; leave output_dir out")
    values = {**given, "output_dir": display_path(directory), "interactive": False}
    own = {
        "stage2": {"stage1_checkpoint": "stage1_checkpoints/stage1_best_model.pt"},
        "evaluate": {
            "stage1_checkpoint": "stage1_checkpoints/stage1_best_model.pt",
            "constant_prefix_checkpoint": "stage1_checkpoints/constant_prefix_best_model.pt",
            "stage2_checkpoint": "stage2_checkpoints/stage2_best_model.pt",
            "no_token_decoder_checkpoint": "stage2_checkpoints/no_token_decoder_best_model.pt",
        },
    }
    for key, relative in own.get(name, {}).items():
        if values.get(key, "x"):  # emptied in the file: left out on purpose
            values[key] = display_path(directory / relative)
    stage2 = folder / "stage2.yaml"
    if stage2.is_file() and not uses_tokens({**read_yaml(stage2), **overrides.get("stage2", {})}):
        without: dict[str, dict[str, Any]] = {
            "stage2": {"stage1_checkpoint": "", "train_control": False},
            "evaluate": {"stage1_checkpoint": "", "constant_prefix_checkpoint": "", "no_token_decoder_checkpoint": ""},
        }
        values |= without.get(name, {})
    if name == "compare":
        values["runs"] = [display_path(directory)]
    if resumed and name in ("stage1", "stage2"):
        values["resume"] = True
    return {**values, **overrides.get(name, {})}


def check_before_start(name: str, values: dict[str, Any], directory: Path, made: Path | None = None) -> Parameters:
    """A notebook's parameters, validated; the run's own checkpoints and `made`, its data, need not be there yet."""
    from mrilib.model.decoders import uses_tokens

    later = [
        key
        for key, value in values.items()
        if (key.endswith("_checkpoint") and value and resolve(value).is_relative_to(directory))
        or (key == "data_dir" and value and resolve(value) == made)
    ]
    cls: type[Parameters] = NOTEBOOKS[name][1]
    try:
        config = cls.create(values, written_later=later)
        if isinstance(config, Stage2Parameters) and uses_tokens(values) and "stage1_checkpoint" not in later:
            config.require_path("stage1_checkpoint")
        return config
    except ParameterError as error:
        raise ParameterError(f"{name}: {error}") from None


def check_resumed(name: str, config: Parameters, given: dict[str, Any], directory: Path) -> None:
    """Refuse to change what a run has already been made with."""
    from mrilib.runs.record import read_record
    from mrilib.training.resume import check_folder

    section = read_record(directory)["notebooks"].get(name, {})
    if section.get("status") == "done":
        made = section.get("config", {})
        for key in given:
            if key in made and config.to_dict()[key] != made[key]:
                raise ParameterError(
                    f"-p {name}.{key}: {name} is done, with {key}: {made[key]}; leave it out, or choose another --name "
                    "for a new run"
                )
    elif isinstance(config, TrainingParameters):
        check_folder(directory, config)


def check_baselines(values: dict[str, dict[str, Any]], directory: Path) -> None:
    """Refuse a run whose evaluation wants a control that neither lies in its folder nor will be trained."""
    for stage, key in (("stage1", "constant_prefix_checkpoint"), ("stage2", "no_token_decoder_checkpoint")):
        wanted = values.get("evaluate", {}).get(key)
        if stage not in values or not wanted or resolve(wanted).exists():
            continue
        trained = values[stage].get("train_control", NOTEBOOKS[stage][1].model_fields["train_control"].default)
        if resolve(wanted).is_relative_to(directory) and not trained:
            raise ParameterError(
                f"evaluate: {key}: {stage} does not train its control (train_control: false); "
                f'set {stage}.train_control to true, or leave the control out (evaluate.{key}: "")'
            )


def parse_overrides(parameters: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``-p stage1.epochs=3`` → {"stage1": {"epochs": 3}}; the value is YAML."""
    overrides: dict[str, dict[str, Any]] = {}
    for text in parameters:
        left, equals, value = text.partition("=")
        notebook, dot, name = left.partition(".")
        if not equals or not dot or notebook not in names:
            raise ParameterError(
                f"-p {shortened(text)}: NOTEBOOK.NAME=VALUE is wanted, NOTEBOOK one of {', '.join(names)}"
            )
        _put(overrides.setdefault(notebook, {}), name, value, text)
    return overrides


def parse_values(parameters: Sequence[str]) -> dict[str, Any]:
    """``-p epochs=3`` → {"epochs": 3}; the value is YAML."""
    values: dict[str, Any] = {}
    for text in parameters:
        name, equals, value = text.partition("=")
        if not equals or "." in name:
            told = f"; '{shortened(name)}' names a notebook, too, as `run` wants it" if "." in name and equals else ""
            raise ParameterError(f"-p {shortened(text)}: NAME=VALUE is wanted{told}")
        _put(values, name, value, text)
    return values


def _put(values: dict[str, Any], name: str, value: str, text: str) -> None:
    if not name:
        raise ParameterError(f"-p {shortened(text)}: the name is empty; NAME=VALUE is wanted")
    if name in values:
        raise ParameterError(f"-p {shortened(text)}: {shortened(name)} is given twice")
    values[name] = parse_yaml(value, f"-p {text}")


def merge_overrides(*several: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Overrides of notebooks' parameters, the later ones on top."""
    merged: dict[str, dict[str, Any]] = {}
    for one in several:
        for name, values in one.items():
            merged[name] = {**merged.get(name, {}), **values}
    return merged


def read_nested(path: Path) -> dict[str, dict[str, Any]]:
    """A run's overrides as they were written."""
    shown = display_path(path)
    nested = parse_yaml(read_small(path), shown) or {}
    if not isinstance(nested, dict) or not all(isinstance(values, dict) for values in nested.values()):
        raise ParameterError(f"{shown} must hold 'name: value' lines below a notebook's name; it is damaged")
    return nested


class Notebook:
    """One notebook under papermill, in a process of its own that does not outlive this one."""

    def __init__(self, name: str, values: dict[str, Any], directory: Path) -> None:
        self.name, self.values, self.directory = name, values, directory
        self.process: subprocess.Popen[str] | None = None
        self.ending = False  # asked to end before it had begun

    def stop(self, times: int) -> None:
        """On a signal: training finishes its step and saves; anything else, and a second signal, ends at once."""
        training = self.name in ("stage1", "stage2") and times == 1
        told = "training finishes its step and saves; a second signal ends it at once" if training else "ending"
        print(f"   {told}", file=sys.stderr, flush=True)
        if not training:
            self.ending = True
            if self.process is not None:
                self.process.terminate()  # papermill takes its kernel along

    def execute(self) -> int:
        """Run it, its log on the console; the exit status."""
        from mrilib.processes import child_process_options, end_process

        stem, directory = NOTEBOOKS[self.name][0], self.directory
        command = [sys.executable, "-m", "papermill", f"notebooks/{stem}.ipynb"]
        command += [display_path(directory / f"{stem}.ipynb"), "--no-progress-bar", "-y", yaml.safe_dump(self.values)]
        # papermill is quiet; what fails is in the record, and its last line is told here.
        before = set((directory / "logs").glob("*.log"))
        options = child_process_options()
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)
        if self.ending:  # the signal came while it was being started
            self.process.terminate()
        ended = threading.Event()
        follower = threading.Thread(target=_follow, args=(directory / "logs", before, ended))
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


def _follow(folder: Path, before: set[Path], ended: threading.Event) -> None:
    """Print what a notebook's new log gains, until the notebook has ended."""
    position = 0
    log: Path | None = None
    while True:
        last = ended.wait(1.0)
        if log is None:
            new = sorted(set(folder.glob("*.log")) - before)
            log = new[0] if new else None
        if log is not None:
            with open(log, encoding="utf-8") as file:
                file.seek(position)
                for line in file.read().splitlines():
                    date, clock, _, text = [*line.split(" ", 3), "", "", ""][:4]
                    print(f"   {clock[:8]} {text}" if date[:2] == "20" else f"   {line}", flush=True)
                position = file.tell()
        if last:
            return


def train_stage(options: argparse.Namespace) -> int:
    """Train one stage without its notebook."""
    from mrilib.runs import train as train_module
    from mrilib.training.distributed import TrainingStopped

    values = parse_values(options.parameter)
    if options.resume:
        values["resume"] = True
    config = train_module.read_config(options.params, options.stage, values)
    if options.dry_run:
        from mrilib.training import dry_run

        print(dry_run.report(config).text())
        return 0
    try:
        directory = train_module.train(config, options.only)
    except TrainingStopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return STOPPED
    print(f"trained: {display_path(directory)}")
    return 0


def measure_costs(options: argparse.Namespace) -> int:
    """Measure params files in turn and print what they cost."""
    from mrilib.training import cost as cost_module

    costs = cost_module.measure(options.params, options.rounds, options.steps)
    print(cost_module.table(costs, options.reference).to_string(index=False))
    return 0


def make_data(options: argparse.Namespace) -> int:
    """Write a phantom data set."""
    from mrilib.phantom.dataset import make_dataset

    path = make_dataset(
        options.directory, options.volumes, options.slices, options.img_size, options.coils, options.seed
    )
    print(f"{options.volumes} volumes in {path}")
    return 0


def check_data(options: argparse.Namespace) -> int:
    """Print what is wrong with the files of a folder, and what is in it; 1 if any has a problem."""
    from mrilib.data.check import check_directory

    report, fine = check_directory(options.directory.resolve(), options.processes)
    print(report)
    return 0 if fine else 1


def reconstruct_file(options: argparse.Namespace) -> int:
    """One h5 file to ``OUT/<file>.h5`` (fastMRI's submission format), ``OUT/<file>.jsonl`` and ``OUT/<file>.png``."""
    from mrilib.runs.reconstruct import reconstruct

    for line in reconstruct(options.run, options.file, options.out, options.acceleration):
        print(printable(line))
    return 0


def sweep_runs(options: argparse.Namespace) -> int:
    """A grid of runs and their comparison."""
    from mrilib.runs.sweep import Stopped, sweep

    try:
        return sweep(options)
    except Stopped as signal:
        print(f"error: stopped by {signal}; the same command with --resume goes on", file=sys.stderr)
        return 1


def list_runs(options: argparse.Namespace) -> int:
    """Print the table of run records."""
    from mrilib.display.tables import runs_text

    if not options.directory.is_dir():
        raise ParameterError(f"'{options.directory}' is no folder; give one that holds run folders, such as outputs")
    print(runs_text(options.directory))
    return 0


COMMANDS = {
    "run": run_notebooks,
    "sweep": sweep_runs,
    "train": train_stage,
    "cost": measure_costs,
    "make-data": make_data,
    "check": check_data,
    "reconstruct": reconstruct_file,
    "runs": list_runs,
}

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
