"""The gated delta rule: linear attention with a state that a gate decays and the delta rule corrects.

Per head, with state S (Dk, Dv): S ← e^g S; S ← S + k (β (v − Sᵀk))ᵀ; o = Sᵀq.

`naive_gated_delta_rule` is this recurrence, token by token. `gated_delta_rule` computes the same over chunks of tokens
(Yang et al., "Gated Delta Networks", 2024, arXiv:2412.06464, and "Parallelizing Linear Transformers with the Delta
Rule over Sequence Length", arXiv:2406.06484). The corrections of all tokens in a chunk solve one unit triangular
system. The work is thus in batched matrix products, and Python loops over chunks instead of tokens. Argument names and
layout are those of flash-linear-attention's `chunk_gated_delta_rule`.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mrilib.precision import full_float32

# exp(x) and its derivative are zero in float32 below −103.98. Gates are clamped here: the results are the same, and
# sums of gates over a chunk stay finite for a gate of −inf.
_SMALLEST_GATE = -104.0
_BLOCK = 16  # rows solved at once; torch.compile reads constants of a module, but not of a Function

Rule = TypeVar("Rule", bound=Callable[..., Any])


def _in_float32(rule: Rule) -> Rule:
    """Disable autocast and TF32 in a rule, as they would round products and the state."""

    @functools.wraps(rule)
    def wrapped(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(q.device.type, enabled=False), full_float32():
            return rule(q, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide x (..., D) by its Euclidean norm over the last axis: x / √(Σx² + eps)."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None) -> None:
    """Raise ValueError for shapes that do not match."""
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q must have shape (B, T, H, Dk), none of them 0, got {tuple(q.shape)}")
    batch, length, heads, key_dim = q.shape
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must have shape {(batch, length, heads)} + (Dv,), got {tuple(v.shape)}")
    for name, x in (("g", g), ("beta", beta)):
        if x.shape != q.shape[:3]:
            raise ValueError(f"{name} must have shape (B, T, H) = {(batch, length, heads)}, got {tuple(x.shape)}")
    state_shape = (batch, heads, key_dim, v.shape[-1])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(
            f"initial_state must have shape (B, H, Dk, Dv) = {state_shape}, got {tuple(initial_state.shape)}"
        )


@_in_float32
def naive_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the recurrence token by token: the reference for `gated_delta_rule`, with its arguments and results."""
    _check(q, k, v, g, beta, initial_state)
    dtype = v.dtype
    q, k, v, g, beta = _prepare(q, k, v, g, beta, use_qk_l2norm_in_kernel, scale)
    batch, length, heads, key_dim = q.shape
    state = q.new_zeros(batch, heads, key_dim, v.shape[-1]) if initial_state is None else initial_state.float()
    outputs = []
    for t in range(length):
        state = state * g[:, t].exp()[..., None, None]
        # (B, H, 1, Dk) @ (B, H, Dk, Dv) is Sᵀk as a row
        correction = beta[:, t, :, None, None] * (v[:, t, :, None] - k[:, t, :, None] @ state)
        state = state + k[:, t, :, :, None] * correction
        outputs.append((q[:, t, :, None] @ state).squeeze(-2))
    return torch.stack(outputs, 1).to(dtype), state if output_final_state else None


def _precise(q: Tensor, k: Tensor) -> Tensor:
    """Product of q and k, summed in double precision.

    If a token's query is nearly orthogonal to its key, its output is tiny, and the norm after the rule scales it up,
    with the rounding error of this product.
    """
    return (q.double() @ k.double()).float()


