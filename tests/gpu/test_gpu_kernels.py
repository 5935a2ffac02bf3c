"""The delta rule on the GPU: fused kernels and PyTorch's code agree with the naive recurrence."""

import pytest
import torch

from mrilib.backbone import delta_rule, kernels
from mrilib.backbone.kernels import FusedKernels

pytestmark = pytest.mark.gpu
CASES = pytest.mark.parametrize("head_dim", [64, 128])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@CASES
@TYPES
def test_fused_kernels(device, dtype, head_dim, record_property):
    """Outputs and all gradients; `kernels.check` raises if an error is above its bound."""
    fused = kernels.installed_kernels()
    if fused is None:
        pytest.skip("flash-linear-attention is not installed: pip install -c constraints.txt -e '.[gpu]'")
    errors = kernels.check(fused, device, dtype, head_dim)
    record_property("table", [{"relative error of": "", **errors}])


@CASES
@TYPES
def test_pytorch_code(device, dtype, head_dim, record_property):
    code = FusedKernels(delta_rule.gated_delta_rule, delta_rule.gated_delta_rule)
    errors = kernels.check(code, device, dtype, head_dim)
    record_property("table", [{"relative error of": "", **errors}])
