"""The text that the demo's small backbone learns: facts, tokenizer, prefixes."""

import numpy as np
import pytest

from mrilib.data import annotations, findings
from mrilib.data.findings import Facts, Finding
from mrilib.pretrain import corpus


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.make_tokenizer(texts=400)


def test_contrast_level_and_findings_are_independent():
    rng = np.random.default_rng(0)
    facts = [corpus.random_facts(rng) for _ in range(6000)]
    for attribute in ("contrast", "level"):
        for value in {getattr(one, attribute) for one in facts}:
            group = [one.findings for one in facts if getattr(one, attribute) == value]
            clean = np.mean([found == () for found in group])
            assert clean == pytest.approx(np.mean([one.findings == () for one in facts]), abs=0.06)
    labels = {found.label for one in facts for found in one.findings or ()}
    assert labels == set(annotations.LABELS)  # rare ones too
    assert {one.contrast for one in facts} == set(findings.CONTRASTS.values())
    assert any(one.findings is None for one in facts) and any(one.study_labels for one in facts)


def test_tokenizer_gives_texts_back_and_ids_are_those_of_the_backbone(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    rng = np.random.default_rng(1)
    texts = [findings.answer(corpus.random_facts(rng)) for _ in range(200)]
    for text in [*texts, findings.prompt(), "", " two  spaces\n", "Größe 3 µm — ok?"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids  # nothing added
        assert max(ids, default=0) < len(tokenizer)
    for label in annotations.LABELS:  # a word is one token, so answers are short
        words = label.lower().replace("-", " - ").replace(":", " :").split()
        assert len(tokenizer.encode(f" {label.lower()}")) <= len(words) + 1, label


def test_tokenizer_is_deterministic(tokenizer):
    again = corpus.make_tokenizer(texts=400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_eos_is_learned_and_padding_is_not(tokenizer):
    facts = [Facts("T1", "lower", None), Facts("T2", "upper", (Finding("Mass", "left", "central"),))]
    ids, lengths = corpus.encode_answers(tokenizer, facts)
    for row, length, one in zip(ids, lengths, facts, strict=True):
        assert row[length - 1] == tokenizer.eos_token_id
        assert tokenizer.decode(row[: length - 1]) == findings.answer(one)
        assert (row[length:] == tokenizer.pad_token_id).all()
    assert lengths[0] < lengths[1] == ids.shape[1]


@pytest.mark.parametrize("length", [16, 33])
def test_a_clean_prefix_holds_the_facts_and_nothing_else(tokenizer, length):
    batch = corpus.make_batch(tokenizer, np.random.default_rng(2), 40, length, corpus.PrefixDifficulty(), clean=True)
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    known = set(findings.fact_tokens())
    assert batch.weights.shape == (40, length, len(tokenizer))
    assert (batch.noise == 0).all() and (batch.common == 0).all() and (batch.scale == 1).all()
    for weights, facts in zip(batch.weights, batch.facts, strict=True):
        told = {frozenset(tokens[int(number)] for number in row.nonzero()[:, 0]) & known for row in weights}
        told.discard(frozenset())  # fillers
        wanted = {
            frozenset(map(findings.fact_token, (found.label, found.side, found.region)))
            for found in facts.findings or ()
        }
        wanted |= {frozenset([findings.fact_token(word)]) for word in (facts.contrast, facts.level)}
        study = findings.fact_token("Whole study")
        wanted |= {frozenset([study, findings.fact_token(label)]) for label in facts.study_labels}
        assert told == wanted


def test_a_mixed_prefix_tells_the_true_facts_louder_than_rivals(tokenizer):
    steering = corpus.PrefixDifficulty(clean_share=0, left_out=0, rivals=1)
    batch = corpus.make_batch(tokenizer, np.random.default_rng(3), 40, 21, steering)
    ids = tokenizer.get_vocab()
    for weights, facts in zip(batch.weights, batch.facts, strict=True):
        total = weights.sum(0)
        for value, known in ((facts.contrast, findings.CONTRASTS.values()), (facts.level, findings.LEVELS)):
            strength = {word: float(total[ids[findings.fact_token(word)]]) for word in known}
            assert max(strength, key=strength.get) == value and sum(amount > 0 for amount in strength.values()) <= 2
        labels = {label for label in annotations.LABELS if total[ids[findings.fact_token(label)]] > 0}
        assert labels == {found.label for found in facts.findings or ()} | set(facts.study_labels)
    assert 0 < batch.noise.max() <= steering.noise and 0 < batch.common.max() <= steering.common
    assert 1 / steering.scale <= batch.scale.min() < batch.scale.max() <= steering.scale


def test_easier_at_the_start():
    steering = corpus.PrefixDifficulty(clean_share=0.5, left_out=0.1, noise=1.0, common=0.5, scale=4.0, rivals=0.2)
    assert steering.at(0) == (1, 0.1, 0, 0, 1, 0)
    assert steering.at(0.5) == (0.75, 0.1, 0.5, 0.25, 2, 0.1)
    assert steering.at(1) == steering.at(7) == steering
