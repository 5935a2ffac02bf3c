"""Command line: ``python -m mrilib COMMAND``; every command imports the modules it needs, so that --help is fast."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mrilib import errors
from mrilib.errors import STOPPED, ParameterError, printable, shortened

# ------------------------------------------------------------------------------------------------------------- parsing


class HelpFormatter(argparse.HelpFormatter):
    """Help with one line per command: argparse ignores their indentation when it computes the column of the texts."""

    def add_argument(self, action: argparse.Action) -> None:
        """Count the indentation of the commands."""
        super().add_argument(action)
        if action.nargs == argparse.PARSER:
            self._action_max_length += self._indent_increment


class Parser(argparse.ArgumentParser):
    """Argument parser with printable error messages: they repeat what was typed."""

    def error(self, message: str) -> NoReturn:
        """Print usage and the error, and exit with status 2."""
        super().error(shortened(message, errors.MAX_LINE_LENGTH))


def folder(text: str) -> Path:
    """Convert the value of an option to a folder's path; refuse an empty one, which would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("give the name of a folder")
    return Path(text)


def whole(lowest: int, highest: int) -> Callable[[str], int]:
    """Return a converter of an option's value to a whole number within limits."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shortened(repr(text))} is not a whole number") from None
        if not lowest <= number <= highest:
            raise argparse.ArgumentTypeError(f"{shortened(text)} is outside the range {lowest} to {highest}")
        return number

    return convert


def fraction(text: str) -> float:
    """Convert an option's value to a number above 0 and at most 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{shortened(repr(text))} is not a number above 0, at most 1")
    return number


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with a subparser for each command."""
    parser = Parser(
        prog="python -m mrilib",
        description="Two-stage MRI reconstruction with a frozen language-model backbone.",
        epilog="python -m mrilib COMMAND --help shows the options of a command.",
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_run,
        _add_sweep,
        _add_train,
        _add_cost,
        _add_make_data,
        _add_check,
        _add_reconstruct,
        _add_export,
        _add_runs,
    ):
        add(commands)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="execute the notebooks of a params folder")
    run.add_argument("params", type=Path, help="folder with one YAML file per notebook, e.g. params/demo")
    run.add_argument("--name", help="name of the run folder in outputs/ (default: the params folder's name)")
    _add_stages(run)
    _add_parameter(run, "NOTEBOOK.NAME=VALUE", "value of a parameter, replacing the params file's")
    again = run.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="delete an existing run folder first (default: no)")
    again.add_argument("--resume", action="store_true", help="execute the run's unfinished notebooks (default: no)")


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser("sweep", help="one run per combination of values, then a comparison")
    sweep.add_argument("params", type=Path, help="folder with one YAML file per notebook, e.g. params/demo")
    sweep.add_argument("--name", help="first part of the run folders' names (default: the params folder's name)")
    _add_parameter(sweep, "NOTEBOOK.NAME=VALUE,VALUE", "values of a parameter, one run for each")
    sweep.add_argument("--methods", help="files in the folder's methods/, e.g. varnet,unet, or all (default: none)")
    sweep.add_argument("--seeds", help="seeds of both stages, e.g. 0,1 (default: those of the params files)")
    _add_stages(sweep)
    again = sweep.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="resume unfinished runs (default: no)")
    again.add_argument("--overwrite", action="store_true", help="repeat all runs, also finished ones (default: no)")


def _add_stages(command: argparse.ArgumentParser) -> None:
    stages = command.add_mutually_exclusive_group()
    stages.add_argument("--stage1-only", action="store_true", help="train only the k-space encoder (default: no)")
    stages.add_argument("--stage2-only", action="store_true", help="train only the decoder; needs -c (default: no)")
    command.add_argument("-c", "--checkpoint", type=Path, help="stage-1 checkpoint for --stage2-only (default: none)")


def _add_parameter(command: argparse.ArgumentParser, metavar: str, text: str) -> None:
    text += "; may be given several times (default: none)"
    command.add_argument("-p", "--parameter", action="append", default=[], metavar=metavar, help=text)


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train one stage without its notebook, e.g. by accelerate")
    train.add_argument("params", type=Path, help="params file of the stage, e.g. params/full/stage1.yaml")
    train.add_argument("--stage", type=int, choices=(1, 2), required=True, help="1: k-space encoder; 2: image decoder")
    _add_parameter(train, "NAME=VALUE", "value of a parameter, replacing the params file's")
    train.add_argument("--resume", action="store_true", help="resume the training in output_dir (default: no)")
    networks = "stage1 or constant_prefix, stage2 or no_token_decoder"
    train.add_argument("--only", default="", help=f"network to train: {networks} (default: both, with train_control)")
    train.add_argument("--dry-run", action="store_true", help="print memory, time and disk needed (default: no)")
    text = "with --dry-run: fraction of a GPU's peak to assume (default: 0.3)"
    train.add_argument("--utilisation", type=fraction, metavar="FRACTION", help=text)


def _add_cost(commands: Any) -> None:
    add = commands.add_parser("cost", help="time and FLOPs per step, and steps at equal compute").add_argument
    add("params", type=Path, nargs="+", help="params files of stage 1 or 2, or of a methods/ folder")
    add("--reference", type=whole(1, 1000), default=1, help="first files that form the budget (default: %(default)s)")
    add("--rounds", type=whole(1, 1000), default=3, help="measurements per file, in turn (default: %(default)s)")
    add("--steps", type=whole(1, 10**6), default=5, help="optimizer steps per measurement (default: %(default)s)")


def _add_make_data(commands: Any) -> None:
    add = commands.add_parser("make-data", help="write phantom brains in fastMRI's format").add_argument
    add("directory", type=Path, help="output folder")
    add("--volumes", type=whole(1, 10**5), default=150, help="h5 files, three per patient (default: %(default)s)")
    add("--slices", type=whole(1, 256), default=4, help="slices per volume (default: %(default)s)")
    add("--img-size", type=whole(16, 4096), default=128, help="side of the images [pixels] (default: %(default)s)")
    add("--coils", type=whole(2, 128), default=8, help="typical number of coils (default: %(default)s)")
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="seed of the phantom (default: %(default)s)")


def _add_check(commands: Any) -> None:
    add = commands.add_parser("check", help="read every h5 file of a folder; exit 1 on problems").add_argument
    add("directory", type=Path, help="folder of fastMRI brain multicoil h5 files")
    add("--processes", type=whole(1, 256), help="files read in parallel (default: one per core)")


def _add_reconstruct(commands: Any) -> None:
    add = commands.add_parser("reconstruct", help="images and analyses of one file by a run's model").add_argument
    add("run", type=Path, help="run folder, e.g. outputs/demo")
    add("file", type=Path, help="fastMRI brain multicoil h5 file")
    add("--out", type=folder, default=Path("reconstructed"), help="output folder (default: %(default)s)")
    add("--acceleration", type=whole(1, 1000), help="acceleration for a fully sampled file (default: the run's first)")


def _add_export(commands: Any) -> None:
    add = commands.add_parser("export", help="write a run's model as a folder for mrilib.from_pretrained").add_argument
    add("run", type=Path, help="evaluated run folder, e.g. outputs/demo")
    add("folder", type=folder, help="output folder, e.g. models/mine")


def _add_runs(commands: Any) -> None:
    add = commands.add_parser("runs", help="print a table of the runs").add_argument
    add("directory", type=Path, nargs="?", default=Path("outputs"), help="folder of run folders (default: %(default)s)")


# ------------------------------------------------------------------------------------------------------------ commands


def run_notebooks(options: argparse.Namespace) -> int:
    """Execute the notebooks of a params folder and print the metrics."""
    from mrilib.display.console import metrics_text
    from mrilib.files import display_path
    from mrilib.runs import notebooks

    plan = notebooks.make_plan(options)
    status = notebooks.run(plan, options.overwrite)
    metrics = plan.directory / "metrics.json"
    if not status and metrics.is_file():
        print(metrics_text(metrics))
    for line in notebooks.summaries(plan.directory) if not status else ():
        print(line)
    if not status and (plan.directory / "figures").is_dir():
        print(f"figures in {display_path(plan.directory / 'figures')}")
    return status


def sweep_runs(options: argparse.Namespace) -> int:
    """Execute one run per combination of values, then their comparison."""
    from mrilib.runs.sweep import SweepStopped, sweep

    try:
        return sweep(options)
    except SweepStopped as signal:
        print(f"error: stopped by {signal}; to resume, give the same command with --resume", file=sys.stderr)
        return 1


def train_stage(options: argparse.Namespace) -> int:
    """Train one stage without its notebook."""
    from mrilib.config import display_path
    from mrilib.runs import train
    from mrilib.runs.overrides import parse_values
    from mrilib.training.distributed import TrainingStopped

    values = parse_values(options.parameter)
    if options.resume:
        values["resume"] = True
    config = train.read_config(options.params, options.stage, values)
    if options.dry_run:
        from mrilib.training import dry_run, estimate

        print(dry_run.report(config).text(), flush=True)
        print("", estimate.measure(config).text(options.utilisation or estimate.UTILISATION), sep="\n")
        return 0
    if options.utilisation:
        raise ParameterError("--utilisation needs --dry-run")
    try:
        directory = train.train(config, options.only)
    except TrainingStopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return STOPPED
    print(f"trained: {display_path(directory)}")
    return 0


def measure_costs(options: argparse.Namespace) -> int:
    """Measure params files in turn and print time, FLOPs and steps at equal compute."""
    from mrilib.training import cost

    costs = cost.measure(options.params, options.rounds, options.steps)
    print(cost.table(costs, options.reference).to_string(index=False))
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
    """Print contents and problems of a folder's files; return 1 if there is a problem."""
    from mrilib.data.check import check_directory

    report, fine = check_directory(options.directory.resolve(), options.processes)
    print(report)
    return 0 if fine else 1


