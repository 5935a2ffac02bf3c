"""The bench's seeds trained side by side, a process each: two networks of a thread each learn faster than one of two.

``python -m mrilib.bench_seeds PARAMS.yaml DIR`` is such a process: it does the jobs of its params file and ends with a
line for each that is left; on SIGTERM it saves the state of the training under way and leaves the rest.
"""

import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from mrilib import runs
from mrilib.bench import TRAINING_PARTS, Bench
from mrilib.config import ROOT, BenchParameters, display_path
from mrilib.distributed import TrainingStopped, reason

LEFT, STOPPED = "left: ", "stopped: "


def train_side_by_side(bench: Bench, seconds: float) -> None:
    """Train all that the parts "stage1" and "train" name, `seeds_at_once` seeds at a time; their logs: seedN/train.log.

    Parameters
    ----------
    bench : Bench
    seconds : float
        After which no training begins, and those under way stop to be resumed; infinite: no limit.

    Raises
    ------
    TrainingStopped
        If trainings are left.
    RuntimeError
        If a process fails, with the error's own words and the name of its log.
    """
    ends = time.monotonic() + seconds
    waiting = [seed for seed in bench.config.bench_seeds if bench.untrained(seed)]
    at_once = min(bench.config.seeds_at_once, len(waiting)) or 1
    running: dict[int, subprocess.Popen[bytes]] = {}
    left: list[str] = []
    try:
        while running or (waiting and time.monotonic() < ends):
            while waiting and len(running) < at_once and time.monotonic() < ends:
                seed = waiting.pop(0)
                running[seed] = _start(bench, seed, ends - time.monotonic(), at_once)
            for seed in [seed for seed, process in running.items() if process.poll() is not None]:
                left += _told(bench.directory / f"seed{seed}", running.pop(seed).returncode)
            time.sleep(0.2)
    finally:
        for process in running.values():  # all are told before the first is waited for
            process.terminate()
        for process in running.values():
            runs.end_process(process)
    left += [job for seed in waiting for job in bench.untrained(seed)]
    if left:
        raise TrainingStopped(", ".join(left))


def _told(folder: Path, status: int) -> list[str]:
    """The trainings that a seed's process has left."""
    log = folder / "train.log"
    lines = log.read_text(encoding="utf-8", errors="replace").rpartition(_begin(""))[2].splitlines()
    if status:
        if stopped := [line for line in lines if line.startswith(STOPPED)]:
            raise TrainingStopped(stopped[0].removeprefix(STOPPED))
        raise RuntimeError(f"training {folder.name} failed, {reason(lines)}; see '{display_path(log)}'")
    return [line.removeprefix(LEFT) for line in lines if line.startswith(LEFT)]


def _begin(when: str) -> str:
    """How a process's part of the log begins."""
    return f"==== begun {when}"


def _start(bench: Bench, seed: int, seconds: float, at_once: int) -> "subprocess.Popen[bytes]":
    folder = bench.directory / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [part for part in TRAINING_PARTS if part in bench.config.bench_parts]
    limit = math.ceil(seconds) if math.isfinite(seconds) else 0
    alone = {"bench_seeds": [seed], "bench_parts": parts, "seeds_at_once": 1, "bench_seconds": limit}
    values = {name: value for name, value in bench.config.to_dict().items() if name in BenchParameters.model_fields}
    parameters = folder / "train.yaml"
    parameters.write_text(yaml.safe_dump({**values, **alone}, sort_keys=False))
    threads = max(1, torch.get_num_threads() // at_once)
    with open(folder / "train.log", "a", encoding="utf-8") as output:
        output.write(_begin(f"{time.strftime('%Y-%m-%d %H:%M:%S')}, {threads} threads\n"))
        output.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "mrilib.bench_seeds", str(parameters), str(bench.directory)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=output,
            stderr=subprocess.STDOUT,
            **runs.ends_with_this_process(),
        )


def main(parameters: str, directory: str) -> None:
    """One seed's process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    if os.environ.get(runs.RUN_VARIABLE) == directory:  # a killed run's folder is in use until its seeds have ended
        runs.hold(Path(directory))
    bench = Bench(BenchParameters.from_yaml(Path(parameters)), Path(directory))

    def stop(*_: Any) -> None:
        bench.end()

    signal.signal(signal.SIGTERM, stop)
    try:
        left = bench.run()
    except TrainingStopped as stopped:
        sys.exit(f"{STOPPED}{stopped}")
    for job in left:
        print(LEFT + job, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
