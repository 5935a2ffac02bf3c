"""Keys of the token cache: hashes of everything that image tokens and decoder inputs depend on."""

import ast
import hashlib
import inspect
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mrilib import backbone, data, model, physics
from mrilib.config import Stage2Parameters
from mrilib.environment import versions
from mrilib.model.two_stage import TwoStageModel, delta_rule_path, tensor_hash
from mrilib.physics.masks import find_mask
from mrilib.training.token_shards import write_whole

FORMAT = 1  # of a shard; raise it when the content of shards changes
COMPUTING_PACKAGES = (physics, backbone, data, model)
logger = logging.getLogger("mrilib")


def describe(system: TwoStageModel, config: Stage2Parameters) -> dict[str, Any]:
    """Collect everything that image tokens and decoder inputs depend on, except data and mask number."""
    packages = versions()
    vit: Any = system.encoder.vit
    path = delta_rule_path(system.backbone, config)
    return {
        "format": FORMAT,
        "encoder": tensor_hash(system.encoder),
        "encoder_config": _plain_settings(vit.config.to_dict()),
        "backbone": tensor_hash(system.backbone),
        "backbone_config": _plain_settings(system.backbone.config.to_dict()),
        "code": hashlib.sha256("".join(map(_code, _computing_files(system, config))).encode()).hexdigest(),
        "versions": {name: packages[name] for name in ("torch", "transformers", "fastmri", "numpy")},
        "device": system.device.type,
        # The implementation in use, not the parameter: "auto" and "plain" are the same on a CPU.
        "delta_rule": [path["path"], path.get("package")],
        **{name: getattr(config, name) for name in ("mixed_precision", "num_coils", "img_size", "crop", "mask_type")},
    }


def _plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Reduce a Hugging Face configuration to JSON, without its origin."""
    kept = {k: v for k, v in settings.items() if not k.startswith("_") and k != "transformers_version"}
    return json.loads(json.dumps(kept, default=str))


def _computing_files(system: TwoStageModel, config: Stage2Parameters) -> list[Path]:
    """List the source files of the computing packages and of the encoder's and the mask's class."""
    files = {path for package in COMPUTING_PACKAGES for path in Path(str(package.__file__)).parent.glob("*.py")}
    for used in (type(system.encoder), find_mask(config.mask_type)):
        files |= {Path(inspect.getfile(used))}
    return sorted(files)


def _code(path: Path) -> str:
    """Return a module's code without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def hash_of(content: Any) -> str:
    """SHA-256 of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digests(paths: Sequence[Path], manifest: Path) -> dict[Path, str]:
    """SHA-256 of files' bytes.

    Each file is read once. Its digest is stored in `manifest` with size, inode and times, and is valid while these are
    the same. The kernel sets the change time, so no write is missed. Clocks of file systems may be coarse, so a file
    that changed less than two seconds ago is not stored.
    """
    known = _read_manifest(manifest)
    states = {path: _file_state(path) for path in paths}
    unknown = [path for path in paths if known.get(str(path), {}).get("state") != states[path]]
    if unknown:
        gigabytes = sum(states[path][0] for path in unknown) / 1e9
        logger.info("token cache: hashing %d data files, %.1f GB", len(unknown), gigabytes)
    with ThreadPoolExecutor(4) as executor:
        hashed = dict(zip(unknown, executor.map(_digest, unknown), strict=True))
    now = time.time()
    entries = {
        str(path): {"state": states[path], "sha256": digest}
        for path, digest in hashed.items()
        if now - states[path][-1] / 1e9 > 2
    }
    if entries:
        write_whole(manifest, json.dumps({**known, **entries}, indent=0).encode())
    return {path: hashed.get(path) or known[str(path)]["sha256"] for path in paths}


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read stored digests; an empty dict if the file is missing or damaged."""
    try:
        known = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return {name: entry for name, entry in known.items() if isinstance(entry, dict)} if isinstance(known, dict) else {}


def _file_state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
