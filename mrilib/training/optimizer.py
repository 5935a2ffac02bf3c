"""Optimizers and learning-rate schedules: AdamW, or Muon for matrices and kernels with AdamW for all other parameters.

Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) replaces the momentum of a matrix
by a nearly orthogonal one, in five Newton-Schulz steps. Directions with small gradients then move as far as those with
large ones. Updates are scaled to the size of AdamW's (Liu et al., "Muon is scalable for LLM training", 2025), so that
both use the same learning rates. PyTorch's own Muon accepts matrices only. Here a convolution kernel is the matrix
from its inputs and taps to its outputs (a transposed convolution's: from its inputs to outputs and taps).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from mrilib.config import TrainingParameters

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}  # names in transformers
MOMENTUM = 0.95
SMALLEST_NORM = 1e-18  # single precision still holds its square
SCALE = 0.2  # root mean square of AdamW's updates over the learning rate
STEPS = ((3.4445, -4.7750, 2.0315),) * 5  # coefficients of the quintic polynomial


def build_optimizer(parameters: Sequence[nn.Parameter], config: TrainingParameters) -> torch.optim.Optimizer:
    """Build ``config.optimizer``; vectors (norms, biases, tokens) have no weight decay."""
    betas = (config.adam_betas[0], config.adam_betas[1])
    if config.optimizer == "muon":
        return Muon(parameters, config.learning_rate, betas, config.weight_decay)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    is_fused = True if parameters[0].device.type == "cuda" else None  # one kernel for all parameters
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=is_fused)


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainingParameters, steps: int) -> LRScheduler:
    """Build ``config.lr_schedule`` with linear warm-up over a share `warmup_ratio` of the optimizer steps."""
    warmup = round(config.warmup_ratio * steps)
    name = SCHEDULES[config.lr_schedule]
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def total_steps(config: TrainingParameters, steps_per_epoch: int) -> int:
    """Optimizer steps of a training: of all epochs, but at most `max_steps`."""
    steps = config.epochs * steps_per_epoch
    return min(steps, config.max_steps) if config.max_steps else steps


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon updates a parameter: a matrix or kernel with more than one row and column."""
    return parameter.ndim >= 2 and parameter.shape[0] > 1 and parameter[0].numel() > 1


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix, approximately: all singular values between about 0.7 and 1.2.

    Parameters
    ----------
    matrix : Tensor, shape (m, n)

    Returns
    -------
    Tensor, shape (m, n)
        Zeros if the norm of `matrix` is below `SMALLEST_NORM`.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    norm = wide.norm()
    is_zero = norm < SMALLEST_NORM  # stays on the device: asking for its value would make the CPU wait
    # A kernel's matrix has many more columns than rows, so the steps act on its small Gram matrix g = x xᵀ:
    # x ← p(g) x turns g into p(g) g p(g), and the product of all p is applied to x once.
    x = wide / torch.where(is_zero, 1, norm)
    gram = x @ x.mT
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    product = unit
    for number, (a, b, c) in enumerate(STEPS):
        step = a * unit + b * gram + c * gram @ gram
        product = step @ product
        if number + 1 < len(STEPS):
            gram = step @ gram @ step
    x = torch.where(is_zero, 0, product @ x)
    return x if wide is matrix else x.mT


class Muon(torch.optim.Optimizer):
    """Muon for matrices and kernels and AdamW for the rest, as one optimizer with one state.

    Parameters
    ----------
    parameters : sequence of Parameter
    lr : float
        As for AdamW.
    betas : (float, float)
        For AdamW.
    weight_decay : float
        Of matrices and kernels, decoupled as in AdamW.
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
        """Update the parameters that have a gradient."""
        assert closure is None, "a closure is not supported"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (self._update_matrix if group["muon"] else self._update_vector)(parameter, group)

    def _update_matrix(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(MOMENTUM).add_(gradient)
        # With a zero gradient, the remaining momentum, scaled to full size, would move the matrix forever.
        has_gradient = gradient.any()
        ahead = (gradient + MOMENTUM * state["momentum"]).flatten(1)  # Nesterov momentum
        size = SCALE * max(ahead.shape) ** 0.5
        parameter.mul_(torch.where(has_gradient, 1 - group["lr"] * group["weight_decay"], 1.0))
        update = torch.where(has_gradient, orthogonal(ahead), 0)
        parameter.add_(update.view(parameter.shape), alpha=-group["lr"] * size)

    def _update_vector(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
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
