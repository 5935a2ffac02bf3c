"""Which code computes the gated delta rule: fused GPU kernels where they are proven right, PyTorch elsewhere.

With the extra `gpu` (flash-linear-attention) its Triton kernels run on CUDA. Their backward pass has been wrong on some
chips, so before they are used for the first time, outputs and all gradients are compared on that very device with the
recurrence as written; a kernel that fails is an error, never a reason to go on with something else in silence.
"""

import functools
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mrilib.backbone import delta_rule

logger = logging.getLogger("mrilib")
Choice = Literal["auto", "fused", "plain"]
PACKAGE = "flash-linear-attention"
# Root mean square of the error over that of the value. The kernels' products take TF32 or bfloat16 operands, 2⁻¹¹ and
# 2⁻⁹ of a number; what is wrong is wrong by far more.
BOUND = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}
WAY_OUT = f"choose delta_rule: plain (slower, and right), or install another version of {PACKAGE}"
LENGTH = 130  # tokens of the check: two chunks of 64 and a rest


class KernelError(RuntimeError):
    """Fused kernels that were asked for and are not there, or that compute something else."""


class Fused(NamedTuple):
    """The two fused kernels, called as flash-linear-attention's are."""

    chunk: Callable[..., Any]  # any number of tokens, with gradients
    recurrent: Callable[..., Any]  # for single tokens, without


_choice: Choice = "auto"
_checked: dict[tuple[str, torch.dtype, int], dict[str, float]] = {}


def choose(choice: str) -> None:
    """Say what is to be used from now on, in this process.

    Parameters
    ----------
    choice : {"auto", "fused", "plain"}
        auto: the fused kernels on CUDA if they are installed; fused: an error where they cannot be used; plain:
        PyTorch alone, exact to float32.
    """
    global _choice
    if choice not in get_args(Choice):
        raise ValueError(f"delta_rule must be one of {', '.join(get_args(Choice))}, got {choice!r}")
    _choice = choice  # type: ignore[assignment]


@functools.cache  # asked by every layer at every token, and the answer costs half a millisecond
def installed() -> Fused | None:
    """The fused kernels, or None where the extra is not installed; KernelError where it is broken."""
    try:
        version(PACKAGE)
    except PackageNotFoundError:
        return None
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    except ImportError as error:
        raise KernelError(f"{PACKAGE} is installed but cannot be imported: {error!r}; {WAY_OUT}") from error
    return Fused(chunk_gated_delta_rule, fused_recurrent_gated_delta_rule)


def _fuses(device: torch.device) -> bool:
    return device.type == "cuda"


def _why_plain(device: torch.device) -> str:
    """Why the fused kernels are not used on a device; empty if they are."""
    if _choice == "plain":
        return "delta_rule is plain"
    if not _fuses(device):
        return f"the fused kernels need CUDA, the backbone is on {device.type}"
    return "" if installed() else f"{PACKAGE} is not installed (pip install -e '.[gpu]')"


def _fused_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> Fused | None:
    """The fused kernels, checked; None where the plain path is to be taken."""
    if why := _why_plain(device):
        if _choice == "fused":
            raise KernelError(f"delta_rule is fused, but {why}; choose delta_rule: auto or plain")
        return None
    fused = installed()
    assert fused is not None
    key = (str(device), dtype, head_dim)
    if key not in _checked:
        _checked[key] = check(fused, device, dtype, head_dim)
        logger.info("delta rule: %s's fused kernels on %s, checked: %s", PACKAGE, device, _checked[key])
    return fused


