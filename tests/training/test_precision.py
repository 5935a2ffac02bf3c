"""Mixed precision, TF32 and fused kernels: what runs in which type, and the loss scale of fp16."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import systems
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mrilib import processes
from mrilib.backbone.delta_rule import gated_delta_rule
from mrilib.backbone.trigger import TriggerWeights
from mrilib.config import Stage1Parameters
from mrilib.model import two_stage
from mrilib.model.decoders import build_decoder
from mrilib.training import device, gradients, loop, stages
from mrilib.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from mrilib.training.distributed import TrainingStopped
from mrilib.training.load_state import load_optimizer
from mrilib.training.losses import VolumeSSIMLoss
from mrilib.training.optimizer import build_optimizer

RESUME = Path("stage1_checkpoints", "stage1_resume.pt")
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


@pytest.fixture
def config(phantom_dir: Path, backbone_dir: Path) -> Stage1Parameters:
    """One epoch of three steps in fp16."""
    return systems.stage1_config(
        phantom_dir, backbone_dir, epochs=1, max_train_slices=9, max_val_slices=3, mixed_precision="fp16"
    )


def fit(config: Stage1Parameters, directory: Path, **options: Any) -> Any:
    device.prepare(config)
    stage = stages.AnalysisStage(systems.build(config), "stage1", config.label_smoothing)
    return loop.fit(stage, config, *systems.loaders(config), directory, **options)


class Operations(TorchDispatchMode):
    """Records each operation's name, the types of its tensors, and whether TF32 is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, set[torch.dtype], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtypes = {one.dtype for one in args if isinstance(one, Tensor)}
        self.calls.append((func.overloadpacket.__name__, dtypes, torch.backends.cuda.matmul.allow_tf32))
        return func(*args, **(kwargs or {}))

    def types(self, *names: str) -> set[torch.dtype]:
        return set().union(*(dtypes for name, dtypes, _ in self.calls if name in names))

    def products(self) -> list[bool]:
        return [tf32 for name, _, tf32 in self.calls if name in PRODUCTS]


