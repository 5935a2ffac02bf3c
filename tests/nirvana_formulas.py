"""The backbone's formulas in double precision, token by token and head by head: slow, but easy to check.

Nothing of `mrilib` is used. Weights have their published names.
"""

import math
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def convolution(x: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """Causal depthwise convolution with 4 taps; x (T, d) is zero at padding and before the start."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for tap in range(4):
            if t - 3 + tap >= 0 and keep[t - 3 + tap]:
                out[t] += weight[:, 0, tap] * x[t - 3 + tap]
    return silu(out)


def delta_branch(w: Weights, x: Tensor, raw: list[Tensor], keep: Tensor, heads: int, eps: float) -> Tensor:
    length, d = x.shape
    width = d // heads
    q, k, v = (
        convolution(y, w[f"{n}_conv1d.weight"], keep).view(length, heads, width)
        for y, n in zip(raw, "qkv", strict=True)
    )
    beta = sigmoid(x @ w["b_proj.weight"].T) * keep[:, None]
    g = -w["A_log"].exp() * torch.log1p((x @ w["a_proj.weight"].T + w["dt_bias"]).exp()) * keep[:, None]
    out = torch.zeros(length, heads, width, dtype=x.dtype)
    for h in range(heads):
        state = torch.zeros(width, width, dtype=x.dtype)
        for t in range(length):
            key = k[t, h] / (k[t, h].square().sum() + 1e-6).sqrt()
            query = q[t, h] / (q[t, h].square().sum() + 1e-6).sqrt() / math.sqrt(width)
            state = g[t, h].exp() * state
            state = state + torch.outer(key, beta[t, h] * (v[t, h] - state.T @ key))
            out[t, h] = state.T @ query
    out = rms_norm(out, w["o_norm.weight"], eps) * silu(x @ w["g_proj.weight"].T).view(length, heads, width)
    return out.reshape(length, d) @ w["o_proj.weight"].T


def trigger(w: Weights, concept: Tensor, theta: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Learn and predict for one token: concept (3C,); theta for W, w (ln), b, c (ln), (L,) each; h (C,), new theta."""
    big, ln, b, c = (w[f"model.rnn_router.{n}"] for n in ("weight_linear", "weight_ln", "bias_linear", "bias_ln"))
    c_q, c_k, c_v = concept.chunk(3)
    th_w, th_ln, th_b, th_c = theta

    def normed(z: Tensor) -> tuple[Tensor, Tensor]:
        var = (z - z.mean()).square().mean()
        return (z - z.mean()) / (var + 1e-6).sqrt(), var

    z, var = normed(c_k @ (big @ th_w) + b @ th_b)
    e = (ln @ th_ln) * z + c @ th_c + c_k - c_v
    r = (ln @ th_ln) * e / (var + 1e-6).sqrt()
    new = [
        th_w - 0.01 * torch.einsum("iol,i,o->l", big, c_k, r),
        th_ln - 0.01 * ln.T @ (e * z),
        th_b - 0.01 * b.T @ r,
        th_c - 0.01 * c.T @ e,
    ]
    z, _ = normed(c_q @ (big @ new[0]) + b @ new[2])
    return (ln @ new[1]) * z + c @ new[3] + c_q, new


def attention_branch(w: Weights, x: Tensor, raw: list[Tensor], keep: Tensor, heads: int, window: int) -> Tensor:
    length, d = x.shape
    width = d // heads
    q, k, v = (
        (y + x @ w[f"{n}_lora.0.weight"].T @ w[f"{n}_lora.1.weight"].T).view(length, heads, width)
        for y, n in zip(raw, "qkv", strict=True)
    )
    out = torch.zeros(length, heads, width, dtype=x.dtype)
    for t in range(length):
        reach = [s for s in range(max(0, t - window + 1), t + 1) if keep[s]]
        for h in range(heads if reach else 0):
            scores = torch.stack([q[t, h] @ k[s, h] for s in reach]) / math.sqrt(width)
            out[t, h] = scores.softmax(0) @ v[reach, h]
    return out.reshape(length, d) @ w["o_proj_attn.0.weight"].T @ w["o_proj_attn.1.weight"].T


def run(weights: Weights, config: Any, x: Tensor, keep: Tensor) -> tuple[list[Tensor], Tensor]:
    """Compute hidden states (before each block, then after the last norm) and logits of one row of embeddings.

    x (T, d); keep (T,) bool, False at padding, where the results are undefined.
    """
    weights = {name: value.double() for name, value in weights.items()}
    x = x.double()
    heads, eps, length = config.num_heads, config.norm_eps, len(x)
    theta: list[list[Tensor]] = []
    states = []
    for i in range(config.num_hidden_layers):
        states.append(x)
        prefix = f"model.layers.{i}."
        block = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        w = {name.removeprefix("Task_Aware_Delta_Net."): value for name, value in block.items()} | {
            name: value for name, value in weights.items() if "rnn_router" in name
        }
        y = rms_norm(x, w["attn_norm.weight"], eps)
        raw = [y @ w[f"{n}_proj.weight"].T for n in "qkv"]
        mixed = delta_branch(w, y, raw, keep, heads, eps)
        if i < 2:
            theta = [[torch.ones(config.logit_dim).double()] * 4] * length
        else:
            concepts = y @ w["concept_proj.weight"].T
            learned = [trigger(w, concepts[t], theta[t]) for t in range(length)]
            h, theta = torch.stack([row[0] for row in learned]), [row[1] for row in learned]
            attended = attention_branch(w, y, raw, keep, heads, config.window_size)
            t, u = sigmoid(h @ w["t_proj.weight"].T), sigmoid(h @ w["t2_proj.weight"].T)
            inner = torch.cat([mixed, attended, h, h], -1) @ w["condition_interpolation.lora.0.weight"].T
            lora = silu(inner) @ w["condition_interpolation.lora.2.weight"].T
            mixed = u * mixed + t * attended + u * t * lora
        x = x + mixed
        gate, y = (rms_norm(x, w["mlp_norm.weight"], eps) @ w["mlp.gate_proj.weight"].T).chunk(2, -1)
        x = x + (silu(gate) * y) @ w["mlp.down_proj.weight"].T
    x = rms_norm(x, weights["model.norm.weight"], eps)
    return [*states, x], x @ weights.get("lm_head.weight", weights["model.embeddings.weight"]).T
