"""Bad backbone folders, weight files and tokenizers: each is refused in one line that names file and fault."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import systems
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mrilib.backbone.nirvana import load_backbone
from mrilib.model import two_stage
from mrilib.pretrain import corpus, tiny_nirvana

DEEP = '{"model_type": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Folders of a good Llama and a good Nirvana."""
    root = tmp_path_factory.mktemp("originals")
    config = LlamaConfig(vocab_size=500, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4)  # fmt: skip
    torch.manual_seed(0)
    tiny_nirvana.save(LlamaForCausalLM(config), corpus.make_tokenizer(vocab_size=500, texts=50), root / "llama")
    systems.write_backbone(root / "nirvana")
    for folder in root.iterdir():
        load_backbone("", folder)
    return root


def settings(file: str = "config.json", **changes: object) -> Callable[[Path], None]:
    """Change keys of a JSON file."""

    def prepare(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **changes}))

    return prepare


def text(file: str, content: str | bytes) -> Callable[[Path], None]:
    """Replace a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(data) and None


def fifo(file: str) -> Callable[[Path], None]:
    """Replace a file by a pipe."""

    def prepare(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return prepare


def embeddings(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Change the embedding matrix."""

    def prepare(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if "embed" in name)
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return prepare


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def index(**content: object) -> Callable[[Path], None]:
    """Rename the weights and write an index over them, with the given content."""

    def prepare(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        weight_map = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **content}))

    return prepare


HUGE = 10**7
CONFIG = "config.json"
FOLDERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "config is a list": (text(CONFIG, "[]"), (CONFIG, "JSON object", "list")),
    "config is null": (text(CONFIG, "null"), (CONFIG, "JSON object")),
    "config is binary": (text(CONFIG, b"\xff\xfe\x00\x01"), (CONFIG, "not a JSON file")),
    "config is empty": (text(CONFIG, " "), (CONFIG, "not a JSON file")),
    "config is deep": (text(CONFIG, DEEP), (CONFIG, "nested too deeply")),
    "config is a pipe": (fifo(CONFIG), (CONFIG,)),
    "model_type is a number": (settings(model_type=3), (CONFIG, "model_type", "3")),
    "model_type is unknown": (settings(model_type="surprise"), (CONFIG, "surprise")),
    "kernel hub": (settings(_attn_implementation="someone/kernel"), (CONFIG, "_attn_implementation", "sdpa")),
    "kernel hub, other key": (settings(attn_implementation="someone/kernel"), (CONFIG, "attn_implementation")),
    "kernel hub, nested": (
        settings(text_config={"_attn_implementation": "a/b:c"}),
        (CONFIG, "_attn_implementation", "a/b:c"),
    ),
    "kernel hub by object": (settings(_attn_implementation={"": "a/b"}), (CONFIG, "_attn_implementation")),
    "kernel hub, experts": (settings(_experts_implementation="a/b"), (CONFIG, "_experts_implementation")),
    "flash attention": (settings(_attn_implementation="flash_attention_2"), (CONFIG, "_attn_implementation")),
    "quantised": (settings(quantization_config={"quant_method": "gptq"}), (CONFIG, "quantization_config")),
    "quantised by number": (settings(quantization_config=3), (CONFIG, "quantization_config")),
    "pickled weights": (settings(transformers_weights="x.bin"), (CONFIG, "transformers_weights")),
    "too many layers": (settings(num_hidden_layers=HUGE), (CONFIG, "num_hidden_layers", str(HUGE))),
    "too many heads": (settings(num_attention_heads=HUGE), (CONFIG, "num_attention_heads", str(HUGE))),
    "too wide": (settings(hidden_size=HUGE * 4), (CONFIG, "parameters")),
    "too many words": (settings(vocab_size=10**12), (CONFIG, "parameters")),
    "integer beyond 64 bits": (settings(vocab_size=10**30), (CONFIG, "vocab_size")),
    "width is text": (settings(hidden_size="wide"), (CONFIG, "hidden_size")),
    "width is a list": (settings(hidden_size=[32]), (CONFIG, "hidden_size")),
    "width is negative": (settings(hidden_size=-32), (CONFIG,)),
    "width is null": (settings(hidden_size=None), (CONFIG, "hidden_size")),
    "activation is unknown": (settings(hidden_act="surprise"), (CONFIG, "surprise")),
    "rope is text": (settings(rope_parameters="surprise"), (CONFIG,)),
    "type is unknown": (settings(dtype="surprise"), (CONFIG,)),
    "weights cut short": (truncate, ("model.safetensors", "not a whole")),
    "weights are empty": (text("model.safetensors", " "), ("model.safetensors", "not a whole")),
    "weights are a pipe": (fifo("model.safetensors"), ("model.safetensors",)),
    "weights are float8": (
        embeddings(lambda x: x.to(torch.float8_e4m3fn)),
        ("model.safetensors", "embed", "F8_E4M3"),
    ),
    "weights are int8": (embeddings(lambda x: x.to(torch.int8)), ("model.safetensors", "embed", "I8")),
    "weights are complex": (embeddings(lambda x: x.to(torch.complex64)), ("model.safetensors", "embed", "C64")),
    "weights are NaN": (embeddings(lambda x: x * torch.nan), ("embed", "NaN")),
    "weights are infinite": (embeddings(lambda x: x + torch.inf), ("embed", "infinite")),
    "weights misshapen": (embeddings(lambda x: x[:7].clone()), ("wrong shape", "embed")),
    "index without metadata": (index(), ("index.json", "metadata")),
    "index metadata is a list": (index(metadata=[]), ("index.json", "metadata")),
    "index without map": (index(weight_map=None), ("index.json", "weight_map")),
    "index with empty map": (index(weight_map={}), ("index.json", "weight_map")),
    "index with a list as map": (index(weight_map=["a"]), ("index.json", "weight_map")),
    "index with a number as file": (index(weight_map={"x": 3}), ("index.json", "weight_map")),
    "index to a file outside": (index(weight_map={"x": "../a.safetensors"}), ("index.json", "../a.safetensors")),
    "index to a subfolder": (index(weight_map={"x": "sub/a.safetensors"}), ("index.json", "never read", "sub/a")),
    "index to an absolute path": (index(weight_map={"x": "/tmp/a.safetensors"}), ("index.json", "/tmp/a.safetensors")),
    "index to a missing file": (index(weight_map={"x": "b.safetensors"}), ("index.json", "b.safetensors")),
    "index to a pickle": (index(weight_map={"x": "a.bin"}), ("index.json", "never read", "a.bin")),
    "adapter": (text("adapter_config.json", "{}"), ("adapter_config.json",)),
    "generation_config is a list": (text("generation_config.json", "[]"), ("generation_config.json",)),
    "generation_config is a pipe": (fifo("generation_config.json"), ("generation_config.json",)),
    "tokenizer is a list": (text("tokenizer.json", "[]"), ("tokenizer.json",)),
    "tokenizer is binary": (text("tokenizer.json", b"\xff\x00"), ("tokenizer.json",)),
    "tokenizer_config is a list": (text("tokenizer_config.json", "[]"), ("tokenizer_config.json",)),
    "tokenizer_config is cut": (text("tokenizer_config.json", "{"), ("tokenizer_config.json",)),
    "tokenizer_config is deep": (text("tokenizer_config.json", DEEP), ("tokenizer_config.json", "deeply")),
    "eos_token is a number": (settings("tokenizer_config.json", eos_token=3), ("tokenizer_config.json",)),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folder(kind, originals, phantom_dir, tmp_path):
    prepare, words = FOLDERS[kind]
    refuse(originals / "llama", prepare, words, phantom_dir, tmp_path)


