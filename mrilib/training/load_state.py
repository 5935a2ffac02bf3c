"""Load the states in a checkpoint into module, optimizer and schedule, after checking that they fit."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mrilib.training.checkpoint import CheckpointError, is_amount, is_number

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load weights into a module; every name and shape must match.

    Raises
    ------
    CheckpointError
        The message lists the names that are missing, unknown or of another shape.
    """
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unknown {str(name)[:80]}" for name in state if name not in own]
    problems += [f"{name} {misfit}" for name in own if name in state and (misfit := _misfit(own[name], state[name]))]
    if problems:
        more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems[:12])}{more}")
    module.load_state_dict(state)


def _misfit(own: Tensor, value: Any) -> str:
    """Why a value cannot replace a tensor; empty if it can."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, expected {tuple(own.shape)}"
    if value.shape != own.shape:
        return f"is {tuple(value.shape)}, expected {tuple(own.shape)}"
    if value.dtype not in FLOATS if own.dtype in FLOATS else value.dtype != own.dtype:
        return f"is of type {str(value.dtype)[6:]}, expected {str(own.dtype)[6:]}"
    if value.dtype in FLOATS and not bool(value.isfinite().all()):
        return "holds NaN or infinity"
    return ""


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state; groups, options, names and shapes must match.

    Raises
    ------
    ValueError
        The message names the key that does not fit; the optimizer is unchanged.
    """
    if set(state) != {"state", "param_groups"} or not isinstance(state["state"], dict):
        raise ValueError("optimizer: expected state and param_groups")
    own = optimizer.state_dict()["param_groups"]
    state = {**state, "param_groups": _with_own_kernel(own, state["param_groups"])}
    _check_groups(own, state["param_groups"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in own for number in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))
    is_adamw = isinstance(optimizer, torch.optim.AdamW)
    names = {"step", "exp_avg", "exp_avg_sq"} if is_adamw else {"step", "mean", "square"}
    for number, entries in state["state"].items():
        if number not in by_number or not isinstance(entries, dict):
            raise ValueError(f"optimizer/state/{number}: there is no such parameter")
        if set(entries) not in (names, {"momentum"}):
            raise ValueError(f"optimizer/state/{number}: expected {', '.join(sorted(names))}")
        for name, value in entries.items():
            _check_moment(f"optimizer/state/{number}/{name}", name, value, by_number[number])
    optimizer.load_state_dict(state)


def _with_own_kernel(own: list[dict[str, Any]], groups: Any) -> Any:
    """Parameter groups with the optimizer's choice of fused kernels, which depends on the device."""
    if not isinstance(groups, list):
        return groups
    pairs = zip(groups, [*own, *[{}] * len(groups)], strict=False)
    return [
        group | {"fused": mine["fused"]} if isinstance(group, dict) and {"fused"} <= set(group) & set(mine) else group
        for group, mine in pairs
    ]


def _check_groups(own: list[dict[str, Any]], groups: Any) -> None:
    """Check that parameter groups are the optimizer's; only the learning rate may differ."""
    _check_like(own, groups, "optimizer/param_groups")
    for number, (own_group, group) in enumerate(zip(own, groups, strict=True)):
        for name, value in own_group.items():
            if name != "lr" and group[name] != value:
                raise ValueError(f"optimizer/param_groups/{number}/{name}: expected {value!r}, got {group[name]!r}")


def _check_moment(where: str, name: str, value: Any, parameter: nn.Parameter) -> None:
    """Check one value that an optimizer keeps for a parameter."""
    if name == "step":
        count = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if not is_amount(count):
            raise ValueError(f"{where}: expected a number of steps")
    elif misfit := _misfit(parameter, value):
        raise ValueError(f"{where} {misfit}")
    elif name in ("exp_avg_sq", "square") and bool((value < 0).any()):
        raise ValueError(f"{where} holds negative numbers")


def load_schedule(schedule: torch.optim.lr_scheduler.LRScheduler, state: dict[str, Any]) -> None:
    """Load a schedule's state; keys and types must match.

    Raises
    ------
    ValueError
        The message names the key that does not fit; the schedule is unchanged.
    """
    _check_like(schedule.state_dict(), state, "schedule")
    schedule.load_state_dict(state)


def load_scaler(scaler: torch.amp.GradScaler, state: dict[str, Any]) -> None:
    """Load a loss scaler's state, which is empty unless it is enabled; keys and types must match.

    Raises
    ------
    ValueError
        The message names the key that does not fit; the scaler is unchanged.
    """
    _check_like(scaler.state_dict(), state, "scaler")
    if scaler.is_enabled():
        if state["scale"] <= 0:
            raise ValueError(f"scaler/scale: expected a number above 0, got {state['scale']}")
        scaler.load_state_dict(state)


def _check_like(own: Any, value: Any, where: str) -> None:
    """Check that a value has the keys, lengths and types of `own`."""
    if isinstance(own, dict):
        if not isinstance(value, dict) or set(own) != set(value):
            raise ValueError(f"{where}: expected {', '.join(map(str, own))}")
        for key, item in own.items():
            _check_like(item, value[key], f"{where}/{key}")
    elif isinstance(own, list | tuple):
        if type(value) is not type(own) or len(value) != len(own):
            raise ValueError(f"{where}: expected {len(own)} values")
        for number, pair in enumerate(zip(own, value, strict=True)):
            _check_like(*pair, f"{where}/{number}")
    elif is_number(own):
        if not is_number(value) or not math.isfinite(value) or value < -1:  # -1: a schedule that has not begun
            raise ValueError(f"{where}: expected a number")
    elif type(value) is not type(own):
        raise ValueError(f"{where}: expected a {type(own).__name__}")
