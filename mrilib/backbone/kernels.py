"""Choice of the code that computes the gated delta rule: fused GPU kernels or PyTorch.

The Triton kernels of flash-linear-attention (extra `gpu`) run on CUDA if they are installed, PyTorch otherwise. Their
backward pass has been wrong on some GPUs. Before their first use, outputs and all gradients are therefore compared
with the naive recurrence on the same device. A kernel that fails is an error; nothing falls back silently.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mrilib.backbone import delta_rule
from mrilib.precision import full_float32

logger = logging.getLogger("mrilib")
PACKAGE = "flash-linear-attention"
TESTED = "0.6.0"  # the version in constraints.txt
# Largest relative error, root mean square of the error over that of the value. The kernels multiply TF32 or bfloat16
# operands, which round to 2⁻¹¹ and 2⁻⁹; wrong kernels are far beyond these bounds.
BOUND = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}
ADVICE = f"uninstall {PACKAGE} (PyTorch is slower, and exact) or install its tested version {TESTED}"
ARGUMENTS = ("q", "k", "v", "g", "beta", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel")
LENGTH = 130  # tokens of the check: two chunks of 64 and a rest


class KernelError(RuntimeError):
    """Fused kernels that cannot be imported, do not run, or give wrong values."""


class FusedKernels(NamedTuple):
    """The two fused kernels, with the interface of flash-linear-attention."""

    chunk: Callable[..., Any]  # any number of tokens, with gradients
    recurrent: Callable[..., Any]  # single tokens, without gradients


_errors: dict[tuple[str, torch.dtype, int], dict[str, float]] = {}  # of the kernels checked in this process


@functools.cache  # called by every layer for every token; a lookup takes half a millisecond
def installed_kernels() -> FusedKernels | None:
    """Return the fused kernels, or None if flash-linear-attention is not installed.

    Raises
    ------
    KernelError
        If the package is installed but cannot be imported, or if a kernel's arguments have changed.
    """
    try:
        release = f"{PACKAGE} {version(PACKAGE)}"
    except PackageNotFoundError:
        return None
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    except ImportError as error:
        raise KernelError(f"{release} is installed but cannot be imported: {error!r}; {ADVICE}") from error
    kernels = FusedKernels(chunk_gated_delta_rule, fused_recurrent_gated_delta_rule)
    for name, kernel in kernels._asdict().items():
        _require_arguments(kernel, f"{release}: the {name} kernel")
    return kernels


def _require_arguments(kernel: Callable[..., Any], title: str) -> None:
    """Refuse a kernel that lacks one of ARGUMENTS, which its ``**kwargs`` would hide, or that needs another one."""
    parameters = inspect.signature(kernel).parameters.values()
    names = {parameter.name for parameter in parameters}
    required = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    wrong = [f"has no argument {name}" for name in ARGUMENTS if name not in names]
    wrong += [f"needs an argument {name}" for name in sorted(required.difference(ARGUMENTS))]
    if wrong:
        raise KernelError(f"{title} {', '.join(wrong)}; {ADVICE}")


def _supports_fused(device: torch.device) -> bool:
    return device.type == "cuda"


def _checked_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> FusedKernels | None:
    """Return the fused kernels after their check, or None where PyTorch is used."""
    kernels = installed_kernels() if _supports_fused(device) else None
    if kernels is None:
        return None
    key = (str(device), dtype, head_dim)
    if key not in _errors:
        _errors[key] = check(kernels, device, dtype, head_dim)
        logger.info("delta rule: %s's fused kernels on %s, checked: %s", PACKAGE, device, _errors[key])
    return kernels


def path(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
    """Describe the code that a backbone uses, for run.json and the log; the kernels are checked if they were not yet.

    Returns
    -------
    dict
        ``path``: "fused" or "plain" (PyTorch); for plain ``because``; for fused ``package`` and the check's ``errors``.
    """
    if _checked_kernels(device, dtype, head_dim) is not None:
        errors = _errors[str(device), dtype, head_dim]
        return {"path": "fused", "package": f"{PACKAGE} {version(PACKAGE)}", "errors": errors}
    if _supports_fused(device):
        reason = f"{PACKAGE} is not installed (pip install -e '.[gpu]')"
    else:
        reason = f"the fused kernels need CUDA, the backbone is on {device.type}"
    logger.info("delta rule: plain PyTorch, %s", reason)
    return {"path": "plain", "because": reason}


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gated delta rule with L2-normalised q and k; arguments as in `delta_rule.gated_delta_rule`."""
    kernels = _checked_kernels(q.device, q.dtype, q.shape[-1])
    rule: Callable[..., Any] = delta_rule.gated_delta_rule
    if kernels is not None:
        # the recurrent kernel has no backward pass
        rule = kernels.recurrent if q.shape[1] == 1 and not torch.is_grad_enabled() else kernels.chunk
    states = {"initial_state": initial_state, "output_final_state": output_final_state}
    # by name: the two kernels take them in different order
    return rule(q=q, k=k, v=v, g=g, beta=beta, **states, use_qk_l2norm_in_kernel=True)


