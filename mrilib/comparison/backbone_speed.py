"""Speed and memory of the backbone: prefill, decoding and the backward pass.

All times are measured in one process on random weights, which cost as much as trained ones. Prefill is compared with
the matrix products of the model's own shapes, and with a Llama of as many parameters from the same library.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mrilib.backbone.nirvana import NirvanaConfig, NirvanaForCausalLM
from mrilib.config import CostParameters
from mrilib.model.two_stage import checkpoint_layers, count_parameters

EARLY, LATE = 20, 500  # the tokens to compare in cost
AROUND = 10  # a token's cost is the median over this many tokens on either side


def build(config: CostParameters, device: torch.device) -> NirvanaForCausalLM:
    """Build a frozen backbone with random weights."""
    torch.manual_seed(config.seed)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "concept_dim", "logit_dim")
    with torch.device(device):
        model = NirvanaForCausalLM(NirvanaConfig(**{name: getattr(config, name) for name in names}))
    return model.eval().requires_grad_(False)


def llama_like(model: NirvanaForCausalLM) -> LlamaForCausalLM:
    """Build a Llama with the backbone's width, layers, heads, vocabulary and, by its MLP, number of parameters."""
    config = model.config
    d, layers = config.hidden_size, config.num_hidden_layers
    per_layer = (count_parameters(model.model) - config.vocab_size * d) / layers - 4 * d * d
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": d,
        "intermediate_size": round(per_layer / (3 * d)),
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_heads,
        "tie_word_embeddings": True,
    }
    with model.device:
        llama = LlamaForCausalLM(LlamaConfig(**sizes))
    return llama.eval().requires_grad_(False)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Measure the wall time of one call [s]; waits for a GPU to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def prefill(model: NirvanaForCausalLM, tokens: int, repeats: int) -> dict[str, float]:
    """Time a pass over `tokens` embeddings that fills the cache and returns the last logits.

    Returns
    -------
    dict
        ``nirvana_seconds``, ``llama_seconds`` and ``matmul_seconds``, each the best of `repeats` taken in turns [s];
        ``matmul_flops``, the floating point operations of the products; ``share_of_matmul`` and ``times_llama``;
        ``parameters`` and ``llama_parameters``.
    """
    device, dtype = model.device, model.dtype
    llama = llama_like(model)
    x = model.get_input_embeddings()(torch.randint(model.config.vocab_size, (1, tokens), device=device))
    linears = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
    operands = {m.in_features: torch.randn(tokens, m.in_features, device=device, dtype=dtype) for m in linears}

    def products() -> None:
        for linear in linears:
            torch.mm(operands[linear.in_features], linear.weight.t())

    def forward(language_model: PreTrainedModel) -> Callable[[], Any]:
        return lambda: language_model(inputs_embeds=x, use_cache=True, logits_to_keep=1)

    works = {"nirvana_seconds": forward(model), "llama_seconds": forward(llama), "matmul_seconds": products}
    for work in works.values():
        seconds(work, device)  # warm-up
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    best = {name: min(values) for name, values in times.items()}
    return {
        **best,
        "matmul_flops": float(sum(2 * tokens * m.weight.numel() for m in linears)),
        "share_of_matmul": best["matmul_seconds"] / best["nirvana_seconds"],
        "times_llama": best["nirvana_seconds"] / best["llama_seconds"],
        "parameters": float(count_parameters(model)),
        "llama_parameters": float(count_parameters(llama)),
    }


