"""Loading of the language model's weights. Memory holds them once, and nothing is ever unpickled."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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
MAX_JSON_BYTES = 64 << 20
MAX_COUNT = 10_000
COUNT_KEYS = re.compile(r"layers?(_|$)|heads?$|experts?$|blocks?$")  # config keys that count modules
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# config keys that choose code: for any other value the library downloads kernels from a hub
IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
BUFFERS = (".attn.bias", ".attn.masked_bias", ".position_ids")  # masks and indices of older models, not weights
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names; narrower types are unusable without their scales


def load_backbone(
    config_path: str | Path,
    backbone_path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load the language model in eval mode.

    Parameters
    ----------
    config_path : path
        JSON configuration of a Nirvana file; unused if backbone_path is a directory.
    backbone_path : path
        A safetensors file with the published names, the `.safetensors.index.json` of several, or the directory of any
        Hugging Face causal language model. The head is tied to the embeddings and may be absent from the file.
    dtype : torch.dtype
        Type of the parameters.
    device : str or torch.device

    Returns
    -------
    PreTrainedModel
        A NirvanaForCausalLM for a file. It is built without memory, and each tensor is read directly to its place.

    Raises
    ------
    FileNotFoundError
        If a path does not exist.
    ValueError
        If a file, or a file in an index, is not safetensors or is truncated. If tensors are missing, unknown,
        duplicate, quantised or of a wrong shape; they are listed by name.
    """
    if not str(backbone_path):
        raise ValueError("backbone_path is empty: give a safetensors file or a Hugging Face model directory")
    path = Path(backbone_path)
    if path.is_dir():
        return _load_directory(path, dtype, str(device))
    if not path.is_file():
        raise FileNotFoundError(f"backbone_path {path} does not exist")
    if not path.name.endswith((".safetensors", INDEX)):
        raise ValueError(f"backbone_path {path} must be .safetensors or a directory: pickled weights are never read")
    if not str(config_path) or not Path(config_path).is_file():
        raise FileNotFoundError(f"config_path {str(config_path)!r} must be the JSON file of the weights in {path}")
    return _load_file(Path(config_path), path, dtype, str(device))


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises
    ------
    ValueError
        If the file is too large, not JSON, nested too deeply, or holds another type.
    """
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes; at most {MAX_JSON_BYTES} are allowed for a JSON file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _one_line(error: BaseException) -> str:
    """Start of an error's message, without line breaks and control characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return text[:300] or type(error).__name__


@contextmanager
def transformers_errors(path: Path) -> Iterator[None]:
    """Turn any error of transformers into a ValueError of one line that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: transformers cannot use it ({type(error).__name__}: {_one_line(error)})") from error


def _nested_items(settings: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of a JSON object and of all objects inside it."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield key, value
            yield from _nested_items(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _nested_items(value)


def _read_model_config(path: Path, tensor_count: int) -> dict[str, Any]:
    """Read a model's config.json and check it before anything is built; the weights hold `tensor_count` tensors."""
    settings = read_json_object(path)
    model_type = settings.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{path}: 'model_type' must be the name of a model, got {model_type!r:.100}")
    if model_type in UNSUPPORTED:
        raise ValueError(f"{path}: {model_type} cannot be the backbone: {UNSUPPORTED[model_type]}")
    try:
        items = list(_nested_items(settings))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    for key, value in items:
        if key == "transformers_weights":
            raise ValueError(
                f"{path}: transformers_weights may name pickled weights, which are never read; "
                "remove it, and name the weights model.safetensors"
            )
        if key == "quantization_config" and value is not None:
            raise ValueError(f"{path}: quantization_config: save the model without it, in full precision")
        allowed = IMPLEMENTATIONS.get(key.removeprefix("_").removesuffix("_internal"))
        if allowed and value is not None and value not in allowed:
            raise ValueError(f"{path}: {key} must be one of {', '.join(allowed)}, got {value!r:.100}")
        if isinstance(value, int):
            is_count = key in LAYER_KEYS or COUNT_KEYS.search(key)
            highest = tensor_count if key in LAYER_KEYS else MAX_COUNT if is_count else (1 << 63) - 1
            if not (-1 if is_count else -highest) <= value <= highest:
                reason = ", the number of tensors in the weights" if key in LAYER_KEYS else ""
                raise ValueError(f"{path}: {key} must be at most {highest}{reason}, got {value!r:.100}")
    return settings


