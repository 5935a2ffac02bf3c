"""Estimate of what a training takes on a GPU, made without one: FLOPs, bytes, time per epoch, and what fits.

FLOPs and activations of one slice are measured. Time and memory of other batch sizes and GPUs are computed from them.
`PyTorch's counter <torch.utils.flop_counter>` counts matrix products, convolutions and attention. It does not count
Fourier transforms, elementwise operations, solves and fused Triton kernels, nor does it see how memory limits speed.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mrilib.config import Stage2Parameters
from mrilib.data.sampler import collate
from mrilib.training import setup
from mrilib.training.dry_run import GB, only_largest
from mrilib.training.optimizer import build_optimizer
from mrilib.training.setup import StageParameters

PARTS = ("encoder", "backbone", "decoder")
PRECISIONS = {"bf16": "bf16", "no": "float32"}  # values of mixed_precision, and their names in the tables
UTILISATION = 0.3  # assumed fraction of the peak; language models reach 0.21 to 0.46 (Chowdhery et al., PaLM, 2022)
BATCH_SIZES = (1, 2, 4, 8, 16)
CONTEXT_BYTES = 10**9  # assumed for CUDA's context and unused blocks of PyTorch's memory


class GPU(NamedTuple):
    """Peak rates of a GPU without sparsity [TFLOP/s] and its memory [GB], from the vendor."""

    name: str
    memory: int
    bf16: float
    tf32: float
    float32: float
    source: str


GPUS = (
    GPU("RTX 4090", 24, 165.2, 82.6, 82.6, "NVIDIA Ada GPU architecture white paper, appendix A"),
    GPU("L40S", 48, 362.05, 183.0, 91.6, "NVIDIA L40S data sheet"),
    GPU("A100 40 GB", 40, 312.0, 156.0, 19.5, "NVIDIA A100 data sheet"),
    GPU("A100 80 GB", 80, 312.0, 156.0, 19.5, "NVIDIA A100 data sheet"),
    GPU("H100 SXM", 80, 989.5, 494.7, 67.0, "NVIDIA H100 data sheet; half of its values with sparsity"),
)


@dataclass
class Part:
    """Size of a part of the model [bytes] and its FLOPs for one slice."""

    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    forward_flops: float
    backward_flops: float  # with what activation checkpointing computes again


class Activations(NamedTuple):
    """Memory of forward and backward pass next to weights and gradients [bytes]."""

    per_slice: int  # at the peak
    weight_copies: int  # in bfloat16, made by autocast


@dataclass
class Estimate:
    """What one stage of a training takes."""

    stage: str
    parts: dict[str, Part]
    optimizer_flops: float  # of one update
    activations: dict[str, Activations]  # by mixed_precision
    mixed_precision: str
    batch_size: int
    steps: int  # optimizer steps of an epoch
    train_slices: int  # of an epoch, of all processes
    val_slices: int
    cached: bool  # the token cache replaces encoder and backbone

    def memory_bytes(self, batch_size: int, precision: str) -> int:
        """Estimate the memory of a GPU that trains with a batch size and a value of mixed_precision [bytes]."""
        fixed = sum(p.weight_bytes + p.gradient_bytes + p.optimizer_bytes for p in self.parts.values())
        activations = self.activations[precision]
        return CONTEXT_BYTES + fixed + activations.weight_copies + batch_size * activations.per_slice

    @property
    def epoch_flops(self) -> float:
        """Counted FLOPs of an epoch with its validation, as if all slices had the largest shape."""
        used = [part for name, part in self.parts.items() if name == "decoder" or not self.cached]
        forward, backward = sum(p.forward_flops for p in used), sum(p.backward_flops for p in used)
        training = self.train_slices * (forward + backward) + self.steps * self.optimizer_flops
        return training + self.val_slices * forward

    def parts_table(self) -> pd.DataFrame:
        """Tabulate the parts: parameters, FLOPs of a slice, bytes."""
        return pd.DataFrame(
            {
                "part": name,
                "parameters": f"{part.parameters:,}",
                "forward [GFLOP]": f"{part.forward_flops / 1e9:.4g}",
                "backward [GFLOP]": f"{part.backward_flops / 1e9:.4g}",
                "weights [MB]": f"{part.weight_bytes / 1e6:.4g}",
                "gradients [MB]": f"{part.gradient_bytes / 1e6:.4g}",
                "optimizer [MB]": f"{part.optimizer_bytes / 1e6:.4g}",
            }
            for name, part in self.parts.items()
        )

    def time_table(self, utilisation: float) -> pd.DataFrame:
        """Tabulate the minutes of an epoch's counted FLOPs at a fraction of each GPU's peak."""

        def minutes(teraflops: float) -> str:
            return f"{self.epoch_flops / (utilisation * teraflops * 1e12) / 60:.3g}"

        return pd.DataFrame(
            {
                "one epoch [min]": gpu.name,
                "bf16": minutes(gpu.bf16),
                "TF32": minutes(gpu.tf32),
                "float32": minutes(gpu.float32),
                "peaks [TFLOP/s]": f"{gpu.bf16:g}, {gpu.tf32:g}, {gpu.float32:g}",
                "source": gpu.source,
            }
            for gpu in GPUS
        )

    def memory_table(self) -> pd.DataFrame:
        """Tabulate the memory of batch sizes and precisions, and the GPUs' memories that hold it."""
        rows = []
        for precision, name in PRECISIONS.items():
            for batch_size in sorted({*BATCH_SIZES, self.batch_size}):
                needed = self.memory_bytes(batch_size, precision) / GB
                sizes = sorted({gpu.memory for gpu in GPUS})
                fits = {f"{size} GB": "fits" if needed <= size else "no" for size in sizes}
                is_own = batch_size == self.batch_size and precision == self.mixed_precision
                row = {"precision": name, "batch_size": batch_size, "needs [GB]": f"{needed:.1f}", **fits}
                rows.append({**row, "": "these parameters" if is_own else ""})
        return pd.DataFrame(rows)

    def text(self, utilisation: float = UTILISATION) -> str:
        """Format as text: the tables, and what they leave out."""
        cached = "; encoder and language model run once, to fill the token cache" if self.cached else ""
        return "\n".join(
            (
                f"Estimates for {self.stage} on a GPU; nothing below was measured on one.",
                "",
                "One slice of the largest shape (FLOPs counted: matrix products, convolutions, attention; not counted: "
                "Fourier transforms, elementwise operations, solves, fused kernels)",
                self.parts_table().to_string(index=False),
                "",
                f"Time of the {self.epoch_flops / 1e12:.4g} TFLOP of an epoch ({self.train_slices} slices, validation "
                f"of {self.val_slices}{cached}) on one GPU at {utilisation:.0%} of its peak",
                "(--utilisation 1 gives the lower bound). What is not counted comes on top; loading can be slower.",
                "Outside autocast, PyTorch's default is TF32 for convolutions and float32 for matrix products.",
                self.time_table(utilisation).to_string(index=False),
                "",
                "Memory of one GPU: weights, gradients, optimizer, activations of one slice times batch_size, and",
                f"{CONTEXT_BYTES / GB:.0f} GB assumed for CUDA. Workspaces of its kernels can add to that.",
                self.memory_table().to_string(index=False),
            )
        )


