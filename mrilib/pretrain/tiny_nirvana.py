"""Pretraining of the demo's small backbone: a Nirvana model that states, in its answer, the facts encoded in a prefix.

The k-space encoder of stage 1 must find embeddings that make a frozen language model describe the scan. A large
pretrained model can be steered by its input embeddings; a small one must be trained for that. It is trained on

    prefix (vectors that encode facts) · prompt · answer · eos

The prefix (`mrilib.pretrain.corpus`) imitates the output of an encoder in training: facts among noise and distractors.
With noise the best predictor is a matched filter, with log-odds linear in the prefix. Such a model is easy to steer: a
small step towards a fact makes the fact's words slightly more probable. `steering_test` measures whether this works.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast

from mrilib.backbone.nirvana import NirvanaConfig, NirvanaForCausalLM
from mrilib.config import PretrainParameters
from mrilib.data import findings as findings_module
from mrilib.data.findings import Facts, Finding
from mrilib.pretrain.corpus import COMMON_LABELS, Batch, PrefixDifficulty, encode_answers, encode_prompt, make_batch

RAMP = (0.3, 0.6)  # fractions of training between which prefixes go from short and clean to full difficulty
FORGETTING = (1e-4, 2e-2)  # range of the delta branch's first forgetting rates [1/token]
EMBEDDING_STD = 0.05  # standard deviation of the untrained token embeddings

# ------------------------------------------------------------------------------------------------------- training


def pretrain(
    tokenizer: PreTrainedTokenizerFast,
    config: PretrainParameters,
    report: Callable[[dict[str, float]], None] | None = None,
) -> tuple[NirvanaForCausalLM, list[dict[str, float]]]:
    """Train a small Nirvana model on the corpus; deterministic for a seed and a number of threads.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        From `corpus.make_tokenizer`.
    config : PretrainParameters
    report : callable, optional
        Called after each step with the new entry of the history.

    Returns
    -------
    model : NirvanaForCausalLM
        In eval mode.
    history : list of dict
        For each step: step, loss [nats], exact (fraction of exact answers), gradient_norm, learning_rate, seconds.

    Raises
    ------
    ValueError
        If prefix_min exceeds prefix_max.
    """
    if config.prefix_min > config.prefix_max:
        raise ValueError(f"prefix_min {config.prefix_min} must not exceed prefix_max {config.prefix_max}")
    torch.manual_seed(config.seed)
    model = _new_model(len(tokenizer), config).train()
    optimizers = _make_optimizers(model, config)
    schedulers = [_make_scheduler(optimizer, config) for optimizer in optimizers]
    rng, generator = np.random.default_rng(config.seed), torch.Generator().manual_seed(config.seed)
    history: list[dict[str, float]] = []
    start = time.perf_counter()
    for step in range(config.max_steps):
        batch = _training_batch(tokenizer, rng, config, step)
        prefix = prefix_embeddings(model.model.embeddings.weight, batch, generator)
        loss, is_right = answer_loss(model, prefix, batch.prompt_ids, batch.answer_ids, batch.lengths)
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        history.append(
            {
                "step": step,
                "loss": loss.item(),
                "exact": is_right.all(1).float().mean().item(),
                "gradient_norm": float(norm),
                "learning_rate": float(schedulers[0].get_last_lr()[0]),
                "seconds": time.perf_counter() - start,
            }
        )
        if report is not None:
            report(history[-1])
    model.zero_grad(set_to_none=True)
    return model.eval(), history


@torch.no_grad()
def _new_model(vocab_size: int, config: PretrainParameters) -> NirvanaForCausalLM:
    """Build a model with initial weights for few training steps; the random numbers are torch's.

    Every linear map starts with unit gain (standard deviation fan_in^−½). With the published 0.02, chosen for a width
    of 2,048, the low-rank maps of the attention branch would start with almost no output. Forgetting rates A·dt of the
    delta branch are drawn from FORGETTING, log-uniform, instead of up to 1.6: an answer needs the whole prefix.
    """
    model = NirvanaForCausalLM(
        NirvanaConfig(
            vocab_size=vocab_size,
            initializer_range=EMBEDDING_STD,
            **config.model_dump(include={"hidden_size", "num_hidden_layers", "num_heads", "concept_dim", "logit_dim"}),
        )
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            module.weight.normal_(std=module.in_features**-0.5)
    for name, value in model.named_parameters():
        if name.endswith("A_log"):
            value.zero_()
        elif name.endswith("dt_bias"):
            slowest, fastest = np.log(FORGETTING).tolist()
            rate = torch.exp(torch.empty_like(value).uniform_(slowest, fastest))
            value.copy_(rate + torch.log(-torch.expm1(-rate)))  # softplus⁻¹
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            value.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


def _make_optimizers(model: NirvanaForCausalLM, config: PretrainParameters) -> list[Optimizer]:
    """Muon for the layers' matrices, AdamW for all other parameters.

    After 300 steps Muon predicts regions correctly where AdamW alone is still at chance.
    """
    is_matrix = {name: value.dim() == 2 and "layers" in name for name, value in model.named_parameters()}
    matrices = [value for name, value in model.named_parameters() if is_matrix[name]]
    others = [value for name, value in model.named_parameters() if not is_matrix[name]]
    return [
        torch.optim.Muon(
            matrices, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=config.learning_rate, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def _make_scheduler(optimizer: Optimizer, config: PretrainParameters) -> LambdaLR:
    """Linear warm-up, then a cosine to zero."""
    warmup = max(1, int(config.warmup_ratio * config.max_steps))

    def factor(step: int) -> float:
        cosine = np.cos(np.pi * max(0, step - warmup) / max(1, config.max_steps - warmup))
        return min((step + 1) / warmup, 0.5 * (1 + cosine))

    return LambdaLR(optimizer, factor)


def _training_batch(
    tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, config: PretrainParameters, step: int
) -> Batch:
    """Draw the batch of a step: short and clean prefixes first, then longer and harder ones."""
    progress = min(1.0, max(0.0, (step / config.max_steps - RAMP[0]) / (RAMP[1] - RAMP[0])))
    span = config.prefix_max - config.prefix_min
    longest = config.prefix_min + min(8, span) + round(progress * max(0, span - 8))
    length = int(rng.integers(config.prefix_min, longest + 1))
    return make_batch(tokenizer, rng, config.batch_size, length, PrefixDifficulty(noise=config.noise).at(progress))


def prefix_embeddings(embedding: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """Return the prefix vectors (B, P, d) of a batch: weighted sums of the rows of `embedding` (V, d), noise, scale."""
    rms = embedding.detach().square().mean().sqrt()
    vectors = batch.weights @ embedding
    size, length, width = vectors.shape
    noise = torch.randn(size, length, width, generator=generator) * batch.noise[:, None, None]
    common = torch.randn(size, 1, width, generator=generator) * batch.common[:, None, None]
    return (vectors + rms * (noise + common)) * batch.scale[:, None, None]


def answer_loss(
    model: NirvanaForCausalLM, prefix: Tensor, prompt_ids: Tensor, answer_ids: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of the answers after prefix and prompt.

    Parameters
    ----------
    model : NirvanaForCausalLM
    prefix : Tensor, shape (B, P, d)
    prompt_ids : Tensor, shape (Q,)
    answer_ids : Tensor, shape (B, A)
    lengths : Tensor, shape (B,)
        Answer tokens in each row, eos included.

    Returns
    -------
    loss : Tensor, scalar
        Mean over the answer tokens [nats].
    is_right : Tensor, shape (B, A), bool
        Whether the most probable next token is the answer's; True at padding. Greedy decoding gives exactly the answer
        if a whole row is True.
    """
    embed = model.model.embeddings
    size = len(answer_ids)
    inputs = torch.cat([prefix, embed(prompt_ids).expand(size, -1, -1), embed(answer_ids[:, :-1])], dim=1)
    hidden = model.model(inputs_embeds=inputs).last_hidden_state[:, -answer_ids.shape[1] :]
    logits = model.lm_head(hidden)
    inside = torch.arange(answer_ids.shape[1]) < lengths[:, None]
    loss = F.cross_entropy(logits[inside], answer_ids[inside])
    return loss, (logits.argmax(-1) == answer_ids) | ~inside


