"""Training of the demo's small backbone, and the backbone that is in the repository."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mrilib.backbone.nirvana import NirvanaForCausalLM
from mrilib.config import PretrainParameters
from mrilib.data import findings
from mrilib.data.findings import Facts, Finding
from mrilib.pretrain import corpus, tiny_nirvana

ROOT = Path(__file__).parents[2]
TINY = ROOT / "models" / "tiny_backbone"


def small(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 2, "concept_dim": 4, "logit_dim": 2}
    training = {"batch_size": 3, "prefix_min": 16, "prefix_max": 25, "max_steps": 1, "learning_rate": 4e-3}
    return PretrainParameters.create({**sizes, **training, **changes})


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.make_tokenizer(texts=400)


@pytest.fixture(scope="module")
def backbone():
    return NirvanaForCausalLM.from_pretrained(TINY).eval(), PreTrainedTokenizerFast.from_pretrained(TINY)


# ------------------------------------------------------------------------------------------------------- training


def test_training_is_deterministic_and_lowers_the_loss(tokenizer):
    rows = []
    first, history = tiny_nirvana.pretrain(tokenizer, small(max_steps=24, seed=5), rows.append)
    again, _ = tiny_nirvana.pretrain(tokenizer, small(max_steps=24, seed=5))
    other, _ = tiny_nirvana.pretrain(tokenizer, small(seed=6))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.model.embeddings.weight, other.model.embeddings.weight)
    assert len(history) == 24 and history[-1]["loss"] < history[0]["loss"] - 0.7
    assert rows == history and not first.training


def test_prefix_min_above_prefix_max_is_refused(tokenizer):
    with pytest.raises(ValueError, match="prefix_min 26 must not exceed prefix_max 25"):
        tiny_nirvana.pretrain(tokenizer, small(prefix_min=26))


def test_loss_excludes_padding_and_includes_eos(tokenizer):
    model, _ = tiny_nirvana.pretrain(tokenizer, small())
    all_facts = [Facts("T1", "lower", None), Facts("T2", "upper", (Finding("Mass", "left", "central"),))]
    prompt = torch.tensor(tokenizer.encode(findings.prompt()))
    prefix = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together, is_right = tiny_nirvana.answer_loss(
            model, prefix, prompt, *corpus.encode_answers(tokenizer, all_facts)
        )
        alone = [
            tiny_nirvana.answer_loss(model, prefix[i : i + 1], prompt, *corpus.encode_answers(tokenizer, [facts]))
            for i, facts in enumerate(all_facts)
        ]
    counts = [row.shape[1] for _, row in alone]
    assert is_right.shape == (2, max(counts))
    expected = sum(loss * count for (loss, _), count in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(together, expected)


def test_saved_model_is_loaded_exactly(tokenizer, tmp_path):
    model, _ = tiny_nirvana.pretrain(tokenizer, small())
    tiny_nirvana.save(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, NirvanaForCausalLM)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_steering_test_does_not_change_the_model(tokenizer):
    model, _ = tiny_nirvana.pretrain(tokenizer, small())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    history = tiny_nirvana.steering_test(model, tokenizer, max_steps=2, batch_size=2, side=5, evaluate_every=1)
    assert [row["step"] for row in history] == [0, 1, 2]
    assert all(0 <= row[key] <= 1 for row in history for key in ("contrast", "level", "findings_exact"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(value.requires_grad and value.grad is None for value in model.parameters())


def test_notebook_runs(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "concept_dim": 4, "logit_dim": 2}
    folders = {"model_dir": tmp_path / "model", "output_dir": tmp_path / "run"}
    values = {**sizes, **folders, "max_steps": 2, "batch_size": 2, "num_threads": 1, "interactive": False}
    command = [
        sys.executable,
        "-m",
        "papermill",
        "notebooks/appendix_pretrain_tiny_backbone.ipynb",
        tmp_path / "out.ipynb",
    ]
    command += [word for name, value in values.items() for word in ("-p", name, value)]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "done"
    assert len(list((tmp_path / "run" / "figures").glob("*.png"))) == 2
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), NirvanaForCausalLM)


# ------------------------------------------------------------------------------------------ the committed backbone


def test_committed_backbone_answers_exactly(backbone):
    """Word for word, from clean prefixes; its errors are sides and regions where there are several findings."""
    model, tokenizer = backbone
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 12e6
    assert json.loads((TINY / "config.json").read_text())["model_type"] == "transformer_rnn"
    assert model.config.vocab_size == len(tokenizer) and model.config.pad_token_id == model.config.eos_token_id == 2
    assert tiny_nirvana.exact_fraction(model, tokenizer, samples=128, seed=12) >= 0.8


def test_committed_backbone_is_steered_by_learned_vectors(backbone):
    model, tokenizer = backbone
    history = tiny_nirvana.steering_test(model, tokenizer, max_steps=30, batch_size=8, evaluate_every=30, seed=3)
    assert history[0]["contrast"] < 0.7
    assert history[-1]["contrast"] >= 0.95 and history[-1]["level"] >= 0.95
