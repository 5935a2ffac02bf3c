"""Fused kernels against PyTorch, on CPU tensors in Triton's interpreter; `test_fused_kernels.py` runs this file.

Everything goes through `kernels.gated_delta_rule`, as in a model on a GPU, with the kernels' check before their first
use. Only the predicate is replaced that says which devices support fused kernels.

Largest relative errors of the rule (RMS of the error over that of the value): 2.5e-6 in float32, 9.7e-3 in bfloat16.
The random model amplifies rounding: in float32 its gradients differ by 2.6e-3 at 130 tokens, its logits by 2.7e-5.
"""

import functools
from pathlib import Path

import pytest
import torch
import triton_interpreter
from triton_interpreter import launched

from mrilib.backbone import delta_rule, kernels
from mrilib.backbone.nirvana import load_backbone

GOLDEN = Path(__file__).parents[1] / "golden" / "nirvana_small"
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
FORWARD = "chunk_gated_delta_rule_fwd_kernel_h_blockdim64"
BACKWARD = "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64"
SINGLE = "fused_recurrent_gated_delta_rule_fwd_kernel"
plain = functools.partial(delta_rule.gated_delta_rule, use_qk_l2norm_in_kernel=True)


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    assert kernels.installed_kernels() is not None
    triton_interpreter.install()


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """Make the CPU a device with fused kernels; call the result with False to make it one without."""

    def select(is_fused):
        monkeypatch.setattr(kernels, "_supports_fused", lambda device: is_fused)

    select(True)
    return select


def make_inputs(length, width, dtype, has_state, batch=2, heads=2):
    """Random arguments. The first third of row 0 and the last third of row 1 are padding; one gate is strong."""
    torch.manual_seed(length + width)
    shape = (batch, length, heads)
    inputs = {name: torch.randn(*shape, width).to(dtype) for name in ("q", "k", "v")}
    keep = torch.ones(batch, length, 1)
    keep[0, : length // 3], keep[1, length - length // 3 :] = 0, 0
    g, beta = -torch.rand(shape), torch.rand(shape)
    if length > 1:  # alone, it would leave no gradient but rounding
        g[:, length // 2] *= 30
    inputs |= {"g": g * keep, "beta": beta * keep}
    return inputs | ({"initial_state": torch.randn(batch, heads, width, width)} if has_state else {})


def evaluate(rule, inputs):
    """Outputs, and the gradients of all inputs for a random loss."""
    inputs = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    o, state = rule(**inputs, output_final_state=True)
    torch.manual_seed(0)
    loss = (o.float() * torch.randn(o.shape)).sum() + (state * torch.randn(state.shape)).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    return {
        "o": o.detach(),
        "state": state.detach(),
        **{f"d{name}": g for name, g in zip(inputs, gradients, strict=True)},
    }


def relative_errors(values, expected):
    errors = {}
    for name, value in expected.items():
        assert values[name].dtype == value.dtype and values[name].shape == value.shape, name
        error, scale = (values[name] - value).double().norm(), value.double().norm()
        errors[name] = float(error / scale) if scale else float(error)
    return errors


def require_equal(values, expected, bound):
    errors = relative_errors(values, expected)
    print({name: float(f"{error:.1e}") for name, error in errors.items()})
    assert {name: error for name, error in errors.items() if not error <= bound} == {}


def cases(*quick):
    """All combinations of length, width, type and initial state; those not in `quick` are marked fullsize."""
    every = [
        (length, width, dtype, has_state)
        for width in (16, 64, 128)
        for dtype in BOUND
        for length in (1, 64, 65, 130)
        for has_state in (False, True)
    ]
    assert set(quick) <= set(every)
    return [pytest.param(*case, marks=[] if case in quick else pytest.mark.fullsize) for case in every]


@pytest.mark.parametrize(
    ("length", "width", "dtype", "has_state"),
    cases(
        (1, 16, torch.float32, False),
        (64, 16, torch.float32, True),
        (65, 16, torch.float32, False),
        (130, 16, torch.float32, True),
        (65, 16, torch.bfloat16, True),
        (1, 64, torch.float32, True),
    ),
)
def test_outputs_and_gradients(length, width, dtype, has_state):
    inputs = make_inputs(length, width, dtype, has_state)
    kernels.path(torch.device("cpu"), dtype, width)  # the check launches kernels too
    launched.clear()
    values = evaluate(kernels.gated_delta_rule, inputs)
    assert launched[FORWARD] == 2 and launched[BACKWARD] == 1, launched  # the backward pass computes states again
    require_equal(values, evaluate(plain, inputs), BOUND[dtype])


@torch.no_grad()
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (16, torch.float32),
        (16, torch.bfloat16),
        (64, torch.float32),
        pytest.param(64, torch.bfloat16, marks=pytest.mark.fullsize),
        pytest.param(128, torch.float32, marks=pytest.mark.fullsize),
        pytest.param(128, torch.bfloat16, marks=pytest.mark.fullsize),
    ],
)
def test_single_tokens(width, dtype, has_state):
    inputs = make_inputs(1, width, dtype, has_state)
    kernels.path(torch.device("cpu"), dtype, width)
    launched.clear()
    values = kernels.gated_delta_rule(**inputs, output_final_state=True)
    assert dict(launched) == {SINGLE: 1}
    expected = plain(**inputs, output_final_state=True)
    names = ("o", "state")
    require_equal(dict(zip(names, values, strict=True)), dict(zip(names, expected, strict=True)), BOUND[dtype])


