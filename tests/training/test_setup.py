"""Loaders, stages and trained models: the same for notebooks and commands."""

import json
from types import SimpleNamespace

import pytest
import systems
import torch
from torch import nn

from mrilib.config import ROOT, ParameterError, Stage1Parameters, Stage2Parameters
from mrilib.display import tables
from mrilib.model import two_stage
from mrilib.model.baselines import zero_filled
from mrilib.model.decoders import DECODERS, DecoderEntry
from mrilib.runs import train
from mrilib.training import loop, setup, stages
from mrilib.training.history import History
from mrilib.training.loop import Trainer

FAST = {"finding_fraction": 0.5, "mirror_fraction": 0.5, "epochs": 2, "train_control": True, "test_fraction": 0.25}
TINY = {"baseline_cascades": 1, "baseline_chans": 2, "baseline_pools": 2}


def batches_of(epochs: int, loader) -> list:
    """Slices of a loader over some epochs, in order."""
    batches = []
    for epoch in range(epochs):
        loader.dataset.epoch = epoch
        for batch in loader:
            batches.append([(item.file, item.slice_num, item.mirrored) for item in batch.slices])
    return batches


class RecordedTraining:
    """A replacement for the module `loop`: `fit` records the batches of each stage and does not train."""

    def __init__(self):
        self.batches: dict[str, list] = {}

    def __getattr__(self, name):
        return getattr(stages, name)

    def fit(self, stage, config, train_loader, *_, **__):
        self.batches[stage.name] = batches_of(config.epochs, train_loader)
        return History(epochs=[{"epoch": 1.0}], best_epoch=1, best_loss=1.0)


