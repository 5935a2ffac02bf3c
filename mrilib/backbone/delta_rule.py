"""The gated delta rule: a linear attention whose state forgets by a gate and corrects itself by the delta rule.

Per head, with state S (Dk, Dv), S ← e^g S; S ← S + k (β (v − Sᵀk))ᵀ; o = Sᵀq.

`naive_gated_delta_rule` is that recurrence as written. `gated_delta_rule` is the same function over chunks of tokens
(Yang et al., "Gated Delta Networks", 2024, arXiv:2412.06464, and "Parallelizing Linear Transformers with the Delta
Rule over Sequence Length", arXiv:2406.06484): within a chunk the corrections of all tokens are one unit triangular
system, so that the work is in batched matrix products and python walks over chunks, not over tokens.
Argument names and layout follow flash-linear-attention's `chunk_gated_delta_rule`.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

# exp(x) is zero in float32 below −103.98, and so is its derivative. Gates are clamped here: the same numbers come out,
# and sums of gates over a chunk stay finite even where the gate is −inf.
_SMALLEST_GATE = -104.0
_BLOCK = 16  # rows that are solved at once; a constant of the module, as torch.compile reads none of a Function

Rule = TypeVar("Rule", bound=Callable[..., Any])


def _without_autocast(rule: Rule) -> Rule:
    """Keep autocast out of a function of q and more: it would take products and the state to bfloat16."""

    @functools.wraps(rule)
    def wrapped(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(q.device.type, enabled=False):
            return rule(q, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide by the Euclidean length over the last axis, x / √(Σx² + eps).

    Parameters
    ----------
    x : Tensor, shape (..., D)
    eps : float
        Added under the root, so that a zero vector stays zero.

    Returns
    -------
    Tensor, shape (..., D)
    """
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None) -> None:
    """Raise ValueError, naming the argument, where the shapes do not belong together."""
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


@_without_autocast
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
    """The recurrence token by token: the definition that `gated_delta_rule` is held to.

    Parameters, returns and raises as in `gated_delta_rule`.
    """
    _check(q, k, v, g, beta, initial_state)
    dtype = v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    q = q * scale
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
    """The product of q and k, summed in double precision.

    A token whose query is nearly orthogonal to its key has a tiny output, which the norm behind it blows up to full
    size: the rounding of this one product is what would be seen there.
    """
    return (q.double() @ k.double()).float()