def save(model: NirvanaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json: a folder for `backbone_path`."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


# ----------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def exact_fraction(
    model: NirvanaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    samples: int = 256,
    batch_size: int = 32,
    prefix_length: int = 66,
    seed: int = 1,
    clean: bool = True,
) -> float:
    """Return the fraction of held-out facts that the model, given a prefix that encodes them, answers word for word."""
    rng, generator = np.random.default_rng([seed, 99]), torch.Generator().manual_seed(seed)
    exact = 0
    count = 0
    while count < samples:
        batch = make_batch(tokenizer, rng, batch_size, prefix_length, PrefixDifficulty(left_out=0.0), clean=clean)
        # no prefix encodes whether a volume was reviewed
        reviewed = torch.tensor([facts.findings is not None for facts in batch.facts])
        prefix = prefix_embeddings(model.model.embeddings.weight, batch, generator)
        _, is_right = answer_loss(model, prefix, batch.prompt_ids, batch.answer_ids, batch.lengths)
        exact += int((is_right.all(1) & reviewed).sum())
        count += int(reviewed.sum())
    return exact / count


class Scans(NamedTuple):
    """Imaginary scans as a perfect encoder sees them: features (B, P, F) of P places, and the facts."""

    features: Tensor
    facts: list[Facts]


def imaginary_scans(rng: np.random.Generator, batch_size: int, side: int = 8) -> Scans:
    """Draw scans of three contrasts with 0 to 2 findings on a grid of P = side² places.

    The features of a place are the contrast (3) and the level (3), equal at all places, and the label (6) of a lesion
    there. Side and region are not among them; the position embeddings have to learn those.
    """
    contrasts = [findings_module.CONTRASTS[name] for name in ("AXT1", "AXT2", "AXFLAIR")]
    features = np.zeros((batch_size, side, side, 6 + len(COMMON_LABELS)), dtype=np.float32)
    all_facts = []
    thirds = np.array_split(np.arange(side), 3)
    for row in range(batch_size):
        contrast, level = int(rng.integers(3)), int(rng.integers(3))
        features[row, :, :, contrast] = features[row, :, :, 3 + level] = 1
        findings = []
        for _ in range(int(rng.choice(3, p=(0.35, 0.4, 0.25)))):
            label, across, down = (int(rng.integers(count)) for count in (len(COMMON_LABELS), 3, 3))
            findings.append(Finding(COMMON_LABELS[label], findings_module.SIDES[across], findings_module.REGIONS[down]))
            features[row, rng.choice(thirds[down]), rng.choice(thirds[across]), 6 + label] = 1
        all_facts.append(Facts(contrasts[contrast], findings_module.LEVELS[level], tuple(findings)))
    return Scans(torch.from_numpy(features).reshape(batch_size, side * side, -1), all_facts)


