"""Time and memory of one step of each stage at full size, on random weights and phantom slices.

Neither time nor memory depends on the values.
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
    """Make a dry run of each stage in a separate process.

    Parameters
    ----------
    params : path
        Folder with stage1.yaml and stage2.yaml.
    directory : path
        Holds a temporary folder for all files.
    **others
        Parameters that replace those of both files, e.g. device.

    Raises
    ------
    ParameterError
        If the disk has less than 15 GB of free space.
    """
    parent = resolve(directory)
    parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(parent).free < DISK_BYTES:
        raise ParameterError(
            f"{display_path(parent)}: the full-size step needs {DISK_BYTES / 1e9:.0f} GB of free disk space"
        )
    with tempfile.TemporaryDirectory(prefix="full-size-", dir=parent) as name:
        folder = Path(name)
        settings = resolve(read_yaml(resolve(params) / "stage1.yaml")["config_path"])
        write_random_backbone(settings, folder / "backbone.safetensors")
        values = {
            "data_dir": str(_make_patients(folder / "data")),
            "annotations_dir": "",
            "split_seed": 3,  # trains on the patient with 20 coils, compressed to 16, and 320 phase-encoding lines
            "val_fraction": 0.34,
            "test_fraction": 0.34,
            "config_path": str(settings),
            "backbone_path": str(folder / "backbone.safetensors"),
            "output_dir": name,
            "num_workers": 0,  # loading is timed separately
            **others,
        }
        stage1 = Stage1Parameters.from_yaml(resolve(params) / "stage1.yaml", values)
        first = report_in_subprocess(stage1, folder / "stage1", progress=False)
        (checkpoint,) = folder.glob("stage1/*/stage1_final_model.pt")
        values["stage1_checkpoint"] = str(checkpoint)
        stage2 = Stage2Parameters.from_yaml(resolve(params) / "stage2.yaml", values)
        return [first, report_in_subprocess(stage2, progress=False)]


def measure_once(path: Path, **others: Any) -> list[Report]:
    """Read the reports of `measure` from a JSON file, or measure and write them if its parameters differ."""
    if path.exists():
        content = read_json(path)
        if content["parameters"] == others:
            return [Report(**{**report, "batch": tuple(report["batch"])}) for report in content["reports"]]
    reports = measure(**others)
    write_json(path, {"parameters": others, "reports": [report.to_dict() for report in reports]})
    return reports


def table(reports: Sequence[Report]) -> pd.DataFrame:
    """Tabulate the reports, a row per stage."""
    return pd.DataFrame(
        {
            "stage": report.stage,
            "device": report.device,
            "slices × coils × readout × phase": "×".join(map(str, report.batch)),
            "one step [s]": f"{report.step_seconds:.2f}",
            "loading its slices, one process [s]": f"{report.load_seconds:.2f}",
            "peak memory [GB]": f"{report.peak_memory_bytes / 1e9:.1f}",
            "one checkpoint [GB]": f"{report.checkpoint_bytes / 1e9:.2f}",
        }
        for report in reports
    )


def write_random_backbone(config_path: Path, path: Path) -> None:
    """Write random bfloat16 weights for a backbone's configuration as a safetensors file, without building the model.

    The file has 2.8 GB for ``models/nirvana_1_3B.json``.
    """
    settings = json.loads(config_path.read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim > 1:
            values.normal_(std=settings["initializer_range"], generator=generator)
        else:
            values.fill_(1.0)  # norm weights and decay rates
        tensors[name] = values
    save_file(tensors, path)


def _make_patients(directory: Path) -> Path:
    """Make three phantom patients of 320 pixels, 640 readout points, and 10, 20 and 25 coils."""
    return make_dataset(directory, volumes=9, slices=4, img_size=320, coils=20, seed=8, progress=False)