@torch.no_grad()
def decoding(model: NirvanaForCausalLM, prefix: int, tokens: int) -> dict[str, Any]:
    """Time greedy decoding after `prefix` embeddings: `generate` with its cache, and recomputing the whole sequence.

    Returns
    -------
    dict
        ``generate_seconds`` and ``recompute_seconds`` for `tokens` tokens; ``speed_up``; ``same_tokens``.
    """
    device = model.device
    embed = model.get_input_embeddings()
    x = embed(torch.randint(model.config.vocab_size, (1, prefix), device=device))
    # Without an end token, so that both loops generate the same number of tokens.
    settings = {"attention_mask": torch.ones(1, prefix, dtype=torch.long, device=device), "eos_token_id": None}
    generated: list[Tensor] = []
    recomputed: list[Tensor] = []

    def with_cache() -> None:
        generator: Any = model
        generated.append(generator.generate(inputs_embeds=x, max_new_tokens=tokens, do_sample=False, **settings))

    def recompute() -> None:
        rows, ids = x, []
        for _ in range(tokens):
            ids.append(model(inputs_embeds=rows, use_cache=False).logits[:, -1:].argmax(-1))
            rows = torch.cat((rows, embed(ids[-1])), 1)
        recomputed.append(torch.cat(ids, 1))

    model(inputs_embeds=x[:, :8], use_cache=True)
    cached, uncached = min(seconds(with_cache, device) for _ in range(2)), seconds(recompute, device)
    return {
        "generate_seconds": cached,
        "recompute_seconds": uncached,
        "speed_up": uncached / cached,
        "same_tokens": bool(torch.equal(generated[-1], recomputed[0])),
    }


@torch.no_grad()
def token_costs(model: NirvanaForCausalLM, tokens: int, passes: int = 4) -> tuple[list[float], list[int]]:
    """Measure each cached step's time [s], the best of `passes`, and the cache's size after it [bytes]."""
    times: list[list[float]] = []
    for _ in range(passes):
        times.append([])
        sizes: list[int] = []
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        out = model(ids, use_cache=True)

        def step() -> None:
            nonlocal out
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)

        for _ in range(tokens):
            times[-1].append(seconds(step, model.device))
            cached = [x for layer in out.past_key_values.layers for x in layer.tensors()]
            sizes.append(sum(x.numel() * x.element_size() for x in cached))
    return [min(steps) for steps in zip(*times, strict=True)], sizes


def cost_around(times: list[float], token: int) -> float:
    """Return the median cost of the tokens around this one [s], as single steps are noisy."""
    return statistics.median(times[max(0, token - AROUND) : token + AROUND])