def path(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
    """Which path a backbone takes, as run.json and the log tell it; the check is run if it has not been.

    Returns
    -------
    dict
        ``path``: "fused" or "plain"; ``because`` for plain; ``package`` and ``errors`` of the check for fused.
    """
    if _fused_for(device, dtype, head_dim) is None:
        told = {"path": "plain", "because": _why_plain(device)}
        logger.info("delta rule: plain PyTorch, %s", told["because"])
        return told
    return {
        "path": "fused",
        "package": f"{PACKAGE} {version(PACKAGE)}",
        "errors": _checked[str(device), dtype, head_dim],
    }


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule with L2-normalised q and k, by the chosen path; arguments as in `delta_rule`."""
    fused = _fused_for(q.device, q.dtype, q.shape[-1])
    rule: Callable[..., Any] = delta_rule.gated_delta_rule
    if fused is not None:
        # the recurrent kernel has no backward pass
        rule = fused.recurrent if q.shape[1] == 1 and not torch.is_grad_enabled() else fused.chunk
    return rule(
        q,
        k,
        v,
        g,
        beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=True,
    )


def check(fused: Fused, device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, float]:
    """Compare fused kernels with the recurrence as written, on the device that they are to run on.

    Parameters
    ----------
    fused : Fused
    device : torch.device
    dtype : torch.dtype
        Of q, k and v.
    head_dim : int

    Returns
    -------
    dict of str to float
        The error of each output and gradient, root mean square over root mean square.

    Raises
    ------
    KernelError
        An error beyond BOUND or not finite, or a kernel that does not run; it names what is wrong and the way out.
    """
    try:
        # whatever the caller is in the middle of: the check wants gradients, and the types that it was given
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            errors = _errors(fused, device, dtype, head_dim)
    except torch.OutOfMemoryError:
        raise  # no fault of the kernels
    except Exception as error:
        # Triton's compiler, its autotuner and the driver have no error in common; none is lost, each is told with what
        # to do
        raise KernelError(f"{PACKAGE}'s kernels do not run on {device}: {error!r}; {WAY_OUT}") from error
    bound = BOUND[dtype]
    wrong = [f"{name} {value:.2g}" for name, value in errors.items() if not value <= bound]
    if wrong:
        raise KernelError(
            f"{PACKAGE}'s kernels are wrong on {device} with {dtype}, head width {head_dim}: relative error of "
            f"{', '.join(wrong)}, allowed are {bound}; {WAY_OUT}"
        )
    return errors


def _errors(fused: Fused, device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)  # its own: a run's numbers must not depend on the check

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch, heads = 2, 2
    shape = (batch, LENGTH, heads)
    inputs = {name: draw(*shape, head_dim).to(dtype) for name in ("q", "k", "v")}
    inputs |= {"g": -draw(*shape).abs(), "beta": draw(*shape).sigmoid()}
    inputs["initial_state"] = draw(batch, heads, head_dim, head_dim)
    weights = (draw(*shape, head_dim).to(device), draw(batch, heads, head_dim, head_dim).to(device))

    def run(rule: Callable[..., Any], keep: slice, gradients: bool) -> dict[str, Tensor]:
        x = {name: value.to(device)[:, keep] if name != "initial_state" else value.to(device)
             for name, value in inputs.items()}  # fmt: skip
        x = {name: value.contiguous().detach().requires_grad_(gradients) for name, value in x.items()}
        o, state = rule(**x, output_final_state=True, use_qk_l2norm_in_kernel=True)
        found = {"o": o, "final_state": state}
        if gradients:
            loss = sum((y.float() * w).sum() for y, w in zip((o, state), weights, strict=True))
            found |= dict(zip((f"d{name}" for name in x), torch.autograd.grad(loss, list(x.values())), strict=True))
        return {name: value.detach().float() for name, value in found.items()}

    def compare(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
        return {name: float((found[name] - value).norm() / value.norm()) for name, value in right.items()}

    every, one = slice(None), slice(0, 1)
    naive = delta_rule.naive_gated_delta_rule
    errors = compare(run(fused.chunk, every, True), run(naive, every, True))
    with torch.no_grad():
        single = compare(run(fused.recurrent, one, False), run(naive, one, False))
    return errors | {f"{name} of a single token": value for name, value in single.items()}
