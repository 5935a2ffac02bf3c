"""How often a training step makes the CPU wait for the device: once, to read the step's numbers.

The CPU queues work for a GPU in advance. A wait leaves the GPU idle until new work is queued.
"""

from pathlib import Path
from typing import Any

import pytest
import systems
import torch
from pretended_device import META, PretendedTensor, WaitCounter, pretended

from mrilib.config import Stage1Parameters, Stage2Parameters
from mrilib.model import two_stage
from mrilib.model.decoders import build_decoder, find_decoder
from mrilib.training import device, distributed, stages
from mrilib.training.gradients import StepGradient, StepGradients
from mrilib.training.optimizer import build_optimizer

BATCHES = 2  # of a step, each with three slices
READ = "read by a copy to the CPU: mrilib/transfer.py"  # loss, statistics and gradient norms, in one copy
# Connected regions of the detection maps are found by scipy on the CPU, in every forward pass.
DETECTION = "read by a copy to the CPU: model/finding_maps.py"


def take_step(stage: stages.Stage, config: Stage1Parameters | Stage2Parameters) -> tuple[StepGradient, list[str]]:
    """Take a step on the pretended device; return its numbers and the place of each wait."""
    loader = systems.loaders(config)[0]
    batches = [batch for batch, _ in zip(loader, range(BATCHES), strict=False)]
    assert [len(batch.slices) for batch in batches] == [3] * BATCHES
    accelerator = distributed.build_accelerator(torch.device("cpu"), Path())
    with pretended(META):
        stage.model.to(META)
        parameters = stage.model.freeze(stage.trainable)
        stage.model.train()
        optimizer = build_optimizer(parameters, config)
        before = [parameter.value.clone() for parameter in parameters]
        with WaitCounter() as counter:
            step = StepGradients(stage, parameters, optimizer, accelerator, config).compute(batches, 3, "a step")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert step.is_finite and any((p.value != old).any() for p, old in zip(parameters, before, strict=True))
    return step, [place.rpartition(":")[0] for place in counter.places.elements()]


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give encoders several cascades and layers, since a wait in each of them must show."""
    monkeypatch.setattr(systems, "ENCODER", systems.ENCODER | {"varnet_num_cascades": 2, "vit_num_layers": 2})


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize(
    "values",
    [
        {"varnet_map_network": True},
        {"optimizer": "muon", "activation_checkpointing": True},
        {"optimizer": "muon", "finding_labels": ["Edema", "Mass"], "mirror_fraction": 0.5},
    ],
    ids=["map network", "activation checkpointing", "detection maps"],
)
def test_step_of_stage1_waits_once_and_once_for_each_detection(
    phantom_dir: Path, backbone_dir: Path, values: dict[str, Any]
) -> None:
    split = {"test_fraction": 0.25, "split_seed": 4}  # findings among the training patients
    config = systems.stage1_config(phantom_dir, backbone_dir, **split, **values)
    device.prepare(config)
    model = systems.build(config)
    if model.encoder.finding_maps is not None:  # every pixel is detected
        torch.nn.init.constant_(model.encoder.finding_maps.unet.head.bias, 2.0)
    step, waits = take_step(stages.AnalysisStage(model, "stage1", 0.1, stages.MAP_WEIGHT), config)
    assert sorted(waits) == [DETECTION] * BATCHES * bool(config.finding_labels) + [READ], waits
    assert {"cross_entropy", "token_accuracy"} <= set(step.statistics) and len(step.losses) == BATCHES


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize(
    "values",
    [
        {"decoder": "unet_dc", "optimizer": "muon", "activation_checkpointing": True},
        {"decoder": "unet_dc", "sense": False},
        {"decoder": "no_token_decoder"},
        {"decoder": "varnet"},
        {"decoder": "varnet_measured_lines"},
        {"decoder": "varnet_combined"},
        {"decoder": "fastmri_unet"},
    ],
    ids=lambda values: " ".join(f"{value}" for value in values.values()),
)
def test_step_of_stage2_waits_once(
    phantom_dir: Path, backbone_dir: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    (tmp_path / "stage1.pt").touch()
    sizes = {"baseline_cascades": 2, "baseline_chans": 4, "baseline_pools": 2}
    config = systems.stage2_config(phantom_dir, backbone_dir, tmp_path / "stage1.pt", **sizes, **values)
    device.prepare(config)
    model = two_stage.TwoStageModel()
    if find_decoder(config.decoder).uses_tokens:
        model = systems.build(systems.stage1_config(phantom_dir, backbone_dir))
    model.decoder = build_decoder(config, 0 if model.backbone is None else two_stage.hidden_size(model.backbone))
    step, waits = take_step(stages.ReconstructionStage(model), config)
    assert waits == [READ], waits
    assert {"reconstruction_mean", "target_max"} <= set(step.statistics)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(), lambda x: float(x[0]), lambda x: int(x[0]), lambda x: bool(x.any()),
        lambda x: [0] * 9 and [0, 1, 2][x.long()[0]], lambda x: x.tolist(), lambda x: x.cpu(),
        lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: torch.masked_select(x, x > 0),
        lambda x: x[: x.long()[0]], lambda x: x.add_(torch.ones(3).to(META)),
        lambda x: torch.tensor([1.0], device=META), lambda x: x.copy_(torch.ones(3)),
        lambda x: x[torch.tensor([0, 1])], lambda x: torch.equal(x, x),
    ],
)  # fmt: skip
def test_every_kind_of_wait_is_counted(wait: Any) -> None:
    with pretended(META), WaitCounter() as counter:
        x = torch.ones(3).to(META, non_blocking=True)
        y = (x * 2).sum() + torch.zeros((), device=META)
        assert isinstance(y, PretendedTensor) and not counter.places
        wait(x)
    assert sum(counter.places.values()) == 1, counter.places
    assert "test_waits.py" in next(iter(counter.places))
