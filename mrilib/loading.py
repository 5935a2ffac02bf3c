"""Load the language model's weights, without a second copy in memory and without ever unpickling.

`mrilib.nirvana` hands `load_backbone` on, and tells the library the classes that it makes.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

MODEL_TYPE = "transformer_rnn"
INDEX = ".safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names; narrower types mean nothing without their scales


def _read_json(path: Path, wanted: str) -> Any:
    """The value of a key in a JSON file; a ValueError names the file where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))[wanted]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON file with '{wanted}' in it ({error!r})") from error


def _weight_map(index: Path) -> dict[str, str]:
    """Which file holds which tensor, by an index file: safetensors files beside it, and no others."""
    found = _read_json(index, "weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
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
    if (kind := _read_json(config_path, "model_type")) != MODEL_TYPE:
        raise ValueError(
            f"config_path {config_path} has model_type {kind!r}, not {MODEL_TYPE!r}; "
            "for another language model give its directory as backbone_path"
        )
    settings = json.loads(config_path.read_text(encoding="utf-8"))
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # named_parameters gives a tied tensor once, under the embeddings' name
    wanted = dict(model.named_parameters())
    where: dict[str, Path] = {}
    problems: list[str] = []
    found: set[tuple[str, str]] = set()  # tensor and file
    listed = _weight_map(path) if path.name.endswith(INDEX) else {}
    for shard in _shards(path):
        for name, shape, kind in _contents(shard):
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
        raise ValueError(
            f"{path} does not fit {config_path}, {len(problems)} of its tensors:\n  " + "\n  ".join(sorted(problems))
        )
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
    config.dtype = dtype
    return model.eval()


def _load_directory(path: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Any causal language model of the library from a directory that `save_pretrained` wrote."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"backbone_path {path} is a directory without config.json")
    _read_json(path / "config.json", "model_type")
    if "transformers_weights" in json.loads((path / "config.json").read_text(encoding="utf-8")):
        raise ValueError(
            f"{path / 'config.json'}: transformers_weights may name pickled weights, which are never read; "
            "take it out, and call the file model.safetensors"
        )
    weights = next((file for file in (path / "model.safetensors", path / f"model{INDEX}") if file.is_file()), None)
    if weights is None:
        raise FileNotFoundError(
            f"backbone_path {path} holds no model.safetensors, nor its index; pickled weights are never read"
        )
    for shard in _shards(weights):  # the library would unpickle what an index may name
        _contents(shard)
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
        raise ValueError(f"{path}: weights and config.json do not fit:\n  " + "\n  ".join(sorted(problems)))
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