NIRVANA = {
    "layers": (settings(num_hidden_layers=HUGE), (CONFIG, "num_hidden_layers")),
    "width": (settings(hidden_size=HUGE * 2), (CONFIG, "hidden_size", "at most")),
    "versions": (settings(logit_dim=HUGE), (CONFIG, "logit_dim", "at most")),
    "concepts": (settings(concept_dim=HUGE), (CONFIG, "concept_dim", "at most")),
    "width is text": (settings(hidden_size="wide"), (CONFIG, "hidden_size")),
    "layers are true": (settings(num_hidden_layers=True), (CONFIG, "num_hidden_layers")),
    "epsilon is text": (settings(norm_eps="small"), (CONFIG, "norm_eps")),
    "int8": (embeddings(lambda x: x.to(torch.int8)), ("model.safetensors", "embeddings", "I8")),
    "complex": (embeddings(lambda x: x.to(torch.complex64)), ("model.safetensors", "embeddings", "C64")),
    "NaN": (embeddings(lambda x: x * torch.nan), ("embeddings", "NaN")),
    "deep": (text(CONFIG, DEEP), (CONFIG, "nested too deeply")),
    "quantised": (settings(quantization_config={}), (CONFIG, "quantization_config")),
    "kernel hub": (settings(_attn_implementation="a/b"), (CONFIG, "_attn_implementation")),
}


@pytest.mark.parametrize("kind", NIRVANA)
@pytest.mark.parametrize("single", [True, False])
def test_nirvana(kind, single, originals, phantom_dir, tmp_path):
    """As a file with its config, and as a folder."""
    prepare, words = NIRVANA[kind]
    refuse(originals / "nirvana", prepare, words, phantom_dir, tmp_path, single)


def refuse(original, prepare, words, phantom_dir, folder, single=False):
    for file in original.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    prepare(folder)
    own = {"config_path": str(folder / CONFIG), "backbone_path": str(folder / "model.safetensors")} if single else {}
    parameters = systems.stage1_config(phantom_dir, original).model_copy(update={"backbone_path": str(folder), **own})
    with pytest.raises((ValueError, OSError)) as caught:
        two_stage.build_backbone(parameters, "cpu")
    message = str(caught.value)
    assert message.isprintable() and str(folder) in message and all(word in message for word in words), message
