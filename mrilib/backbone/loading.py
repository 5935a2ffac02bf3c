"""Load the language model's weights, without a second copy in memory and without ever unpickling.

`mrilib.backbone.nirvana` hands `load_backbone` on, and tells the library the classes that it makes.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_NO_EMBEDDINGS = "the library's generate takes no embeddings for it"
UNSUPPORTED = {  # see docs/backbones.md
    "falcon_h1": _NO_EMBEDDINGS,
    "bamba": _NO_EMBEDDINGS,
    "zamba2": _NO_EMBEDDINGS,
    "rwkv": "it generates other tokens with its state than without",
}
MODEL_TYPE = "transformer_rnn"
INDEX = ".safetensors.index.json"
JSON_BYTES = 64 << 20
COUNT = re.compile(r"layers?(_|$)|heads?$|experts?$|blocks?$")  # config keys that count modules
COUNT_MOST = 10_000
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# config keys that choose code: the library fetches any other name from a hub of kernels
IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
BUFFERS = (".attn.bias", ".attn.masked_bias", ".position_ids")  # of older models: masks and indices, no weights
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names; narrower types mean nothing without their scales


def read_json_object(path: Path) -> dict[str, Any]:
    """The contents of a JSON file that holds an object; any other file is a ValueError that names it."""
    if (size := path.stat().st_size) > JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than the {JSON_BYTES} that are read of such a file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {_one_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def _one_line(error: BaseException) -> str:
    """The start of an error's message without line breaks and control characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return text[:300] or type(error).__name__


@contextmanager
def names_file(path: Path) -> Iterator[None]:
    """Turn every error of the library, whose kinds are many, into a ValueError in one line that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: transformers cannot use it ({type(error).__name__}: {_one_line(error)})") from error


def _nested(settings: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a JSON object and of the objects in it, with its value."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield key, value
            yield from _nested(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _nested(value)


def _read_config(path: Path, tensors: int) -> dict[str, Any]:
    """A model's settings, checked before anything is built from them.

    Parameters
    ----------
    path : Path
    tensors : int
        How many tensors the weights hold. Each layer has at least one.
    """
    settings = read_json_object(path)
    if not isinstance(settings.get("model_type"), str):
        raise ValueError(f"{path}: 'model_type' must be the name of a model, got {settings.get('model_type')!r:.100}")
    if settings["model_type"] in UNSUPPORTED:
        raise ValueError(
            f"{path}: {settings['model_type']} cannot be the backbone: {UNSUPPORTED[settings['model_type']]}"
        )
    try:
        keys = list(_nested(settings))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    for key, value in keys:
        if key == "transformers_weights":
            raise ValueError(
                f"{path}: transformers_weights may name pickled weights, which are never read; "
                "take it out, and call the file model.safetensors"
            )
        if key == "quantization_config" and value is not None:
            raise ValueError(f"{path}: quantization_config: save the model without it, in full precision")
        allowed = IMPLEMENTATIONS.get(key.removeprefix("_").removesuffix("_internal"))
        if allowed and value is not None and value not in allowed:
            raise ValueError(f"{path}: {key} must be one of {', '.join(allowed)}, got {value!r:.100}")
        if isinstance(value, int) and (COUNT.search(key) or key in LAYERS):
            most = tensors if key in LAYERS else COUNT_MOST
            if not -1 <= value <= most:
                because = ", the number of tensors in the weights" if key in LAYERS else ""
                raise ValueError(f"{path}: {key} must be at most {most}{because}, got {value!r:.100}")
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise ValueError(f"{path}: {key} is too large: {value!r:.100}")
    return settings


def _listed(problems: list[str]) -> str:
    """Problems in one line, the first few of many."""
    rest = len(problems) - 8
    return "; ".join(sorted(problems)[:8]) + (f"; and {rest} more" if rest > 0 else "")


def _check_finite(model: PreTrainedModel, path: Path) -> None:
    """Raise ValueError where a weight is NaN or infinite."""
    bad = [name for name, x in model.named_parameters() if x.numel() and not torch.stack(x.aminmax()).isfinite().all()]
    if bad:
        raise ValueError(f"{path}: weights that are NaN or infinite: {_listed(bad)}")


def _weight_map(index: Path) -> dict[str, str]:
    """Which file holds which tensor, by an index file: safetensors files beside it, and no others."""
    found = read_json_object(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise ValueError(f"{index}: weight_map must give a file name for each tensor")
    files = sorted(set(found.values()))
    foreign = [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]
    if foreign:
        raise ValueError(f"{index} lists other files than .safetensors beside it, never read: {', '.join(foreign)}")
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} lists files that are not beside it: {', '.join(missing)}")
    return found


def _shards(path: Path) -> list[Path]:
    """The safetensors files that `path` stands for: itself, or those that an index lists."""
    if not path.name.endswith(INDEX):
        return [path]
    return [path.parent / file for file in sorted(set(_weight_map(path).values()))]


def _contents(shard: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of each tensor in a safetensors file; nothing of their values is read."""
    try:
        with safe_open(shard, framework="pt") as tensors:
            slices = [(name, tensors.get_slice(name)) for name in tensors.keys()]  # noqa: SIM118  (it is no dict)
            return [(name, tuple(x.get_shape()), x.get_dtype()) for name, x in slices]
    except SafetensorError as error:
        raise ValueError(f"{shard} is not a whole safetensors file ({error}): fetch it again") from error


