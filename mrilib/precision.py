"""Matrix products in full float32 where a GPU may otherwise use TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute the block's float32 matrix products in float32. TF32 rounds their factors to 10 bits of mantissa.

    Backward passes outside of the block are not affected, nor are compiled functions.
    """
    if torch.compiler.is_compiling():
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32 = before
