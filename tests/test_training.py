"""The loop: learning, freezing, checkpoints, logs, accumulation, errors."""

import json
from pathlib import Path

import pytest
import systems
import torch
from fastmri.losses import SSIMLoss

from mrilib import inference, kspace, model, train, trainer, training
from mrilib.checkpoint import CheckpointError, load_checkpoint
from mrilib.config import ParameterError, Stage1Parameters
from mrilib.data import (
    FastMRIDataset,
    ShapeBatchSampler,
    index_volumes,
    load_annotations,
    make_loader,
    require_lesions,
    split_volumes,
)
from mrilib.encoder import KSpaceEncoder
from mrilib.history import read_history


@pytest.fixture(scope="module")
def backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return systems.write_backbone(tmp_path_factory.mktemp("backbone"))


def loaders(config):
    volumes = split_volumes(config)
    annotations = load_annotations(config)
    train = FastMRIDataset(volumes["train"], config, annotations, training=True, masks_per_slice=config.masks_per_slice)
    val = FastMRIDataset(volumes["val"], config, annotations)
    return make_loader(train, config.batch_size, config.seed, shuffle=True), make_loader(val, config.batch_size)


def train_stage1(config, directory):
    training.prepare(config)
    system = systems.build(config)
    stage = training.AnalysisStage(system, "stage1", config.label_smoothing)
    return system, training.fit(stage, config, *loaders(config), directory)


