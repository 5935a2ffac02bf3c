"""Pretraining of the demo's small backbone: a Nirvana model that tells, in its answer, the facts that a prefix carries.

The k-space encoder of stage 1 has to find embeddings that make a frozen language model say what is in the scan. A
large pretrained model can be steered by its input embeddings; a small one has to be taught to. So it is trained on

    prefix (vectors that carry facts) · prompt · answer · eos

where the prefix (`mrilib.pretrain.corpus`) is what an encoder in training might hand over: facts under noise, rivals
and nuisances. With noise the best guess is a matched filter, log-odds linear in the prefix, and that is what makes the
model easy to steer: a small step towards a fact makes its words a little more probable.
`steering_test` asks whether that has worked.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from mrilib.backbone.nirvana import NirvanaConfig, NirvanaForCausalLM
from mrilib.data import findings as analysis
from mrilib.data.findings import Facts, Finding
from mrilib.pretrain.corpus import COMMON_LABELS, Batch, PrefixDifficulty, encode_answers, make_batch


def prefix_embeddings(embedding: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """The prefix vectors (B, P, d) of a batch: weighted sums of the rows of `embedding` (V, d), noise, scale."""
    rms = embedding.detach().square().mean().sqrt()
    vectors = batch.weights @ embedding
    size, length, width = vectors.shape
    noise = torch.randn(size, length, width, generator=generator) * batch.noise[:, None, None]
    common = torch.randn(size, 1, width, generator=generator) * batch.common[:, None, None]
    return (vectors + rms * (noise + common)) * batch.scale[:, None, None]


def answer_loss(
    model: NirvanaForCausalLM, prefix: Tensor, prompt_ids: Tensor, answer_ids: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers after prefix and prompt.

    Parameters
    ----------
    prefix : (B, P, d)
    prompt_ids : (Q,)
    answer_ids : (B, A)
    lengths : (B,)

    Returns
    -------
    loss : scalar
        mean over answer tokens, eos included, padding by length not [nats]
    right : (B, A) bool
        where the likeliest next token is the answer's; all of a row up to its length: greedy decoding gives that answer
    """
    embed = model.model.embeddings
    size = len(answer_ids)
    inputs = torch.cat([prefix, embed(prompt_ids).expand(size, -1, -1), embed(answer_ids[:, :-1])], dim=1)
    hidden = model.model(inputs_embeds=inputs).last_hidden_state[:, -answer_ids.shape[1] :]
    logits = model.lm_head(hidden)
    inside = torch.arange(answer_ids.shape[1]) < lengths[:, None]
    loss = F.cross_entropy(logits[inside], answer_ids[inside])
    return loss, (logits.argmax(-1) == answer_ids) | ~inside


