"""The description's sizes without its weights and data: random weights and a small phantom stand in, for measuring.

Time and memory do not depend on the values. What is written here is large; it goes to a temporary folder.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mrilib.phantom import make_dataset


def write_random_backbone(config_path: Path, path: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
    """Random weights for a backbone's configuration, as a safetensors file; the model itself is never built.

    Parameters
    ----------
    config_path : Path
        For instance ``models/nirvana_1_3B.json``.
    path : Path
        The file to write, 2.7 GB for the 1.3B backbone in bfloat16.
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
            values.fill_(1.0)  # norms' weights; the decay rates of 1 lie in the range that training starts from
        tensors[name] = values
    save_file(tensors, path)


def make_data(directory: Path, img_size: int = 320) -> Path:
    """Phantom files of full size: `img_size` pixels, 2·`img_size` readout points, 20 coils and more."""
    return make_dataset(directory, volumes=9, slices=4, img_size=img_size, coils=20, seed=8, progress=False)