@pytest.fixture(scope="module")
def stage1(phantom_dir, backbone_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("stage1")
    config = systems.stage1_config(phantom_dir, backbone_dir, epochs=3, save_interval=2, learning_rate=3e-3)
    system, history = train_stage1(config, directory)
    return config, directory, system, history


def test_stage1_learns_and_writes_what_it_should(stage1):
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


def test_learning_rate_warms_up_and_falls(stage1):
    config, _, _, history = stage1
    rates = [step["learning_rate"] for step in history.steps]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(config.learning_rate, rel=0.1)
    assert peak == round(config.warmup_ratio * len(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_backbone_is_the_same_bit_by_bit(stage1):
    config, _, system, _ = stage1
    fresh, tokenizer = model.build_backbone(config, "cpu")
    assert model.fingerprint(system.backbone, system.tokenizer) == model.fingerprint(fresh, tokenizer)


def test_the_same_seed_gives_the_same_weights(stage1, tmp_path):
    config, _, system, history = stage1
    again, history_again = train_stage1(config, tmp_path)
    assert [s["loss"] for s in history.steps] == [s["loss"] for s in history_again.steps]
    assert model.tensor_hash(again.encoder) == model.tensor_hash(system.encoder)


def test_loaded_encoder_gives_the_same_tokens(stage1):
    config, directory, system, _ = stage1
    backbone, tokenizer = model.build_backbone(config, "cpu")
    loaded, loaded_config = inference.load_stage1(
        directory / "stage1_checkpoints" / "stage1_final_model.pt", backbone, tokenizer
    )
    assert loaded_config == config
    batch = next(iter(loaders(config)[1]))
    assert torch.equal(loaded.encoder(batch.kspace, batch.mask), system.encoder(batch.kspace, batch.mask))


def test_checkpoint_of_another_backbone_is_refused(stage1):
    config, directory, _, _ = stage1
    backbone, tokenizer = model.build_backbone(config, "cpu")
    with torch.no_grad():
        next(backbone.parameters()).add_(1)
    with pytest.raises(CheckpointError, match="another backbone"):
        inference.load_stage1(directory / "stage1_checkpoints" / "stage1_best_model.pt", backbone, tokenizer)


def test_stage2_trains_the_decoder_alone_and_beats_its_start(stage1, phantom_dir, backbone_dir, tmp_path):
    _, directory, _, _ = stage1
    checkpoint = directory / "stage1_checkpoints" / "stage1_best_model.pt"
    config = systems.stage2_config(phantom_dir, backbone_dir, checkpoint, epochs=4, learning_rate=5e-3)
    training.prepare(config)
    backbone, tokenizer = model.build_backbone(config, "cpu")
    system, _ = inference.load_stage1(checkpoint, backbone, tokenizer)
    encoder_before = model.tensor_hash(system.encoder)
    system.decoder = model.build_decoder(config, backbone)
    train_loader, val_loader = loaders(config)
    stage = training.ReconstructionStage(system)
    with torch.no_grad():
        before = stage.validate(iter(val_loader))
    history = training.fit(stage, config, train_loader, val_loader, tmp_path)
    assert history.best_loss < before["loss"]
    assert model.tensor_hash(system.encoder) == encoder_before
    assert {"ssim", "psnr", "nmse", "loss"} == {name[4:] for name in history.epochs[0] if name.startswith("val_")}
    assert {"reconstruction_mean", "reconstruction_max", "target_mean"} <= set(history.steps[0])
    config_back = inference.load_stage2(tmp_path / "stage2_checkpoints" / "stage2_final_model.pt", system)
    assert config_back == config
    # The decoder belongs to this encoder's tokens.
    with torch.no_grad():
        system.encoder.start.add_(1)
    with pytest.raises(CheckpointError, match="another stage-1"):
        inference.load_stage2(tmp_path / "stage2_checkpoints" / "stage2_final_model.pt", system)


def test_lesions_weigh_in_stage_2_where_there_are_any(stage1, phantom_dir, backbone_dir, monkeypatch):
    """Every lesion of a slice adds its share; unknown findings and none add nothing; judged by the image alone."""
    _, directory, _, _ = stage1
    checkpoint = directory / "stage1_checkpoints" / "stage1_best_model.pt"
    config = systems.stage2_config(phantom_dir, backbone_dir, checkpoint, lesion_weight=0.5)
    training.prepare(config)
    stages = []
    for stage in train.make_stages(config, torch.device("cpu")):
        stages.append((stage.name, stage.lesion_weight))
        weighted = stage
    assert stages == [("stage2", 0.5), ("plain", 0.5)]
    plain = training.ReconstructionStage(weighted.model, "plain")
    dataset = FastMRIDataset(index_volumes(phantom_dir), config, load_annotations(config))
    require_lesions(dataset)
    seen = set()
    with torch.no_grad():
        for batch in make_loader(dataset, 3):
            parts = batch.chunks(1)
            added = [float(weighted.loss(one).total - plain.loss(one).total) for one in parts]
            boxes = [one.boxes for one in batch.slices]
            assert [value > 0 for value in added] == [bool(one) for one in boxes]
            assert float(weighted.loss(batch).total - plain.loss(batch).total) == pytest.approx(sum(added), abs=1e-5)
            assert weighted.score(batch) == plain.score(batch)
            seen |= {None if one is None else bool(one) for one in boxes}
    assert seen == {None, False, True}
    with pytest.raises(ParameterError, match="lesion_weight: no training slice has a box"):
        require_lesions(FastMRIDataset(dataset.volumes, config))
    monkeypatch.setattr(train, "load_annotations", lambda config: None)
    with pytest.raises(ParameterError, match="lesion_weight: no training slice has a box"):
        train.make_loaders(config)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_tokens_may_join_late(stage1, phantom_dir, backbone_dir, tmp_path, optimizer):
    """Until then neither encoder nor backbone runs and no epoch is the best; a training resumed before is the same."""
    checkpoint = stage1[1] / "stage1_checkpoints" / "stage1_best_model.pt"
    config = systems.stage2_config(
        phantom_dir, backbone_dir, checkpoint, epochs=2, tokens_from=0.5, optimizer=optimizer, train_control=False
    )
    config = config.model_copy(update={"checkpoint_minutes": 0})

    def trained(folder, stop_after=None, **changes):
        training.prepare(config)
        (stage,) = train.make_stages(config, torch.device("cpu"))
        calls = []

        def tokens(batch):
            calls.append(stage.progress)
            return stage.model.image_tokens(batch)

        def on_step(entry):
            if entry["step"] == stop_after:
                raise KeyboardInterrupt

        stage.image_tokens = tokens
        changed = config.model_copy(update=changes)
        one = trainer.Trainer(stage, changed, *loaders(config), folder, on_step=on_step)
        return one.run(), calls, one

    history, calls, whole = trained(tmp_path / "a")
    total = len(history.steps)
    late = [step / total for step in range(total) if step / total >= 0.5]
    # the first epoch ends with the last step that has none, and is judged without them
    assert total % 2 == 0 and list(dict.fromkeys(calls)) == late
    assert [epoch["complete"] for epoch in history.epochs] == [0, 1] and history.best_epoch == 2
    for step in history.steps:
        assert (step["gradient_norm_token_projection"] > 0) == ((step["step"] - 1) / total in late)
    assert read_history(tmp_path / "a", "stage2").best_epoch == 2
    decoder = whole.stage.model.decoder
    for parameter, steps in ((decoder.token_projection.bias, len(late)), (decoder.unet.head.bias, total)):
        assert int(whole.optimizer.state[parameter]["step"]) == steps  # a counter of its own
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", stop_after=total // 2 - 1)
    assert (tmp_path / "b" / "stage2_checkpoints" / "stage2_resume.pt").exists()
    *_, resumed = trained(tmp_path / "b", resume=True)
    assert model.tensor_hash(resumed.stage.part) == model.tensor_hash(decoder)
    with pytest.raises(ParameterError, match=r"tokens_from: of \d+ steps none"):
        trainer.Trainer(
            training.ReconstructionStage(whole.stage.model, tokens_from=0.999), config, *loaders(config), tmp_path
        )


def test_stages_are_made_as_the_parameters_say(stage1, phantom_dir, backbone_dir):
    checkpoint = stage1[1] / "stage1_checkpoints" / "stage1_best_model.pt"
    changed = {"tokens_from": 0.3, "sense": True}
    config = systems.stage2_config(phantom_dir, backbone_dir, checkpoint, **changed)
    stage, control = train.make_stages(config, torch.device("cpu"))
    assert stage.tokens_from == 0.3 and stage.complete and control.complete
    assert stage.model.decoder.sense and control.model.decoder.sense
    stage.progress = control.progress = 0.2
    assert not stage.complete and control.complete


def test_a_batch_may_be_decoded_more_than_once(stage1, phantom_dir, backbone_dir, tmp_path, monkeypatch):
    """Encoder and backbone run for the first time alone, and nothing else changes; whether it is resumed or not."""
    checkpoint = stage1[1] / "stage1_checkpoints" / "stage1_best_model.pt"
    late = {"tokens_from": 0.1, "encoder_image": True}
    config = systems.stage2_config(
        phantom_dir, backbone_dir, checkpoint, epochs=2, data_echo=3, train_control=False, batch_size=2, **late
    )
    config = config.model_copy(update={"checkpoint_minutes": 0})
    monkeypatch.setattr(ShapeBatchSampler, "ECHO_SPAN", 2)

    def trained(folder, stop_after=None, keeps=True, **changes):
        training.prepare(config)
        (stage,) = train.make_stages(config, torch.device("cpu"))
        calls, frozen = [], stage._frozen

        def counted(batch):
            if stage.part.training:
                calls.append(stage.progress)
            return frozen(batch)

        def on_step(entry):
            if entry["step"] == stop_after:
                raise KeyboardInterrupt

        stage._frozen = counted
        _, *data = train.make_loaders(config)
        one = trainer.Trainer(stage, config.model_copy(update=changes), *data, folder, on_step=on_step)
        assert stage.data_echo == 3
        stage.data_echo = 3 if keeps else 1
        one.run()
        assert changes or not stage.echoes  # nothing for a batch that does not come again
        return one, len(calls)

    whole, calls = trained(tmp_path / "a")
    unique = len(whole.sampler.plan())
    assert whole.step == 2 * 3 * unique and unique > 2
    assert calls == 2 * unique + 2  # the tokens join in the first block, whose batches were kept without them
    weights = model.tensor_hash(whole.stage.part)
    plain, calls = trained(tmp_path / "b", keeps=False)
    assert calls == plain.step == whole.step and model.tensor_hash(plain.stage.part) == weights
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "c", stop_after=whole.step // 2 + 3)  # within a block
    resumed, _ = trained(tmp_path / "c", resume=True)
    assert model.tensor_hash(resumed.stage.part) == weights


def test_echoes_fall_into_other_steps_and_only_what_comes_again_is_kept(stage1, phantom_dir, backbone_dir, tmp_path):
    checkpoint = stage1[1] / "stage1_checkpoints" / "stage1_best_model.pt"
    config = systems.stage2_config(
        phantom_dir, backbone_dir, checkpoint, data_echo=2, train_control=False, gradient_accumulation_steps=5
    )
    (stage,) = train.make_stages(config, torch.device("cpu"))
    _, loader, val = train.make_loaders(config)
    for steps in (1, 5, 7, 32):
        changed = config.model_copy(update={"gradient_accumulation_steps": steps})
        one = trainer.Trainer(stage, changed, loader, val, tmp_path)
        assert one.sampler.step == steps and stage.data_echo == 2
    # batches that come once, whatever the parameters say: nothing waits for an echo
    trainer.Trainer(stage, config, make_loader(loader.dataset, 2, shuffle=True), val, tmp_path)
    assert stage.data_echo == 1


def test_a_decoder_may_start_from_the_encoders_image(stage1, phantom_dir, backbone_dir, monkeypatch):
    """It is restored, has no graph, and is made once a batch: with the tokens where there are any."""
    config = systems.stage2_config(phantom_dir, backbone_dir, stage1[1], encoder_image=True)
    system = systems.build(stage1[0].model_copy(update={"restore_chans": 4, "varnet_image_weight": 1.0}))
    torch.nn.init.normal_(system.encoder.restoration.head.weight, std=0.1)
    batch = next(iter(loaders(config)[1]))
    calls, original = [], KSpaceEncoder.upright_image

    def counted(self, kspace_, mask):
        calls.append(torch.is_grad_enabled())
        return original(self, kspace_, mask)

    monkeypatch.setattr(KSpaceEncoder, "upright_image", counted)
    for use_tokens in (True, False):
        torch.manual_seed(0)
        system.decoder = model.build_decoder(config, system.backbone, use_tokens)
        stage = training.ReconstructionStage.of(system, config)
        system.freeze("decoder")
        calls.clear()
        stage.loss(batch).total.backward()
        system.check_gradients()
        assert calls == [False]
        with torch.no_grad():
            image = stage.reconstruct(batch)
            starts = system.start_images(batch)
            tokens = system.image_tokens(batch) if use_tokens else None
            torch.testing.assert_close(system.reconstruct(batch, tokens), image)
            torch.testing.assert_close(system.reconstruct(batch, tokens, starts), image)
            torch.testing.assert_close(system(batch), image)
            assert not torch.allclose(system.reconstruct(batch, tokens, starts.flip(-1)), image, rtol=0.01, atol=0)
            stage.image_tokens = system.image_tokens  # of a cache, which has no images
            torch.testing.assert_close(stage.reconstruct(batch), image)
    own = config.model_copy(update={"encoder_weights": True, "decoder_type": "small", "decoder_hidden_dim": 16})
    for use_tokens in (True, False):
        decoder = model.decoder_to_train(own, system, use_tokens)
        assert torch.equal(decoder.unet.up[0][0].body[2].weight, system.encoder.restoration.up[0][0].body[2].weight)
    with pytest.raises(ParameterError, match="encoder_weights: the decoder's U-Net is 8 wide and the encoder's 4"):
        model.decoder_to_train(own.model_copy(update={"decoder_hidden_dim": 32}), system)
    control = model.TwoStageModel(model.build_control(stage1[0], system.backbone), system.backbone, system.tokenizer)
    with pytest.raises(ParameterError, match="encoder_weights: this encoder restores no image"):
        model.decoder_to_train(own, control)
    control.decoder = system.decoder
    with pytest.raises(ValueError, match="encoder_image: a learned prefix makes no image"):
        control(batch)
    with pytest.raises(ParameterError, match="restore_chans: only the target teaches to restore"):
        Stage1Parameters.create({**stage1[0].to_dict(), "restore_chans": 4})


def test_accumulated_batches_give_the_gradient_of_the_whole(stage1):
    """Cross-entropy is normalised over the tokens of the whole effective batch, not batch by batch."""
    config, _, system, _ = stage1
    batches = list(loaders(config)[1])[:3]
    stage = training.AnalysisStage(system, "stage1", 0.1)
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


def test_a_loss_that_is_not_finite_stops_with_names(stage1, tmp_path, monkeypatch):
    config, _, _, _ = stage1
    system = systems.build(config)
    stage = training.AnalysisStage(system)
    real = stage.loss
    monkeypatch.setattr(stage, "loss", lambda batch: real(batch)._replace(total=real(batch).total * float("nan")))
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 1.*file_brain_AX.* slice \d"):
        training.fit(stage, config, *loaders(config), tmp_path)


def test_early_stopping(stage1, tmp_path, monkeypatch):
    config, _, _, _ = stage1
    patient = config.model_copy(update={"epochs": 6, "early_stopping_patience": 1})
    system = systems.build(config)
    stage = training.AnalysisStage(system)
    losses = iter([3.0, 2.0, 2.5, 1.0, 1.0, 1.0])
    monkeypatch.setattr(stage, "metrics", lambda scores: {"loss": next(losses)})
    history = training.fit(stage, patient, *loaders(config), tmp_path)
    assert len(history.epochs) == 3 and history.best_epoch == 2


def test_bf16_autocast_trains_both_stages_close_to_float32(stage1, phantom_dir, backbone_dir, tmp_path):
    config, directory, _, history = stage1
    half = config.model_copy(update={"mixed_precision": "bf16", "epochs": 1})
    _, history_half = train_stage1(half, tmp_path)
    assert history_half.steps[0]["loss"] == pytest.approx(history.steps[0]["loss"], rel=0.02)
    checkpoint = directory / "stage1_checkpoints" / "stage1_best_model.pt"
    stage2 = systems.stage2_config(phantom_dir, backbone_dir, checkpoint, epochs=1, mixed_precision="bf16")
    backbone, tokenizer = model.build_backbone(stage2, "cpu")
    system, _ = inference.load_stage1(checkpoint, backbone, tokenizer)
    system.decoder = model.build_decoder(stage2, backbone)
    history2 = training.fit(training.ReconstructionStage(system), stage2, *loaders(stage2), tmp_path)
    assert 0 < history2.epochs[0]["val_ssim"] < 1


def test_a_backbone_kept_in_bfloat16_has_a_checkpoint_of_its_own(stage1, backbone_dir):
    config, directory, _, _ = stage1
    backbone, tokenizer = model.build_backbone(config.model_copy(update={"backbone_dtype": "bfloat16"}), "cpu")
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.bfloat16}
    with pytest.raises(CheckpointError, match="backbone_dtype"):
        inference.load_stage1(directory / "stage1_checkpoints" / "stage1_best_model.pt", backbone, tokenizer)


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
    assert calls.count(False) == 1 and calls.count(True) == 2  # once more in the backward pass
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_the_reconstruction_term_reads_the_image_off_the_tokens(stage1, monkeypatch):
    """Off by default; with it the image tokens come to hold the image, slice by slice, mirrored ones mirrored."""
    config, _, _, _ = stage1
    plain = systems.build(config)
    assert plain.encoder.pixel_head is None
    system = systems.build(config.model_copy(update={"recon_weight": 2.0}))
    stage = training.AnalysisStage(system, recon_weight=2.0)
    batch = max(loaders(config)[1], key=lambda one: len(one.slices))
    result = stage.loss(batch)
    tokens = stage.weight(batch)
    text = training.AnalysisStage(system).loss(batch)
    assert float(result.total - text.total) / tokens == pytest.approx(2 * result.statistics["recon_loss"], rel=1e-4)
    parts = torch.stack([stage.loss(part).total for part in batch.chunks(1)])
    torch.testing.assert_close(parts.sum(), result.total, rtol=1e-4, atol=1e-3)
    parameters = system.freeze("encoder")
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        stage.loss(batch).total.backward()
        system.check_gradients()
        optimizer.step()
    learned = stage.loss(batch).statistics["recon_loss"]
    assert learned < 0.8 * result.statistics["recon_loss"]
    with torch.no_grad():  # the same tokens whatever is measured: a mirrored slice is held against a mirrored target
        fixed = system.encoder.tokens_and_maps(batch.kspace, batch.mask)
        monkeypatch.setattr(system.encoder, "tokens_and_maps", lambda *measured, **how: fixed)
        flipped = batch._replace(slices=[one._replace(mirrored=True) for one in batch.slices])
        turned = flipped._replace(target=batch.target.flip(-1))
        losses = [stage.loss(one).statistics["recon_loss"] for one in (batch, flipped, turned)]
    assert losses[0] == losses[2] != losses[1]
    told: list = []
    monkeypatch.setattr(train, "require_targets", lambda volumes, what: told.append((len(volumes), what)))
    train.make_loaders(config.model_copy(update={"recon_weight": 1.0}))
    assert told == [(len(split_volumes(config)["train"]), "recon_weight")]
    with pytest.raises(ValueError, match=r"recon_weight: .* has no reconstruction_rss"):
        stage.loss(batch._replace(target=None))


def test_varnets_image_may_learn_from_the_target(stage1, monkeypatch):
    """Off by default; a sum over slices; of no unit; a mirrored slice is held against a mirrored target."""
    config, _, _, _ = stage1
    system = systems.build(config)
    stage = training.AnalysisStage(system, image_weight=2.0)
    batch = max(loaders(config)[1], key=lambda one: len(one.slices))
    result, text, tokens = stage.loss(batch), training.AnalysisStage(system).loss(batch), stage.weight(batch)
    start = result.statistics["varnet_image_loss"]
    assert float(result.total - text.total) / tokens == pytest.approx(2 * start, rel=1e-4)
    parts = torch.stack([stage.loss(part).total for part in batch.chunks(1)])
    torch.testing.assert_close(parts.sum(), result.total, rtol=1e-4, atol=1e-3)
    flipped = batch._replace(slices=[one._replace(mirrored=True) for one in batch.slices])
    for other in (batch._replace(target=3 * batch.target), flipped):
        assert stage.loss(other).statistics["varnet_image_loss"] == pytest.approx(start, rel=1e-5)
    wrong = batch._replace(target=batch.target.flip(-1))
    assert stage.loss(wrong).statistics["varnet_image_loss"] > 1.01 * start
    with torch.no_grad():
        pixels = system.encoder.pixels(batch.kspace, batch.mask)
        size = pixels.shape[-1]
        target = kspace.center_crop_or_pad(
            kspace.center_crop_or_pad(batch.target, batch.kspace.shape[-2:]), (size, size)
        )
        magnitude, target = pixels.norm(dim=1), target / target.square().mean((1, 2), keepdim=True).sqrt()
        unlike = SSIMLoss()(magnitude[:, None], target[:, None], target.amax((1, 2)), reduced=False).mean((1, 2, 3))
        each = (magnitude - target).abs().mean((1, 2)) + unlike
        counts = (system.tokenize(batch.slices).labels != -100).sum(1)
    assert start == pytest.approx(float((each * counts).sum() / counts.sum()), rel=1e-4)
    system.freeze("encoder")
    optimizer = torch.optim.Adam(system.encoder.varnet.parameters(), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        stage.loss(batch).total.backward()
        optimizer.step()
    assert stage.loss(batch).statistics["varnet_image_loss"] < 0.9 * start
    told: list = []
    monkeypatch.setattr(train, "require_targets", lambda volumes, what: told.append(what))
    train.make_loaders(config.model_copy(update={"varnet_image_weight": 1.0}))
    assert told == ["varnet_image_weight"]
    with pytest.raises(ValueError, match=r"varnet_image_weight: .* has no reconstruction_rss"):
        stage.loss(batch._replace(target=None))
    kept = {"varnet_keep": True, "varnet_weights": str(__file__), "varnet_image_weight": 1.0}
    with pytest.raises(ParameterError, match="varnet_image_weight: a VarNet that is kept learns nothing"):
        Stage1Parameters.create({**config.to_dict(), **kept})
