"""Training checkpoints: written atomically, and read without running code.

A checkpoint is a dict of plain tensors, numbers, strings, lists and dicts, which ``torch.load(weights_only=True)``
reads. `ENTRIES` lists its content.
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

import torch
from torch import Tensor, nn

from mrilib.config import display_path

FORMAT = 1
MAX_DEPTH = 16  # of nested lists and dicts; a checkpoint has 5
MAX_INTEGER = 2**62
# Errors of torch and zipfile on damaged or tampered files, collected by changing files at random.
READ_ERRORS = (
    RuntimeError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError,
    EOFError, MemoryError, NotImplementedError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
Check = Callable[[Any], bool]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another stage or of another architecture.

    The message is one printable line, because it may quote text from a foreign file.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line))


def checkpoint_path(directory: Path, number: int, stage: str, kind: str) -> Path:
    """Path in a run folder, such as ``stage1_checkpoints/stage1_best_model.pt``; `number` is 1 or 2."""
    return directory / f"stage{number}_checkpoints" / f"{stage}_{kind}.pt"


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name, sync it to disk, then rename it.

    A crash at any moment leaves either the old file or the new one, complete.

    Raises
    ------
    OSError
        The disk is full, the folder is read-only, …; the old file, if any, is unchanged.
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
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        while isinstance(error, RuntimeError) and isinstance(error.__context__, OSError | RuntimeError):
            error = error.__context__
        state = f"the previous one is intact: '{display_path(path)}'" if path.exists() else "there is no previous one"
        raise OSError(f"a checkpoint could not be written: {error}; {state}") from error


def _sync_folder(folder: Path) -> None:
    """Sync a rename to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path, stage: str) -> dict[str, Any]:
    """Read and check a checkpoint of one stage ("stage1", "constant_prefix", "stage2", "no_token_decoder").

    Raises
    ------
    CheckpointError
        It is missing, damaged, of another stage or another project, or a pickle that would run code.
    """
    name = display_path(path)
    _check_file(path, name)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"checkpoint '{name}' could not be read: {error}") from None
    except READ_ERRORS:
        # torch's own message advises to load the file unsafely.
        raise CheckpointError(
            f"'{name}' holds more than plain tensors, numbers and text, and may run code when it is opened: it was "
            "not opened; delete it, or ask its author for a checkpoint of this project"
        ) from None
    is_known = isinstance(content, dict) and type(content.get("format")) is int and content["format"] == FORMAT
    if not is_known or "stage" not in content:
        raise CheckpointError(f"'{name}' is not a checkpoint of this project")
    try:
        content = _plain_copy(content, "", {})
    except ValueError as error:
        raise CheckpointError(f"checkpoint '{name}': {error}") from None
    if isinstance(content["stage"], str) and content["stage"] != stage:
        raise CheckpointError(f"checkpoint '{name}' is of {content['stage'][:40]}; give one of {stage}")
    missing = [entry for entry in ENTRIES if entry not in content]
    if missing:
        raise CheckpointError(f"checkpoint '{name}' lacks {', '.join(missing)}")
    wrong = [f"{entry}: expected {kind}" for entry, (kind, is_kind) in ENTRIES.items() if not is_kind(content[entry])]
    if wrong:
        raise CheckpointError(f"checkpoint '{name}' has wrong entries: {'; '.join(wrong)}")
    return content


def _check_file(path: Path, name: str) -> None:
    """Check that a file is a complete zip file as `save_checkpoint` writes it, with correct checksums."""
    if not path.is_file():
        is_loop = path.is_symlink() and os.path.islink(os.path.realpath(path))
        problem = "is a link to itself" if is_loop else "is not a file" if path.exists() else "does not exist"
        raise CheckpointError(f"checkpoint '{name}' {problem}")
    try:
        with zipfile.ZipFile(path) as archive:
            is_compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            damaged = None if is_compressed else archive.testzip()
    except PermissionError as error:
        raise CheckpointError(f"checkpoint '{name}' could not be read: {error.strerror}") from None
    except READ_ERRORS:
        with open(path, "rb") as file:
            start = file.read(2)
        if start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5":
            raise CheckpointError(
                f"'{name}' is a bare pickle, not a checkpoint of this project, and may run code when it is opened: it "
                "was not opened; delete it"
            ) from None
        raise CheckpointError(
            f"checkpoint '{name}' is damaged or not a checkpoint: it is not a complete zip file; use another one"
        ) from None
    if is_compressed:
        raise CheckpointError(f"'{name}' is not a checkpoint of this project: its content is compressed")
    if damaged is not None:
        raise CheckpointError(
            f"checkpoint '{name}' is damaged: the checksum of its entry '{damaged}' is wrong; use another one"
        )