class TensorInfo(NamedTuple):
    """A tensor in a safetensors file."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def _read_tensor_infos(file: Path) -> list[TensorInfo]:
    """Name, shape and type of each tensor in a safetensors file; the values are not read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = [(name, tensors.get_slice(name)) for name in tensors.keys()]  # noqa: SIM118  (it is no dict)
            return [TensorInfo(name, tuple(x.get_shape()), x.get_dtype()) for name, x in slices]
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): download it again") from error


def _read_index(index: Path) -> dict[str, str]:
    """Read the file name of each tensor from an index; the files must be safetensors in the same directory."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise ValueError(f"{index}: weight_map must give a file name for each tensor")
    files = sorted(set(weight_map.values()))
    foreign = [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]
    if foreign:
        raise ValueError(f"{index} lists files that are never read: {', '.join(foreign)}; only .safetensors next to it")
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} lists files that are missing next to it: {', '.join(missing)}")
    return weight_map


def _read_weights(path: Path) -> dict[Path, list[TensorInfo]]:
    """Tensors in each file of a model: a safetensors file, or the files of an index."""
    if not path.name.endswith(INDEX):
        return {path: _read_tensor_infos(path)}
    weight_map = _read_index(path)
    files = {path.parent / file: _read_tensor_infos(path.parent / file) for file in sorted(set(weight_map.values()))}
    in_files = {(info.name, file.name) for file, infos in files.items() for info in infos}
    missing = [f"{name}, which the index lists in {file}"
               for name, file in weight_map.items() if (name, file) not in in_files]  # fmt: skip
    if missing:
        raise ValueError(f"{path} lists tensors that are missing: {_listed(missing)}")
    return files


def _listed(problems: list[str]) -> str:
    """Problems in one line, eight at most."""
    rest = len(problems) - 8
    return "; ".join(sorted(problems)[:8]) + (f"; and {rest} more" if rest > 0 else "")


def _check_finite(model: PreTrainedModel, path: Path) -> None:
    bad = [name for name, x in model.named_parameters() if x.numel() and not torch.stack(x.aminmax()).isfinite().all()]
    if bad:
        raise ValueError(f"{path}: weights that are NaN or infinite: {_listed(bad)}")


def _load_file(config_path: Path, path: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Build the model without memory, then read each tensor to its place."""
    files = _read_weights(path)
    model = _build_without_memory(config_path, tensor_count=sum(map(len, files.values())))
    if problems := _misfits(model, files):
        raise ValueError(f"{path} does not fit {config_path}, {len(problems)} of its tensors: {_listed(problems)}")
    _fill(model, files, dtype, device)
    model.tie_weights()
    head_files = [file for file, infos in files.items() if any(info.name == "lm_head.weight" for info in infos)]
    if model.config.tie_word_embeddings and head_files:
        _check_tied_head(model, head_files[0])
    unfilled = [name for name, x in (*model.named_parameters(), *model.named_buffers()) if x.is_meta]
    if unfilled:
        raise RuntimeError(f"parameters and buffers without values: {', '.join(unfilled)}")
    _check_finite(model, path)
    model.config.dtype = dtype
    return model.eval()


def _build_without_memory(config_path: Path, tensor_count: int) -> PreTrainedModel:
    """Build a Nirvana model on PyTorch's meta device."""
    settings = _read_model_config(config_path, tensor_count)
    if (model_type := settings["model_type"]) != MODEL_TYPE:
        raise ValueError(
            f"config_path {config_path} has model_type {model_type!r}, not {MODEL_TYPE!r}; "
            "for another language model give its directory as backbone_path"
        )
    with transformers_errors(config_path):
        config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _misfits(model: PreTrainedModel, files: dict[Path, list[TensorInfo]]) -> list[str]:
    """Differences between a model's parameters and the tensors in its files."""
    parameters = dict(model.named_parameters())  # a tied tensor occurs once, under the embeddings' name
    aliases = {"lm_head.weight": "model.embeddings.weight"} if model.config.tie_word_embeddings else {}
    file_of: dict[str, Path] = {}
    problems = []
    for file, infos in files.items():
        for name, shape, dtype in infos:
            if name in file_of:
                problems.append(f"twice: {name}, in {file_of[name].name} and {file.name}")
            file_of[name] = file
            parameter = parameters.get(aliases.get(name, name))
            if parameter is None:
                problems.append(f"extra: {name} {shape}")
            elif tuple(parameter.shape) != shape:
                problems.append(f"wrong shape: {name} is {shape}, the config asks for {tuple(parameter.shape)}")
            elif dtype not in FLOATS:
                problems.append(f"wrong type: {name} is {dtype}, not one of {', '.join(FLOATS)}")
    missing = [name for name in parameters if name not in file_of]
    return problems + [f"missing: {name} {tuple(parameters[name].shape)}" for name in missing]


