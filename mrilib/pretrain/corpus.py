"""Training text of the demo's small backbone: prefixes that encode facts, the prompt, and answers that state them.

A prefix is a sequence of vectors, each a weighted sum of token embeddings. Every contrast, level, label, side and
region has a token for this purpose. A finding is the *sum* of its label's, side's and region's embeddings at one
position; the position ties them together. Facts are placed at random positions, repeated, and weak or strong. Added to
them are weaker false contrasts and levels (distractors), sides and regions without a finding, filler tokens, Gaussian
noise, a random vector common to all positions, and a random overall scale. Facts left out of the prefix teach the model
to answer with the most frequent value.

Contrast, level and findings are drawn independently, so the model cannot infer one from another.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mrilib.data import annotations
from mrilib.data import findings as findings_module
from mrilib.data.findings import FACT_WORDS, Facts, Finding, fact_token, fact_tokens

# labels that the phantom draws; most findings in the corpus have one of them
COMMON_LABELS = (
    "Edema",
    "Encephalomalacia",
    "Lacunar infarct",
    "Mass",
    "Nonspecific white matter lesion",
    "Resection cavity",
)
FINDING_COUNTS = (0.27, 0.36, 0.25, 0.09, 0.03)  # probabilities of 0, 1, 2, … findings in a slice
UNK, BOS, EOS = "<unk>", "<s>", "</s>"  # ids 0, 1, 2 as in Mistral's vocabulary; pad is eos, as in Nirvana


def random_facts(rng: np.random.Generator) -> Facts:
    """Draw the facts of an imaginary slice; contrast, level and findings are independent.

    One slice in twenty was not reviewed; one reviewed slice in twelve has a label of the whole study.
    """
    contrast = str(rng.choice(list(findings_module.CONTRASTS.values()), p=(0.26, 0.11, 0.11, 0.26, 0.26)))
    level = str(rng.choice(findings_module.LEVELS))
    if rng.random() < 0.05:
        return Facts(contrast, level, None)
    findings = tuple(
        Finding(
            str(rng.choice(COMMON_LABELS if rng.random() < 0.7 else annotations.LABELS)),
            str(rng.choice(findings_module.SIDES)),
            str(rng.choice(findings_module.REGIONS)),
        )
        for _ in range(rng.choice(len(FINDING_COUNTS), p=FINDING_COUNTS))
    )
    study = (str(rng.choice(annotations.STUDY_LABELS)),) if rng.random() < 1 / 12 else ()
    return Facts(contrast, level, findings, study)


def make_tokenizer(vocab_size: int = 768, texts: int = 4000, seed: int = 0) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on answers; it decodes any text without loss.

    Parameters
    ----------
    vocab_size : int
        Upper limit for bytes, special tokens, fact tokens and merges together.
    texts : int
        Number of answers that the merges are learned from.
    seed : int

    Returns
    -------
    PreTrainedTokenizerFast
        pad = eos = 2, bos = 1. Encoding adds no tokens. The fact tokens are special tokens.
    """
    rng = np.random.default_rng(seed)
    corpus = [findings_module.prompt()] * texts + [findings_module.answer(random_facts(rng)) for _ in range(texts)]
    # all labels equally often; otherwise rare ones would be split into many tokens
    corpus += [f" {label.lower()}" for label in annotations.LABELS] * texts
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[UNK, BOS, EOS, *fact_tokens()],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        additional_special_tokens=fact_tokens(),
        clean_up_tokenization_spaces=False,
    )