def steering_test(
    model: NirvanaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_steps: int = 150,
    batch_size: int = 16,
    side: int = 8,
    seed: int = 0,
    evaluate_every: int = 25,
) -> list[dict[str, float]]:
    """Train the simplest encoder to steer the frozen model: a linear map of `imaginary_scans` plus position vectors.

    Returns
    -------
    list of dict
        Every `evaluate_every` steps, on held-out scans: step, loss [nats], contrast and level (fraction predicted
        correctly), findings_exact (fraction with all findings correct, word for word).
    """
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng([seed, 7])
    held_out = imaginary_scans(np.random.default_rng([seed, 8]), 128, side)
    rms = model.model.embeddings.weight.square().mean().sqrt().item()
    width = model.config.hidden_size
    # both maps are in units of the embeddings' root mean square; their sum starts near that
    table = (torch.randn(held_out.features.shape[-1], width, generator=generator) / 2).requires_grad_()
    positions = (torch.randn(side * side + 2, width, generator=generator) / 2).requires_grad_()  # with start and end
    optimizer = torch.optim.Adam([table, positions], lr=0.1)
    prompt_ids = encode_prompt(tokenizer)

    def forward(scans: Scans) -> tuple[Tensor, Tensor, Tensor]:
        vectors = F.pad(scans.features @ table, (0, 0, 1, 1)) + positions
        answer_ids, lengths = encode_answers(tokenizer, scans.facts)
        loss, is_right = answer_loss(model, rms * vectors, prompt_ids, answer_ids, lengths)
        return loss, is_right, answer_ids

    trainable = [value for value in model.parameters() if value.requires_grad]
    model.requires_grad_(False)
    history = []
    for step in range(max_steps + 1):
        if step % evaluate_every == 0:
            with torch.no_grad():
                loss, is_right, answer_ids = forward(held_out)
            history.append({"step": step, "loss": loss.item(), **_steering_scores(tokenizer, is_right, answer_ids)})
        loss, _, _ = forward(imaginary_scans(rng, batch_size, side))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for value in trainable:
        value.requires_grad_(True)
    return history


def _steering_scores(tokenizer: PreTrainedTokenizerFast, is_right: Tensor, answer_ids: Tensor) -> dict[str, float]:
    """Fractions of correct contrasts (tokens before the level), levels, and findings (tokens after the level)."""
    third = tokenizer.encode(" third", add_special_tokens=False)[0]
    levels = (answer_ids == third).int().argmax(1) - 1  # the level is the word before "third"
    rows = list(zip(is_right, levels.tolist(), strict=True))
    scores = {
        "contrast": [row[:level].all() for row, level in rows],
        "level": [row[level] for row, level in rows],
        "findings_exact": [row[level + 1 :].all() for row, level in rows],
    }
    return {name: torch.stack(values).float().mean().item() for name, values in scores.items()}