def _fill(model: PreTrainedModel, files: Iterable[Path], dtype: torch.dtype, device: str) -> None:
    """Replace a model's parameters by the tensors in its files."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in shapes.keys() & set(tensors.keys()):
                module, _, attribute = name.rpartition(".")
                # copied: safetensors may return a view of the file
                value = torch.empty(shapes[name], dtype=dtype, device=device)
                value.copy_(tensors.get_tensor(name))
                setattr(model.get_submodule(module), attribute, nn.Parameter(value))


def _check_tied_head(model: PreTrainedModel, file: Path) -> None:
    weight: Any = model.get_input_embeddings().weight
    with safe_open(file, framework="pt") as tensors:
        head = tensors.get_tensor("lm_head.weight").to(weight)
    if not torch.equal(head, weight):
        raise ValueError(
            f"{file}: lm_head.weight differs from model.embeddings.weight although the config ties them; "
            "set tie_word_embeddings to false"
        )


def _load_directory(path: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Load a causal language model from a directory written by `save_pretrained`."""
    weights = _find_weights(path)
    _check_directory(path, weights)
    with transformers_errors(path):
        # with output_loading_info a pair is returned, which the library's types do not declare
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, with the other problems
            output_loading_info=True,
        )
    model, info = loaded
    problems = [f"missing: {name}" for name in info["missing_keys"]]
    problems += [f"extra: {name}" for name in info["unexpected_keys"]]
    problems += [f"wrong shape: {name} is {tuple(in_file)}, the config asks for {tuple(in_model)}"
                 for name, in_file, in_model in info["mismatched_keys"]]  # fmt: skip
    problems += [f"unreadable: {error}" for error in info["error_msgs"]]
    if problems:
        raise ValueError(f"{path}: weights and config.json do not fit: {_listed(problems)}")
    _check_finite(model, path)
    return model.to(device).eval()


def _find_weights(path: Path) -> Path:
    """Return a directory's safetensors file or index; refuse directories that transformers would misread."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"backbone_path {path} is a directory without config.json")
    odd = [file.name for file in path.iterdir() if not (file.is_file() or file.is_dir())]
    if odd:
        raise ValueError(f"backbone_path {path} holds what is no regular file: {', '.join(map(repr, sorted(odd)))}")
    if (path / "adapter_config.json").exists():
        raise ValueError(f"{path / 'adapter_config.json'}: merge the adapter into the model and save that")
    if (path / "generation_config.json").exists():
        read_json_object(path / "generation_config.json")
    for weights in (path / "model.safetensors", path / f"model{INDEX}"):
        if weights.is_file():
            return weights
    raise FileNotFoundError(
        f"backbone_path {path} holds neither model.safetensors nor model{INDEX}; pickled weights are never read"
    )


def _check_directory(path: Path, weights: Path) -> None:
    """Check weights and config.json before transformers reads them: it would unpickle files that an index names."""
    infos = [info for file_infos in _read_weights(weights).values() for info in file_infos]
    if weights.name.endswith(INDEX) and not isinstance(read_json_object(weights).get("metadata"), dict):
        raise ValueError(f'{weights} must have the key metadata, which transformers reads: add "metadata": {{}}')
    wrong_type = [f"{info.name} is {info.dtype}"
                  for info in infos if info.dtype not in FLOATS and not info.name.endswith(BUFFERS)]  # fmt: skip
    if wrong_type:
        raise ValueError(f"{weights}: wrong type, not one of {', '.join(FLOATS)}: {_listed(wrong_type)}")
    config_path = path / "config.json"
    _read_model_config(config_path, len(infos))
    with transformers_errors(config_path):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    in_model = sum(x.numel() for x in model.parameters())
    in_file = sum(math.prod(info.shape) for info in infos)
    # transformers allocates missing weights, at the size that the config asks for
    if in_model > 4 * in_file + 10**8:
        raise ValueError(f"{config_path} asks for {in_model} parameters, {weights.name} holds {in_file}")