def check(kernels: FusedKernels, device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, float]:
    """Compare fused kernels with the naive recurrence on a device.

    Parameters
    ----------
    kernels : FusedKernels
    device : torch.device
    dtype : torch.dtype
        Type of q, k and v.
    head_dim : int

    Returns
    -------
    dict of str to float
        Relative error of each output and gradient.

    Raises
    ------
    KernelError
        If an error exceeds BOUND or is not finite, or if a kernel does not run.
    """
    try:
        # the caller may be in inference mode or under autocast
        no_autocast = torch.autocast(device.type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), no_autocast, full_float32():
            errors = _relative_errors(kernels, device, dtype, head_dim)
    except torch.OutOfMemoryError:
        raise  # not an error of the kernels
    except Exception as error:  # Triton's compiler, its autotuner and the driver share no exception class
        raise KernelError(f"{PACKAGE}'s kernels do not run on {device}: {error!r}; {ADVICE}") from error
    bound = BOUND[dtype]
    wrong = [f"{name} {value:.2g}" for name, value in errors.items() if not value <= bound]
    if wrong:
        raise KernelError(
            f"{PACKAGE}'s kernels are wrong on {device} with {dtype}, head width {head_dim}: relative error of "
            f"{', '.join(wrong)}, at most {bound} is allowed; {ADVICE}"
        )
    return errors


def _relative_errors(
    kernels: FusedKernels, device: torch.device, dtype: torch.dtype, head_dim: int
) -> dict[str, float]:
    """Relative errors of the chunk kernel, with gradients, and of the recurrent kernel on a single token."""
    batch, heads = 2, 2
    shape = (batch, LENGTH, heads)
    state_shape = (batch, heads, head_dim, head_dim)
    generator = torch.Generator().manual_seed(0)  # separate: a run's random numbers must not depend on the check
    draw = functools.partial(torch.randn, generator=generator)
    inputs = {name: draw(*shape, head_dim).to(dtype) for name in ("q", "k", "v")}
    inputs |= {"g": -draw(*shape).abs(), "beta": draw(*shape).sigmoid(), "initial_state": draw(state_shape)}
    inputs = {name: value.to(device) for name, value in inputs.items()}
    loss_weights = (draw(*shape, head_dim).to(device), draw(state_shape).to(device))
    naive = delta_rule.naive_gated_delta_rule

    errors = _compare(_evaluate(kernels.chunk, inputs, loss_weights), _evaluate(naive, inputs, loss_weights))
    first = {name: value if name == "initial_state" else value[:, :1] for name, value in inputs.items()}
    with torch.no_grad():
        single = _compare(_evaluate(kernels.recurrent, first), _evaluate(naive, first))
    return errors | {f"{name} of a single token": value for name, value in single.items()}


def _evaluate(
    rule: Callable[..., Any], inputs: dict[str, Tensor], loss_weights: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """Compute outputs of a rule and, for a loss that weights them, the gradients of all inputs."""
    x = {n: value.contiguous().detach().requires_grad_(loss_weights is not None) for n, value in inputs.items()}
    o, state = rule(**x, output_final_state=True, use_qk_l2norm_in_kernel=True)
    values = {"o": o, "final_state": state}
    if loss_weights is not None:
        loss = sum((y.float() * w).sum() for y, w in zip((o, state), loss_weights, strict=True))
        values |= dict(zip((f"d{name}" for name in x), torch.autograd.grad(loss, list(x.values())), strict=True))
    return {name: value.detach().float() for name, value in values.items()}


def _compare(values: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((values[name] - value).norm() / value.norm()) for name, value in expected.items()}
