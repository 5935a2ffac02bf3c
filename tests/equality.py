"""Comparison of nested values."""

from typing import Any

import torch


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Compare bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}/{number}")
    else:
        assert a == b, where