class _UnitLowerInverse(torch.autograd.Function):
    """(I + A)⁻¹ of strictly lower triangular A (N, n, n); what stands on and above the diagonal is not read.

    Blocks of 16 are solved, then joined by pairs: [[P, 0], [R, Q]]⁻¹ = [[P⁻¹, 0], [−Q⁻¹ R P⁻¹, Q⁻¹]]. As stable as
    substitution, and nearly all of it batched products: a library solves large triangular systems one after another,
    with threads that wait for each other at each, which takes ten times as long where the cores are shared.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        """The inverse."""
        n, size = a.shape[-1], _BLOCK
        full = size
        while full < n:
            full *= 2
        a = F.pad(a, (0, full - n, 0, full - n))

        def blocks(width: int) -> Tensor:
            """The diagonal blocks (N, full / width, width, width)."""
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
        """−X ᵀ grad Xᵀ, below the diagonal."""
        (x,) = ctx.saved_tensors
        return -(x.mT @ grads[0] @ x.mT).tril(-1)


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token: q, k, v (B, 1, H, D) in float32, q scaled; returns o (B, 1, H, Dv) and the state after it."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    beta = beta.transpose(1, 2).unsqueeze(-1)
    own = _precise(q, k.mT)
    if state is None:
        correction = beta * v
        return (own * correction).transpose(1, 2), k.mT * correction
    decay = g.exp().transpose(1, 2).unsqueeze(-1)
    state = state.float() * decay
    # the old state is read once, for key and query together
    recalled, seen = (torch.cat((k, q), 2) @ state).split(1, 2)
    correction = beta * (v - recalled)
    if torch.is_grad_enabled():
        state = torch.addcmul(state, k.mT, correction)
    else:  # in the memory that the decayed state lies in: fresh memory costs more than the sum
        state.addcmul_(k.mT, correction)
    return (seen + own * correction).transpose(1, 2), state


@_without_autocast
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
    """The gated delta rule, chunk by chunk.

    With G the running sum of g within a chunk and S the state before it, token t corrects the state by
    u_t = β_t (v_t − e^{G_t} Sᵀk_t − Σ_{s<t} e^{G_t − G_s} (k_t·k_s) u_s), so all of a chunk's corrections are
    U = (I + A)⁻¹ (β V − β e^G K S), A strictly lower triangular. Then
    o_t = e^{G_t} Sᵀq_t + Σ_{s≤t} e^{G_t − G_s} (q_t·k_s) u_s and S ← e^{G_C} S + Σ_s e^{G_C − G_s} k_s u_sᵀ.

    Parameters
    ----------
    q, k : Tensor, shape (B, T, H, Dk)
        Queries and keys, any floating type; the work is done in float32, under autocast too.
    v : Tensor, shape (B, T, H, Dv)
        Values.
    g : Tensor, shape (B, T, H)
        Logarithm of the decay, ≤ 0; −inf forgets everything.
    beta : Tensor, shape (B, T, H)
        Size of the correction, usually in [0, 1]. Where it is 0 and g is 0 the token leaves the state as it is: that
        is how padding is passed over.
    initial_state : Tensor, shape (B, H, Dk, Dv), optional
        State before the first token; zeros if not given.
    output_final_state : bool
        Whether to return the state after the last token.
    use_qk_l2norm_in_kernel : bool
        Normalise q and k per head first, eps 1e-6 under the root.
    scale : float, optional
        Factor on q, Dk^−½ if not given.
    chunk_size : int
        Tokens in a chunk at most.

    Returns
    -------
    o : Tensor, shape (B, T, H, Dv)
        In the type of v.
    final_state : Tensor, shape (B, H, Dk, Dv), or None
        In float32.

    Raises
    ------
    ValueError
        Shapes that do not belong together, or chunk_size below 1.
    """
    _check(q, k, v, g, beta, initial_state)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    batch, length, heads, key_dim = q.shape
    dtype = v.dtype
    scale = key_dim**-0.5 if scale is None else scale
    q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    q = q * scale
    if length == 1:
        o, after = _step(q, k, v, g, beta, initial_state)
        return o.to(dtype), after if output_final_state else None
    # chunks of even length: 150 tokens are three of 50, not two of 64 and one mostly of padding
    chunks = -(-length // chunk_size)
    size = -(-length // chunks)

    def to_chunks(x: Tensor) -> Tensor:
        """(B, T, H, D) to (chunks, B·H, size, D), so that a chunk is contiguous."""
        if chunks * size > length:
            x = F.pad(x, (0, 0, 0, 0, 0, chunks * size - length))
        return x.view(batch, chunks, size, heads, -1).permute(1, 0, 3, 2, 4).reshape(chunks, batch * heads, size, -1)

    q, k, v = to_chunks(q), to_chunks(k), to_chunks(v)
    beta, g = to_chunks(beta[..., None]), to_chunks(g[..., None]).clamp(min=_SMALLEST_GATE)

    # In double precision: a small gate after a large one would drown in the running sum otherwise.
    total = g.double().cumsum(-2)
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    # e^{G_t − G_s} for s ≤ t. The other differences are positive and may overflow: masked before exp, or inf·0 spoils
    # gradients.
    decay = (total - total.mT).masked_fill_(future, -torch.inf).float().exp()
    from_start = total.float().exp()
    to_end = (total[..., -1:, :] - total).float().exp()
    over_chunk = from_start[..., -1:, :]

    has_state = initial_state is not None or chunks > 1
    rhs = torch.cat((v, k * from_start), -1) if has_state else v
    inverse = _UnitLowerInverse.apply((k @ k.mT * decay * beta).flatten(0, 1)).view(chunks, -1, size, size)
    solved = inverse @ (rhs * beta)
    inner = _precise(q, k.mT) * decay
    if not has_state:
        o = inner @ solved
        state = ((k * to_end).mT @ solved)[0]
    else:
        own, seen = solved.split((v.shape[-1], key_dim), -1)
        if initial_state is None:
            state = q.new_zeros(batch * heads, key_dim, v.shape[-1])
        else:
            state = initial_state.float().reshape(batch * heads, key_dim, -1)
        states, corrections = [], []
        for own_i, seen_i, k_i, decay_i in zip(own, seen, (k * to_end).mT, over_chunk, strict=True):
            correction = torch.baddbmm(own_i, seen_i, state, alpha=-1)
            states.append(state)
            corrections.append(correction)
            if output_final_state or len(states) < chunks:
                state = torch.baddbmm(state * decay_i, k_i, correction)
        o = (q * from_start) @ torch.stack(states) + inner @ torch.stack(corrections)
    o = o.view(chunks, batch, heads, size, -1).permute(1, 0, 3, 2, 4).reshape(batch, chunks * size, heads, -1)
    if not output_final_state:
        return o[:, :length].to(dtype), None
    return o[:, :length].to(dtype), state.view(batch, heads, key_dim, -1)
