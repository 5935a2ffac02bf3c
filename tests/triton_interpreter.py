"""Triton's interpreter, made complete enough for the kernels of flash-linear-attention on CPU tensors.

The interpreter runs a kernel's Python source with numpy. TRITON_INTERPRET=1 must be set before the first import of
Triton, so `install` is for a process of its own (`test_fused_kernels.py` starts it). It changes what the interpreter
lacks, never a kernel:

- The autotuner times configurations on a GPU. Here every configuration has the same time, so it takes the first one.
- Kernels call methods of a loop's counter. In a compiled kernel it is a tensor, in the interpreter a Python int.
- The interpreter stores bfloat16 as uint16, and computes with these bits (triton-lang/triton, issue 11584). Its
  conversion from float32 truncates. Here operands are converted to float32 and results rounded to bfloat16.
"""

import builtins
import collections
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import autotuner, interpreter

launched: collections.Counter[str] = collections.Counter()  # calls of each kernel, by name


class Counter(int):
    """A loop's counter; a conversion keeps its value."""

    def to(self, dtype: Any) -> "Counter":
        """Return the counter itself."""
        return self


def _range(*limits: Any) -> Iterator[Counter]:
    return map(Counter, builtins.range(*map(int, limits)))


def install() -> None:
    """Change the interpreter, after the import of flash-linear-attention."""
    autotuner.Autotuner._bench = lambda self, *args, config, **meta: [1.0, 1.0, 1.0]
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops"):
            module.range = _range  # type: ignore[attr-defined]
    _count_launches()
    _compute_in_bfloat16()


def _count_launches() -> None:
    execute = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        launched[self.fn.__name__] += 1
        execute(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = call


def _widen(x: Any) -> Any:
    """Convert a bfloat16 operand to float32; return others unchanged."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle(torch.from_numpy(x.data).view(torch.bfloat16).float().numpy(), tl.float32)


def _narrow(values: np.ndarray) -> Any:
    """Round float32 values to bfloat16."""
    rounded = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(torch.bfloat16)
    return interpreter.TensorHandle(rounded.view(torch.uint16).numpy().reshape(np.shape(values)), tl.bfloat16)


def _compute_in_bfloat16() -> None:
    builder, reduction = interpreter.InterpreterBuilder, interpreter.ReduceOps
    binary, unary, dot, cast, total = (
        builder.binary_op, builder.unary_op, builder.create_dot, builder.cast_impl, reduction.sum,
    )  # fmt: skip

    def is_narrow(*operands: Any) -> bool:
        return tl.bfloat16 in [x.dtype.scalar for x in operands]

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        result = binary(self, _widen(lhs), _widen(rhs), op)
        return _narrow(result.data) if is_narrow(lhs, rhs) and result.data.dtype.kind == "f" else result

    def unary_op(self: Any, x: Any, op: Any) -> Any:
        return _narrow(op(_widen(x).data)) if is_narrow(x) else unary(self, x, op)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widen(a), _widen(b), *rest)

    def cast_impl(self: Any, x: Any, dtype: Any) -> Any:
        x = _widen(x)
        return _narrow(x.data) if dtype.scalar == tl.bfloat16 else cast(self, x, dtype)

    def create_fp_to_fp(self: Any, x: Any, dtype: Any, rounding: Any) -> Any:
        return cast_impl(self, x, dtype)

    def sum_of(self: Any, x: Any) -> Any:
        if not is_narrow(x):
            return total(self, x)
        values = np.sum(_widen(x.handle).data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(_narrow(values).data[()], tl.bfloat16)

    builder.binary_op, builder.unary_op, builder.create_dot = binary_op, unary_op, create_dot
    builder.cast_impl, builder.create_fp_to_fp, reduction.sum = cast_impl, create_fp_to_fp, sum_of
