"""Run folders of made methods: reconstructions blended from the target and noise, with the records of a sweep."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mrilib.data.dataset import Volume
from mrilib.evaluation.reconstructions import (
    evaluate_volumes,
    read_target,
    summarize_methods,
    write_reconstruction,
)
from mrilib.files import write_json

STAGES = {"two_stage": ("stage1", "stage2")}


def make_method_run(
    parent: Path, method: str, volumes: Sequence[Volume], noise: float, seed: int = 0, **evaluation: Any
) -> Path:
    """Write ``comparison-METHOD-seed-SEED``, evaluated at 4x and 8x; `noise` relative to the volume's maximum.

    The volumes are all test data. `evaluation` changes the parameters of 04_evaluate.
    """
    folder = parent / f"comparison-{method}-seed-{seed}"
    stages = STAGES.get(method, ("stage2",))
    config = {"data_dir": str(volumes[0].path.parent), "test_dir": "", "annotations_dir": "", "crop": "readout"}
    config |= {"test_fraction": 0.5, "split_seed": 0, "accelerations": [4, 8], "center_fractions": [0.08, 0.06]}
    config |= {"shift": "", "stage2_checkpoint": str(folder / "stage2_checkpoints" / "stage2_best_model.pt")}
    notebooks: dict[str, Any] = {stage: {"status": "done", "config": {"seed": seed, "epochs": 1}} for stage in stages}
    notebooks["evaluate"] = {"status": "done", "config": config | evaluation}
    record = {"name": folder.name, "status": "done", "planned": list(notebooks), "notebooks": notebooks}
    write_json(folder / "run.json", {**record, "started": "2030-01-01T00:00:00"})
    reconstructions = folder / "reconstructions"
    scores: dict[str, Any] = {}
    for acceleration in ("4", "8"):
        for name, level in (("model", noise * int(acceleration) / 4), ("zero_filled", 0.5)):
            for volume in volumes:
                target = np.stack([read_target(volume, number) for number in range(volume.slices)])
                rng = np.random.default_rng([seed, *volume.file.encode()])
                image = np.abs(target + level * volume.maximum * rng.standard_normal(target.shape))
                write_reconstruction(reconstructions / name / acceleration / volume.path.name, image)
            scores.setdefault(acceleration, {})[name] = evaluate_volumes(volumes, reconstructions / name / acceleration)
    cost = {f"{stage}_seconds": 60.0 * (1 + len(method)) for stage in stages}
    cost |= {"trainable_parameters": dict.fromkeys(stages, 1000)}
    write_json(folder / "metrics.json", {"reconstruction": summarize_methods(scores), "cost": cost})
    for stage in stages:
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        (logs / f"{stage}.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
        (logs / f"{stage}_history.csv").write_text("epoch,train_loss,val_loss\n1,3.0,2.5\n")
    return folder
