"""Choice between fused kernels and PyTorch, and the check that fused kernels must pass.

No GPU is needed: the check runs on any device. Substitutes for the kernels are right, or wrong in one value.
"""

import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from mrilib.backbone import delta_rule, kernels
from mrilib.backbone.kernels import FusedKernels, KernelError
from mrilib.backbone.nirvana import NirvanaConfig, NirvanaForCausalLM

CPU = torch.device("cpu")
RIGHT = FusedKernels(delta_rule.gated_delta_rule, delta_rule.gated_delta_rule)


@pytest.fixture(autouse=True)
def forget_checks(monkeypatch):
    forget = kernels.installed_kernels.cache_clear
    forget()
    monkeypatch.setattr(kernels, "_errors", {})
    yield
    forget()


@pytest.fixture
def install(monkeypatch):
    """Install substitute kernels and make the CPU a device that supports them."""

    def install(substitutes):
        monkeypatch.setattr(kernels, "_supports_fused", lambda device: True)
        monkeypatch.setattr(kernels, "installed_kernels", lambda: substitutes)
        monkeypatch.setattr(kernels, "version", lambda name: "9.9")

    return install


class ScaledGradient(torch.autograd.Function):
    """The identity, with a gradient that is wrong by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def wrong_backward(name, factor=1.1):
    def rule(q, k, v, g, beta, **kwargs):
        x = {"q": q, "k": k, "v": v, "g": g, "beta": beta, **kwargs}
        x[name] = ScaledGradient.apply(x[name], factor)
        return delta_rule.gated_delta_rule(**x)

    return rule


def wrong_forward(index, factor=1.1):
    """A rule with one output wrong by a factor; the gradients are right."""

    def rule(*args, **kwargs):
        outputs = list(delta_rule.gated_delta_rule(*args, **kwargs))
        outputs[index] = outputs[index] + (factor - 1) * outputs[index].detach()
        return tuple(outputs)

    return rule


def failing(error):
    def rule(*args, **kwargs):
        raise error

    return rule


def fla_recurrent(
    q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False,
):  # fmt: skip
    """The recurrent kernel's signature in flash-linear-attention 0.6: beta is the seventh argument."""
    assert gk is None and gv is None, "the decay of each channel is not part of the gated delta rule"
    states = {"initial_state": initial_state, "output_final_state": output_final_state}
    return delta_rule.gated_delta_rule(q, k, v, g, beta, **states, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)


def tiny_model():
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


OUTPUTS = ("o", "final_state")
INPUTS = ("q", "k", "v", "g", "beta", "initial_state")


@pytest.mark.parametrize("dtype", list(kernels.BOUND))
@pytest.mark.parametrize(
    ("kernel", "mutate", "of", "name"),
    [
        *[("chunk", wrong_forward, index, name) for index, name in enumerate(OUTPUTS)],
        *[("chunk", wrong_backward, name, f"d{name}") for name in INPUTS],
        *[("recurrent", wrong_forward, index, f"{name} of a single token") for index, name in enumerate(OUTPUTS)],
    ],
)
def test_one_wrong_value_is_an_error_that_names_it(kernel, mutate, of, name, dtype):
    """Wrong by three times the bound: the error names this value and no other."""
    wrong = RIGHT._replace(**{kernel: mutate(of, 1 + 3 * kernels.BOUND[dtype])})
    with pytest.raises(KernelError, match=rf"wrong on cpu .* relative error of {name} [\d.e-]+, at most .*uninstall"):
        kernels.check(wrong, CPU, dtype, 16)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (wrong_backward("v", float("nan")), "dv nan"),
        (failing(RuntimeError("no such instruction")), "no such instruction.*uninstall flash-linear"),
    ],
)
def test_kernels_that_fail_are_an_error(rule, message):
    with pytest.raises(KernelError, match=message):
        kernels.check(RIGHT._replace(chunk=rule), CPU, torch.float32, 16)


def test_full_memory_is_not_a_kernel_error():
    with pytest.raises(torch.OutOfMemoryError, match="20 GiB"):
        kernels.check(RIGHT._replace(chunk=failing(torch.OutOfMemoryError("20 GiB"))), CPU, torch.float32, 16)


def test_failing_import_is_an_error(monkeypatch):
    """The package is installed, but Triton, for example, is not."""
    monkeypatch.setattr(kernels, "_supports_fused", lambda device: True)
    monkeypatch.setattr(kernels, "version", lambda name: "9.9")
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    with pytest.raises(KernelError, match=r"cannot be imported.*uninstall flash-linear-attention"):
        kernels.path(CPU, torch.float32, 16)


