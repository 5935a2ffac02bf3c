"""Corpus of the demo's small backbone: facts, tokenizer, prefixes."""

import numpy as np
import pytest

from mrilib.data import annotations, findings
from mrilib.data.findings import Facts, Finding, fact_token
from mrilib.pretrain import corpus


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.make_tokenizer(texts=400)


def test_contrast_level_and_findings_are_independent():
    rng = np.random.default_rng(0)
    all_facts = [corpus.random_facts(rng) for _ in range(6000)]
    no_finding = np.mean([facts.findings == () for facts in all_facts])
    for attribute in ("contrast", "level"):
        for value in {getattr(facts, attribute) for facts in all_facts}:
            group = [facts.findings == () for facts in all_facts if getattr(facts, attribute) == value]
            assert np.mean(group) == pytest.approx(no_finding, abs=0.06)
    labels = {finding.label for facts in all_facts for finding in facts.findings or ()}
    assert labels == set(annotations.LABELS)  # rare ones included
    assert {facts.contrast for facts in all_facts} == set(findings.CONTRASTS.values())
    assert any(facts.findings is None for facts in all_facts) and any(facts.study_labels for facts in all_facts)


def test_tokenizer_round_trip_and_special_ids(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    rng = np.random.default_rng(1)
    texts = [findings.answer(corpus.random_facts(rng)) for _ in range(200)]
    for text in [*texts, findings.prompt(), "", " two  spaces\n", "Größe 3 µm — ok?"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids  # no tokens added
        assert max(ids, default=0) < len(tokenizer)
    for label in annotations.LABELS:  # one token a word, so that answers are short
        words = label.lower().replace("-", " - ").replace(":", " :").split()
        assert len(tokenizer.encode(f" {label.lower()}")) <= len(words) + 1, label


def test_tokenizer_is_deterministic(tokenizer):
    again = corpus.make_tokenizer(texts=400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_lengths_include_eos_and_exclude_padding(tokenizer):
    all_facts = [Facts("T1", "lower", None), Facts("T2", "upper", (Finding("Mass", "left", "central"),))]
    ids, lengths = corpus.encode_answers(tokenizer, all_facts)
    for row, length, facts in zip(ids, lengths, all_facts, strict=True):
        assert row[length - 1] == tokenizer.eos_token_id
        assert tokenizer.decode(row[: length - 1]) == findings.answer(facts)
        assert (row[length:] == tokenizer.pad_token_id).all()
    assert lengths[0] < lengths[1] == ids.shape[1]


@pytest.mark.parametrize("length", [16, 33])
def test_clean_prefix_encodes_exactly_the_facts(tokenizer, length):
    batch = corpus.make_batch(tokenizer, np.random.default_rng(2), 40, length, corpus.PrefixDifficulty(), clean=True)
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    known = set(findings.fact_tokens())
    assert batch.weights.shape == (40, length, len(tokenizer))
    assert (batch.noise == 0).all() and (batch.common == 0).all() and (batch.scale == 1).all()
    for weights, facts in zip(batch.weights, batch.facts, strict=True):
        positions = {frozenset(tokens[int(number)] for number in row.nonzero()[:, 0]) & known for row in weights}
        expected = [(finding.label, finding.side, finding.region) for finding in facts.findings or ()]
        expected += [(facts.contrast,), (facts.level,), *(("Whole study", label) for label in facts.study_labels)]
        assert positions - {frozenset()} == {frozenset(map(fact_token, words)) for words in expected}


def test_true_facts_are_stronger_than_distractors(tokenizer):
    difficulty = corpus.PrefixDifficulty(clean_share=0, left_out=0, distractors=1)
    batch = corpus.make_batch(tokenizer, np.random.default_rng(3), 40, 21, difficulty)
    ids = tokenizer.get_vocab()
    for weights, facts in zip(batch.weights, batch.facts, strict=True):
        total = weights.sum(0)
        for value, known in ((facts.contrast, findings.CONTRASTS.values()), (facts.level, findings.LEVELS)):
            strength = {word: float(total[ids[fact_token(word)]]) for word in known}
            assert max(strength, key=strength.get) == value and sum(amount > 0 for amount in strength.values()) <= 2
        labels = {label for label in annotations.LABELS if total[ids[fact_token(label)]] > 0}
        assert labels == {finding.label for finding in facts.findings or ()} | set(facts.study_labels)
    assert 0 < batch.noise.max() <= difficulty.noise and 0 < batch.common.max() <= difficulty.common
    assert 1 / difficulty.scale <= batch.scale.min() < batch.scale.max() <= difficulty.scale


def test_difficulty_rises_from_clean_prefixes():
    full = corpus.PrefixDifficulty(clean_share=0.5, left_out=0.1, noise=1.0, common=0.5, scale=4.0, distractors=0.2)
    assert full.at(0) == (1, 0.1, 0, 0, 1, 0)
    assert full.at(0.5) == (0.75, 0.1, 0.5, 0.25, 2, 0.1)
    assert full.at(1) == full.at(7) == full
