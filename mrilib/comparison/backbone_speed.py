"""What a token of the backbone costs: decoding, prefill and memory, beside what they could cost at best.

Everything is measured in one process on random weights, which cost the same as learned ones. Prefill is set beside the
plain matrix products of the model's own shapes, and beside a Llama of as many parameters from the same library.
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
from mrilib.config import BenchmarkParameters
from mrilib.model.two_stage import checkpoint_layers

EARLY, LATE = 20, 500  # the tokens whose cost is compared


AROUND = 10  # tokens on either side that a token's cost is the median over


def build(config: BenchmarkParameters, device: torch.device) -> NirvanaForCausalLM:
    """A frozen backbone with random weights."""
    torch.manual_seed(config.seed)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "concept_dim", "logit_dim")
    with torch.device(device):
        model = NirvanaForCausalLM(NirvanaConfig(**{name: getattr(config, name) for name in names}))
    return model.eval().requires_grad_(False)


def llama_like(model: NirvanaForCausalLM) -> LlamaForCausalLM:
    """A Llama with the backbone's width, layers, heads and vocabulary; its MLP makes up the number of parameters."""
    config = model.config
    d, layers = config.hidden_size, config.num_hidden_layers
    per_layer = (parameters(model.model) - config.vocab_size * d) / layers - 4 * d * d
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


def parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, a GPU's work included [s]."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def prefill(model: NirvanaForCausalLM, tokens: int, repeats: int) -> dict[str, float]:
    """Time of a pass over `tokens` embeddings that fills the cache and gives the last logits, as generating does.

    Returns
    -------
    dict
        ``nirvana_seconds``, ``llama_seconds`` and ``matmul_seconds``, each the best of `repeats` taken in turns [s];
        ``matmul_flops``, the floating point operations of the products; ``share_of_matmul`` and ``times_llama``.
    """
    device, dtype = model.device, model.dtype
    llama = llama_like(model)
    x = model.get_input_embeddings()(torch.randint(model.config.vocab_size, (1, tokens), device=device))
    linears = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
    operands = {m.in_features: torch.randn(tokens, m.in_features, device=device, dtype=dtype) for m in linears}

    def products() -> None:
        for linear in linears:
            torch.mm(operands[linear.in_features], linear.weight.t())

    def run(language_model: PreTrainedModel) -> Callable[[], Any]:
        return lambda: language_model(inputs_embeds=x, use_cache=True, logits_to_keep=1)

    works = {"nirvana_seconds": run(model), "llama_seconds": run(llama), "matmul_seconds": products}
    for work in works.values():
        seconds(work, device)  # the first call of anything is slower
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    found = {name: min(values) for name, values in times.items()}
    return {
        **found,
        "matmul_flops": float(sum(2 * tokens * m.weight.numel() for m in linears)),
        "share_of_matmul": found["matmul_seconds"] / found["nirvana_seconds"],
        "times_llama": found["nirvana_seconds"] / found["llama_seconds"],
        "parameters": float(parameters(model)),
        "llama_parameters": float(parameters(llama)),
    }


@torch.no_grad()
def decoding(model: NirvanaForCausalLM, prefix: int, tokens: int) -> dict[str, Any]:
    """Greedy decoding after `prefix` embeddings: `generate` with its cache against recomputing the whole sequence.

    Returns
    -------
    dict
        ``generate_seconds`` and ``recompute_seconds`` for `tokens` tokens; ``speed_up``; ``same_tokens``.
    """
    device = model.device
    embed = model.get_input_embeddings()
    x = embed(torch.randint(model.config.vocab_size, (1, prefix), device=device))
    # without an end token, so that both loops make as many
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
    cached, plain = min(seconds(with_cache, device) for _ in range(2)), seconds(recompute, device)
    return {
        "generate_seconds": cached,
        "recompute_seconds": plain,
        "speed_up": plain / cached,
        "same_tokens": bool(torch.equal(generated[-1], recomputed[0])),
    }


@torch.no_grad()
def token_costs(model: NirvanaForCausalLM, tokens: int, passes: int = 4) -> tuple[list[float], list[int]]:
    """Time of each cached step [s], the best of `passes`, and the cache's size after it [bytes]."""
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
            sizes.append(sum(x.numel() * x.element_size() for one in out.past_key_values.layers for x in one.tensors()))
    return [min(steps) for steps in zip(*times, strict=True)], sizes


def cost_around(times: list[float], token: int) -> float:
    """Median cost of the tokens around one [s]; single steps are noisy."""
    return statistics.median(times[max(0, token - AROUND) : token + AROUND])