def _load_file(config_path: Path, path: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Build the model without memory, then give it each tensor as it is read."""
    contents = {shard: _contents(shard) for shard in _shards(path)}
    settings = _read_config(config_path, sum(map(len, contents.values())))
    if (kind := settings["model_type"]) != MODEL_TYPE:
        raise ValueError(
            f"config_path {config_path} has model_type {kind!r}, not {MODEL_TYPE!r}; "
            "for another language model give its directory as backbone_path"
        )
    with names_file(config_path):
        config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # named_parameters gives a tied tensor once, under the embeddings' name
    wanted = dict(model.named_parameters())
    where: dict[str, Path] = {}
    problems: list[str] = []
    found: set[tuple[str, str]] = set()  # tensor and file
    listed = _weight_map(path) if path.name.endswith(INDEX) else {}
    for shard, tensors_in in contents.items():
        for name, shape, kind in tensors_in:
            if name in where:
                problems.append(f"twice: {name}, in {where[name].name} and {shard.name}")
            where[name] = shard
            found.add((name, shard.name))
            tied = name == "lm_head.weight" and config.tie_word_embeddings
            parameter = wanted.get("model.embeddings.weight" if tied else name)
            if parameter is None:
                problems.append(f"extra: {name} {shape}")
            elif tuple(parameter.shape) != shape:
                problems.append(f"wrong shape: {name} is {shape}, the config asks for {tuple(parameter.shape)}")
            elif kind not in FLOATS:
                problems.append(f"wrong type: {name} is {kind}, not one of {', '.join(FLOATS)}")
    problems += [f"missing: {name} {tuple(wanted[name].shape)}" for name in wanted if name not in where]
    problems += [f"missing: {name}, which the index lists in {file}" for name, file in listed.items()
                 if (name, file) not in found]  # fmt: skip
    if problems:
        raise ValueError(f"{path} does not fit {config_path}, {len(problems)} of its tensors: {_listed(problems)}")
    for shard in dict.fromkeys(where.values()):
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name in wanted:
                    owner = model.get_submodule(name.rpartition(".")[0])
                    # a copy of its own: what safetensors hands out may be the file itself
                    value = torch.empty(wanted[name].shape, dtype=dtype, device=device)
                    value.copy_(tensors.get_tensor(name))
                    setattr(owner, name.rpartition(".")[2], nn.Parameter(value))
    model.tie_weights()
    if config.tie_word_embeddings and "lm_head.weight" in where:
        with safe_open(where["lm_head.weight"], framework="pt") as tensors:
            head = tensors.get_tensor("lm_head.weight").to(device=device, dtype=dtype)
        if not torch.equal(head, model.get_input_embeddings().weight):
            raise ValueError(
                f"{path}: lm_head.weight differs from model.embeddings.weight although the config ties them; "
                "set tie_word_embeddings to false"
            )
    unfilled = [name for name, x in (*model.named_parameters(), *model.named_buffers()) if x.is_meta]
    if unfilled:
        raise RuntimeError(f"left without values: {', '.join(unfilled)}")
    _check_finite(model, path)
    config.dtype = dtype
    return model.eval()


def _load_directory(path: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Any causal language model of the library from a directory that `save_pretrained` wrote."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"backbone_path {path} is a directory without config.json")
    odd = [file.name for file in path.iterdir() if not (file.is_file() or file.is_dir())]
    if odd:
        raise ValueError(f"backbone_path {path} holds what is no regular file: {', '.join(map(repr, sorted(odd)))}")
    if (path / "adapter_config.json").exists():
        raise ValueError(f"{path / 'adapter_config.json'}: merge the adapter into the model and save that")
    if (path / "generation_config.json").exists():
        read_json_object(path / "generation_config.json")
    weights = next((file for file in (path / "model.safetensors", path / f"model{INDEX}") if file.is_file()), None)
    if weights is None:
        raise FileNotFoundError(
            f"backbone_path {path} holds no model.safetensors, nor its index; pickled weights are never read"
        )
    # before transformers reads the files: it would unpickle what an index may name
    contents = [one for shard in _shards(weights) for one in _contents(shard)]
    if weights.name.endswith(INDEX) and not isinstance(read_json_object(weights).get("metadata"), dict):
        raise ValueError(f'{weights} must have the key metadata, which transformers reads: add "metadata": {{}}')
    typed = [f"{name} is {kind}" for name, _, kind in contents if kind not in FLOATS and not name.endswith(BUFFERS)]
    if typed:
        raise ValueError(f"{weights}: wrong type, not one of {', '.join(FLOATS)}: {_listed(typed)}")
    _read_config(path / "config.json", len(contents))
    with names_file(path / "config.json"):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            built: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    asked, held = (sum(math.prod(shape) for shape in shapes) for shapes in (
        [x.shape for x in built.parameters()], [shape for _, shape, _ in contents]))  # fmt: skip
    if asked > 4 * held + 10**8:  # weights that are missing are made, at the size that the config asks for
        raise ValueError(f"{path / 'config.json'} asks for {asked} parameters, {weights.name} holds {held}")
    with names_file(path):
        # with output_loading_info it is a pair, which the library's types do not tell
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that they are reported below together with the others
            output_loading_info=True,
        )
    model, info = loaded
    problems = [f"missing: {name}" for name in info["missing_keys"]]
    problems += [f"extra: {name}" for name in info["unexpected_keys"]]
    problems += [f"wrong shape: {name} is {tuple(found)}, the config asks for {tuple(asked)}"
                 for name, found, asked in info["mismatched_keys"]]  # fmt: skip
    problems += [f"unreadable: {error}" for error in info["error_msgs"]]
    if problems:
        raise ValueError(f"{path}: weights and config.json do not fit: {_listed(problems)}")
    _check_finite(model, path)
    return model.to(device).eval()


def load_backbone(
    config_path: str | Path,
    backbone_path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load the language model, in eval mode; nothing is ever unpickled.

    Parameters
    ----------
    config_path : path
        The backbone's JSON; left empty where backbone_path is a directory, which has its own.
    backbone_path : path
        A safetensors file with the published names, the `.safetensors.index.json` of a sharded one, or the directory
        of any Hugging Face causal language model. The head is tied to the embeddings and may be left out of the file.
    dtype : torch.dtype
        Of the parameters.
    device : str or torch.device

    Returns
    -------
    PreTrainedModel
        A NirvanaForCausalLM for a file. Memory holds the weights once: the model is built without any, and each tensor
        is read straight into its place.

    Raises
    ------
    FileNotFoundError
        A path that is not there.
    ValueError
        Another kind of file than safetensors, also in an index; a file cut short; tensors that are missing, extra,
        misshapen, quantised or there twice, listed by name.
    """
    if not str(backbone_path):
        raise ValueError("backbone_path is empty: give a safetensors file or a Hugging Face model directory")
    path = Path(backbone_path)
    if path.is_dir():
        return _load_directory(path, dtype, str(device))
    if not path.is_file():
        raise FileNotFoundError(f"backbone_path {path} is not there")
    if not path.name.endswith((".safetensors", INDEX)):
        raise ValueError(f"backbone_path {path} must be .safetensors or a directory: pickled weights are never read")
    if not str(config_path) or not Path(config_path).is_file():
        raise FileNotFoundError(f"config_path {str(config_path)!r} must be the JSON file of the weights in {path}")
    return _load_file(Path(config_path), path, dtype, str(device))