class _UnitLowerInverse(torch.autograd.Function):
    """(I + A)⁻¹ of strictly lower triangular A (N, n, n); entries on and above the diagonal are not read.

    Blocks of 16 are solved, then joined in pairs: [[P, 0], [R, Q]]⁻¹ = [[P⁻¹, 0], [−Q⁻¹ R P⁻¹, Q⁻¹]]. This is as stable
    as substitution, and mostly batched products. PyTorch solves large triangular systems one after another and
    synchronises its threads at each, which takes ten times as long on shared cores.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        """Invert."""
        n, size = a.shape[-1], _BLOCK
        full = size
        while full < n:
            full *= 2
        a = F.pad(a, (0, full - n, 0, full - n))

        def blocks(width: int) -> Tensor:
            """Return the diagonal blocks (N, full / width, width, width)."""
            return a.unflatten(2, (-1, width)).unflatten(1, (-1, width)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

        eye = torch.eye(size, dtype=a.dtype, device=a.device)
        x = torch.linalg.solve_triangular(blocks(size), eye, upper=False, unitriangular=True)
        while size < full:
            upper, lower = x[:, 0::2], x[:, 1::2]
            x = F.pad(upper, (0, size, 0, size))
            x[..., size:, size:] = lower
            x[..., size:, :size] = -(lower @ blocks(2 * size)[..., size:, :size] @ upper)
            size *= 2
        x = x[:, 0, :n, :n].contiguous()
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Return −Xᵀ grad Xᵀ, below the diagonal."""
        (x,) = ctx.saved_tensors
        return -(x.mT @ grads[0] @ x.mT).tril(-1)


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Process one token: q, k, v (B, 1, H, D) in float32, q scaled; return o (B, 1, H, Dv) and the new state."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    beta = beta.transpose(1, 2).unsqueeze(-1)
    own = _precise(q, k.mT)
    if state is None:
        correction = beta * v
        return (own * correction).transpose(1, 2), k.mT * correction
    decay = g.exp().transpose(1, 2).unsqueeze(-1)
    state = state.float() * decay
    # one pass over the old state, for key and query together
    of_key, of_query = (torch.cat((k, q), 2) @ state).split(1, 2)
    correction = beta * (v - of_key)
    if torch.is_grad_enabled():
        state = torch.addcmul(state, k.mT, correction)
    else:  # in place: allocating memory takes longer than the sum
        state.addcmul_(k.mT, correction)
    return (of_query + own * correction).transpose(1, 2), state


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, normalise: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Convert to float32, normalise q and k, scale q."""
    q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
    if normalise:
        q, k = l2norm(q), l2norm(k)
    return q * (q.shape[-1] ** -0.5 if scale is None else scale), k, v, g, beta


def _to_chunks(x: Tensor, chunks: int, size: int) -> Tensor:
    """Turn (B, T, H, D) into (chunks, B·H, size, D), zeros at the end, with contiguous chunks."""
    batch, length, heads = x.shape[:3]
    if chunks * size > length:
        x = F.pad(x, (0, 0, 0, 0, 0, chunks * size - length))
    return x.view(batch, chunks, size, heads, -1).permute(1, 0, 3, 2, 4).reshape(chunks, batch * heads, size, -1)


def _chunk_decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decays for gates (chunks, B·H, size, 1): between tokens s ≤ t, from a chunk's start to t, from t to its end."""
    # in double precision: a small gate after a large one would be lost in a running sum in float32
    total = g.double().cumsum(-2)
    future = torch.ones(g.shape[-2], g.shape[-2], dtype=torch.bool, device=g.device).triu(1)
    # differences to future tokens are positive and may overflow; masked before exp, as inf·0 in backward is NaN
    between = (total - total.mT).masked_fill_(future, -torch.inf).float().exp()
    return between, total.float().exp(), (total[..., -1:, :] - total).float().exp()


