"""Muon: nearly orthogonal updates of AdamW's size for matrices, AdamW for all other parameters."""

import pytest
import torch
from systems import stage1_config
from torch import nn

from mrilib.training.optimizer import (
    MOMENTUM,
    STEPS,
    Muon,
    build_optimizer,
    is_matrix,
    orthogonal,
)


@pytest.mark.parametrize("shape", [(7, 7), (5, 40), (40, 5), (1, 9), (2, 3)])
def test_orthogonal_has_singular_values_near_1(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.5 and values.max() < 1.3
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(24, 216), (40, 7), (16, 16)])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_gram_matrix_iteration_equals_the_published_one(shape, rank):
    """A low rank plus little noise is the hardest case."""
    generator = torch.Generator().manual_seed(rank)
    left, right = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    matrix = left @ right + 1e-3 * torch.randn(shape, generator=generator)
    x = (matrix / matrix.norm()).double()
    for a, b, c in STEPS:
        x = a * x + b * (x @ x.mT @ x) + c * (x @ x.mT @ x @ x.mT @ x)
    assert (orthogonal(matrix) - x).norm() < 2e-3 * x.norm()


def test_kernel_is_updated_as_the_matrix_of_its_inputs_and_taps():
    generator = torch.Generator().manual_seed(1)
    kernel = nn.Parameter(torch.randn(6, 4, 3, 3, generator=generator).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    ours, theirs = (Muon([p], 0.01, (0.9, 0.95), 0.1) for p in (kernel, matrix))
    for _ in range(3):
        gradient = torch.randn(6, 4, 3, 3, generator=generator)
        kernel.grad, matrix.grad = gradient, gradient.flatten(1)
        ours.step()
        theirs.step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach())


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_matrices_are_updated_as_by_torch_muon(shape):
    """The tolerance is wide because torch computes the orthogonal matrix in bfloat16."""
    generator = torch.Generator().manual_seed(2)
    mine = nn.Parameter(torch.randn(shape, generator=generator))
    its = nn.Parameter(mine.detach().clone())
    ours = Muon([mine], 0.02, (0.9, 0.95), 0.1)
    theirs = torch.optim.Muon([its], lr=0.02, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    start = mine.detach().clone()
    for _ in range(5):
        mine.grad = torch.randn(shape, generator=generator)
        its.grad = mine.grad.clone()
        ours.step()
        theirs.step()
    assert (mine - its).norm() < 0.03 * (mine - start).norm()


def test_other_parameters_are_updated_as_by_adamw():
    generator = torch.Generator().manual_seed(3)
    shapes = [(5,), (1, 8), (4, 1, 1), ()]
    mine = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    its = [nn.Parameter(p.detach().clone()) for p in mine]
    assert not any(is_matrix(p) for p in mine)
    ours = Muon(mine, 0.01, (0.8, 0.9), 0.0)
    theirs = torch.optim.AdamW(its, lr=0.01, betas=(0.8, 0.9), weight_decay=0.0)
    for _ in range(4):
        for a, b in zip(mine, its, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for a, b in zip(mine, its, strict=True):
        torch.testing.assert_close(a, b)


def test_updates_have_the_size_of_adamw_updates():
    matrix = nn.Parameter(torch.zeros(64, 256))
    matrix.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(4))
    Muon([matrix], 1e-3, (0.9, 0.999), 0.0).step()
    assert 1e-4 < float(matrix.detach().square().mean().sqrt()) < 3e-4  # 0.2 of the rate


def test_build_optimizer(phantom_dir, backbone_dir):
    weights = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))]
    adamw = build_optimizer(weights, stage1_config(phantom_dir, backbone_dir, weight_decay=0.5))
    assert isinstance(adamw, torch.optim.AdamW)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.5, 0.0]
    muon = build_optimizer(weights, stage1_config(phantom_dir, backbone_dir, optimizer="muon", learning_rate=0.01))
    assert isinstance(muon, Muon) and [group["lr"] for group in muon.param_groups] == [0.01, 0.01]
    weights[0].grad, weights[1].grad = torch.ones(3, 3), None
    muon.step()
    assert (weights[1] == 1).all() and (weights[0] < 1).all(), "no update without a gradient"


def test_zero_gradient_gives_no_update_and_no_nan():
    matrix = nn.Parameter(torch.ones(8, 8))
    ours = Muon([matrix], 1e-2, (0.9, 0.95), 0.0)
    matrix.grad = torch.full((8, 8), 1e-3)
    ours.step()
    after = matrix.detach().clone()
    for _ in range(1200):
        matrix.grad = torch.zeros(8, 8)
        ours.step()
    assert torch.equal(matrix.detach(), after)
    for size in (1e-25, 1e-37, 1e-44, 1e37):
        assert torch.isfinite(orthogonal(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) * size)).all()
