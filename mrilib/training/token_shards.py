"""Files of the token cache: each holds a few slices of one volume under one mask."""

import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mrilib.config import display_path

SLICES = 4  # in a shard at most
HEADER_BYTES = 800  # of a shard, for each of its slices


class Shard(NamedTuple):
    """A file of the cache: consecutive slices of one volume under one mask."""

    path: Path
    key: str  # hash of everything that its content depends on
    indices: tuple[int, ...]  # of the dataset
    mask_number: int


def write_shard(shard: Shard, rows: list[tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
    """Write a shard from the tensors and facts of its slices.

    It is not synced to disk: `read_entry` detects damage by a power cut.

    Raises
    ------
    OSError
    """
    tensors = {f"{row}.{name}": tensor for row, (entry, _) in enumerate(rows) for name, tensor in entry.items()}
    facts = [{**facts, "checksum": _checksum(entry, facts)} for entry, facts in rows]
    # One metadata entry, because safetensors writes several in varying order.
    metadata = {"shard": json.dumps({"key": shard.key, "rows": facts})}
    try:
        write_whole(shard.path, save(tensors, metadata))
    except OSError as error:
        raise OSError(f"token_cache_dir: {display_path(shard.path)} cannot be written ({error})") from None


def read_entry(shard: Shard, row: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read tensors and facts of one slice; None if the shard is missing, damaged or has another key."""
    try:
        with safe_open(shard.path, framework="pt") as file:
            content = json.loads(file.metadata()["shard"])
            if content["key"] != shard.key:
                return None
            facts = content["rows"][row]
            prefix = f"{row}."
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
            tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        checksum = facts.pop("checksum")
    except (FileNotFoundError, SafetensorError, LookupError, ValueError, TypeError, AttributeError):
        return None
    return (tensors, facts) if checksum == _checksum(tensors, facts) else None


def _checksum(tensors: dict[str, Tensor], facts: dict[str, Any]) -> int:
    """CRC-32 over names, types, shapes, bytes and facts."""
    value = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a name of this process, then rename it; other processes never see a part of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
