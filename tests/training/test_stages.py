"""Both stages in the training loop: learning, frozen modules, checkpoints, logs, accumulation."""

import json
from pathlib import Path

import pytest
import systems
import torch

from mrilib.data.dataset import FastMRIDataset
from mrilib.data.sampler import make_loader
from mrilib.data.splits import load_annotations, split_volumes
from mrilib.model import two_stage
from mrilib.model.decoders import build_decoder
from mrilib.training import device, loop, setup, stages
from mrilib.training.checkpoint import CheckpointError, load_checkpoint


@pytest.fixture(scope="module")
def backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return systems.write_backbone(tmp_path_factory.mktemp("backbone"))


def loaders(config):
    volumes = split_volumes(config)
    annotations = load_annotations(config)
    train = FastMRIDataset(volumes["train"], config, annotations, training=True)
    val = FastMRIDataset(volumes["val"], config, annotations)
    return make_loader(train, config.batch_size, config.seed, shuffle=True), make_loader(val, config.batch_size)


def train_stage1(config, directory):
    device.prepare(config)
    system = systems.build(config)
    stage = stages.AnalysisStage(system, "stage1", config.label_smoothing)
    return system, loop.fit(stage, config, *loaders(config), directory)


@pytest.fixture(scope="module")
def stage1(phantom_dir, backbone_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("stage1")
    config = systems.stage1_config(phantom_dir, backbone_dir, epochs=3, save_interval=2, learning_rate=3e-3)
    system, history = train_stage1(config, directory)
    return config, directory, system, history


def test_stage1_learns_and_writes_checkpoints_and_logs(stage1):
    config, directory, _, history = stage1
    assert history.epochs[-1]["val_loss"] < history.epochs[0]["val_loss"]
    names = {path.name for path in (directory / "stage1_checkpoints").iterdir()}
    assert names == {"stage1_best_model.pt", "stage1_final_model.pt", "stage1_epoch_2.pt"}
    lines = [json.loads(line) for line in (directory / "logs" / "stage1.jsonl").read_text().splitlines()]
    assert len(lines) == len(history.steps) == lines[-1]["step"]
    assert {"loss", "learning_rate", "gradient_norm", "gradient_norm_varnet", "gradient_norm_vit"} <= set(lines[0])
    table = (directory / "logs" / "stage1_history.csv").read_text().splitlines()
    assert len(table) == 1 + config.epochs
    final = load_checkpoint(directory / "stage1_checkpoints" / "stage1_final_model.pt", "stage1")
    assert final["epoch"] == 3 and final["config"] == config.to_dict()


def test_best_checkpoint_is_the_epoch_with_the_lowest_validation_loss(stage1):
    _, directory, _, history = stage1
    losses = [epoch["val_loss"] for epoch in history.epochs]
    best = load_checkpoint(directory / "stage1_checkpoints" / "stage1_best_model.pt", "stage1")
    assert best["epoch"] == history.best_epoch == 1 + losses.index(min(losses))


def test_learning_rate_schedule(stage1):
    config, _, _, history = stage1
    rates = [step["learning_rate"] for step in history.steps]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(config.learning_rate, rel=0.1)
    assert peak == round(config.warmup_ratio * len(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_backbone_is_unchanged(stage1):
    config, _, system, _ = stage1
    fresh, tokenizer = two_stage.build_backbone(config, "cpu")
    assert two_stage.fingerprint(system) == two_stage.fingerprint(two_stage.TwoStageModel(None, fresh, tokenizer))


def test_the_same_seed_gives_the_same_weights(stage1, tmp_path):
    config, _, system, history = stage1
    again, history_again = train_stage1(config, tmp_path)
    assert [s["loss"] for s in history.steps] == [s["loss"] for s in history_again.steps]
    assert two_stage.tensor_hash(again.encoder) == two_stage.tensor_hash(system.encoder)


def test_loaded_encoder_gives_the_same_tokens(stage1):
    config, directory, system, _ = stage1
    backbone, tokenizer = two_stage.build_backbone(config, "cpu")
    loaded, loaded_config = setup.load_stage1(
        directory / "stage1_checkpoints" / "stage1_final_model.pt", backbone, tokenizer
    )
    assert loaded_config == config
    batch = next(iter(loaders(config)[1]))
    assert torch.equal(loaded.encoder(batch.kspace, batch.mask), system.encoder(batch.kspace, batch.mask))


def test_checkpoint_of_another_backbone_is_refused(stage1):
    config, directory, _, _ = stage1
    backbone, tokenizer = two_stage.build_backbone(config, "cpu")
    with torch.no_grad():
        next(backbone.parameters()).add_(1)
    with pytest.raises(CheckpointError, match="another backbone"):
        setup.load_stage1(directory / "stage1_checkpoints" / "stage1_best_model.pt", backbone, tokenizer)


def test_stage2_trains_the_decoder_alone_and_lowers_its_loss(stage1, phantom_dir, backbone_dir, tmp_path):
    _, directory, _, _ = stage1
    checkpoint = directory / "stage1_checkpoints" / "stage1_best_model.pt"
    config = systems.stage2_config(phantom_dir, backbone_dir, checkpoint, epochs=4, learning_rate=5e-3)
    device.prepare(config)
    backbone, tokenizer = two_stage.build_backbone(config, "cpu")
    system, _ = setup.load_stage1(checkpoint, backbone, tokenizer)
    encoder_before = two_stage.tensor_hash(system.encoder)
    system.decoder = build_decoder(config, two_stage.hidden_size(backbone))
    train_loader, val_loader = loaders(config)
    stage = stages.ReconstructionStage(system)
    with torch.no_grad():
        before = stage.validate(iter(val_loader))
    history = loop.fit(stage, config, train_loader, val_loader, tmp_path)
    assert history.best_loss < before["loss"]
    assert two_stage.tensor_hash(system.encoder) == encoder_before
    assert {"ssim", "psnr", "nmse", "loss"} == {name[4:] for name in history.epochs[0] if name.startswith("val_")}
    assert {"reconstruction_mean", "reconstruction_max", "target_mean"} <= set(history.steps[0])
    config_back = setup.load_stage2(tmp_path / "stage2_checkpoints" / "stage2_final_model.pt", system)
    assert config_back == config
    with torch.no_grad():
        system.encoder.start.add_(1)
    with pytest.raises(CheckpointError, match="another stage-1"):
        setup.load_stage2(tmp_path / "stage2_checkpoints" / "stage2_final_model.pt", system)


def test_accumulated_batches_give_the_gradient_of_the_whole(stage1):
    """Cross-entropy is normalised over the tokens of the whole effective batch."""
    config, _, system, _ = stage1
    batches = list(loaders(config)[1])[:3]
    stage = stages.AnalysisStage(system, "stage1", 0.1)
    system.freeze("encoder")
    total = sum(stage.weight(batch) for batch in batches)
    for batch in batches:
        (stage.loss(batch).total / total).backward()
    accumulated = system.encoder.projection.weight.grad.clone()
    system.zero_grad(set_to_none=True)
    whole = sum(stage.loss(batch).total for batch in batches) / sum(
        int((system.tokenize(batch.slices).labels != -100).sum()) for batch in batches
    )
    whole.backward()
    torch.testing.assert_close(accumulated, system.encoder.projection.weight.grad, rtol=1e-4, atol=1e-7)
    system.zero_grad(set_to_none=True)


def test_early_stopping(stage1, tmp_path, monkeypatch):
    config, _, _, _ = stage1
    config = config.model_copy(update={"epochs": 6, "early_stopping_patience": 1})
    system = systems.build(config)
    stage = stages.AnalysisStage(system)
    losses = iter([3.0, 2.0, 2.5, 1.0, 1.0, 1.0])
    monkeypatch.setattr(stage, "metrics", lambda scores: {"loss": next(losses)})
    history = loop.fit(stage, config, *loaders(config), tmp_path)
    assert len(history.epochs) == 3 and history.best_epoch == 2


def test_bf16_autocast_trains_both_stages_close_to_float32(stage1, phantom_dir, backbone_dir, tmp_path):
    config, directory, _, history = stage1
    half = config.model_copy(update={"mixed_precision": "bf16", "epochs": 1})
    _, history_half = train_stage1(half, tmp_path)
    assert history_half.steps[0]["loss"] == pytest.approx(history.steps[0]["loss"], rel=0.02)
    checkpoint = directory / "stage1_checkpoints" / "stage1_best_model.pt"
    stage2 = systems.stage2_config(phantom_dir, backbone_dir, checkpoint, epochs=1, mixed_precision="bf16")
    backbone, tokenizer = two_stage.build_backbone(stage2, "cpu")
    system, _ = setup.load_stage1(checkpoint, backbone, tokenizer)
    system.decoder = build_decoder(stage2, two_stage.hidden_size(backbone))
    history2 = loop.fit(stages.ReconstructionStage(system), stage2, *loaders(stage2), tmp_path)
    assert 0 < history2.epochs[0]["val_ssim"] < 1


def test_checkpoint_of_another_backbone_dtype_is_refused(stage1):
    config, directory, _, _ = stage1
    backbone, tokenizer = two_stage.build_backbone(config.model_copy(update={"backbone_dtype": "bfloat16"}), "cpu")
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.bfloat16}
    with pytest.raises(CheckpointError, match="backbone_dtype"):
        setup.load_stage1(directory / "stage1_checkpoints" / "stage1_best_model.pt", backbone, tokenizer)


def test_activation_checkpointing_reaches_the_frozen_backbone(stage1):
    config, _, _, _ = stage1
    batch = next(iter(loaders(config)[1]))
    gradients, calls = [], []
    for on in (False, True):
        system = systems.build(config.model_copy(update={"activation_checkpointing": on}))
        system.freeze("encoder")
        hook = system.backbone.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_, on=on: calls.append(on))
        system.analysis_loss(batch).loss.backward()
        hook.remove()
        gradients.append(system.encoder.projection.weight.grad)
    assert calls.count(False) == 1 and calls.count(True) == 2  # again in the backward pass
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