def run_notebook_cells(config: Stage1Parameters, recorded: RecordedTraining, directory) -> None:
    """Run the cells of notebook 02 that build loaders and stages and train them."""
    notebook = json.loads((ROOT / "notebooks" / "02_train_stage1.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    run = SimpleNamespace(directory=directory, note=lambda *_, **__: None)
    watch = SimpleNamespace(
        Monitor=lambda *_: SimpleNamespace(step=None, epoch=None), text_progress=None, text_store=lambda _: None
    )
    names = {"config": config, "setup": setup, "loop": recorded, "run": run, "live": watch, "two_stage": two_stage}
    names |= {"display": lambda _: None, "tables": tables, "device": setup.prepare(config)}
    for start in ("loaders = ", "stage = ", "monitor = ", "baseline_history = "):
        (cell,) = (cell for cell in cells if cell.startswith(start))
        exec(cell.split("monitor.finish")[0], names)


def test_notebook_02_and_the_train_command_train_the_control_on_the_same_batches(
    phantom_dir, backbone_dir, tmp_path, monkeypatch
):
    """Slices, order and flips are also those of stage 1."""
    config = systems.stage1_config(phantom_dir, backbone_dir, **FAST)
    command, notebook = RecordedTraining(), RecordedTraining()
    monkeypatch.setattr(train, "loop", command)
    train.train(config.model_copy(update={"output_dir": str(tmp_path / "run")}))
    run_notebook_cells(config, notebook, tmp_path)
    control = command.batches["constant_prefix"]
    assert len(control) > 2 and any(mirrored for batch in control for *_, mirrored in batch)
    assert command.batches == notebook.batches == {"stage1": control, "constant_prefix": control}


def test_constant_prefix_reads_no_kspace(phantom_dir, backbone_dir, monkeypatch):
    config = systems.stage1_config(phantom_dir, backbone_dir, **FAST)
    stage = setup.build_stage(config, setup.prepare(config))
    loaders = setup.make_loaders(config)
    control = setup.build_control_stage(config, stage)
    own = setup.stage_loaders(config, control, loaders)
    monkeypatch.setattr("mrilib.data.dataset.h5py.File", lambda *_: pytest.fail("a file is read"))
    assert all(batch.kspace.numel() == 0 for loader in (own.train, own.val) for batch in loader)
    assert setup.stage_loaders(config, stage, loaders) is loaders


@pytest.fixture(scope="module")
def stage2(phantom_dir, backbone_dir) -> Stage2Parameters:
    """Parameters without a stage-1 checkpoint."""
    return systems.stage2_config(phantom_dir, backbone_dir, "", epochs=1, train_control=False, **TINY)


@pytest.mark.parametrize("name", [name for name, entry in DECODERS.items() if not entry.uses_tokens])
def test_decoders_without_tokens_train_without_stage_1(stage2, name, tmp_path, monkeypatch):
    config = stage2.model_copy(update={"decoder": name, "max_steps": 2})
    monkeypatch.setattr(setup, "build_backbone", lambda *_: pytest.fail("the backbone is loaded"))
    stage = setup.build_stage(config, setup.prepare(config))
    loaders = setup.make_loaders(config)
    assert setup.stage_loaders(config.model_copy(update={"token_cache_dir": str(tmp_path)}), stage, loaders) is loaders
    history = loop.fit(stage, config, loaders.train, loaders.val, tmp_path)
    assert len(history.steps) == 2 and 0 < history.epochs[0]["val_ssim"] < 1
    assert two_stage.fingerprint(stage.model) == {}
    again = two_stage.TwoStageModel()
    assert setup.load_stage2(tmp_path / "stage2_checkpoints" / "stage2_final_model.pt", again) == config
    batch = next(iter(loaders.val))
    with torch.no_grad():
        assert torch.equal(again(batch), stage.model(batch))


def test_decoder_with_tokens_needs_stage_1(stage2):
    with pytest.raises(ParameterError, match=r"stage1_checkpoint: '' does not exist\. Run stage 1 first"):
        setup.prepare(stage2)


def test_unknown_decoder_is_refused_with_a_hint(stage2):
    for name, hint in (("varnett", "did you mean 'varnet'"), ("x", "there are unet_dc, no_token_decoder")):
        with pytest.raises(ParameterError, match=f"decoder: '{name}' is not known; {hint}"):
            setup.prepare(stage2.model_copy(update={"decoder": name}))


def test_custom_decoder_is_an_entry_of_decoders(stage2, tmp_path, monkeypatch):
    entry = DECODERS["fastmri_unet"]
    monkeypatch.setitem(DECODERS, "mine", DecoderEntry("mine", False, lambda config, _: entry.build(config, 0)))
    config = stage2.model_copy(update={"decoder": "mine", "max_steps": 1})
    loaders = setup.make_loaders(config)
    stage = setup.build_stage(config, setup.prepare(config))
    assert len(loop.fit(stage, config, loaders.train, loaders.val, tmp_path).steps) == 1


class TokenMean(nn.Module):
    """A decoder that adds a multiple of the tokens' mean to the zero-filled image."""

    def __init__(self, token_dim: int) -> None:
        super().__init__()
        self.token_dim, self.factor = token_dim, nn.Parameter(torch.ones(2))

    def forward(self, tokens, kspace, mask, scale, image_shape, acquired=None):
        image = self.factor[0] * zero_filled(kspace, scale, image_shape)
        if not self.token_dim:
            return image + 0 * self.factor[1]
        return image + self.factor[1] * tokens.mean((1, 2))[:, None, None] * scale[:, None, None]


def test_the_control_is_the_chosen_decoder_without_tokens(stage2, tmp_path, monkeypatch):
    monkeypatch.setitem(DECODERS, "mean", DecoderEntry("mean", True, lambda _, token_dim: TokenMean(token_dim)))
    config = stage2.model_copy(update={"decoder": "mean", "max_steps": 1})
    model = two_stage.TwoStageModel(decoder=TokenMean(8))
    control = setup.build_control_stage(config, stages.ReconstructionStage(model))
    assert isinstance(control.part, TokenMean) and control.part.token_dim == 0
    loaders = setup.make_loaders(config)
    loop.fit(control, config, loaders.train, loaders.val, tmp_path)
    again = two_stage.TwoStageModel()
    path = tmp_path / "stage2_checkpoints" / "no_token_decoder_final_model.pt"
    setup.load_stage2(path, again, control=True)
    assert isinstance(again.decoder, TokenMean)


class AbsoluteErrorStage(stages.ReconstructionStage):
    """Stage 2 with the mean absolute error, relative to the volume's maximum."""

    def image_loss(self, image, batch):
        return (image - batch.target).abs().mean((-2, -1)) / batch.maximum


def test_a_custom_loss_is_used_in_training_validation_and_by_the_control(stage2, tmp_path, monkeypatch):
    monkeypatch.setitem(setup.STAGES, 2, AbsoluteErrorStage)
    config = stage2.model_copy(update={"decoder": "fastmri_unet", "max_steps": 1})
    stage, loaders = setup.build_stage(config, setup.prepare(config)), setup.make_loaders(config)
    history = loop.fit(stage, config, loaders.train, loaders.val, tmp_path)
    batches = list(loaders.val)
    with torch.no_grad():
        expected = torch.cat([(stage.model(b) - b.target).abs().mean((-2, -1)) / b.maximum for b in batches]).mean()
    assert history.epochs[0]["val_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert isinstance(setup.build_control_stage(config, stage), AbsoluteErrorStage)


@pytest.mark.parametrize(("share", "epochs"), [(0, 2), (0.5, 1), (1.5, 2), (99, 2)])
def test_max_steps_ends_a_training_and_it_resumes(stage2, tmp_path, share, epochs):
    """`max_steps` may end within an epoch, which is then validated; 0 and large values have no effect."""
    config = stage2.model_copy(update={"decoder": "fastmri_unet", "epochs": 2, "batch_size": 2})
    loaders = setup.make_loaders(config)
    each = len(loaders.train)
    limit = int(share * each)
    config = config.model_copy(update={"max_steps": limit, "checkpoint_minutes": 0})

    def trained(folder, stop_after=0, **changes):
        stage = setup.build_stage(config, setup.prepare(config))

        def on_step(entry):
            if entry["step"] == stop_after:
                raise KeyboardInterrupt

        changed = config.model_copy(update=changes)
        trainer = Trainer(stage, changed, loaders.train, loaders.val, folder, on_step=on_step)
        return trainer.run(), stage

    history, stage = trained(tmp_path / "a")
    total = limit if 0 < limit < 2 * each else 2 * each
    assert len(history.steps) == total and len(history.epochs) == epochs
    rates = [step["learning_rate"] for step in history.steps]
    assert rates[-1] <= 0.5 * max(rates)  # the schedule ends where the training does
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", stop_after=total - 1)
    _, resumed = trained(tmp_path / "b", resume=True)
    assert two_stage.tensor_hash(resumed.part) == two_stage.tensor_hash(stage.part)
