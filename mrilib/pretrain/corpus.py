"""The text that the demo's small backbone learns: prefixes that carry facts, the prompt, and answers that tell them.

A prefix is a row of vectors, each a weighted sum of token embeddings. Every contrast, level, label, side and region
has a token of its own for this; a finding is the *sum* of its label's, side's and region's embeddings at one position,
so that what belongs together is told by position. Facts stand anywhere, repeated, weak or strong, besides rival
contrasts and levels that are weaker, sides and regions without a finding, fillers, Gaussian noise, one random vector
common to all positions, and a random overall scale. Facts that are left out of the prefix teach the model to say the
most usual thing.

Contrast, level and findings are drawn independently, so a model has no prior that would tell one from another.
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

#: labels that the phantom makes; they are three quarters of all findings in the corpus
COMMON_LABELS = (
    "Edema",
    "Encephalomalacia",
    "Lacunar infarct",
    "Mass",
    "Nonspecific white matter lesion",
    "Resection cavity",
)


#: how often a slice has 0, 1, 2, … findings in the corpus
FINDING_COUNTS = (0.27, 0.36, 0.25, 0.09, 0.03)


UNK, BOS, EOS = "<unk>", "<s>", "</s>"  # ids 0, 1, 2 as in Mistral's vocabulary; pad is eos, as in Nirvana


def random_facts(rng: np.random.Generator) -> Facts:
    """Facts of an imaginary slice: contrast, level and findings independent of each other.

    One in twenty is not reviewed, one in twelve has labels of the whole study.
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
    """A byte-level BPE trained on answers of `analysis`; decodes any text back to itself.

    Parameters
    ----------
    vocab_size : int
        upper limit; bytes, special tokens, fact tokens and merges together
    texts : int
        number of answers to learn merges from
    seed : int

    Returns
    -------
    PreTrainedTokenizerFast
        pad = eos = 2, bos = 1, nothing added by encoding; the fact tokens are special tokens
    """
    rng = np.random.default_rng(seed)
    corpus = [findings_module.prompt()] * texts + [findings_module.answer(random_facts(rng)) for _ in range(texts)]
    # every label in equal numbers, or the rare ones would be spelt in pieces
    corpus += [f" {label.lower()}" for label in annotations.LABELS] * texts
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [UNK, BOS, EOS, *fact_tokens()]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
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
    """How hard the prefixes are to read. Lengths in units of the token embeddings' root mean square.

    clean_share : share of prefixes whose facts stand alone: weight 1, one a position, no noise, no rivals
    left_out : chance for contrast, and for level, not to be in the prefix at all
    noise : largest standard deviation of the Gaussian noise of a position
    common : largest standard deviation of the random vector that all positions share
    scale : the prefix is multiplied by a factor between 1/scale and scale
    rivals : chance of a weaker, false contrast (and level) beside the true one
    """

    clean_share: float = 0.25
    left_out: float = 0.03
    noise: float = 1.0
    common: float = 0.8
    scale: float = 3.0
    rivals: float = 0.25

    def at(self, progress: float) -> "PrefixDifficulty":
        """Easier prefixes for the start of training, in proportion to `progress`, which counts up to 1."""
        ease = min(1.0, max(0.0, progress))
        return self._replace(
            clean_share=1 - (1 - self.clean_share) * ease,
            noise=self.noise * ease,
            common=self.common * ease,
            scale=self.scale**ease,
            rivals=self.rivals * ease,
        )


class Batch(NamedTuple):
    """A batch of the corpus.

    weights : (B, P, V) weights of token embeddings in every prefix position
    noise : (B, P) standard deviation of the noise [RMS of the embeddings]
    common : (B,) standard deviation of the common vector [RMS of the embeddings]
    scale : (B,) overall factor
    prompt_ids : (Q,) the same for all
    answer_ids : (B, A) int64, answer and eos, then padding
    lengths : (B,) number of answer tokens, eos included
    facts : what the prefixes carry
    """

    weights: Tensor
    noise: Tensor
    common: Tensor
    scale: Tensor
    prompt_ids: Tensor
    answer_ids: Tensor
    lengths: Tensor
    facts: list[Facts]


def encode_answers(tokenizer: PreTrainedTokenizerFast, facts: Sequence[Facts]) -> tuple[Tensor, Tensor]:
    """Answers and eos as ids (B, A), padded with eos, and their lengths (B,) with eos counted.

    What is padding is known from the lengths alone: pad and eos are one id, and a model whose eos is masked never
    learns to stop.
    """
    ids = [
        [*tokenizer.encode(findings_module.answer(one), add_special_tokens=False), tokenizer.eos_token_id]
        for one in facts
    ]
    lengths = torch.tensor([len(one) for one in ids])
    padded = [one + [tokenizer.eos_token_id] * (int(lengths.max()) - len(one)) for one in ids]
    return torch.tensor(padded), lengths


