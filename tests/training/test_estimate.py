"""The estimate of a training on a GPU counts what it says: FLOPs by formula, bytes by parameter, living tensors."""

import dataclasses

import pytest
import systems
import torch
import yaml
from torch import nn

from mrilib.__main__ import main
from mrilib.training import estimate, setup


@pytest.fixture(scope="module")
def stage1(phantom_dir, backbone_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    return systems.stage1_config(phantom_dir, backbone_dir, output_dir=str(directory), train_control=False)


@pytest.fixture(scope="module")
def measured(stage1):
    return estimate.measure(stage1)


def test_flops_of_known_layers_equal_the_formula():
    """Forward 2·m·n of a matrix product; backward the same for each of input and weights, where they need gradients."""
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 5))
    backbone = nn.Linear(4 * 12 * 12, 10).requires_grad_(False)
    decoder = nn.Linear(10, 7)
    x = torch.randn(2, 3, 16, 16)
    first, second = 2 * (2 * 16 * 16) * 8 * 3 * 9, 2 * (2 * 12 * 12) * 4 * 8 * 25
    middle, last = 2 * 2 * 576 * 10, 2 * 2 * 10 * 7
    flops = estimate.PartFlops({"encoder": encoder, "backbone": backbone, "decoder": decoder})
    with flops.counting():
        loss = decoder(backbone(encoder(x).flatten(1))).sum()
        assert flops.take() == {"encoder": first + second, "backbone": middle, "decoder": last}
        loss.backward()
    # no gradient of x, none of the frozen weights
    assert flops.take() == {"encoder": first + 2 * second, "backbone": middle, "decoder": 2 * last}


def test_recomputed_activations_count_in_the_backward_pass():
    """PyTorch computes again only what it needs: all but the last product."""
    part = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    first, last = 2 * 4 * 6 * 5, 2 * 4 * 5 * 3
    x = torch.randn(4, 6, requires_grad=True)
    flops = estimate.PartFlops({"encoder": part})
    with flops.counting():
        loss = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False).square().sum()
        assert flops.take() == {"encoder": first + last}
        loss.backward()
    assert flops.take() == {"encoder": 3 * first + 2 * last}


def test_memory_of_known_tensors():
    """y = exp(a) and exp(y) are saved; the gradient of `a` is not an activation."""
    a = nn.Parameter(torch.randn(1000))
    with estimate.TensorMemory([a]) as memory:
        y = a.exp()
        assert memory.live == memory.peak == 4000
        a.detach().neg()
        assert memory.live == 4000 and memory.peak == 8000
        loss = y.exp().sum()
        assert memory.live == 8004
        del y
        assert memory.live == 8004  # the graph holds it
        loss.backward()
        del loss
        assert 8004 < memory.peak <= 16008
    assert memory.live == 0 and memory.weight_copies == 0


def test_autocast_copies_of_weights_are_not_counted_by_slice():
    linear = nn.Linear(100, 50, bias=False)
    peaks = {}
    for slices in (1, 3):
        x = torch.randn(slices, 100)
        with estimate.TensorMemory(linear.parameters()) as memory, torch.autocast("cpu", torch.bfloat16):
            linear(x).float().sum()
        assert memory.weight_copies == 2 * 100 * 50
        peaks[slices] = memory.peak
    assert peaks[1] < 2000 and peaks[3] == pytest.approx(3 * peaks[1], rel=0.05)


def test_bytes_equal_the_sum_over_parameters(stage1, measured):
    model = setup.build_stage(stage1, torch.device("cpu")).model
    assert set(measured.parts) == {"encoder", "backbone"}
    for name, part in measured.parts.items():
        own = list(getattr(model, name).parameters())
        assert part.parameters == sum(p.numel() for p in own)
        assert part.weight_bytes == sum(p.numel() * p.element_size() for p in own)
    encoder, backbone = measured.parts["encoder"], measured.parts["backbone"]
    tensors = len(list(model.encoder.parameters()))
    assert encoder.gradient_bytes == encoder.weight_bytes
    assert encoder.optimizer_bytes == 2 * encoder.weight_bytes + 4 * tensors  # AdamW: two moments, and a step count
    assert backbone.gradient_bytes == backbone.optimizer_bytes == 0
    assert backbone.backward_flops > 0, "gradients pass through the frozen language model"
    assert encoder.backward_flops > encoder.forward_flops > 0


