"""Corpus, tokenizer and training of the demo's small backbone, and the backbone that is in the repository."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mrilib import analysis, pretrain
from mrilib.analysis import Facts, Finding
from mrilib.nirvana import NirvanaForCausalLM

TINY = Path(__file__).parents[1] / "models" / "tiny_backbone"
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 2, "concept_dim": 4, "logit_dim": 2, "batch_size": 3,
         "prefix_min": 16, "prefix_max": 25}


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain.make_tokenizer(texts=400)


@pytest.fixture(scope="module")
def backbone():
    return NirvanaForCausalLM.from_pretrained(TINY).eval(), PreTrainedTokenizerFast.from_pretrained(TINY)


# ------------------------------------------------------------------------------------------------- corpus


def test_contrast_level_and_findings_are_independent():
    rng = np.random.default_rng(0)
    facts = [pretrain.random_facts(rng) for _ in range(6000)]
    for attribute in ("contrast", "level"):
        for value in {getattr(one, attribute) for one in facts}:
            group = [one.findings for one in facts if getattr(one, attribute) == value]
            clean = np.mean([found == () for found in group])
            assert clean == pytest.approx(np.mean([one.findings == () for one in facts]), abs=0.06)
    labels = {found.label for one in facts for found in one.findings or ()}
    assert labels == set(analysis.LABELS)  # rare ones too
    assert {one.contrast for one in facts} == set(analysis.CONTRASTS.values())
    assert any(one.findings is None for one in facts) and any(one.study_labels for one in facts)


def test_tokenizer_gives_texts_back_and_ids_are_those_of_the_backbone(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    rng = np.random.default_rng(1)
    texts = [analysis.answer(pretrain.random_facts(rng)) for _ in range(200)]
    for text in [*texts, analysis.prompt(), "", " two  spaces\n", "Größe 3 µm — ok?"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids  # nothing added
        assert max(ids, default=0) < len(tokenizer)
    for label in analysis.LABELS:  # a word is one token, so answers are short
        words = label.lower().replace("-", " - ").replace(":", " :").split()
        assert len(tokenizer.encode(f" {label.lower()}")) <= len(words) + 1, label


def test_tokenizer_is_deterministic(tokenizer):
    again = pretrain.make_tokenizer(texts=400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_eos_is_learned_and_padding_is_not(tokenizer):
    facts = [Facts("T1", "lower", None), Facts("T2", "upper", (Finding("Mass", "left", "central"),))]
    ids, lengths = pretrain.encode_answers(tokenizer, facts)
    for row, length, one in zip(ids, lengths, facts, strict=True):
        assert row[length - 1] == tokenizer.eos_token_id
        assert tokenizer.decode(row[: length - 1]) == analysis.answer(one)
        assert (row[length:] == tokenizer.pad_token_id).all()
    assert lengths[0] < lengths[1] == ids.shape[1]


@pytest.mark.parametrize("length", [16, 33])
def test_a_clean_prefix_holds_the_facts_and_nothing_else(tokenizer, length):
    batch = pretrain.make_batch(tokenizer, np.random.default_rng(2), 40, length, pretrain.Steering(), clean=True)
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    known = set(pretrain.fact_tokens())
    assert batch.weights.shape == (40, length, len(tokenizer))
    assert (batch.noise == 0).all() and (batch.common == 0).all() and (batch.scale == 1).all()
    for weights, facts in zip(batch.weights, batch.facts, strict=True):
        told = {frozenset(tokens[int(number)] for number in row.nonzero()[:, 0]) & known for row in weights}
        told.discard(frozenset())  # fillers
        wanted = {frozenset(map(pretrain.fact_token, (found.label, found.side, found.region)))
                  for found in facts.findings or ()}
        wanted |= {frozenset([pretrain.fact_token(word)]) for word in (facts.contrast, facts.level)}
        study = pretrain.fact_token("Whole study")
        wanted |= {frozenset([study, pretrain.fact_token(label)]) for label in facts.study_labels}
        assert told == wanted


def test_a_mixed_prefix_tells_the_true_facts_louder_than_rivals(tokenizer):
    steering = pretrain.Steering(clean_share=0, left_out=0, rivals=1)
    batch = pretrain.make_batch(tokenizer, np.random.default_rng(3), 40, 21, steering)
    ids = tokenizer.get_vocab()
    for weights, facts in zip(batch.weights, batch.facts, strict=True):
        total = weights.sum(0)
        for value, known in ((facts.contrast, analysis.CONTRASTS.values()), (facts.level, analysis.LEVELS)):
            strength = {word: float(total[ids[pretrain.fact_token(word)]]) for word in known}
            assert max(strength, key=strength.get) == value and sum(amount > 0 for amount in strength.values()) <= 2
        labels = {label for label in analysis.LABELS if total[ids[pretrain.fact_token(label)]] > 0}
        assert labels == {found.label for found in facts.findings or ()} | set(facts.study_labels)
    assert 0 < batch.noise.max() <= steering.noise and 0 < batch.common.max() <= steering.common
    assert 1 / steering.scale <= batch.scale.min() < batch.scale.max() <= steering.scale


def test_easier_at_the_start():
    steering = pretrain.Steering(clean_share=0.5, left_out=0.1, noise=1.0, common=0.5, scale=4.0, rivals=0.2)
    assert steering.at(0) == (1, 0.1, 0, 0, 1, 0)
    assert steering.at(0.5) == (0.75, 0.1, 0.5, 0.25, 2, 0.1)
    assert steering.at(1) == steering.at(7) == steering


# ------------------------------------------------------------------------------------------------- training


def test_two_trainings_with_one_seed_are_equal_and_lower_the_loss(tokenizer):
    first, history = pretrain.pretrain(tokenizer, max_steps=12, seed=5, **SMALL)
    again, _ = pretrain.pretrain(tokenizer, max_steps=12, seed=5, **SMALL)
    other, _ = pretrain.pretrain(tokenizer, max_steps=1, seed=6, **SMALL)
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.model.embeddings.weight, other.model.embeddings.weight)
    assert len(history) == 12 and history[-1]["loss"] < history[0]["loss"] - 0.5
    assert not first.training


def test_prefixes_too_short_for_the_facts_are_refused(tokenizer):
    with pytest.raises(ValueError, match="prefix_min 15"):
        pretrain.pretrain(tokenizer, max_steps=1, **{**SMALL, "prefix_min": 15})


def test_the_loss_ignores_padding_and_counts_eos(tokenizer):
    model, _ = pretrain.pretrain(tokenizer, max_steps=1, **SMALL)
    facts = [Facts("T1", "lower", None), Facts("T2", "upper", (Finding("Mass", "left", "central"),))]
    prompt = torch.tensor(tokenizer.encode(analysis.prompt()))
    prefix = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both, right = pretrain.answer_loss(model, prefix, prompt, *pretrain.encode_answers(tokenizer, facts))
        alone = [pretrain.answer_loss(model, prefix[i:i + 1], prompt, *pretrain.encode_answers(tokenizer, [one]))
                 for i, one in enumerate(facts)]
    counts = [answer.shape[1] for _, answer in alone]
    assert right.shape == (2, max(counts))
    expected = sum(loss * count for (loss, _), count in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(both, expected)


def test_saved_and_loaded_again_is_the_same(tokenizer, tmp_path):
    model, _ = pretrain.pretrain(tokenizer, max_steps=1, **SMALL)
    pretrain.save(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, NirvanaForCausalLM)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), loaded.parameters(), strict=True))
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_steering_leaves_the_model_alone(tokenizer):
    model, _ = pretrain.pretrain(tokenizer, max_steps=1, **SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    history = pretrain.steering_test(model, tokenizer, max_steps=2, batch_size=2, side=5, evaluate_every=1)
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
    assert pretrain.exact_share(model, tokenizer, samples=64, seed=12) >= 0.95


def test_the_backbone_is_steered_by_learned_vectors(backbone):
    model, tokenizer = backbone
    history = pretrain.steering_test(model, tokenizer, max_steps=30, batch_size=8, evaluate_every=30, seed=3)
    assert history[0]["contrast"] < 0.7
    assert history[-1]["contrast"] >= 0.95 and history[-1]["level"] >= 0.95