class SavedTensors(AbstractContextManager["SavedTensors"]):
    """Count the bytes of distinct tensors that a graph saves for its backward pass, without the weights."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.sizes: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return x

    def __enter__(self) -> "SavedTensors":
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        """Total size of the saved tensors."""
        return sum(self.sizes.values())


def backward_memory(model: NirvanaForCausalLM, tokens: int) -> dict[str, float]:
    """Measure the activations saved for a backward pass to the inputs, and the time of the pass.

    Returns
    -------
    dict
        ``trainable_bytes``, ``frozen_bytes`` and ``recomputed_bytes`` (frozen, with activation checkpointing);
        ``frozen_seconds`` and ``recomputed_seconds`` of forward and backward; ``weight_gradients``, the number of
        frozen tensors that hold a gradient afterwards.
    """
    x = torch.randn(1, tokens, model.config.hidden_size, device=model.device, dtype=model.dtype)
    costs: dict[str, float] = {}

    def run(backward: bool) -> int:
        leaf = x.clone().requires_grad_()
        with SavedTensors(model) as saved:
            loss = model.model(inputs_embeds=leaf, use_cache=False).last_hidden_state.float().square().mean()
        if backward:
            loss.backward()
        return saved.bytes

    model.requires_grad_(True)
    costs["trainable_bytes"] = run(backward=False)
    model.requires_grad_(False)
    costs["frozen_bytes"] = run(backward=True)
    costs["frozen_seconds"] = seconds(lambda: run(backward=True), model.device)
    forwards = checkpoint_layers(model)
    costs["recomputed_bytes"] = run(backward=True)
    costs["recomputed_seconds"] = seconds(lambda: run(backward=True), model.device)
    for module in model.modules():  # restores the class's forward
        module.__dict__.pop("forward", None)
    assert forwards == model.config.num_hidden_layers
    costs["weight_gradients"] = sum(p.grad is not None for p in model.parameters())
    return costs


def measure(config: CostParameters, device: torch.device) -> dict[str, Any]:
    """Measure everything as plain numbers, for run.json and the table."""
    model = build(config, device)
    costs: dict[str, Any] = {"prefill": prefill(model, config.prefill_tokens, config.repeats)}
    times, sizes = token_costs(model, max(LATE + AROUND, config.new_tokens))
    costs["steps"] = {"seconds": times, "cache_bytes": sizes}
    costs["decoding"] = decoding(model, config.prefix_tokens, config.new_tokens)
    costs["backward"] = backward_memory(model, config.prefix_tokens)
    costs["threads"] = torch.get_num_threads()
    return costs


def table(costs: dict[str, Any], config: CostParameters) -> pd.DataFrame:
    """Tabulate the measurements with their limits, and whether they are met."""
    pre, dec, back, steps = (costs[name] for name in ("prefill", "decoding", "backward", "steps"))
    early, late = (cost_around(steps["seconds"], n) for n in (EARLY, LATE))
    rate = pre["matmul_flops"] / pre["matmul_seconds"] / 1e9
    llama, nirvana = (pre[name] / 1e6 for name in ("llama_parameters", "parameters"))
    mib = 2**20

    def at_most(value: float, limit: float) -> tuple[str, str, str]:
        return f"{value:.2f}", f"at most {limit:g}", "yes" if value <= limit else "no"

    def at_least(value: float, limit: float, unit: str = "") -> tuple[str, str, str]:
        return f"{value:.2f}{unit}", f"at least {limit:g}{unit}", "yes" if value >= limit else "no"

    same, gradients = "yes" if dec["same_tokens"] else "no", back["weight_gradients"]
    rows: list[tuple[str, ...]] = [
        (f"prefill of {config.prefill_tokens} tokens", f"{pre['nirvana_seconds']:.3f} s"),
        ("  its matrix products alone", f"{pre['matmul_seconds']:.3f} s, {rate:.0f} GFLOP/s"),
        ("  share of that rate", *at_least(100 * pre["share_of_matmul"], 60, " %")),
        (f"  Llama of {llama:.1f} M parameters (Nirvana {nirvana:.1f} M)", f"{pre['llama_seconds']:.3f} s"),
        ("  time over the Llama's", *at_most(pre["times_llama"], 1.3)),
        (f"decoding {config.new_tokens} tokens after {config.prefix_tokens} embeddings",
         f"{dec['generate_seconds']:.2f} s"),
        ("  recomputing the sequence at each step", f"{dec['recompute_seconds']:.2f} s"),
        ("  speed-up by the cache", *at_least(dec["speed_up"], 20)),
        ("  same tokens", same, "yes", same),
        (f"token {EARLY}", f"{1e3 * early:.1f} ms"),
        (f"token {LATE}", f"{1e3 * late:.1f} ms"),
        (f"  time over token {EARLY}'s", *at_most(late / early, 1.2)),
        (f"cache after {len(steps['cache_bytes'])} tokens", f"{steps['cache_bytes'][-1] / mib:.1f} MiB"),
        (f"activations kept for backward of {config.prefix_tokens} tokens, trainable weights",
         f"{back['trainable_bytes'] / mib:.0f} MiB"),
        ("  frozen weights", f"{back['frozen_bytes'] / mib:.0f} MiB, {back['frozen_seconds']:.2f} s"),
        ("  frozen weights, activation checkpointing",
         f"{back['recomputed_bytes'] / mib:.0f} MiB, {back['recomputed_seconds']:.2f} s"),
        ("  frozen weights with a gradient", f"{gradients:.0f}", "0", "yes" if gradients == 0 else "no"),
    ]  # fmt: skip
    padded = [(*row, *[""] * (4 - len(row))) for row in rows]
    return pd.DataFrame(padded, columns=["backbone", "measured", "limit", "met"])