@pytest.fixture
def model():
    return load_backbone(GOLDEN / "config.json", GOLDEN / "model.safetensors")


def padded_batch(length):
    """Random tokens with padding on the left of row 0 and on the right of row 1, and their attention mask."""
    torch.manual_seed(2)
    ids, mask = torch.randint(3, 512, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[0, :3], mask[1, -4:] = 0, 0
    return ids, mask


def logits_and_gradients(model, ids, mask, autocast):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(ids, attention_mask=mask).logits.float()
    logits = logits * mask[..., None]
    torch.manual_seed(0)
    (logits * torch.randn(logits.shape)).sum().backward()
    return {"logits": logits.detach()} | {name: x.grad.clone() for name, x in model.named_parameters()}


@pytest.mark.parametrize(
    ("length", "autocast", "bound"),
    [
        (20, False, 1e-4),
        pytest.param(130, False, 5e-3, marks=pytest.mark.fullsize),
        pytest.param(20, True, 0.15, marks=pytest.mark.fullsize),
        pytest.param(130, True, 0.15, marks=pytest.mark.fullsize),
    ],
)
def test_model_and_all_its_gradients(model, fused, length, autocast, bound):
    ids, mask = padded_batch(length)
    model.requires_grad_()
    launched.clear()
    values = logits_and_gradients(model, ids, mask, autocast)
    assert launched[BACKWARD] >= model.config.num_hidden_layers
    fused(False)
    launched.clear()
    expected = logits_and_gradients(model, ids, mask, autocast)
    assert not launched
    if autocast:  # this random model amplifies rounding: PyTorch's own gradients differ from float32 by their size
        values, expected = {"logits": values["logits"]}, {"logits": expected["logits"]}
    require_equal(values, expected, bound)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-4), pytest.param(torch.bfloat16, 5e-2, marks=pytest.mark.fullsize)]
)
def test_cached_steps_equal_a_full_pass_in_pytorch(model, fused, dtype, bound):
    model.to(dtype)
    ids, mask = padded_batch(9)
    mask[1] = 1
    first = 6
    out = model(ids[:, :first], attention_mask=mask[:, :first], use_cache=True)
    launched.clear()
    steps = [out.logits]
    for token in range(first, 9):
        cache = out.past_key_values
        out = model(ids[:, token : token + 1], attention_mask=mask[:, : token + 1], past_key_values=cache)
        steps.append(out.logits)
    assert dict(launched) == {SINGLE: 3 * model.config.num_hidden_layers}
    fused(False)
    keep = mask.bool()
    expected = model(ids, attention_mask=mask).logits[keep]
    require_equal({"logits": torch.cat(steps, 1)[keep]}, {"logits": expected}, bound)


@pytest.mark.fullsize
def test_generated_text(model, fused):
    ids, mask = padded_batch(9)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    launched.clear()
    text = model.generate(ids, **options)
    assert launched[SINGLE] == 7 * model.config.num_hidden_layers
    fused(False)
    assert torch.equal(text, model.generate(ids, **options))
