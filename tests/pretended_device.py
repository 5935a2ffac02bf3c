"""Tensors that claim to be on a GPU: their values are on the CPU, and mixing devices is an error as on a GPU.

In `pretended(device)`, tensors made on that device or copied to it are `PretendedTensor`s. As their values are real,
branches on values act as well, `.item()` and `.tolist()` included. An operation on tensors of two devices raises
RuntimeError, with a GPU's exceptions: copies, CPU tensors without dimensions, and CPU indices.

- CUDA: branches on `device.type` and autocast act as on a GPU. No tensor may require a gradient, since PyTorch's
  autograd asks for a CUDA driver.
- META: any other device, with backward pass and optimizer, without autocast. PyTorch's own device of this name, which
  has no values, cannot be used at the same time.

Kernels that exist for CUDA alone do not run; another implementation of the operation takes their place.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)  # with its index, which PyTorch would ask the driver for
META = torch.device("meta")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
READS = {  # results, or their shapes, depend on values
    aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default,
    aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class PretendedTensor(Tensor):
    """A tensor on a pretended device with its values on the CPU."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor, device: torch.device) -> "PretendedTensor":
        """Wrap the values."""
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, value.shape, device=device, **layout)
        self.value = value
        return self

    def tolist(self) -> Any:
        """Return the values."""
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the values: a checkpoint is loaded to the CPU."""
        return self.value.__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"PretendedTensor({self.value}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the values."""
        return run(func, args, kwargs or {})


def _values(arguments: Any) -> Any:
    """Replace pretended tensors in nested arguments by their values."""
    return pytree.tree_map_only(PretendedTensor, lambda x: x.value, arguments)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values, and put its result on the device where a GPU would have it."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if func in COPIES or func in INDEXING:
        decisive = tensors[:1]
    else:
        check_devices(func, tensors)
        decisive = tensors
    device = next((x.device for x in decisive if isinstance(x, PretendedTensor)), torch.device("cpu"))
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func is aten._fused_sdp_choice.default:
        return 0  # the implementation that runs on every device
    if func is aten._pin_memory.default:
        return args[0]  # pinned memory needs a driver
    # A view with a flag for conjugation would lose it here; the conjugated values do not.
    func = {aten._conj.default: aten._conj_physical.default, aten._neg_view.default: aten.neg.default}.get(func, func)
    results = func(*_values(args), **_values(kwargs))
    if device.type == "cpu":
        return results
    known = {id(x.value): x for x in tensors if isinstance(x, PretendedTensor)}  # results of operations in place

    def wrap(x: Tensor) -> Tensor:
        return known[id(x)] if id(x) in known else PretendedTensor(x, device)

    return pytree.tree_map_only(Tensor, wrap, results)


def check_devices(func: Any, tensors: list[Tensor]) -> None:
    """Raise RuntimeError for tensors of two devices."""
    pretended = [x for x in tensors if isinstance(x, PretendedTensor)]
    on_cpu = [tuple(x.shape) for x in tensors if not isinstance(x, PretendedTensor) and x.dim()]
    if pretended and on_cpu:
        raise RuntimeError(f"{func}: expected all tensors on {pretended[0].device}, but on the CPU are {on_cpu}")


class _Mode(TorchDispatchMode):
    """Lets operations without a tensor argument make tensors on a pretended device."""

    def __init__(self) -> None:
        super().__init__()
        # With this key PyTorch does not look for a driver when a tensor is made on CUDA.
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def _let_meta_have_values(stack: ExitStack) -> None:
    """Replace two functions: autocast, which is switched off, does not know META, and new tensors have no values."""
    autocast, tensor = torch.autocast, torch.tensor

    def autocast_on_cpu(_: str, *args: Any, **kwargs: Any) -> torch.autocast:
        return autocast("cpu", *args, **kwargs)

    def tensor_with_values(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = tensor(*args, **kwargs)
        return made if device is None else made.to(device)

    stack.enter_context(mock.patch.object(torch, "autocast", autocast_on_cpu))
    stack.enter_context(mock.patch.object(torch, "tensor", tensor_with_values))


@contextmanager
def pretended(device: torch.device) -> Iterator[None]:
    """Within this context tensors can be on CUDA, or on META with values."""
    with ExitStack() as stack:
        if device == CUDA:
            common = torch.cuda.amp.common
            stack.enter_context(mock.patch.object(common, "amp_definitely_not_available", lambda: False))
            stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_: True))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            torch._C._ensureCUDADeviceGuardSet()  # as PyTorch's FakeTensorMode does without a driver
        if device == META:
            _let_meta_have_values(stack)
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes a CPU tensor, then copies it
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a module on the CPU can be moved
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(_Mode())
        yield


class WaitCounter(TorchDispatchMode):
    """Counts what makes the CPU wait for a GPU, within `pretended`: reads of values, and copies to the device.

    A copy to the device that is marked as non-blocking does not wait. Copies from it always do.

    Attributes
    ----------
    places : Counter of str
        Kind of the wait, and the innermost line of code outside of PyTorch that causes it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation's waits, and run it."""
        kwargs = kwargs or {}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_on_device = any(isinstance(x, PretendedTensor) for x in tensors)
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            is_to_device = torch.device(kwargs["device"]).type != "cpu"
            self._count_copy(is_on_device, is_to_device, kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            from_device, to_device = (isinstance(x, PretendedTensor) for x in (args[1], args[0]))
            self._count_copy(from_device, to_device, any(args[2:]))
        elif func in READS and is_on_device:
            self._count(f"read by {func}")
        elif func in INDEXING and is_on_device:
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                self._count(f"read by {func}")
            if not all(isinstance(x, PretendedTensor) for x in indices):
                self._count(f"copy of an index by {func}")
        return func(*args, **kwargs)

    def _count_copy(self, is_from_device: bool, is_to_device: bool, is_non_blocking: bool) -> None:
        if is_from_device and not is_to_device:
            self._count("read by a copy to the CPU")
        elif is_to_device and not is_from_device and not is_non_blocking:
            self._count("blocking copy to the device")

    def _count(self, kind: str) -> None:
        frame: Any = sys._getframe()
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        folder, file = Path(frame.f_code.co_filename).parts[-2:]
        self.places[f"{kind}: {folder}/{file}:{frame.f_lineno} {frame.f_code.co_name}"] += 1
