"""A device that does not exist: tensors claim to be on it, compute on the CPU, and count what would make the CPU wait.

On a GPU, a read of a tensor's value makes the CPU wait until all queued work is done. So does a copy to the device
that is not marked as non-blocking. The pretended device is PyTorch's "meta", the only one besides "cpu" with which
backward runs anywhere. Mixing it with the CPU is an error, as on a GPU.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
aten = torch.ops.aten
READS = {  # their result, or its shape, depends on values
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class DeviceTensor(Tensor):
    """A tensor that claims to be on `DEVICE`; `on_cpu` holds its values."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "DeviceTensor":
        """Wrap a tensor on the CPU."""
        on_cpu = on_cpu.detach().resolve_conj().resolve_neg()
        wrapper: DeviceTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, on_cpu.shape, on_cpu.stride(), on_cpu.storage_offset(), dtype=on_cpu.dtype, device=DEVICE
        )
        wrapper.on_cpu = on_cpu
        return wrapper

    def __repr__(self, **_: Any) -> str:
        """Return type and shape, without values."""
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        """Return the values; PyTorch refuses this for subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation outside of `pretend_device`, without counting."""
        return _run(func, args, kwargs or {}, lambda kind: None)


class PretendDevice(TorchDispatchMode):
    """Runs operations of `DEVICE`, and counts the waits.

    Attributes
    ----------
    waits : Counter of str
        Kind of the wait, and the innermost line of code outside of PyTorch that causes it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        return _run(func, args, kwargs or {}, self._count)

    def _count(self, kind: str) -> None:
        frame: Any = sys._getframe()
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        folder, file = Path(frame.f_code.co_filename).parts[-2:]
        self.waits[f"{kind}: {folder}/{file}:{frame.f_lineno} {frame.f_code.co_name}"] += 1


def _run(func: Any, args: Any, kwargs: dict[str, Any], count: Callable[[str], None]) -> Any:
    """Run an operation on the CPU, and wrap its results if they belong on the device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    is_input_on_device = any(isinstance(one, DeviceTensor) for one in tensors)
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if not is_input_on_device and device != DEVICE:
        return func(*args, **kwargs)
    is_output_on_device = device in (None, DEVICE)
    if func is aten._to_copy.default:
        _count_copy(is_input_on_device, is_output_on_device, kwargs.get("non_blocking", False), count)
    elif func is aten.copy_.default:
        is_output_on_device = isinstance(args[0], DeviceTensor)
        _count_copy(isinstance(args[1], DeviceTensor), is_output_on_device, any(args[2:]), count)
    elif func in INDEXING:
        indices = [one for one in args[1] if one is not None]
        if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
            count(f"read by {func}")
        if not all(isinstance(one, DeviceTensor) for one in indices):
            count(f"copy of an index by {func}")
    else:
        if func in READS:
            count(f"read by {func}")
        if is_input_on_device and any(one.dim() and not isinstance(one, DeviceTensor) for one in tensors):
            raise RuntimeError(f"{func} mixes devices")
    plain_args, plain_kwargs = tree_map_only(DeviceTensor, lambda one: one.on_cpu, (args, kwargs))
    if device is not None:
        plain_kwargs["device"] = torch.device("cpu")
    result = func(*plain_args, **plain_kwargs)
    if not is_output_on_device:
        return result
    result = tree_map_only(Tensor, DeviceTensor, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if is_input_on_device else result


def _count_copy(is_from_device: bool, is_to_device: bool, non_blocking: bool, count: Callable[[str], None]) -> None:
    if is_from_device and not is_to_device:
        count("read by a copy to the CPU")
    elif is_to_device and not is_from_device and not non_blocking:
        count("blocking copy to the device")


def move(module: nn.Module) -> None:
    """Move a module to the pretended device; parameters that are shared stay shared."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(DeviceTensor(parameter), requires_grad=parameter.requires_grad)
                part._parameters[name] = moved[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = DeviceTensor(buffer)


@contextmanager
def pretend_device() -> Iterator[PretendDevice]:
    """Run the block with the pretended device."""
    autocast, tensor = torch.autocast, torch.tensor

    def autocast_on_cpu(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

    def tensor_by_copy(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        """`torch.tensor`, which loses the values on "meta"."""
        made = tensor(data, **kwargs)
        return made if device is None else made.to(device)

    with PretendDevice() as mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", autocast_on_cpu)
        patch.setattr(torch, "tensor", tensor_by_copy)
        yield mode