class PrefixDifficulty(NamedTuple):
    """Difficulty of reading the facts in a prefix; noise is in units of the token embeddings' root mean square.

    Attributes
    ----------
    clean_share : float
        Fraction of clean prefixes: facts of weight 1, one per position, no noise, no distractors.
    left_out : float
        Probability that the contrast is missing in the prefix, and the same for the level.
    noise : float
        Largest standard deviation of the Gaussian noise at a position.
    common : float
        Largest standard deviation of the random vector common to all positions.
    scale : float
        The prefix is multiplied by a factor between 1/scale and scale.
    distractors : float
        Probability of a weaker, false contrast next to the true one, and the same for the level.
    """

    clean_share: float = 0.25
    left_out: float = 0.03
    noise: float = 1.0
    common: float = 0.8
    scale: float = 3.0
    distractors: float = 0.25

    def at(self, progress: float) -> "PrefixDifficulty":
        """Return the difficulty at `progress` between 0 (all prefixes clean) and 1 (full difficulty)."""
        progress = min(1.0, max(0.0, progress))
        return self._replace(
            clean_share=1 - (1 - self.clean_share) * progress,
            noise=self.noise * progress,
            common=self.common * progress,
            scale=self.scale**progress,
            distractors=self.distractors * progress,
        )


class Batch(NamedTuple):
    """A batch of the corpus.

    Attributes
    ----------
    weights : Tensor, shape (B, P, V)
        Weights of the token embeddings at every prefix position.
    noise : Tensor, shape (B,)
        Standard deviation of the noise [RMS of the embeddings].
    common : Tensor, shape (B,)
        Standard deviation of the common vector [RMS of the embeddings].
    scale : Tensor, shape (B,)
        Overall factor.
    prompt_ids : Tensor, shape (Q,)
        The same prompt for all rows.
    answer_ids : Tensor, shape (B, A), int64
        Answer and eos, then padding.
    lengths : Tensor, shape (B,)
        Number of answer tokens, eos included.
    facts : list of Facts
        Facts that the prefixes encode.
    """

    weights: Tensor
    noise: Tensor
    common: Tensor
    scale: Tensor
    prompt_ids: Tensor
    answer_ids: Tensor
    lengths: Tensor
    facts: list[Facts]