@torch.no_grad()
def initialise(model: NirvanaForCausalLM, slowest: float = 1e-4, fastest: float = 2e-2) -> None:
    """Weights for a small model that has few steps to learn; the random numbers are torch's.

    Every linear map begins with unit gain (standard deviation fan_in^−½), the low-rank maps of the attention branch
    with it: at the published 0.02, made for a width of 2,048, that branch would begin silent. The delta branch begins
    with forgetting rates A·dt between `slowest` and `fastest` [1/token], log-uniform, instead of up to 1.6: an answer
    has to reach back over all of a prefix.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            module.weight.normal_(std=module.in_features**-0.5)
    for name, value in model.named_parameters():
        if name.endswith("A_log"):
            value.zero_()
        elif name.endswith("dt_bias"):
            rate = torch.exp(torch.empty_like(value).uniform_(float(np.log(slowest)), float(np.log(fastest))))
            value.copy_(rate + torch.log(-torch.expm1(-rate)))  # softplus⁻¹
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            value.mul_((2 * model.config.num_hidden_layers) ** -0.5)


def pretrain(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 96,
    num_hidden_layers: int = 4,
    num_heads: int = 4,
    concept_dim: int = 32,
    logit_dim: int = 8,
    max_steps: int = 1800,
    batch_size: int = 32,
    learning_rate: float = 4e-3,
    weight_decay: float = 0.01,
    warmup_ratio: float = 0.05,
    max_grad_norm: float = 1.0,
    prefix_min: int = 16,
    prefix_max: int = 80,
    seed: int = 0,
    steering: PrefixDifficulty = PrefixDifficulty(),  # noqa: B008
    ramp: tuple[float, float] = (0.3, 0.6),
    initializer_range: float = 0.05,
    report: Callable[[dict[str, float]], None] | None = None,
) -> tuple[NirvanaForCausalLM, list[dict[str, float]]]:
    """Train a small Nirvana on the corpus from scratch; deterministic for a seed and a number of threads.

    Parameters
    ----------
    hidden_size, num_hidden_layers, num_heads, concept_dim, logit_dim : int
        see `NirvanaConfig`
    max_steps, batch_size : int
        steps, and texts a step
    learning_rate, weight_decay : float
        peak rate of Muon (the layers' matrices) and AdamW (all else, without decay); cosine after the warm-up
    warmup_ratio : float
        share of the steps with rising learning rate
    max_grad_norm : float
        gradients are clipped to this norm
    prefix_min, prefix_max : int
        lengths of prefixes [positions]; at least 16
    steering : PrefixDifficulty
        how hard the prefixes become
    ramp : (float, float)
        shares of the steps between which prefixes go from short and clean to those of `steering`
    initializer_range : float
        standard deviation of the untrained token embeddings
    report : callable, optional
        called after each step with the last entry of the history

    Returns
    -------
    model : NirvanaForCausalLM
        in eval mode
    history : list of dict
        for each step: step, loss [nats], exact (share of exact answers), gradient_norm, learning_rate, seconds

    Raises
    ------
    ValueError
        prefixes too short to hold the facts of one slice
    """
    if not 16 <= prefix_min <= prefix_max:
        raise ValueError(f"prefix_min {prefix_min}, prefix_max {prefix_max}: wanted is 16 <= prefix_min <= prefix_max")
    torch.manual_seed(seed)
    model = NirvanaForCausalLM(
        NirvanaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_heads=num_heads,
            concept_dim=concept_dim,
            logit_dim=logit_dim,
            window_size=2048,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            initializer_range=initializer_range,
            use_cache=False,
        )
    )
    initialise(model)
    matrices = [value for name, value in model.named_parameters() if value.dim() == 2 and "layers" in name]
    others = [value for name, value in model.named_parameters() if not (value.dim() == 2 and "layers" in name)]
    # Muon for the layers' matrices: after 300 steps it names regions rightly where AdamW is still at chance
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    warmup = max(1, int(warmup_ratio * max_steps))
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(
                (step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * max(0, step - warmup) / max(1, max_steps - warmup)))
            ),
        )
        for optimizer in optimizers
    ]
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    history: list[dict[str, float]] = []
    start = time.perf_counter()
    model.train()
    for step in range(max_steps):
        # First how to look a fact up at all, from short and clean prefixes; then from all others.
        ease = min(1.0, max(0.0, (step / max_steps - ramp[0]) / (ramp[1] - ramp[0])))
        span = prefix_max - prefix_min
        longest = prefix_min + min(8, span) + round(ease * max(0, span - 8))
        length = int(rng.integers(prefix_min, longest + 1))
        batch = make_batch(tokenizer, rng, batch_size, length, steering.at(ease))
        prefix = prefix_embeddings(model.model.embeddings.weight, batch, generator)
        loss, right = answer_loss(model, prefix, batch.prompt_ids, batch.answer_ids, batch.lengths)
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        history.append(
            {
                "step": step,
                "loss": loss.item(),
                "exact": right.all(1).float().mean().item(),
                "gradient_norm": float(norm),
                "learning_rate": float(schedulers[0].get_last_lr()[0]),
                "seconds": time.perf_counter() - start,
            }
        )
        if report is not None:
            report(history[-1])
    model.zero_grad(set_to_none=True)
    return model.eval(), history


def save(model: NirvanaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json: a `backbone_path`."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


# ------------------------------------------------------------------------------------------------- can it be steered?


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
    """Share of held-out facts whose answer comes out exact, word for word, from a prefix that carries them."""
    rng, generator = np.random.default_rng([seed, 99]), torch.Generator().manual_seed(seed)
    right = 0
    count = 0
    while count < samples:
        batch = make_batch(tokenizer, rng, batch_size, prefix_length, PrefixDifficulty(left_out=0.0), clean=clean)
        # whether a volume was reviewed is not told by any prefix
        told = torch.tensor([facts.findings is not None for facts in batch.facts])
        prefix = prefix_embeddings(model.model.embeddings.weight, batch, generator)
        _, exact = answer_loss(model, prefix, batch.prompt_ids, batch.answer_ids, batch.lengths)
        right += int((exact.all(1) & told).sum())
        count += int(told.sum())
    return right / count


class Scans(NamedTuple):
    """What a perfect encoder would know of imaginary scans: features (B, P, F) of P places, and the facts."""

    features: Tensor
    facts: list[Facts]


def imaginary_scans(rng: np.random.Generator, batch_size: int, side: int = 8) -> Scans:
    """Scans of three contrasts with 0 to 2 findings on a side × side grid of places (P = side²).

    Features of a place: contrast (3) and level (3), the same everywhere, and each of `COMMON_LABELS` (6) where such
    a lesion lies. Which place is left or anterior is not among them: that is for the position embeddings to learn.
    """
    contrasts = [analysis.CONTRASTS[name] for name in ("AXT1", "AXT2", "AXFLAIR")]
    features = np.zeros((batch_size, side, side, 6 + len(COMMON_LABELS)), dtype=np.float32)
    all_facts = []
    columns = np.array_split(np.arange(side), 3)
    rows = np.array_split(np.arange(side), 3)
    for row in range(batch_size):
        contrast, level = int(rng.integers(3)), int(rng.integers(3))
        features[row, :, :, contrast] = features[row, :, :, 3 + level] = 1
        findings = []
        for _ in range(int(rng.choice(3, p=(0.35, 0.4, 0.25)))):
            label, across, down = (int(rng.integers(count)) for count in (len(COMMON_LABELS), 3, 3))
            findings.append(Finding(COMMON_LABELS[label], analysis.SIDES[across], analysis.REGIONS[down]))
            features[row, rng.choice(rows[down]), rng.choice(columns[across]), 6 + label] = 1
        all_facts.append(Facts(contrasts[contrast], analysis.LEVELS[level], tuple(findings)))
    return Scans(torch.from_numpy(features).reshape(batch_size, side * side, -1), all_facts)


def steering_test(
    model: NirvanaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_steps: int = 150,
    batch_size: int = 16,
    learning_rate: float = 0.1,
    scale: float = 1.0,
    side: int = 8,
    seed: int = 0,
    evaluate_every: int = 25,
) -> list[dict[str, float]]:
    """Train the least encoder there is to steer the frozen model: a linear map of `imaginary_scans` plus positions.

    Parameters
    ----------
    learning_rate : float
        of Adam, [root mean square of the token embeddings]: the map's output is in that unit
    scale : float
        root mean square of the untrained map's vectors, in the same unit

    Returns
    -------
    list of dict
        every `evaluate_every` steps on held-out scans: step, loss [nats], contrast, level (share named rightly),
        findings_exact (share whose findings are all right, word for word)
    """
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng([seed, 7])
    held_out = imaginary_scans(np.random.default_rng([seed, 8]), 128, side)
    rms = model.model.embeddings.weight.square().mean().sqrt().item()
    width = model.config.hidden_size
    count = held_out.features.shape[-1]
    table = (torch.randn(count, width, generator=generator) * scale / 2).requires_grad_()
    places = (torch.randn(side * side + 2, width, generator=generator) * scale / 2).requires_grad_()  # and start, end
    optimizer = torch.optim.Adam([table, places], lr=learning_rate)
    prompt_ids = torch.tensor(tokenizer.encode(analysis.prompt(), add_special_tokens=False))
    frozen = [value for value in model.parameters() if value.requires_grad]
    for value in frozen:
        value.requires_grad_(False)

    def forward(scans: Scans) -> tuple[Tensor, Tensor, Tensor]:
        vectors = F.pad(scans.features @ table, (0, 0, 1, 1)) + places
        answer_ids, lengths = encode_answers(tokenizer, scans.facts)
        loss, right = answer_loss(model, rms * vectors, prompt_ids, answer_ids, lengths)
        return loss, right, answer_ids

    history = []
    for step in range(max_steps + 1):
        if step % evaluate_every == 0:
            with torch.no_grad():
                loss, right, answer_ids = forward(held_out)
            history.append({"step": step, "loss": loss.item(), **_steering_scores(tokenizer, right, answer_ids)})
        loss, _, _ = forward(imaginary_scans(rng, batch_size, side))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for value in frozen:
        value.requires_grad_(True)
    return history


def _steering_scores(tokenizer: PreTrainedTokenizerFast, right: Tensor, answer_ids: Tensor) -> dict[str, float]:
    third = tokenizer.encode(" third", add_special_tokens=False)[0]
    at_level = (answer_ids == third).int().argmax(1) - 1
    rows = torch.arange(len(right))
    level = right[rows, at_level]
    contrast = torch.stack([one[:place].all() for one, place in zip(right, at_level, strict=True)])
    rest = torch.stack([one[place + 1 :].all() for one, place in zip(right, at_level, strict=True)])
    return {
        "contrast": contrast.float().mean().item(),
        "level": level.float().mean().item(),
        "findings_exact": rest.float().mean().item(),
    }
