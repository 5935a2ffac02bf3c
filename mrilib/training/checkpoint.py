"""Training checkpoints: written whole or not at all, read without running code.

A checkpoint is a dict of plain tensors, numbers, strings, lists and dicts, so that ``torch.load(weights_only=True)``
reads it: the trainable part's weights, optimizer, schedule, random number states, history and the run's parameters.
"""

import contextlib
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mrilib.config import display_path

FORMAT = 1
# What `Trainer.state` puts into a checkpoint.
ENTRIES = (
    "stage", "epoch", "step", "micro_batch", "weights", "optimizer", "schedule", "rng", "losses", "history", "config",
    "data", "backbone", "encoder", "cost",
)  # fmt: skip
_DEPTH = 16  # of lists and dicts in each other; a checkpoint has 5
_LARGEST = 2**62  # of a whole number
# What damaged or tampered content makes torch and zipfile raise, found by changing files at random.
_UNFIT = (
    RuntimeError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError,
    EOFError, MemoryError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another stage or of another architecture.

    The message is one printable line: it may quote what somebody else has written.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line))


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name, sync it to disk, then rename it into place.

    A crash at any moment leaves either the old file or the new one, whole.

    Raises
    ------
    OSError
        The disk is full, the folder read-only, …; the old file, if any, is as it was.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer makes a RuntimeError of a full disk
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        while isinstance(error, RuntimeError) and isinstance(error.__context__, OSError | RuntimeError):
            error = error.__context__
        before = f"the one before is whole: '{display_path(path)}'" if path.exists() else "there is none before it"
        raise OSError(f"a checkpoint could not be written: {error}; {before}") from error