class Saved(AbstractContextManager["Saved"]):
    """Counts the bytes of distinct tensors that a graph keeps for its backward pass, the weights left out."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.sizes: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return x

    def __enter__(self) -> "Saved":
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def backward_memory(model: NirvanaForCausalLM, tokens: int) -> dict[str, float]:
    """Activations kept for a backward pass to the inputs, and the pass's time.

    Returns
    -------
    dict
        ``trainable_bytes``, ``frozen_bytes`` and ``recomputed_bytes`` (frozen, with activation checkpointing);
        ``frozen_seconds`` and ``recomputed_seconds`` of forward and backward; ``weight_gradients``, how many tensors of
        the frozen model hold a gradient afterwards.
    """
    x = torch.randn(1, tokens, model.config.hidden_size, device=model.device, dtype=model.dtype)
    found: dict[str, float] = {}

    def run(backward: bool) -> int:
        leaf = x.clone().requires_grad_()
        with Saved(model) as saved:
            loss = model.model(inputs_embeds=leaf, use_cache=False).last_hidden_state.float().square().mean()
        if backward:
            loss.backward()
        return saved.bytes

    model.requires_grad_(True)
    found["trainable_bytes"] = run(backward=False)
    model.requires_grad_(False)
    found["frozen_bytes"] = run(backward=True)
    found["frozen_seconds"] = seconds(lambda: run(backward=True), model.device)
    forwards = checkpoint_layers(model)
    found["recomputed_bytes"] = run(backward=True)
    found["recomputed_seconds"] = seconds(lambda: run(backward=True), model.device)
    for module in model.modules():  # back to the class's own
        module.__dict__.pop("forward", None)
    assert forwards == model.config.num_hidden_layers
    found["weight_gradients"] = sum(p.grad is not None for p in model.parameters())
    return found


def measure(config: BenchmarkParameters, device: torch.device) -> dict[str, Any]:
    """All of the above as plain numbers, for run.json and the table."""
    model = build(config, device)
    found: dict[str, Any] = {"prefill": prefill(model, config.prefill_tokens, config.repeats)}
    times, sizes = token_costs(model, max(LATE + AROUND, config.new_tokens))
    found["steps"] = {"seconds": times, "cache_bytes": sizes}
    found["decoding"] = decoding(model, config.prefix_tokens, config.new_tokens)
    found["backward"] = backward_memory(model, config.prefix_tokens)
    found["threads"] = torch.get_num_threads()
    return found


def table(found: dict[str, Any], config: BenchmarkParameters) -> pd.DataFrame:
    """The measurements in words, with what is asked of them."""
    pre, dec, back, steps = (found[name] for name in ("prefill", "decoding", "backward", "steps"))
    early, late = (cost_around(steps["seconds"], n) for n in (EARLY, LATE))
    rate = pre["matmul_flops"] / 1e9
    mib = 2**20

    def judged(value: float, unit: str, limit: float, most: bool) -> tuple[str, str, str]:
        kept = value <= limit if most else value >= limit
        return f"{value:.2f}{unit}", f"{'at most' if most else 'at least'} {limit:g}{unit}", "yes" if kept else "no"

    rows: list[tuple[str, str, str, str]] = [
        (f"prefill of {config.prefill_tokens} tokens", f"{pre['nirvana_seconds']:.3f} s", "", ""),
        ("  its matrix products alone", f"{pre['matmul_seconds']:.3f} s, {rate / pre['matmul_seconds']:.0f} GFLOP/s",
         "", ""),
        ("  share of that rate", *judged(100 * pre["share_of_matmul"], " %", 60, most=False)),
        (f"  Llama of {pre['llama_parameters'] / 1e6:.1f} M parameters (Nirvana {pre['parameters'] / 1e6:.1f} M)",
         f"{pre['llama_seconds']:.3f} s", "", ""),
        ("  times the Llama's", *judged(pre["times_llama"], "", 1.3, most=True)),
        (f"decoding {config.new_tokens} tokens after {config.prefix_tokens} embeddings",
         f"{dec['generate_seconds']:.2f} s", "", ""),
        ("  recomputing the sequence at each step", f"{dec['recompute_seconds']:.2f} s", "", ""),
        ("  times faster", *judged(dec["speed_up"], "", 20, most=False)),
        ("  the same tokens", "yes" if dec["same_tokens"] else "no", "yes", "yes" if dec["same_tokens"] else "no"),
        (f"token {EARLY}", f"{1e3 * early:.1f} ms", "", ""),
        (f"token {LATE}", f"{1e3 * late:.1f} ms", "", ""),
        (f"  times token {EARLY}", *judged(late / early, "", 1.2, most=True)),
        (f"cache after {len(steps['cache_bytes'])} tokens", f"{steps['cache_bytes'][-1] / mib:.1f} MiB", "", ""),
        (f"kept for backward of {config.prefix_tokens} tokens, trainable weights",
         f"{back['trainable_bytes'] / mib:.0f} MiB", "", ""),
        ("  frozen weights", f"{back['frozen_bytes'] / mib:.0f} MiB, {back['frozen_seconds']:.2f} s", "", ""),
        ("  frozen weights, recomputing",
         f"{back['recomputed_bytes'] / mib:.0f} MiB, {back['recomputed_seconds']:.2f} s", "", ""),
        ("  frozen weights that got a gradient", f"{back['weight_gradients']:.0f}", "0",
         "yes" if back["weight_gradients"] == 0 else "no"),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["backbone", "measured", "wanted", "kept"])
