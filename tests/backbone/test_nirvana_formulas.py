"""The backbone against the explicit formulas in nirvana_formulas.py, for configurations without a golden file."""

from pathlib import Path

import nirvana_formulas
import pytest
import torch
from safetensors.torch import load_file, save_file

from mrilib.backbone.nirvana import NirvanaConfig, NirvanaForCausalLM, load_backbone

GOLDEN = Path(__file__).parents[1] / "golden" / "nirvana_small"
BASE = {"vocab_size": 40, "hidden_size": 48, "num_hidden_layers": 4, "num_heads": 3, "concept_dim": 8, "logit_dim": 4}
CONFIGS = {
    "odd_heads": {},
    "one_head": {"num_heads": 1, "hidden_size": 32},
    "narrow_heads": {"num_heads": 16, "hidden_size": 48},
    "odd_width": {"hidden_size": 51, "num_heads": 3},
    "odd_concepts": {"concept_dim": 7, "logit_dim": 5},
    "one_version": {"concept_dim": 1, "logit_dim": 1},
    "more_versions_than_concepts": {"concept_dim": 3, "logit_dim": 9},
    "window_1": {"window_size": 1},
    "window_7": {"window_size": 7},
    "window_is_length": {"window_size": 70},
    "one_layer": {"num_hidden_layers": 1},
    "two_layers": {"num_hidden_layers": 2},
    "three_layers": {"num_hidden_layers": 3},
    "six_layers": {"num_hidden_layers": 6},
    "odd_vocabulary": {"vocab_size": 41},
    "untied": {"tie_word_embeddings": False},
    "large_eps": {"norm_eps": 1e-3},
    "wide_mlp": {"hidden_size": 128, "num_heads": 2},  # two tiles of 256
}


def random_weights(config):
    """Weights by name, large enough that every term matters; A_log and dt_bias give short and long memories."""
    torch.manual_seed(1)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in NirvanaForCausalLM(config).named_parameters()}
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            weights[name] = 1 + 0.2 * torch.randn(shape)
        elif name.endswith(("A_log", "dt_bias")):
            weights[name] = torch.randn(shape) - 1
        elif "rnn_router" in name:
            weights[name] = torch.randn(shape) / shape[-1] / (shape[0] ** 0.5 if len(shape) == 3 else 1)
        elif "conv1d" in name:
            weights[name] = 0.5 * torch.randn(shape)
        else:
            weights[name] = torch.randn(shape) / shape[-1] ** 0.5
    return weights


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_formulas(name, tmp_path):
    config = NirvanaConfig(**{**BASE, **CONFIGS[name]})
    weights = random_weights(config)
    config.to_json_file(tmp_path / "config.json")
    save_file(weights, tmp_path / "model.safetensors")
    model = load_backbone(tmp_path / "config.json", tmp_path / "model.safetensors")
    assert {n for n, _ in model.named_parameters()} == set(weights)

    # padding on the left, on the right and in the middle of a row; 70 tokens are more than one chunk
    ids = torch.randint(config.vocab_size, (3, 70))
    mask = torch.ones(3, 70, dtype=torch.long)
    mask[0, :9], mask[1, 61:], mask[2, 20:23] = 0, 0, 0
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    for row in range(3):
        keep = mask[row].bool()
        embeds = weights["model.embeddings.weight"][ids[row]]
        states, logits = nirvana_formulas.run(weights, config, embeds, keep)
        for i, (values, expected) in enumerate(
            zip((*[h[row] for h in out.hidden_states], out.logits[row]), (*states, logits), strict=True)
        ):
            error = (values[keep] - expected[keep]).abs().max()
            assert error < 1e-4 * max(1.0, expected[keep].abs().max()), f"{row} {i}"


@torch.no_grad()
def test_formulas_equal_the_published_architecture():
    io = load_file(GOLDEN / "io.safetensors")
    config = NirvanaConfig.from_json_file(GOLDEN / "config.json")
    weights = load_file(GOLDEN / "model.safetensors")
    embeds = weights["model.embeddings.weight"][io["input_ids"][0]]
    states, logits = nirvana_formulas.run(weights, config, embeds, io["attention_mask"][0].bool())
    keep = io["attention_mask"][0].bool()
    for i, state in enumerate(states):
        assert (state - io[f"hidden_states.{i}"][0])[keep].abs().max() < 2e-4, i
    assert (logits - io["logits"][0])[keep].abs().max() < 2e-4


@torch.no_grad()
def test_weights_in_bfloat16_files(tmp_path):
    """A bfloat16 file read into float32 is exact; a run in bfloat16 has the rounding error of that type."""
    config = NirvanaConfig(**BASE)
    weights = {name: value.to(torch.bfloat16) for name, value in random_weights(config).items()}
    config.to_json_file(tmp_path / "config.json")
    save_file(weights, tmp_path / "model.safetensors")
    ids = torch.randint(config.vocab_size, (1, 70))
    embeds = weights["model.embeddings.weight"][ids[0]]
    _, expected = nirvana_formulas.run(weights, config, embeds, torch.ones(70, dtype=torch.bool))
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        model = load_backbone(tmp_path / "config.json", tmp_path / "model.safetensors", dtype=dtype)
        assert (model(ids).logits[0] - expected).norm() < bound * expected.norm(), dtype
