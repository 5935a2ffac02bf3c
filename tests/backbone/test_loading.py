"""Loading of Nirvana's weights from a file or an index; test_bad_backbones.py has the table of refused files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from mrilib.backbone.nirvana import NirvanaModel, load_backbone

GOLDEN = Path(__file__).parents[1] / "golden" / "nirvana_small"
CONFIG = GOLDEN / "config.json"
IDS = torch.arange(20)[None]


@pytest.fixture
def weights():
    return load_file(GOLDEN / "model.safetensors")


def test_load_is_exact_and_typed(weights):
    model = load_backbone(CONFIG, GOLDEN / "model.safetensors", dtype=torch.bfloat16)
    assert not model.training and model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embeddings.weight
    state = model.state_dict()
    for name, value in weights.items():
        assert torch.equal(state[name], value.to(torch.bfloat16)), name


@torch.no_grad()
@pytest.mark.parametrize("max_shard_size", ["5GB", "200KB"])
def test_save_and_load(tmp_path, max_shard_size):
    model = load_backbone(CONFIG, GOLDEN / "model.safetensors")
    expected = model(IDS).logits
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() == (max_shard_size == "200KB")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)
    assert isinstance(AutoModel.from_pretrained(tmp_path), NirvanaModel)
    assert torch.equal(load_backbone("", tmp_path)(IDS).logits, expected)
    if index.is_file():
        assert torch.equal(load_backbone(tmp_path / "config.json", index)(IDS).logits, expected)


def test_misfits_are_listed_by_name(weights, tmp_path):
    del weights["model.layers.3.mlp.down_proj.weight"]
    weights["model.rnn_router.surprise"] = torch.zeros(2)
    weights["model.norm.weight"] = torch.zeros(65)
    save_file(weights, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError) as caught:
        load_backbone(CONFIG, tmp_path / "bad.safetensors")
    for part in (
        "missing: model.layers.3.mlp.down_proj.weight (64, 256)",
        "extra: model.rnn_router.surprise (2,)",
        "wrong shape: model.norm.weight is (65,), the config asks for (64,)",
    ):
        assert part in str(caught.value)


def test_index_that_does_not_fit_its_files(weights, tmp_path):
    names = sorted(weights)
    file_of = {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(names)}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: weights[name] for name in names if file_of[name] == file}, tmp_path / file)

    def load(**changes):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {**file_of, **changes}}))
        load_backbone(CONFIG, index)

    load()
    norm = "model.norm.weight"
    wrong = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[file_of[norm]]
    with pytest.raises(ValueError, match=rf"missing: {norm}, which the index lists in {wrong}"):
        load(**{norm: wrong})
    with pytest.raises(ValueError, match=r"missing: ghost, which the index lists in a\.safetensors"):
        load(ghost="a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"missing next to it: c\.safetensors"):
        load(**{norm: "c.safetensors"})
    save_file(weights, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"twice: .* in a\.safetensors and b"):
        load()


def test_head_in_the_file_must_be_the_embeddings(weights, tmp_path):
    weights["lm_head.weight"] = weights["model.embeddings.weight"].clone()
    save_file(weights, tmp_path / "head.safetensors")
    load_backbone(CONFIG, tmp_path / "head.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load_backbone(CONFIG, tmp_path / "head.safetensors")


def test_pickles_and_missing_paths_are_refused(weights, tmp_path):
    torch.save(weights, tmp_path / "pytorch_model.bin")
    shutil.copy(CONFIG, tmp_path)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"model_type": "llama"}))
    for config_path, backbone_path, error, message in (
        (CONFIG, tmp_path / "pytorch_model.bin", ValueError, "never read"),
        ("", tmp_path, FileNotFoundError, "never read"),
        (CONFIG, tmp_path / "none.safetensors", FileNotFoundError, "does not exist"),
        ("", GOLDEN / "model.safetensors", FileNotFoundError, "config_path"),
        (other, GOLDEN / "model.safetensors", ValueError, "'llama'"),
        ("", "", ValueError, "backbone_path is empty"),
    ):
        with pytest.raises(error, match=message):
            load_backbone(config_path, backbone_path)