def make_batch(
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    batch_size: int,
    prefix_length: int,
    steering: PrefixDifficulty,
    clean: bool | None = None,
) -> Batch:
    """Draw facts and write them into prefixes of one length; see `PrefixDifficulty`.

    Parameters
    ----------
    prefix_length : int
        P, at least 16 positions
    clean : bool or None
        all of the prefixes clean, or none, or (None) a `PrefixDifficulty.clean_share` of them
    """
    writer = PrefixWriter(tokenizer, rng, steering)
    weights = np.zeros((batch_size, prefix_length, len(tokenizer)), dtype=np.float32)
    noise, common, scale = (np.zeros(batch_size, dtype=np.float32) for _ in range(3))
    all_facts = [random_facts(rng) for _ in range(batch_size)]
    for row, facts in enumerate(all_facts):
        if clean or (clean is None and rng.random() < steering.clean_share):
            writer.write_clean(weights[row], facts, left_out=0.0 if clean else steering.left_out)
            scale[row] = 1
        else:
            writer.write_mixed(weights[row], facts)
            noise[row], common[row] = rng.uniform(0, steering.noise), rng.uniform(0, steering.common)
            scale[row] = steering.scale ** rng.uniform(-1, 1)
    answer_ids, lengths = encode_answers(tokenizer, all_facts)
    prompt_ids = torch.tensor(tokenizer.encode(findings_module.prompt(), add_special_tokens=False))
    return Batch(
        torch.from_numpy(weights),
        torch.from_numpy(noise),
        torch.from_numpy(common),
        torch.from_numpy(scale),
        prompt_ids,
        answer_ids,
        lengths,
        all_facts,
    )


class PrefixWriter:
    """Writes facts into the weights (P, V) of a prefix's token embeddings."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, steering: PrefixDifficulty
    ) -> None:
        self.rng, self.steering = rng, steering
        one_hot, ids = np.eye(len(tokenizer), dtype=np.float32), tokenizer.get_vocab()
        self.words = {word: one_hot[ids[fact_token(word)]] for word in FACT_WORDS}
        self.fillers = np.delete(one_hot, [ids[token] for token in fact_tokens()], axis=0)
        self.sides = np.stack([self.words[word] for word in findings_module.SIDES])
        self.regions = np.stack([self.words[word] for word in findings_module.REGIONS])

    def _local(self, facts: Facts) -> list[tuple[np.ndarray, np.ndarray]]:
        """What has a place, as label and place: each finding, each label of the study."""
        study = [(self.words[label], self.words["Whole study"]) for label in facts.study_labels]
        return [
            (self.words[found.label], self.words[found.side] + self.words[found.region])
            for found in facts.findings or ()
        ] + study

    def _global(self, facts: Facts, left_out: float) -> list[tuple[np.ndarray, np.ndarray]]:
        """Contrast and level, each with a rival; now and then one is not told, and an unknown contrast never is."""
        both = []
        for word, known in (
            (facts.contrast, list(findings_module.CONTRASTS.values())),
            (facts.level, list(findings_module.LEVELS)),
        ):
            if self.rng.random() >= left_out and word is not None:
                rival = str(self.rng.choice([other for other in known if other != word]))
                both.append((self.words[word], self.words[rival]))
        return both

    def write_clean(self, weights: np.ndarray, facts: Facts, left_out: float) -> None:
        """Each position holds one fact or nothing; the facts in random places, some of them repeated."""
        rng, length = self.rng, len(weights)
        items = [label + place for label, place in self._local(facts)]
        items += [word for word, _ in self._global(facts, left_out)]
        if items:
            items += [items[index] for index in rng.integers(len(items), size=rng.integers(length // 2))]
        for place, item in zip(rng.permutation(length), items, strict=False):
            weights[place] = item

    def write_mixed(self, weights: np.ndarray, facts: Facts) -> None:
        """Facts of random strength on top of each other, of fillers, rivals, and sides and regions of nothing."""
        rng, length = self.rng, len(weights)
        filled = np.flatnonzero(rng.random(length) < rng.random())
        weights[filled] += rng.uniform(0, 0.7) * self.rng.choice(self.fillers, size=len(filled))
        # An encoder may tell places by giving every position its side's and region's vector; only a label makes that
        # a finding. Its strength has nothing to do with theirs.
        places_strength = rng.uniform(0.2, 1.2) * (rng.random() < 0.7)
        background = places_strength * (
            self.sides[rng.integers(3, size=length)] + self.regions[rng.integers(3, size=length)]
        )
        free = rng.permutation(length)
        for label, place in self._local(facts):
            count = 1 + int(rng.integers(max(1, min(5, len(free) // 4))))
            chosen, free = free[:count], free[count:]
            background[chosen] = rng.uniform(0.5, 2) * label + (places_strength or rng.uniform(0.5, 1.5)) * place
        weights += background
        for word, rival in self._global(facts, self.steering.left_out):
            places = np.flatnonzero(rng.random(length) < rng.uniform(0.1, 1.3))
            places = np.union1d(places, rng.integers(length))
            amounts = rng.uniform(0.3, 1.5) * rng.uniform(0.5, 1.5, size=(len(places), 1))
            weights[places] += amounts * word
            if rng.random() < self.steering.rivals:
                weights[places] += rng.uniform(0, 0.7) * amounts * rival