def _plain_copy(value: Any, where: str, copies: dict[int, Any], depth: int = 0) -> Any:
    """Copy into plain dicts, lists and tensors, without attributes that a pickle may have attached to them.

    Parameters
    ----------
    value : object
    where : str
        Its key, for error messages.
    copies : dict
        Copies by the id of the original: lists may be shared.
    depth : int

    Raises
    ------
    ValueError
        Any other type, or too deep nesting.
    """
    if value is None or type(value) in (bool, float, str):
        return value
    if type(value) is int:
        if abs(value) > MAX_INTEGER:
            raise ValueError(f"{where}: a number is too large")
        return value
    if id(value) in copies:
        return copies[id(value)]
    if depth > MAX_DEPTH:
        raise ValueError(f"{where.partition('/')[0]}: lists or dicts are nested more than {MAX_DEPTH} deep")
    copy: Any
    if type(value) in (dict, OrderedDict):
        copy = {}
        for key, item in dict.items(value):
            if type(key) not in (str, int):
                raise ValueError(f"{where or 'its keys'}: a key is a {type(key).__name__}, not text or a number")
            place = f"{where}/{key}" if where else str(key)
            copy[key] = _plain_copy(item, place[:200], copies, depth + 1)
    elif type(value) in (list, tuple):
        copy = type(value)(_plain_copy(item, f"{where}/{i}"[:200], copies, depth + 1) for i, item in enumerate(value))
    elif type(value) in (Tensor, nn.Parameter):
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            kind = "quantized" if value.is_quantized else "meta" if value.is_meta else "sparse"
            raise ValueError(f"{where}: expected a dense tensor, not a {kind} one")
        copy = Tensor.detach(value)
    else:
        raise ValueError(f"{where}: a {type(value).__name__}; expected tensors, numbers, text, lists and dicts")
    copies[id(value)] = copy
    return copy


# ------------------------------------------------------------------------------------------- content of a checkpoint


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 0."""
    return type(value) is int and value >= 0


def is_number(value: Any) -> bool:
    """Whether a value is a number; true and false are none."""
    return type(value) in (int, float)


def is_amount(value: Any) -> bool:
    """Whether a value is a finite number of at least 0."""
    return is_number(value) and math.isfinite(value) and value >= 0


def is_text(value: Any) -> bool:
    """Whether a value is a string."""
    return isinstance(value, str)


def _dict_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(is_text(key) and check(item) for key, item in value.items())


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_parameter(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str) or _list_of(_is_parameter)(value)


def _is_history(value: Any) -> bool:
    checks: dict[str, Check] = {
        "epochs": _list_of(_dict_of(is_number)), "best_epoch": is_count, "best_loss": is_number, "skipped": is_count,
    }  # fmt: skip
    return isinstance(value, dict) and set(value) <= set(checks) and all(checks[key](value[key]) for key in value)


def _is_cost(value: Any) -> bool:
    return _dict_of(is_amount)(value) and {"seconds", "epoch_seconds", "peak_memory_bytes"} <= set(value)


def _is_rng(value: Any) -> bool:
    """Whether a value is as `device.rng_state` returns it."""
    if not isinstance(value, dict) or not {"torch", "numpy"} <= set(value) or not isinstance(value["numpy"], dict):
        return False
    states, numpy = [value["torch"], *value.get("cuda", [])], value["numpy"]
    keys = numpy.get("keys")
    return (
        all(isinstance(state, Tensor) and state.dtype == torch.uint8 and state.ndim == 1 for state in states)
        and isinstance(keys, Tensor) and keys.dtype == torch.int64 and keys.shape == (624,)
        and bool(((keys >= 0) & (keys < 2**32)).all())
        and numpy.get("kind") == "MT19937" and is_count(numpy.get("position")) and numpy["position"] <= 624
        and is_count(numpy.get("has_gauss")) and is_number(numpy.get("cached"))
    )  # fmt: skip


# Each entry's content in words, and a check of it.
ENTRIES: dict[str, tuple[str, Check]] = {
    "stage": ("text", is_text),
    "epoch": ("a whole number", is_count),
    "step": ("a whole number", is_count),
    "micro_batch": ("a whole number above 0", lambda value: is_count(value) and value > 0),
    "weights": ("a tensor for each name", _dict_of(lambda value: isinstance(value, Tensor))),
    "optimizer": ("a dict", lambda value: isinstance(value, dict)),
    "schedule": ("a dict", lambda value: isinstance(value, dict)),
    "rng": ("a list of random number states", _list_of(_is_rng)),
    "losses": ("a list of finite numbers", _list_of(lambda value: is_number(value) and math.isfinite(value))),
    "history": ("epochs, best_epoch, best_loss and skipped", _is_history),
    "config": ("a value for each parameter", _dict_of(_is_parameter)),
    "data": ("text", is_text),
    "backbone": ("text", is_text),
    "encoder": ("text", is_text),
    "cost": ("seconds, epoch_seconds, peak_memory_bytes as numbers", _is_cost),
}
