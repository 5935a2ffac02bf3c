"""Training of the demo's small backbone, and the backbone that is in the repository."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mrilib.backbone.nirvana import NirvanaForCausalLM
from mrilib.data import findings
from mrilib.data.findings import Facts, Finding
from mrilib.pretrain import corpus, tiny_nirvana

TINY = Path(__file__).parents[2] / "models" / "tiny_backbone"
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_heads": 2,
    "concept_dim": 4,
    "logit_dim": 2,
    "batch_size": 3,
    "prefix_min": 16,
    "prefix_max": 25,
}


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.make_tokenizer(texts=400)


@pytest.fixture(scope="module")
def backbone():
    return NirvanaForCausalLM.from_pretrained(TINY).eval(), PreTrainedTokenizerFast.from_pretrained(TINY)


# ------------------------------------------------------------------------------------------------- training


def test_two_trainings_with_one_seed_are_equal_and_lower_the_loss(tokenizer):
    first, history = tiny_nirvana.pretrain(tokenizer, max_steps=24, seed=5, **SMALL)
    again, _ = tiny_nirvana.pretrain(tokenizer, max_steps=24, seed=5, **SMALL)
    other, _ = tiny_nirvana.pretrain(tokenizer, max_steps=1, seed=6, **SMALL)
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.model.embeddings.weight, other.model.embeddings.weight)
    assert len(history) == 24 and history[-1]["loss"] < history[0]["loss"] - 0.7
    assert not first.training


def test_prefixes_too_short_for_the_facts_are_refused(tokenizer):
    with pytest.raises(ValueError, match="prefix_min 15"):
        tiny_nirvana.pretrain(tokenizer, max_steps=1, **{**SMALL, "prefix_min": 15})


def test_the_loss_ignores_padding_and_counts_eos(tokenizer):
    model, _ = tiny_nirvana.pretrain(tokenizer, max_steps=1, **SMALL)
    facts = [Facts("T1", "lower", None), Facts("T2", "upper", (Finding("Mass", "left", "central"),))]
    prompt = torch.tensor(tokenizer.encode(findings.prompt()))
    prefix = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both, right = tiny_nirvana.answer_loss(model, prefix, prompt, *corpus.encode_answers(tokenizer, facts))
        alone = [
            tiny_nirvana.answer_loss(model, prefix[i : i + 1], prompt, *corpus.encode_answers(tokenizer, [one]))
            for i, one in enumerate(facts)
        ]
    counts = [answer.shape[1] for _, answer in alone]
    assert right.shape == (2, max(counts))
    expected = sum(loss * count for (loss, _), count in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(both, expected)


def test_saved_and_loaded_again_is_the_same(tokenizer, tmp_path):
    model, _ = tiny_nirvana.pretrain(tokenizer, max_steps=1, **SMALL)
    tiny_nirvana.save(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, NirvanaForCausalLM)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), loaded.parameters(), strict=True))
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_steering_leaves_the_model_alone(tokenizer):
    model, _ = tiny_nirvana.pretrain(tokenizer, max_steps=1, **SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    history = tiny_nirvana.steering_test(model, tokenizer, max_steps=2, batch_size=2, side=5, evaluate_every=1)
    assert [row["step"] for row in history] == [0, 1, 2]
    assert all(0 <= row[key] <= 1 for row in history for key in ("contrast", "level", "findings_exact"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(value.requires_grad and value.grad is None for value in model.parameters())


# ------------------------------------------------------------------------------------------------- the one in git


def test_the_backbone_in_the_repository(backbone):
    model, tokenizer = backbone
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 12e6
    assert json.loads((TINY / "config.json").read_text())["model_type"] == "transformer_rnn"
    assert model.config.vocab_size == len(tokenizer) and model.config.pad_token_id == model.config.eos_token_id == 2
    # the labels can be spelt, and the sentences are those that `analysis` writes today
    # (word for word, up to four findings; what it gets wrong are sides and regions of several findings)
    assert tiny_nirvana.exact_fraction(model, tokenizer, samples=128, seed=12) >= 0.8


def test_the_backbone_is_steered_by_learned_vectors(backbone):
    model, tokenizer = backbone
    history = tiny_nirvana.steering_test(model, tokenizer, max_steps=30, batch_size=8, evaluate_every=30, seed=3)
    assert history[0]["contrast"] < 0.7
    assert history[-1]["contrast"] >= 0.95 and history[-1]["level"] >= 0.95
