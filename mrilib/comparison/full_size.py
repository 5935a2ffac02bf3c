"""One step of each stage at the description's sizes, without its weights and data, for measuring time and memory.

Random weights and a small phantom of full size stand in; neither time nor memory depends on the values.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mrilib.config import ParameterError, Stage1Parameters, Stage2Parameters, display_path, read_yaml, resolve
from mrilib.files import read_json, write_json
from mrilib.phantom.dataset import make_dataset
from mrilib.training.dry_run import Report, report_in_subprocess

DISK_BYTES = 15e9  # backbone 2.8 GB, phantom 1 GB, checkpoints of stage 1 3 x 0.9 GB and of stage 2 3 x 1.9 GB


def measure(params: str | Path = "params/full", directory: str | Path = "outputs", **others: Any) -> list[Report]:
    """Dry runs of stage 1 and stage 2, each in a process of its own, with the parameters of `params`.

    Parameters
    ----------
    params : path
        Folder with stage1.yaml and stage2.yaml.
    directory : path
        Everything is written to a temporary folder in it and removed at the end.
    **others
        Parameters of both stages in place of the files', e.g. device.

    Raises
    ------
    ParameterError
        If there are less than 15 GB free on the disk.
    """
    parent = resolve(directory)
    parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(parent).free < DISK_BYTES:
        raise ParameterError(f"{display_path(parent)}: the full-size step needs {DISK_BYTES / 1e9:.0f} GB on the disk")
    with tempfile.TemporaryDirectory(prefix="full-size-", dir=parent) as name:
        folder = Path(name)
        settings = resolve(read_yaml(resolve(params) / "stage1.yaml")["config_path"])
        write_random_backbone(settings, folder / "backbone.safetensors")
        given = {
            "data_dir": str(make_data(folder / "data")),
            "annotations_dir": "",
            "split_seed": 3,  # trains on the patient with 20 coils, compressed to 16, and 320 phase-encoding lines
            "val_fraction": 0.34,
            "test_fraction": 0.34,
            "config_path": str(settings),
            "backbone_path": str(folder / "backbone.safetensors"),
            "output_dir": name,
            "num_workers": 0,  # loading is timed by itself
            **others,
        }
        stage1 = Stage1Parameters.from_yaml(resolve(params) / "stage1.yaml", given)
        first = report_in_subprocess(stage1, folder / "stage1", progress=False)
        (checkpoint,) = folder.glob("stage1/*/stage1_final_model.pt")
        given["stage1_checkpoint"] = str(checkpoint)
        stage2 = Stage2Parameters.from_yaml(resolve(params) / "stage2.yaml", given)
        return [first, report_in_subprocess(stage2, progress=False)]


def measure_once(path: Path, **others: Any) -> list[Report]:
    """What `measure` found, read from `path` where it has been written for the same parameters, else measured anew.

    Parameters
    ----------
    path : Path
        JSON file.
    **others
        As for `measure`.
    """
    if path.exists():
        found = read_json(path)
        if found["parameters"] == others:
            return [Report(**{**one, "batch": tuple(one["batch"])}) for one in found["reports"]]
    reports = measure(**others)
    write_json(path, {"parameters": others, "reports": [one.to_dict() for one in reports]})
    return reports


def table(reports: Sequence[Report]) -> pd.DataFrame:
    """A row per stage: what was measured, and on what."""
    return pd.DataFrame(
        {
            "stage": one.stage,
            "device": one.device,
            "slices × coils × readout × phase": "×".join(map(str, one.batch)),
            "one step [s]": f"{one.step_seconds:.2f}",
            "loading its slices, one process [s]": f"{one.load_seconds:.2f}",
            "peak memory [GB]": f"{one.peak_memory_bytes / 1e9:.1f}",
            "one checkpoint [GB]": f"{one.checkpoint_bytes / 1e9:.2f}",
        }
        for one in reports
    )


def write_random_backbone(config_path: Path, path: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
    """Random weights for a backbone's configuration, as a safetensors file; the model itself is never built.

    Parameters
    ----------
    config_path : Path
        For instance ``models/nirvana_1_3B.json``.
    path : Path
        The file to write, 2.8 GB for the 1.3B backbone in bfloat16.
    dtype : torch.dtype
    seed : int
    """
    settings = json.loads(config_path.read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=dtype)
        if parameter.ndim > 1:
            values.normal_(std=settings["initializer_range"], generator=generator)
        else:
            values.fill_(1.0)  # norms' weights; for the decay rates 1 is as good as any
        tensors[name] = values
    save_file(tensors, path)


def make_data(directory: Path, img_size: int = 320) -> Path:
    """Three phantom patients of full size: `img_size` pixels, 2·`img_size` readout points, 10, 20 and 25 coils."""
    return make_dataset(directory, volumes=9, slices=4, img_size=img_size, coils=20, seed=8, progress=False)


if __name__ == "__main__":
    for one in measure():
        print(one.text())