def test_time_and_memory_follow_from_the_measurement(measured):
    full, third = measured.time_table(1.0), measured.time_table(1 / 3)
    gpu = estimate.GPUS[0]
    assert float(full["bf16"][0]) == pytest.approx(measured.epoch_flops / gpu.bf16 / 1e12 / 60, rel=0.01)
    assert float(third["bf16"][0]) == pytest.approx(3 * float(full["bf16"][0]), rel=0.01)
    one, three = (measured.memory_bytes(size, "no") for size in (1, 3))
    assert three - one == 2 * measured.activations["no"].per_slice > 0
    assert measured.activations["no"].weight_copies == 0 < measured.activations["bf16"].weight_copies
    measured.activations["no"] = estimate.Activations(10**10, 0)
    rows = {row["batch_size"]: row for row in measured.memory_table().to_dict("records") if row["precision"] != "bf16"}
    assert [rows[2][size] for size in ("24 GB", "40 GB", "80 GB")] == ["fits", "fits", "fits"]
    assert [rows[3][size] for size in ("24 GB", "40 GB", "80 GB")] == ["no", "fits", "fits"]
    assert [rows[8][size] for size in ("24 GB", "40 GB", "80 GB")] == ["no", "no", "no"]
    assert rows[3][""] == "these parameters"


def test_decoder_without_tokens_and_muon(phantom_dir, backbone_dir, tmp_path):
    """A part alone, an optimizer with matrix products, gradients accumulated over two batches."""
    config = systems.stage2_config(
        phantom_dir, backbone_dir, tmp_path / "none.pt", decoder="fastmri_unet", baseline_chans=2, baseline_pools=2,
        gradient_accumulation_steps=2, train_control=False,
    )  # fmt: skip
    adamw = estimate.measure(config)
    muon = estimate.measure(config.model_copy(update={"optimizer": "muon"}))
    assert set(muon.parts) == {"decoder"} and not muon.cached
    assert adamw.optimizer_flops == 0 < muon.optimizer_flops
    assert muon.epoch_flops - adamw.epoch_flops == pytest.approx(muon.steps * muon.optimizer_flops)
    assert muon.parts["decoder"].optimizer_bytes < adamw.parts["decoder"].optimizer_bytes
    assert muon.steps == -(-len(setup.make_loaders(config).train) // 2)


def test_with_a_token_cache_an_epoch_has_the_decoder_only(measured):
    size = estimate.Part(1, 4, 4, 8, 1e9, 2e9)
    stage2 = dataclasses.replace(
        measured, parts={"encoder": size, "backbone": size, "decoder": size}, train_slices=10, val_slices=4, steps=0
    )
    assert stage2.epoch_flops == 3 * (10 * 3e9 + 4 * 1e9)
    assert dataclasses.replace(stage2, cached=True).epoch_flops == 10 * 3e9 + 4 * 1e9


def test_option_utilisation(stage1, capsys, tmp_path):
    params = tmp_path / "stage1.yaml"
    params.write_text(yaml.safe_dump(stage1.to_dict()))
    command = ["train", str(params), "--stage", "1"]
    assert main([*command, "--dry-run", "--utilisation", "0.5"]) == 0
    output = capsys.readouterr().out
    assert "peak memory" in output and "at 50% of its peak" in output and "H100 SXM" in output
    for value in ("0", "1.01", "-1", "nan", "much"):
        with pytest.raises(SystemExit):
            main([*command, "--dry-run", f"--utilisation={value}"])
        assert "above 0, at most 1" in capsys.readouterr().err
    assert main([*command, "--utilisation", "0.5"]) == 1
    assert "--utilisation needs --dry-run" in capsys.readouterr().err