def _sync_folder(folder: Path) -> None:
    """Have a rename on disk, not in the system's memory alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path, stage: str) -> dict[str, Any]:
    """Read a checkpoint of one stage ("stage1", "constant_prefix", "stage2", "no_token_decoder").

    The file's checksums are compared first, so that a damaged file is never taken for a whole one.

    Raises
    ------
    CheckpointError
        Not there, damaged, not a checkpoint of this project, a pickle that would run code, or of another stage.
    """
    name = display_path(path)
    _check_file(path, name)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"checkpoint '{name}' could not be read: {error}") from None
    except _UNFIT:
        # torch's own text is left out: it advises to load the file unsafely.
        raise CheckpointError(
            f"'{name}' is a pickle of other things than plain tensors, numbers and text, and may run code when it is "
            "opened: it was not opened, and must not be; delete it, or ask its author for a checkpoint of this project"
        ) from None
    known = isinstance(content, dict) and type(content.get("format")) is int and content["format"] == FORMAT
    if not known or "stage" not in content:
        raise CheckpointError(f"'{name}' is not a checkpoint of this project")
    try:
        content = _plain(content, "", {})
    except ValueError as error:
        raise CheckpointError(f"checkpoint '{name}': {error}") from None
    if isinstance(content["stage"], str) and content["stage"] != stage:
        raise CheckpointError(f"checkpoint '{name}' is of {content['stage'][:40]}; {stage} is wanted here")
    lacks = [entry for entry in ENTRIES if entry not in content]
    if lacks:
        raise CheckpointError(f"checkpoint '{name}' lacks {', '.join(lacks)}")
    problems = [f"{entry}: {what} is wanted" for entry, (what, fits) in _KINDS.items() if not fits(content[entry])]
    if problems:
        raise CheckpointError(f"checkpoint '{name}' does not hold what it must: {'; '.join(problems)}")
    return content


def _check_file(path: Path, name: str) -> None:
    """Refuse what is not a whole zip file as `save_checkpoint` writes it; all checksums are compared.

    Raises
    ------
    CheckpointError
    """
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise CheckpointError(f"checkpoint '{name}' {'is a link to itself' if _is_loop(path) else what}")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise CheckpointError(f"'{name}' is not a checkpoint of this project: its content is compressed")
            damaged = archive.testzip()
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"checkpoint '{name}' could not be read: {error.strerror}") from None
    except (*_UNFIT, NotImplementedError):
        with open(path, "rb") as file:
            start = file.read(2)
        if start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5":
            raise CheckpointError(
                f"'{name}' is a bare pickle, not a checkpoint of this project, and may run code when it is opened: it "
                "was not opened, and must not be"
            ) from None
        raise CheckpointError(
            f"checkpoint '{name}' is damaged, or no checkpoint: it is not a whole zip file; "
            "take another checkpoint, or a copy of this one"
        ) from None
    if damaged is not None:
        raise CheckpointError(
            f"checkpoint '{name}' is damaged: the checksum of '{damaged}' in it is wrong; "
            "take another checkpoint, or a copy of this one"
        )


def _is_loop(path: Path) -> bool:
    return path.is_symlink() and os.path.islink(os.path.realpath(path))


def _plain(value: Any, where: str, known: dict[int, Any], depth: int = 0) -> Any:
    """The same in plain dicts, lists and tensors, without anything that a pickle may have attached to them.

    Raises
    ------
    ValueError
        Naming the key with anything else.
    """
    if value is None or type(value) in (bool, float, str):
        return value
    if type(value) is int:
        if abs(value) > _LARGEST:
            raise ValueError(f"{where}: a number is too large")
        return value
    if id(value) in known:
        return known[id(value)]
    if depth > _DEPTH:
        raise ValueError(f"{where.partition('/')[0]}: lists or dicts in each other, more than {_DEPTH} deep")
    made: Any
    if type(value) in (dict, OrderedDict):
        made = {}
        for key, one in dict.items(value):
            if type(key) not in (str, int):
                raise ValueError(f"{where or 'its keys'}: a key is a {type(key).__name__}, not text or a number")
            below = f"{where}/{key}" if where else str(key)
            made[key] = _plain(one, below[:200], known, depth + 1)
    elif type(value) in (list, tuple):
        made = type(value)(_plain(one, f"{where}/{i}"[:200], known, depth + 1) for i, one in enumerate(value))
    elif type(value) in (torch.Tensor, nn.Parameter):
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            kind = "quantized" if value.is_quantized else "meta" if value.is_meta else "sparse"
            raise ValueError(f"{where}: a {kind} tensor; a dense one is wanted")
        made = torch.Tensor.detach(value)
    else:
        raise ValueError(f"{where}: a {type(value).__name__}; tensors, numbers, text, lists and dicts are wanted")
    known[id(value)] = made
    return made


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _real(value: Any) -> bool:
    return type(value) in (int, float)


def _amount(value: Any) -> bool:
    return _real(value) and math.isfinite(value) and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _dict_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(_text(key) and fits(one) for key, one in value.items())


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _setting(value: Any) -> bool:
    """A parameter: a number, text, true or false, or a list of these."""
    return value is None or isinstance(value, bool | int | float | str) or _list_of(_setting)(value)


def _history(value: Any) -> bool:
    kinds: dict[str, Callable[[Any], bool]] = {
        "epochs": _list_of(_dict_of(_real)), "best_epoch": _whole, "best_loss": _real, "skipped": _whole,
    }  # fmt: skip
    return isinstance(value, dict) and set(value) <= set(kinds) and all(kinds[key](one) for key, one in value.items())


def _costs(value: Any) -> bool:
    return _dict_of(_amount)(value) and {"seconds", "epoch_seconds", "peak_memory_bytes"} <= set(value)


def _rng(value: Any) -> bool:
    """As `rng_state` gives it."""
    if not isinstance(value, dict) or not {"torch", "numpy"} <= set(value) or not isinstance(value["numpy"], dict):
        return False
    states, numpy = [value["torch"], *value.get("cuda", [])], value["numpy"]
    keys = numpy.get("keys")
    return (
        all(isinstance(state, torch.Tensor) and state.dtype == torch.uint8 and state.ndim == 1 for state in states)
        and isinstance(keys, torch.Tensor) and keys.dtype == torch.int64 and keys.shape == (624,)
        and bool(((keys >= 0) & (keys < 2**32)).all())
        and numpy.get("kind") == "MT19937" and _whole(numpy.get("position")) and numpy["position"] <= 624
        and _whole(numpy.get("has_gauss")) and _real(numpy.get("cached"))
    )  # fmt: skip


# What each entry of a checkpoint must be, in words and as a check.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "stage": ("text", _text),
    "epoch": ("a whole number", _whole),
    "step": ("a whole number", _whole),
    "micro_batch": ("a whole number above 0", lambda value: _whole(value) and value > 0),
    "weights": ("a tensor for each name", _dict_of(lambda value: isinstance(value, torch.Tensor))),
    "optimizer": ("a dict", lambda value: isinstance(value, dict)),
    "schedule": ("a dict", lambda value: isinstance(value, dict)),
    "rng": ("a list of random number states", lambda value: isinstance(value, list) and all(map(_rng, value))),
    "losses": ("a list of finite numbers", _list_of(lambda value: _real(value) and math.isfinite(value))),
    "history": ("epochs, best_epoch, best_loss and skipped", _history),
    "config": ("a value for each parameter", _dict_of(_setting)),
    "data": ("text", _text),
    "backbone": ("text", _text),
    "encoder": ("text", _text),
    "cost": ("seconds, epoch_seconds, peak_memory_bytes as numbers", _costs),
}


def load_weights(module: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Copy weights into a module; every name and shape must match.

    Raises
    ------
    CheckpointError
        Listing the names that are missing, too many or of another shape.
    """
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unknown {str(name)[:80]}" for name in state if name not in own]
    problems += [f"{name} {told}" for name in own if name in state and (told := _misfit(own[name], state[name]))]
    if problems:
        more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems[:12])}{more}")
    module.load_state_dict(state)


