"""Which path the delta rule takes, and the check that fused kernels must pass first.

No GPU is needed: the check runs on any device, and stands-in for the kernels are given that are right, or wrong in
one thing. What the real kernels do on a chip is what the check itself finds out there.
"""

import logging
import sys

import pytest
import torch

from mrilib.backbone import delta_rule, kernels
from mrilib.backbone.nirvana import NirvanaConfig, NirvanaForCausalLM

CPU = torch.device("cpu")
RIGHT = kernels.Fused(delta_rule.gated_delta_rule, delta_rule.gated_delta_rule)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing chosen, nothing checked, nothing known of what is installed, and back to that afterwards."""
    kernels.installed.cache_clear()
    monkeypatch.setattr(kernels, "_choice", "auto")
    monkeypatch.setattr(kernels, "_checked", {})


@pytest.fixture
def plug(monkeypatch):
    """Make the CPU a device that fuses, with the given kernels installed."""

    def use(fused):
        monkeypatch.setattr(kernels, "_fuses", lambda device: True)
        monkeypatch.setattr(kernels, "installed", lambda: fused)
        monkeypatch.setattr(kernels, "version", lambda name: "9.9")

    return use


class Spoil(torch.autograd.Function):
    """x, and on the way back a gradient that is wrong by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def wrong_backward(name, factor=1.1):
    def rule(q, k, v, g, beta, **kwargs):
        x = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
        x[name] = Spoil.apply(x[name], factor)
        return delta_rule.gated_delta_rule(**x, **kwargs)

    return rule


def wrong_forward(index):
    def rule(*args, **kwargs):
        found = list(delta_rule.gated_delta_rule(*args, **kwargs))
        found[index] = found[index] * 1.05
        return tuple(found)

    return rule


def tiny():
    torch.manual_seed(0)
    return NirvanaForCausalLM(
        NirvanaConfig(vocab_size=20, hidden_size=32, num_hidden_layers=3, num_heads=2, concept_dim=4, logit_dim=2)
    ).eval()


@pytest.mark.parametrize("dtype", list(kernels.BOUND))
@pytest.mark.parametrize("head_dim", [16, 20])
def test_right_kernels_pass(dtype, head_dim):
    errors = kernels.check(RIGHT, CPU, dtype, head_dim)
    assert {"o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state"} <= set(errors)
    assert max(errors.values()) < kernels.BOUND[dtype]


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
def test_a_wrong_gradient_is_found_and_named(name):
    with pytest.raises(kernels.KernelError, match=rf"wrong on cpu.*\bd{name} .*delta_rule: plain"):
        kernels.check(RIGHT._replace(chunk=wrong_backward(name)), CPU, torch.float32, 16)


@pytest.mark.parametrize(
    ("fused", "told"),
    [
        (RIGHT._replace(chunk=wrong_forward(0)), "error of o 0.05"),
        (RIGHT._replace(chunk=wrong_forward(1)), "final_state 0.05"),
        (RIGHT._replace(recurrent=wrong_forward(0)), "o of a single token"),
        (RIGHT._replace(chunk=wrong_backward("v", float("nan"))), "dv nan"),
    ],
)
def test_a_wrong_output_is_found_and_named(fused, told):
    with pytest.raises(kernels.KernelError, match=told):
        kernels.check(fused, CPU, torch.float32, 16)


def test_a_kernel_that_does_not_run_is_told_with_the_way_out():
    def broken(*args, **kwargs):
        raise RuntimeError("no such instruction")

    with pytest.raises(kernels.KernelError, match=r"no such instruction.*delta_rule: plain"):
        kernels.check(RIGHT._replace(chunk=broken), CPU, torch.float32, 16)


def test_memory_that_is_full_is_not_the_kernels_fault():
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("20 GiB")

    with pytest.raises(torch.OutOfMemoryError, match="20 GiB"):
        kernels.check(RIGHT._replace(chunk=full), CPU, torch.float32, 16)


def test_a_package_that_cannot_be_imported_is_told_with_the_way_out(monkeypatch):
    """Installed by its name, but without Triton, say."""
    monkeypatch.setattr(kernels, "_fuses", lambda device: True)
    monkeypatch.setattr(kernels, "version", lambda name: "9.9")
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    with pytest.raises(kernels.KernelError, match=r"cannot be imported.*delta_rule: plain"):
        kernels.path(CPU, torch.float32, 16)


def test_check_leaves_the_callers_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        kernels.check(RIGHT, CPU, torch.float32, 16)
    assert torch.equal(torch.rand(3), expected)


def test_plain_on_cpu_and_said_so(caplog):
    with caplog.at_level(logging.INFO, "mrilib"):
        told = kernels.path(CPU, torch.float32, 16)
    assert told == {"path": "plain", "because": "the fused kernels need CUDA, the backbone is on cpu"}
    assert "plain PyTorch" in caplog.text


def test_not_installed_is_said(plug):
    plug(None)
    assert "pip install" in kernels.path(CPU, torch.float32, 16)["because"]


def test_asked_for_and_absent_is_an_error():
    kernels.choose("fused")
    with pytest.raises(kernels.KernelError, match=r"need CUDA.*auto or plain"):
        kernels.path(CPU, torch.float32, 16)
    with pytest.raises(ValueError, match="auto, fused, plain"):
        kernels.choose("fast")


def test_backbone_runs_on_checked_kernels_once(plug, caplog):
    """The chunk kernel for many tokens, the recurrent one for single ones, one check for all layers and calls."""
    calls = []

    def counted(name):
        def rule(*args, **kwargs):
            calls.append(name)
            return delta_rule.gated_delta_rule(*args, **kwargs)

        return rule

    model = tiny()
    ids = torch.arange(9)[None]
    expected = model(ids).logits
    plug(kernels.Fused(counted("chunk"), counted("recurrent")))
    with caplog.at_level(logging.INFO, "mrilib"), torch.no_grad():
        out = model(ids[:, :8], use_cache=True)
        assert calls == ["chunk", "recurrent", "chunk", "chunk", "chunk"]  # the first two are the check's
        calls.clear()
        last = model(ids[:, 8:], past_key_values=out.past_key_values).logits
    assert calls == ["recurrent"] * 3
    assert caplog.text.count("checked") == 1
    torch.testing.assert_close(torch.cat((out.logits, last), 1), expected, atol=1e-5, rtol=1e-4)
    told = kernels.path(CPU, torch.float32, 16)
    assert told["path"] == "fused" and told["package"].endswith("9.9") and max(told["errors"].values()) < 5e-3
    kernels.choose("plain")
    calls.clear()
    model(ids)
    assert not calls and kernels.path(CPU, torch.float32, 16)["because"] == "delta_rule is plain"


def test_backbone_refuses_wrong_kernels(plug):
    plug(RIGHT._replace(chunk=wrong_backward("k")))
    with pytest.raises(kernels.KernelError, match="dk"):
        tiny()(torch.arange(9)[None])
