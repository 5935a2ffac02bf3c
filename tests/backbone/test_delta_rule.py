"""The chunked gated delta rule against the naive recurrence.

Largest errors of outputs and gradients, relative to the largest entry: 4e-7 for float32 inputs, 1.3e-3 for bfloat16
inputs (outputs are rounded again).
"""

import pytest
import torch

from mrilib.backbone.delta_rule import gated_delta_rule, naive_gated_delta_rule

LENGTHS = (1, 2, 63, 64, 65, 130, 257)
BOUND = {torch.float32: 5e-6, torch.bfloat16: 5e-3}


def inputs(length, dtype=torch.float32, state=True, batch=2, heads=3, key_dim=8, value_dim=12, decay=1.0):
    gen = torch.Generator().manual_seed(length)

    def randn(*shape):
        return torch.randn(*shape, generator=gen)

    q, k = randn(batch, length, heads, key_dim), randn(batch, length, heads, key_dim)
    v = randn(batch, length, heads, value_dim)
    g = -decay * torch.rand(batch, length, heads, generator=gen)
    beta = torch.rand(batch, length, heads, generator=gen)
    x = [t.to(dtype) for t in (q, k, v, g, beta)]
    if state:
        x.append(randn(batch, heads, key_dim, value_dim))
    return [t.requires_grad_() for t in x]


def outputs_and_gradients(function, x, **kwargs):
    o, final = function(*x, output_final_state=True, use_qk_l2norm_in_kernel=True, **kwargs)
    gen = torch.Generator().manual_seed(0)
    loss = sum((y.float() * torch.randn(y.shape, generator=gen)).sum() for y in (o, final))
    return [o, final, *torch.autograd.grad(loss, x, materialize_grads=True)]


def assert_close(values, expected, bound):
    names = ("o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state")
    for name, a, b in zip(names, values, expected, strict=False):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert torch.isfinite(a).all(), name
        scale = max(1e-3, b.abs().max().item())
        assert (a.float() - b.float()).abs().max().item() <= bound * scale, name


def assert_equals_naive(x, bound, **kwargs):
    values = outputs_and_gradients(gated_delta_rule, x, **kwargs)
    assert_close(values, outputs_and_gradients(naive_gated_delta_rule, x), bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_naive(length, state, dtype):
    assert_equals_naive(inputs(length, dtype, state), BOUND[dtype])


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 200])
def test_chunk_size_changes_nothing(chunk_size):
    assert_equals_naive(inputs(65), 2e-5, chunk_size=chunk_size)


def test_slow_decay_and_repeated_keys():
    """The worst condition of the triangular system: almost no decay, and one key for all tokens."""
    x = [t.detach() for t in inputs(257, decay=1e-3)]
    x[1] = x[1][:, :1].expand_as(x[1]).clone()
    assert_equals_naive([t.requires_grad_() for t in x], 5e-5)


@pytest.mark.parametrize("gate", [-50.0, -1e4, -1e30, -torch.inf])
@pytest.mark.parametrize("length", [1, 65, 130])
def test_very_negative_gates(gate, length):
    """Tokens that erase the state cause no NaN and keep the precision at the others."""
    x = [t.detach() for t in inputs(length)]
    x[3][:, ::5] = gate
    assert_equals_naive([t.requires_grad_() for t in x], 2e-5)


def test_split_sequence_carries_the_state():
    q, k, v, g, beta, state = (t.detach() for t in inputs(130))
    whole, final = gated_delta_rule(q, k, v, g, beta, state, output_final_state=True)
    parts = []
    for piece in (slice(0, 70), slice(70, 71), slice(71, 130)):
        o, state = gated_delta_rule(*(x[:, piece] for x in (q, k, v, g, beta)), state, output_final_state=True)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(state, final, atol=2e-5, rtol=1e-5)


def test_token_with_zero_gate_and_beta_is_skipped():
    q, k, v, g, beta, state = (t.detach() for t in inputs(66))
    g[:, 30:40], beta[:, 30:40] = 0, 0
    kept = [i for i in range(66) if not 30 <= i < 40]
    whole, final = gated_delta_rule(q, k, v, g, beta, state, output_final_state=True)
    o, short = gated_delta_rule(*(x[:, kept] for x in (q, k, v, g, beta)), state, output_final_state=True)
    torch.testing.assert_close(whole[:, kept], o, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(final, short, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", [gated_delta_rule, naive_gated_delta_rule])
@pytest.mark.parametrize("length", [1, 70])
def test_autocast_changes_nothing(length, rule):
    """The rule computes in float32 in a model that runs in bfloat16."""

    def under_autocast(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return rule(*args, **kwargs)

    x = inputs(length)
    assert_close(outputs_and_gradients(under_autocast, x), outputs_and_gradients(rule, x), 0)


def test_frozen_inputs_get_no_gradient():
    q, k, v, g, beta = (t.detach() for t in inputs(65, state=False))
    v.requires_grad_()
    o, final = gated_delta_rule(q, k, v, g, beta)
    assert final is None
    o.sum().backward()
    assert v.grad is not None and q.grad is None and beta.grad is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", lambda a: a.update(k=a["k"][..., :4])),
        ("v", lambda a: a.update(v=a["v"][:, :-1])),
        ("g", lambda a: a.update(g=a["g"][..., None])),
        ("beta", lambda a: a.update(beta=a["beta"][:, :-1])),
        ("initial_state", lambda a: a.update(initial_state=a["initial_state"].mT)),
        ("chunk_size", lambda a: a.update(chunk_size=0)),
        ("q", lambda a: a.update(q=a["q"][:, :0])),
    ],
)
def test_wrong_arguments_are_named(name, change):
    names = ("q", "k", "v", "g", "beta", "initial_state")
    arguments = dict(zip(names, inputs(5), strict=True))
    change(arguments)
    with pytest.raises(ValueError, match=rf"^{name} must"):
        gated_delta_rule(**arguments)