def _misfit(own: torch.Tensor, given: Any) -> str:
    """Why a tensor cannot take another's place; empty if it can."""
    if not isinstance(given, torch.Tensor):
        return f"is a {type(given).__name__}, {tuple(own.shape)} is wanted"
    if given.shape != own.shape:
        return f"is {tuple(given.shape)}, {tuple(own.shape)} is wanted"
    if given.dtype not in FLOATS if own.dtype in FLOATS else given.dtype != own.dtype:
        return f"is of type {str(given.dtype)[6:]}, {str(own.dtype)[6:]} is wanted"
    if given.dtype in FLOATS and not bool(given.isfinite().all()):
        return "holds NaN or infinity"
    return ""


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put an optimizer's state back; its groups, names and shapes must be those of `optimizer`.

    Raises
    ------
    ValueError
        Naming the key that does not fit; nothing has been changed then.
    """
    if set(state) != {"state", "param_groups"} or not isinstance(state["state"], dict):
        raise ValueError("optimizer: state and param_groups are wanted")
    own = optimizer.state_dict()["param_groups"]
    _check_like(own, state["param_groups"], "optimizer/param_groups")
    if [group["params"] for group in own] != [group["params"] for group in state["param_groups"]]:
        raise ValueError("optimizer/param_groups: other parameters")
    for number, (mine, given) in enumerate(zip(own, state["param_groups"], strict=True)):
        for name, value in mine.items():
            if name not in ("params", "lr") and given[name] != value:
                raise ValueError(f"optimizer/param_groups/{number}/{name}: {value!r} is wanted, got {given[name]!r}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in own for number in group["params"]]
    of = dict(zip(numbers, parameters, strict=True))
    names = {frozenset(one) for one in state["state"].values() if isinstance(one, dict)}
    wanted = (
        {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.AdamW) else {"step", "mean", "square"}
    )
    if not names <= {frozenset(wanted), frozenset({"momentum"})}:
        raise ValueError(f"optimizer/state: {', '.join(sorted(wanted))} are wanted for each parameter")
    for number, entries in state["state"].items():
        if number not in of or not isinstance(entries, dict):
            raise ValueError(f"optimizer/state/{number}: there is no such parameter")
        for name, value in entries.items():
            where = f"optimizer/state/{number}/{name}"
            if name == "step":
                count = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
                if not _amount(count):
                    raise ValueError(f"{where}: a count of steps is wanted")
            elif told := _misfit(of[number], value):
                raise ValueError(f"{where} {told}")
            elif name in ("exp_avg_sq", "square") and bool((value < 0).any()):
                raise ValueError(f"{where} holds negative numbers")
    optimizer.load_state_dict(state)


def load_schedule(schedule: torch.optim.lr_scheduler.LRScheduler, state: dict[str, Any]) -> None:
    """Put a schedule's state back; what it holds must be of the kinds that `schedule` has.

    Raises
    ------
    ValueError
        Naming the key that does not fit; nothing has been changed then.
    """
    _check_like(schedule.state_dict(), state, "schedule")
    schedule.load_state_dict(state)


def _check_like(own: Any, given: Any, where: str) -> None:
    """Whether something is built as `own` is: the same keys, lengths and kinds of values."""
    if isinstance(own, dict):
        if not isinstance(given, dict) or set(own) != set(given):
            raise ValueError(f"{where}: {', '.join(map(str, own))} are wanted")
        for key, value in own.items():
            _check_like(value, given[key], f"{where}/{key}")
    elif isinstance(own, list | tuple):
        if type(given) is not type(own) or len(given) != len(own):
            raise ValueError(f"{where}: {len(own)} values are wanted")
        for number, pair in enumerate(zip(own, given, strict=True)):
            _check_like(*pair, f"{where}/{number}")
    elif _real(own):
        if not _real(given) or not math.isfinite(given) or given < -1:  # -1: a schedule that has not begun
            raise ValueError(f"{where}: a number is wanted")
    elif type(given) is not type(own):
        raise ValueError(f"{where}: a {type(own).__name__} is wanted")


def rng_state() -> dict[str, Any]:
    """States of the random number generators, as tensors and plain numbers."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 (what is saved is the global one)
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": {
            "kind": kind,
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_rng_state(states: dict[str, Any]) -> None:
    """Put back what `rng_state` gave."""
    torch.set_rng_state(states["torch"])
    numpy_state = states["numpy"]
    keys = numpy_state["keys"].numpy().astype(np.uint32)
    np.random.set_state(  # noqa: NPY002
        (numpy_state["kind"], keys, numpy_state["position"], numpy_state["has_gauss"], numpy_state["cached"])
    )
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
