"""Small models and their parameters for the tests: tiny backbone, encoder and decoder for 64×64 pixels."""

import os
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader

from mrilib import processes
from mrilib.backbone.nirvana import NirvanaConfig, NirvanaForCausalLM
from mrilib.config import Stage1Parameters, Stage2Parameters
from mrilib.data.dataset import Batch, FastMRIDataset
from mrilib.data.sampler import collate
from mrilib.model import two_stage
from mrilib.pretrain import corpus, tiny_nirvana
from mrilib.runs import train
from mrilib.training import setup

SIZE = 64


def write_backbone(directory: Path) -> Path:
    """Write a random Nirvana of width 32 and its tokenizer as a Hugging Face folder."""
    torch.manual_seed(0)
    tokenizer = corpus.make_tokenizer(vocab_size=500, texts=50)
    config = NirvanaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_heads=2, concept_dim=8, logit_dim=4
    )
    tiny_nirvana.save(NirvanaForCausalLM(config), tokenizer, directory)
    return directory


def values(data: Path, backbone: Path, **others: Any) -> dict[str, Any]:
    """Return values of parameters that both stages have."""
    return {
        "data_dir": str(data),
        "val_fraction": 0.25,
        "test_fraction": 0.5,
        "split_seed": 1,
        "num_coils": 6,
        "img_size": SIZE,
        "config_path": "",
        "backbone_path": str(backbone),
        "device": "cpu",
        "epochs": 2,
        "batch_size": 3,
        "interactive": False,
        "optimizer": "adamw",
        "adam_betas": [0.9, 0.999],
        "learning_rate": 3e-4,
        "warmup_ratio": 0.1,
        **others,
    }


ENCODER = {
    "vit_embed_dim": 16,
    "vit_num_layers": 1,
    "vit_num_heads": 2,
    "varnet_num_cascades": 1,
    "varnet_chans": 2,
    "varnet_pools": 2,
}
DECODER = {"decoder_type": "lightweight", "decoder_hidden_dim": 16}


def stage1_config(data: Path, backbone: Path, **others: Any) -> Stage1Parameters:
    """Return the parameters of a small stage 1."""
    return Stage1Parameters.create(values(data, backbone, **ENCODER, **others))


def stage2_config(data: Path, backbone: Path, checkpoint: Path, **others: Any) -> Stage2Parameters:
    """Return the parameters of a small stage 2."""
    return Stage2Parameters.create(values(data, backbone, stage1_checkpoint=str(checkpoint), **DECODER, **others))


def build(config: Stage1Parameters) -> two_stage.TwoStageModel:
    """Return a seeded encoder with its backbone."""
    torch.manual_seed(1)
    backbone, tokenizer = two_stage.build_backbone(config, "cpu")
    return two_stage.TwoStageModel(two_stage.build_encoder(config, backbone, tokenizer), backbone, tokenizer)


def batch_of(dataset: FastMRIDataset, count: int) -> Batch:
    """Return a batch of the first slice and the next of its shape, up to `count`."""
    key = dataset.shape_key(0)
    same = [index for index in range(len(dataset)) if dataset.shape_key(index) == key]
    return collate([dataset[index] for index in same[:count]])


def loaders(config: Stage1Parameters | Stage2Parameters) -> tuple[DataLoader, DataLoader]:
    """Return the training and validation loaders of the notebooks."""
    both = setup.make_loaders(config)
    return both.train, both.val


def train_in(directory: Path, config: Stage1Parameters | Stage2Parameters) -> None:
    """Train a stage in a run folder, like `python -m mrilib train`; at the top level for use as a process."""
    train.train(config.model_copy(update={"output_dir": str(directory)}))


def processes_of(directory: Path) -> list[int]:
    """Return the processes of a run folder, which have it in their environment."""
    pids = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(processes.RUN_VARIABLE) == str(directory) and process.pid != os.getpid():
                pids.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return pids