@pytest.mark.parametrize(("precision", "half"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_networks_run_in_half_precision_and_fourier_transforms_rss_and_ssim_do_not(
    phantom_dir: Path, backbone_dir: Path, tmp_path: Path, precision: str, half: torch.dtype
) -> None:
    checkpoint = tmp_path / "stage1.pt"
    checkpoint.touch()
    config = systems.stage2_config(phantom_dir, backbone_dir, checkpoint, mixed_precision=precision)
    device.prepare(config)
    model = systems.build(systems.stage1_config(phantom_dir, backbone_dir))
    model.decoder = build_decoder(config, two_stage.hidden_size(model.backbone))
    with torch.no_grad():
        model.decoder.unet.head.weight.normal_()
    stage = stages.ReconstructionStage(model)
    batch = next(iter(systems.loaders(config)[1]))
    with torch.no_grad():
        expected = stage.loss(batch).total
        with Operations() as operations, device.autocast(config, torch.device("cpu")):
            image = stage.reconstruct(batch)
        with Operations() as of_loss, device.autocast(config, torch.device("cpu")):
            losses = stage.image_loss(image, batch)
    assert operations.types("convolution", "mkldnn_convolution") == {half}
    assert operations.types("_fft_c2c") == {torch.complex64} and half not in operations.types("sqrt", "clamp_min")
    assert image.dtype == losses.dtype == torch.float32 and half not in of_loss.types(
        *(call[0] for call in of_loss.calls)
    )
    assert float(losses.sum()) == pytest.approx(float(expected), rel=0.02)


def test_fp16_trains_close_to_float32(config: Stage1Parameters, tmp_path: Path) -> None:
    half = fit(config, tmp_path / "half")
    whole = fit(config.model_copy(update={"mixed_precision": "no"}), tmp_path / "whole")
    assert half.skipped == 0 and len(half.steps) == 3
    for name in ("loss", "gradient_norm"):  # gradients are unscaled before they are measured and clipped
        values = [[step[name] for step in history.steps] for history in (half, whole)]
        assert values[0] == pytest.approx(values[1], rel=0.05)


@pytest.fixture
def large_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start with a loss scale at which gradients overflow, and raise it again after every step."""

    def build(*_: Any) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=1)

    monkeypatch.setattr(gradients, "build_scaler", build)


@pytest.mark.usefixtures("large_scale")
def test_overflow_skips_the_step_halves_the_scale_and_resumes_exactly(config: Stage1Parameters, tmp_path: Path) -> None:
    config = config.model_copy(update={"epochs": 2})
    whole = fit(config, tmp_path / "whole")
    assert whole.skipped >= 1 and sum(epoch["skipped_steps"] for epoch in whole.epochs) == whole.skipped
    run = tmp_path / "stopped"
    with pytest.raises(TrainingStopped):
        fit(config, run, on_step=lambda entry: entry["step"] == 2 and processes.request_stop(run, "x"))
    (run / processes.STOP_FILE).unlink()
    saved = load_checkpoint(run / RESUME, "stage1")
    assert saved["scaler"]["scale"] != 2.0**17
    resumed = fit(config.model_copy(update={"resume": True}), run)
    for entry, other in zip(resumed.steps, whole.steps, strict=True):
        assert {**entry, "seconds": 0} == pytest.approx({**other, "seconds": 0}, rel=0, abs=0, nan_ok=True)

    content = {name: value for name, value in saved.items() if name != "format"}
    for wrong in ({}, {**content["scaler"], "scale": 0.0}, {**content["scaler"], "scale": "1"}, 7):
        save_checkpoint(tmp_path / "damaged" / RESUME, {**content, "scaler": wrong})
        with pytest.raises(CheckpointError, match="scaler"):
            fit(config.model_copy(update={"resume": True}), tmp_path / "damaged")


class NaNLoss(stages.AnalysisStage):
    def loss(self, batch: Any) -> Any:
        result = super().loss(batch)
        return result._replace(total=result.total * float("nan"))


def test_a_nan_loss_is_an_error_in_fp16_too(config: Stage1Parameters, tmp_path: Path) -> None:
    device.prepare(config)
    stage = NaNLoss(systems.build(config), "stage1", config.label_smoothing)
    with pytest.raises(FloatingPointError, match="step 1: loss nan"):
        loop.fit(stage, config, *systems.loaders(config), tmp_path)


# ------------------------------------------------------------------------------------------------------- TF32


@pytest.fixture
def tf32() -> Iterator[None]:
    """Allow TF32; on the CPU it changes nothing, but the switch can be read."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    yield
    matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
def test_prepare_allows_tf32_on_a_gpu(config: Stage1Parameters, monkeypatch: pytest.MonkeyPatch) -> None:
    device.prepare(config)
    assert not torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setattr(device, "pick_device", lambda _: torch.device("cuda", 0))
    device.prepare(config)
    assert torch.backends.cuda.matmul.allow_tf32
    device.prepare(config.model_copy(update={"compile": True}))  # compiled functions cannot leave products out
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.usefixtures("tf32")
def test_ssim_and_its_gradient_do_not_use_tf32() -> None:
    image = torch.rand(2, 20, 24, requires_grad=True)
    with Operations() as operations:
        VolumeSSIMLoss()(image, torch.rand(2, 20, 24), torch.ones(2)).sum().backward()
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert operations.products() == [False] * 4 + [True]
    assert image.grad is not None and torch.backends.cuda.matmul.allow_tf32


def test_gradient_of_ssim_equals_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    image, target = torch.rand(2, 1, 9, 12, generator=generator)
    image.requires_grad_()
    VolumeSSIMLoss()(image, target, torch.ones(1)).sum().backward()
    direction = torch.randn(image.shape, generator=generator)
    with torch.no_grad():
        up, down = (VolumeSSIMLoss()(image + step * direction, target, torch.ones(1)) for step in (0.01, -0.01))
    assert image.grad is not None
    assert float((image.grad * direction).sum()) == pytest.approx(float(up - down) / 0.02, rel=0.02)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("length", [1, 70])
def test_delta_rule_and_trigger_do_not_use_tf32(length: int) -> None:
    q, k, v = torch.rand(3, 1, length, 2, 4)
    gate = torch.rand(1, length, 2)
    weights = TriggerWeights(4, 2)
    with torch.no_grad(), Operations() as operations:
        for parameter in weights.parameters():
            parameter.fill_(0.5)
        gated_delta_rule(q, k, v, -gate, gate)
        weights(*torch.rand(3, 1, length, 4), None)
    assert operations.products() and not any(operations.products())


# ------------------------------------------------------------------------------------ optimizer, memory layout


def test_adamw_is_fused_on_a_gpu_alone_and_resumes_on_either(config: Stage1Parameters) -> None:
    with FakeTensorMode():
        on_gpu = build_optimizer([nn.Parameter(torch.empty(3, 3, device="cuda"))], config)
    on_cpu = build_optimizer([nn.Parameter(torch.ones(3, 3))], config)
    assert [optimizer.param_groups[0]["fused"] for optimizer in (on_gpu, on_cpu)] == [True, None]
    load_optimizer(on_cpu, on_gpu.state_dict())
    load_optimizer(on_gpu, on_cpu.state_dict())
    assert [optimizer.param_groups[0]["fused"] for optimizer in (on_gpu, on_cpu)] == [True, None]
    for groups in (7, [7], [{}, {}, {}], [{"fused": True}]):
        with pytest.raises(ValueError, match="optimizer"):
            load_optimizer(on_cpu, {"state": {}, "param_groups": groups})


def test_convolutions_of_encoder_and_decoder_are_channels_last(
    phantom_dir: Path, backbone_dir: Path, tmp_path: Path
) -> None:
    model = systems.build(systems.stage1_config(phantom_dir, backbone_dir, varnet_map_network=True))
    (tmp_path / "stage1.pt").touch()
    config = systems.stage2_config(phantom_dir, backbone_dir, tmp_path / "stage1.pt")
    for network in (model.encoder.varnet, build_decoder(config, 32)):
        weights = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        assert weights and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