def encode_prompt(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return the token ids of the prompt, (Q,)."""
    return torch.tensor(tokenizer.encode(findings_module.prompt(), add_special_tokens=False))


def encode_answers(tokenizer: PreTrainedTokenizerFast, facts: Sequence[Facts]) -> tuple[Tensor, Tensor]:
    """Return ids (B, A) of answers and eos, padded with eos, and their lengths (B,), eos included.

    Padding must be masked by length: pad and eos share one id, and a model trained without eos never learns to stop.
    """
    eos = tokenizer.eos_token_id
    ids = [[*tokenizer.encode(findings_module.answer(row), add_special_tokens=False), eos] for row in facts]
    lengths = torch.tensor([len(row) for row in ids])
    return torch.tensor([row + [eos] * (int(lengths.max()) - len(row)) for row in ids]), lengths


def make_batch(
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    batch_size: int,
    prefix_length: int,
    difficulty: PrefixDifficulty,
    clean: bool | None = None,
) -> Batch:
    """Draw facts and write them into prefixes of one length.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
    rng : numpy.random.Generator
    batch_size : int
    prefix_length : int
        P, at least 16 positions.
    difficulty : PrefixDifficulty
    clean : bool, optional
        True: all prefixes are clean; False: none; None: a fraction `difficulty.clean_share`.
    """
    writer = PrefixWriter(tokenizer, rng, difficulty)
    weights = np.zeros((batch_size, prefix_length, len(tokenizer)), dtype=np.float32)
    noise, common, scale = (np.zeros(batch_size, dtype=np.float32) for _ in range(3))
    all_facts = [random_facts(rng) for _ in range(batch_size)]
    for row, facts in enumerate(all_facts):
        if clean or (clean is None and rng.random() < difficulty.clean_share):
            writer.write_clean(weights[row], facts, left_out=0.0 if clean else difficulty.left_out)
            scale[row] = 1
        else:
            writer.write_mixed(weights[row], facts)
            noise[row], common[row] = rng.uniform(0, difficulty.noise), rng.uniform(0, difficulty.common)
            scale[row] = difficulty.scale ** rng.uniform(-1, 1)
    answer_ids, lengths = encode_answers(tokenizer, all_facts)
    return Batch(
        torch.from_numpy(weights),
        torch.from_numpy(noise),
        torch.from_numpy(common),
        torch.from_numpy(scale),
        encode_prompt(tokenizer),
        answer_ids,
        lengths,
        all_facts,
    )


class PrefixWriter:
    """Writer of facts into a prefix's token weights, an array (P, V)."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, difficulty: PrefixDifficulty
    ) -> None:
        self.rng, self.difficulty = rng, difficulty
        one_hot, ids = np.eye(len(tokenizer), dtype=np.float32), tokenizer.get_vocab()
        self.words = {word: one_hot[ids[fact_token(word)]] for word in FACT_WORDS}
        self.fillers = np.delete(one_hot, [ids[token] for token in fact_tokens()], axis=0)
        self.sides = np.stack([self.words[word] for word in findings_module.SIDES])
        self.regions = np.stack([self.words[word] for word in findings_module.REGIONS])

    def _local_facts(self, facts: Facts) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return label and place of every finding, then of every label of the study."""
        study = [(self.words[label], self.words["Whole study"]) for label in facts.study_labels]
        return [
            (self.words[finding.label], self.words[finding.side] + self.words[finding.region])
            for finding in facts.findings or ()
        ] + study

    def _global_facts(self, facts: Facts, left_out: float) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return contrast and level, each with a distractor; unknown ones and a random share are left out."""
        words = []
        for word, known in (
            (facts.contrast, list(findings_module.CONTRASTS.values())),
            (facts.level, list(findings_module.LEVELS)),
        ):
            if self.rng.random() >= left_out and word is not None:
                distractor = str(self.rng.choice([other for other in known if other != word]))
                words.append((self.words[word], self.words[distractor]))
        return words

    def write_clean(self, weights: np.ndarray, facts: Facts, left_out: float) -> None:
        """Write at most one fact to each position; positions are random, and some facts are repeated."""
        rng, length = self.rng, len(weights)
        items = [label + place for label, place in self._local_facts(facts)]
        items += [word for word, _ in self._global_facts(facts, left_out)]
        if items:
            items += [items[index] for index in rng.integers(len(items), size=rng.integers(length // 2))]
        for position, item in zip(rng.permutation(length), items, strict=False):
            weights[position] = item

    def write_mixed(self, weights: np.ndarray, facts: Facts) -> None:
        """Write facts of random strength, added to fillers, distractors, and sides and regions without a finding."""
        rng, length = self.rng, len(weights)
        filled = np.flatnonzero(rng.random(length) < rng.random())
        weights[filled] += rng.uniform(0, 0.7) * self.rng.choice(self.fillers, size=len(filled))
        # An encoder may mark every position with its side and region. Only a label, of independent strength, makes
        # them a finding.
        place_strength = rng.uniform(0.2, 1.2) * (rng.random() < 0.7)
        background = place_strength * (
            self.sides[rng.integers(3, size=length)] + self.regions[rng.integers(3, size=length)]
        )
        free = rng.permutation(length)
        for label, place in self._local_facts(facts):
            count = 1 + int(rng.integers(max(1, min(5, len(free) // 4))))
            chosen, free = free[:count], free[count:]
            background[chosen] = rng.uniform(0.5, 2) * label + (place_strength or rng.uniform(0.5, 1.5)) * place
        weights += background
        for word, distractor in self._global_facts(facts, self.difficulty.left_out):
            positions = np.flatnonzero(rng.random(length) < rng.uniform(0.1, 1.3))
            positions = np.union1d(positions, rng.integers(length))
            amounts = rng.uniform(0.3, 1.5) * rng.uniform(0.5, 1.5, size=(len(positions), 1))
            weights[positions] += amounts * word
            if rng.random() < self.difficulty.distractors:
                weights[positions] += rng.uniform(0, 0.7) * amounts * distractor
