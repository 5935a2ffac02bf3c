"""The bench's seeds trained side by side, a process each: two networks of a thread each learn faster than one of two.

``python -m mrilib.bench_seeds PARAMS.yaml DIR`` is such a process: it does the jobs of its params file and ends with a
line for each that is left; on SIGTERM it saves the state of the training under way and leaves the rest.
"""

import math
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from mrilib import runs
from mrilib.bench import Bench
from mrilib.config import ROOT, BenchParameters, display_path
from mrilib.distributed import TrainingStopped, reason

TRAINING_PARTS = ("stage1", "train")
LEFT = "left: "


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
    waiting, left = list(bench.config.bench_seeds), []
    running: dict[int, subprocess.Popen[bytes]] = {}
    with ExitStack() as stack:
        while waiting or running:
            while waiting and len(running) < bench.config.seeds_at_once:
                seed = waiting.pop(0)
                running[seed] = process = _start(bench, seed, ends - time.monotonic())
                stack.callback(runs.end_process, process)
            for seed in [seed for seed, process in running.items() if process.poll() is not None]:
                log = bench.directory / f"seed{seed}" / "train.log"
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                if running.pop(seed).returncode:
                    raise RuntimeError(f"training seed {seed} failed, {reason(lines)}; see '{display_path(log)}'")
                left += [line.removeprefix(LEFT) for line in lines if line.startswith(LEFT)]
            time.sleep(0.2)
    if left:
        raise TrainingStopped(", ".join(left))


def _start(bench: Bench, seed: int, seconds: float) -> "subprocess.Popen[bytes]":
    folder = bench.directory / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [part for part in TRAINING_PARTS if part in bench.config.bench_parts]
    limit = max(1, math.ceil(seconds)) if bench.config.bench_seconds else 0
    alone = {"bench_seeds": [seed], "bench_parts": parts, "seeds_at_once": 1, "bench_seconds": limit}
    values = {name: value for name, value in bench.config.to_dict().items() if name in BenchParameters.model_fields}
    parameters = folder / "train.yaml"
    parameters.write_text(yaml.safe_dump({**values, **alone}, sort_keys=False))
    threads = max(1, torch.get_num_threads() // bench.config.seeds_at_once)
    with open(folder / "train.log", "w", encoding="utf-8") as output:
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
    bench = Bench(BenchParameters.from_yaml(Path(parameters)), Path(directory))

    def stop(*_: Any) -> None:
        bench.end()

    signal.signal(signal.SIGTERM, stop)
    for job in bench.run():
        print(LEFT + job, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