class PartFlops:
    """FLOPs by part of a model.

    A forward hook of any module of a part, and in the backward pass a hook of its output's gradient, start the part's
    count. It goes on until another part's begins, so a loss counts as the last part's.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self.parts = parts
        self.counter = FlopCounterMode(display=False)
        self.flops = dict.fromkeys(parts, 0.0)
        self.current = next(iter(parts))
        self.counted = 0

    def take(self) -> dict[str, float]:
        """Return the FLOPs since the last call, by part."""
        self._enter(self.current)
        taken, self.flops = self.flops, dict.fromkeys(self.parts, 0.0)
        return taken

    def _enter(self, part: str) -> None:
        total = self.counter.get_total_flops()
        self.flops[self.current] += total - self.counted
        self.current, self.counted = part, total

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is computed in this context."""
        handles = []
        for name, part in self.parts.items():
            for module in part.modules():
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
                handles.append(module.register_forward_hook(lambda *args, name=name: self._watch(args[-1], name)))
        try:
            with self.counter:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, output: Any, name: str) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _, name=name: self._enter(name))


class TensorMemory(TorchDispatchMode):
    """Memory of the tensors that operations make, but for gradients of parameters and autocast's copies of weights.

    Parameters
    ----------
    parameters : iterable of Parameter
        Of the whole model.

    Attributes
    ----------
    peak : int
        Largest sum of tensors that existed at a time [bytes].
    weight_copies : int
        Sum over the copies of parameters in another type [bytes].
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.parameters = list(parameters)
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in self.parameters}
        self.finalizers: dict[int, weakref.finalize] = {}  # of living storages, by address
        self.live = self.peak = self.weight_copies = 0
        self.handles: list[Any] = []

    def __enter__(self) -> "TensorMemory":
        def exclude_gradient(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._free_now(parameter.grad.untyped_storage().data_ptr())

        trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        self.handles = [parameter.register_post_accumulate_grad_hook(exclude_gradient) for parameter in trained]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()
        for address in list(self.finalizers):
            self._free_now(address)

    def _free_now(self, address: int) -> None:
        if address in self.finalizers:
            self.finalizers[address]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add the storages that it has made."""
        output = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default and self._address(args[0]) in self.weights
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._add(tensor, is_cast)
        return output

    def _address(self, tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr()

    def _add(self, tensor: Tensor, is_cast: bool) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self.weights or address in self.finalizers:
            return
        if is_cast:
            self.weight_copies += size
            size = 0
        self.live += size
        self.peak = max(self.peak, self.live)

        def free() -> None:
            self.live -= size
            del self.finalizers[address]

        self.finalizers[address] = weakref.finalize(storage, free)


def measure(config: StageParameters) -> Estimate:
    """Count FLOPs and bytes of one slice of a stage's largest shape, forward and backward in both precisions.

    Parameters
    ----------
    config : Stage1Parameters or Stage2Parameters
        Of the run. Stage 2 needs its stage-1 checkpoint.
    """
    device = setup.prepare(config)
    stage = setup.build_stage(config, device)
    loaders = setup.make_loaders(config)
    slices = len(loaders.train_data), len(loaders.val_data)
    steps = -(-len(loaders.train) // (config.gradient_accumulation_steps * config.num_processes))
    only_largest(loaders.train_data, 1, 1)
    batch = collate([loaders.train_data[0]]).to(device)
    model = stage.model
    parameters = model.freeze(stage.trainable)
    model.train()
    modules = {name: module for name in PARTS if (module := getattr(model, name)) is not None}

    def loss(precision: str) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return stage.loss(batch).total

    flops = PartFlops(modules)
    with flops.counting():
        total = loss(config.mixed_precision)
        forward = flops.take()
        total.backward()
        backward = flops.take()
    gradients = {name: sum(_bytes(p.grad) for p in part.parameters()) for name, part in modules.items()}
    # A learning rate of 0, so that the next passes use the same weights.
    optimizer = build_optimizer(parameters, config.model_copy(update={"learning_rate": 0.0}))
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    states = {name: sum(_bytes(optimizer.state.get(p)) for p in part.parameters()) for name, part in modules.items()}
    del optimizer
    activations = {precision: _activations(model, partial(loss, precision)) for precision in PRECISIONS}
    parts = {
        name: Part(
            sum(p.numel() for p in part.parameters()),
            sum(_bytes(p) for p in part.parameters()),
            gradients[name],
            states[name],
            forward[name],
            backward[name],
        )
        for name, part in modules.items()
    }
    return Estimate(
        stage=stage.name,
        parts=parts,
        optimizer_flops=float(counter.get_total_flops()),
        activations=activations,
        mixed_precision=config.mixed_precision,
        batch_size=config.batch_size,
        steps=steps,
        train_slices=slices[0],
        val_slices=slices[1],
        cached=isinstance(config, Stage2Parameters) and bool(config.token_cache_dir) and model.uses_tokens,
    )


def _activations(model: nn.Module, loss: Callable[[], Tensor]) -> Activations:
    """Measure the memory of forward and backward pass of one slice."""
    model.zero_grad(set_to_none=True)
    with TensorMemory(model.parameters()) as memory:
        loss().backward()
    model.zero_grad(set_to_none=True)
    return Activations(memory.peak, memory.weight_copies)


def _bytes(values: Any) -> int:
    """Sum of the sizes of all tensors in a structure [bytes]."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
