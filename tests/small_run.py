"""A small trained run for the tests of commands that read one."""

import json
from pathlib import Path

import systems

from mrilib.config import EvaluateParameters
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.sampler import make_loader
from mrilib.data.splits import split_volumes
from mrilib.model import decoders, two_stage
from mrilib.training import loop, setup, stages

COMMON = ("data_dir", "val_fraction", "test_fraction", "split_seed", "img_size", "config_path", "backbone_path")


def write_run(directory: Path, phantom_dir: Path, backbone_dir: Path) -> Path:
    """Write a run folder with the parts that `reconstruct` reads: weights of both stages, and the record."""
    few = {"epochs": 1, "max_train_slices": 3, "max_val_slices": 3, "num_coils": 4}
    one = systems.stage1_config(phantom_dir, backbone_dir, **few)
    volumes = split_volumes(one)
    val = make_loader(FastMRIDataset(volumes["val"], one, max_slices=3), 3)
    train = make_loader(FastMRIDataset(volumes["train"], one, training=True, max_slices=3), 3, shuffle=True)
    loop.fit(stages.AnalysisStage(systems.build(one)), one, train, val, directory)
    checkpoint = directory / "stage1_checkpoints" / "stage1_best_model.pt"
    two = systems.stage2_config(phantom_dir, backbone_dir, checkpoint, **few)
    backbone, tokenizer = two_stage.build_backbone(two, "cpu")
    system, _ = setup.load_stage1(checkpoint, backbone, tokenizer)
    system.decoder = decoders.build_decoder(two, two_stage.hidden_size(backbone))
    loop.fit(stages.ReconstructionStage(system), two, train, val, directory)
    values = systems.values(phantom_dir, backbone_dir)
    config = EvaluateParameters.create(
        {name: values[name] for name in COMMON}
        | {
            "output_dir": str(directory),
            "stage1_checkpoint": str(checkpoint),
            "stage2_checkpoint": str(directory / "stage2_checkpoints" / "stage2_best_model.pt"),
            "constant_prefix_checkpoint": "",
            "no_token_decoder_checkpoint": "",
            "num_coils": 4,
            "max_new_tokens": 4,
            "batch_size": 3,
        }
    )
    record = {"name": "small", "notebooks": {"evaluate": {"status": "done", "config": config.to_dict()}}}
    record |= {"status": "done", "started": "2026-01-01T00:00:00+0000", "planned": ["evaluate"]}
    (directory / "run.json").write_text(json.dumps(record))
    return directory