def reconstruct_file(options: argparse.Namespace) -> int:
    """Write ``OUT/<file>.h5`` (fastMRI's submission format), ``OUT/<file>.jsonl`` and ``OUT/<file>.png``."""
    from mrilib.runs.reconstruct import reconstruct

    for line in reconstruct(options.run, options.file, options.out, options.acceleration):
        print(printable(line))
    return 0


def export_model(options: argparse.Namespace) -> int:
    """Write a run's model as two safetensors files, their parameters and a model card."""
    from mrilib.runs.pretrained import export

    size = export(options.run, options.folder)
    print(f"{size / 1e6:.1f} MB in {options.folder}")
    return 0


def list_runs(options: argparse.Namespace) -> int:
    """Print the table of run records."""
    from mrilib.display.tables import runs_text

    if not options.directory.is_dir():
        raise ParameterError(f"'{options.directory}' is not a folder; give one with run folders, such as outputs")
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
    "export": export_model,
    "runs": list_runs,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run one command, and return the exit status.

    Only here does an exception become a line for the user. If it was not foreseen, the line also names the log file
    with the traceback.
    """
    options = make_parser().parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print("error: stopped by SIGINT", file=sys.stderr)
        return STOPPED
    except Exception as error:
        line = errors.one_line(error)
        if not errors.is_foreseen(error):
            line += f" ({errors.log_traceback(error)})"
        print(f"error: {line}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