def _run_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, need_state: bool
) -> tuple[Tensor, Tensor]:
    """Compute outputs (chunks, B·H, size, Dv) and, if needed, the final state (B·H, Dk, Dv) of chunked arguments."""
    chunks, rows, size, key_dim = q.shape
    decay, from_start, to_end = _chunk_decays(g.clamp(min=_SMALLEST_GATE))
    whole_chunk = from_start[..., -1:, :]
    has_state = state is not None or chunks > 1
    rhs = torch.cat((v, k * from_start), -1) if has_state else v
    inverse = _UnitLowerInverse.apply((k @ k.mT * decay * beta).flatten(0, 1)).view(chunks, -1, size, size)
    solved = inverse @ (rhs * beta)
    inner = _precise(q, k.mT) * decay
    if not has_state:
        return inner @ solved, ((k * to_end).mT @ solved)[0]
    own, of_state = solved.split((v.shape[-1], key_dim), -1)
    if state is None:
        state = q.new_zeros(rows, key_dim, v.shape[-1])
    states, corrections = [], []
    for own_i, of_state_i, k_i, decay_i in zip(own, of_state, (k * to_end).mT, whole_chunk, strict=True):
        correction = torch.baddbmm(own_i, of_state_i, state, alpha=-1)
        states.append(state)
        corrections.append(correction)
        if need_state or len(states) < chunks:
            state = torch.baddbmm(state * decay_i, k_i, correction)
    return (q * from_start) @ torch.stack(states) + inner @ torch.stack(corrections), state


@_in_float32
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gated delta rule, chunk by chunk.

    With G the running sum of g within a chunk and S the state before it, token t corrects the state by
    u_t = β_t (v_t − e^{G_t} Sᵀk_t − Σ_{s<t} e^{G_t − G_s} (k_t·k_s) u_s). All corrections of a chunk are
    U = (I + A)⁻¹ (β V − β e^G K S), A strictly lower triangular. Then
    o_t = e^{G_t} Sᵀq_t + Σ_{s≤t} e^{G_t − G_s} (q_t·k_s) u_s and S ← e^{G_C} S + Σ_s e^{G_C − G_s} k_s u_sᵀ.

    Parameters
    ----------
    q, k : Tensor, shape (B, T, H, Dk)
        Queries and keys of any floating type; they are converted to float32, under autocast too.
    v : Tensor, shape (B, T, H, Dv)
        Values.
    g : Tensor, shape (B, T, H)
        Logarithm of the decay, ≤ 0; −inf erases the state.
    beta : Tensor, shape (B, T, H)
        Size of the correction, usually in [0, 1]. A token with beta = g = 0, such as padding, does not change the
        state.
    initial_state : Tensor, shape (B, H, Dk, Dv), optional
        State before the first token; zeros by default.
    output_final_state : bool
        Whether to return the state after the last token.
    use_qk_l2norm_in_kernel : bool
        Normalise q and k with `l2norm` first.
    scale : float, optional
        Factor on q; Dk^−½ by default.
    chunk_size : int
        Largest number of tokens in a chunk.

    Returns
    -------
    o : Tensor, shape (B, T, H, Dv)
        In the type of v.
    final_state : Tensor, shape (B, H, Dk, Dv), or None
        In float32.

    Raises
    ------
    ValueError
        If shapes do not match, or chunk_size is below 1.
    """
    _check(q, k, v, g, beta, initial_state)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    batch, length, heads, key_dim = q.shape
    dtype = v.dtype
    q, k, v, g, beta = _prepare(q, k, v, g, beta, use_qk_l2norm_in_kernel, scale)
    if length == 1:
        o, state = _step(q, k, v, g, beta, initial_state)
        return o.to(dtype), state if output_final_state else None
    # Equal chunks need less padding: 150 tokens are three chunks of 50 instead of three of 64.
    chunks = -(-length // chunk_size)
    size = -(-length // chunks)
    q, k, v = (_to_chunks(x, chunks, size) for x in (q, k, v))
    beta, g = (_to_chunks(x[..., None], chunks, size) for x in (beta, g))
    first = None if initial_state is None else initial_state.float().reshape(batch * heads, key_dim, -1)
    o, state = _run_chunks(q, k, v, g, beta, first, output_final_state)
    o = o.view(chunks, batch, heads, size, -1).permute(1, 0, 3, 2, 4).reshape(batch, chunks * size, heads, -1)
    final = state.view(batch, heads, key_dim, -1) if output_final_state else None
    return o[:, :length].to(dtype), final
