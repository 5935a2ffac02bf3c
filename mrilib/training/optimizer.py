"""The optimizers of both stages: AdamW, or Muon for matrices and kernels with AdamW for everything else.

Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) takes the momentum of a matrix to
the nearest orthogonal one by five Newton-Schulz steps, so that directions with small gradients move as far as those
with large ones. A step is scaled to the size that AdamW's would have (Liu et al., "Muon is scalable for LLM training",
2025), so learning rates mean the same for both. PyTorch's own Muon takes matrices alone; here a convolution's kernel
counts as the matrix from its inputs and taps to its outputs (a transposed one's from its inputs to outputs and taps).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mrilib.config import TrainingParameters

MOMENTUM = 0.95
SMALLEST = 1e-18  # a norm whose squares single precision still holds
SCALE = 0.2  # times the square root of a matrix's longer side: the root mean square of AdamW's steps
STEPS = ((3.4445, -4.7750, 2.0315),) * 5  # the quintic's coefficients


def build_optimizer(parameters: Sequence[nn.Parameter], config: TrainingParameters) -> torch.optim.Optimizer:
    """The optimizer that `config` asks for; vectors (norms, biases, tokens) are never decayed."""
    betas = (config.adam_betas[0], config.adam_betas[1])
    if config.optimizer == "muon":
        return Muon(parameters, config.learning_rate, betas, config.weight_decay)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas)


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon takes a parameter: a matrix or a kernel, of more than one row and column."""
    return parameter.ndim >= 2 and parameter.shape[0] > 1 and parameter[0].numel() > 1


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: all singular values between about 0.7 and 1.2; (m, n) → (m, n).

    A matrix of zeros, or of what a norm in single precision cannot hold beside them, gives zeros.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    norm = wide.norm()
    if norm < SMALLEST:
        return torch.zeros_like(matrix)
    # A kernel's matrix is many times as long as it is high: the steps are taken on its small Gram matrix, x ← p(xxᵀ) x
    # makes p(g) g p(g) of g = xxᵀ, and the product of all p is applied to the matrix once.
    x = wide / norm
    gram = x @ x.mT
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    total = unit
    for number, (a, b, c) in enumerate(STEPS):
        step = a * unit + b * gram + c * gram @ gram
        total = step @ total
        if number + 1 < len(STEPS):
            gram = step @ gram @ step
    x = total @ x
    return x if wide is matrix else x.mT


class Muon(torch.optim.Optimizer):
    """Muon for matrices and kernels, AdamW for the rest, in one optimizer: one schedule, one state to resume from.

    Parameters
    ----------
    parameters : sequence of Parameter
    lr : float
        As AdamW's.
    betas : (float, float)
        AdamW's.
    weight_decay : float
        Of the matrices and kernels, decoupled as in AdamW.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        groups = [
            {"params": [p for p in parameters if is_matrix(p)], "muon": True},
            {"params": [p for p in parameters if not is_matrix(p)], "muon": False},
        ]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step; parameters without a gradient stay."""
        assert closure is None, "no closure is evaluated here"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (self._matrix if group["muon"] else self._vector)(parameter, group)

    def _matrix(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(MOMENTUM).add_(gradient)
        if not gradient.any():
            return  # what is left of the momentum would be made as large as ever, and go on for ever
        ahead = (gradient + MOMENTUM * state["momentum"]).flatten(1)  # Nesterov's
        size = SCALE * max(ahead.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonal(ahead).view(parameter.shape), alpha=-group["lr"] * size)

    def _vector(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].lerp_(gradient.square(), 1 - beta2)
        mean = state["mean"] / (1 - beta1 ** state["step"])
        square = state["square"] / (1 - beta2 ** state["step"])
        parameter.addcdiv_(mean, square.sqrt() + 1e-8, value=-group["lr"])