def renamed(q, k, v, g, beta, initial_state=None, output_final_state=False, **kwargs):
    """A kernel that normalises q and k under another name, and hides it by **kwargs."""
    return delta_rule.gated_delta_rule(q, k, v, g, beta, initial_state, output_final_state)


def extended(q, k, v, g, beta, layout, initial_state, output_final_state, use_qk_l2norm_in_kernel):
    """A kernel with a new argument that has no default."""


@pytest.mark.parametrize(
    ("chunk", "recurrent", "message"),
    [
        (renamed, fla_recurrent, "the chunk kernel has no argument use_qk_l2norm_in_kernel"),
        (delta_rule.gated_delta_rule, extended, "the recurrent kernel needs an argument layout"),
        (delta_rule.gated_delta_rule, None, "cannot be imported.*fused_recurrent_gated_delta_rule"),
    ],
)
def test_changed_interface_is_an_error(monkeypatch, chunk, recurrent, message):
    library = types.ModuleType("fla.ops.gated_delta_rule")
    library.chunk_gated_delta_rule = chunk
    if recurrent is not None:
        library.fused_recurrent_gated_delta_rule = recurrent
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.setattr(kernels, "_supports_fused", lambda device: True)
    monkeypatch.setattr(kernels, "version", lambda name: "9.9")
    with pytest.raises(KernelError, match=rf"flash-linear-attention 9\.9.*{message}.*uninstall .*version 0\.6\.0"):
        tiny_model()(torch.arange(9)[None])


def test_the_tested_version_is_the_pinned_one():
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    assert f"{kernels.PACKAGE}=={kernels.TESTED}" in pins


def test_installed_kernels_are_not_imported_without_cuda():
    """The library takes seconds to import."""
    code = (
        "import sys, torch, mrilib; from mrilib.backbone import kernels, nirvana;"
        "x = torch.ones(1, 3, 1, 16); kernels.gated_delta_rule(x, x, x, -x[..., 0], x[..., 0]);"
        "kernels.path(x.device, x.dtype, 16); assert 'fla' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_check_keeps_the_callers_random_state():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        kernels.check(RIGHT, CPU, torch.float32, 16)
    assert torch.equal(torch.rand(3), expected)


def test_pytorch_on_cpu_is_logged(caplog):
    with caplog.at_level(logging.INFO, "mrilib"):
        path = kernels.path(CPU, torch.float32, 16)
    assert path == {"path": "plain", "because": "the fused kernels need CUDA, the backbone is on cpu"}
    assert "plain PyTorch" in caplog.text


def test_pytorch_where_nothing_is_installed(install):
    install(None)
    assert "pip install" in kernels.path(CPU, torch.float32, 16)["because"]


def test_backbone_uses_kernels_that_are_checked_once(install, caplog):
    """The chunk kernel for many tokens, the recurrent one for single tokens, one check for all layers and calls."""
    calls = []

    def counted(name):
        def rule(*args, **kwargs):
            calls.append(name)
            return delta_rule.gated_delta_rule(*args, **kwargs)

        return rule

    model = tiny_model()
    ids = torch.arange(9)[None]
    expected = model(ids).logits
    install(FusedKernels(counted("chunk"), counted("recurrent")))
    with caplog.at_level(logging.INFO, "mrilib"), torch.no_grad():
        out = model(ids[:, :8], use_cache=True)
        assert calls == ["chunk", "recurrent", "chunk", "chunk", "chunk"]  # the first two are the check's
        calls.clear()
        last = model(ids[:, 8:], past_key_values=out.past_key_values).logits
    assert calls == ["recurrent"] * 3
    assert caplog.text.count("checked") == 1
    torch.testing.assert_close(torch.cat((out.logits, last), 1), expected, atol=1e-5, rtol=1e-4)
    path = kernels.path(CPU, torch.float32, 16)
    assert path["path"] == "fused" and path["package"].endswith("9.9") and max(path["errors"].values()) < 5e-3


@torch.no_grad()
def test_arguments_reach_the_kernels_by_name(install):
    """The two kernels of flash-linear-attention take their arguments in different order."""
    model = tiny_model()
    ids = torch.arange(9)[None]
    expected = model(ids).logits
    install(RIGHT._replace(recurrent=fla_recurrent))
    cache = model(ids[:, :8], use_cache=True).past_key_values
    last = model(ids[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(last, expected[:, 8:], atol=1e-5, rtol=1e-4)


def test_backbone_refuses_wrong_kernels(install):
    install(RIGHT._replace(chunk=wrong_backward("k")))
    with pytest.raises(KernelError, match="dk"):
        tiny_model()(torch.arange(9)[None])
