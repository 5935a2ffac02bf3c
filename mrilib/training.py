"""The training loop. The stages differ by a loss.

`fit` knows AdamW, warm-up and schedule, accumulation, clipping, validation, early stopping, logs and checkpoints; a
`Stage` knows what is trained, its loss and its validation metrics.
"""

import csv
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_scheduler

from mrilib import evaluation
from mrilib.checkpoint import rng_state, save_checkpoint
from mrilib.config import TrainingParameters
from mrilib.data import Batch, FastMRIDataset
from mrilib.decoder import VolumeSSIMLoss, positive
from mrilib.model import TwoStageModel, count_parameters, tensor_hash
from mrilib.runs import JsonLines, peak_memory_bytes, progress_bar

logger = logging.getLogger("mrilib")
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class BatchLoss(NamedTuple):
    """What a stage says of one batch."""

    total: Tensor  # loss summed over the batch's units
    statistics: dict[str, float]  # for the step's log


class Stage:
    """What is trained, on which loss, judged how.

    Attributes
    ----------
    name : str
        "stage1", "stage2", or their controls "control" and "plain"; names checkpoints and logs.
    model : TwoStageModel
    trainable : {"encoder", "decoder"}
    """

    name: str
    trainable: str

    def __init__(self, model: TwoStageModel) -> None:
        self.model = model

    @property
    def part(self) -> nn.Module:
        """The trained module."""
        return getattr(self.model, self.trainable)

    def weight(self, batch: Batch) -> float:
        """Units (analysis tokens, slices) that the batch's loss is a sum over."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> BatchLoss:
        """Loss summed over the batch's units, with a graph to the trained part."""
        raise NotImplementedError

    def validate(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Validation metrics; "loss" decides which checkpoint is best."""
        raise NotImplementedError


class AnalysisStage(Stage):
    """Stage 1: cross-entropy on the tokens of the analysis; trains the k-space encoder, or its control."""

    trainable = "encoder"

    def __init__(self, model: TwoStageModel, name: str = "stage1", label_smoothing: float = 0.0) -> None:
        super().__init__(model)
        self.name, self.label_smoothing = name, label_smoothing

    def weight(self, batch: Batch) -> float:
        """Analysis tokens."""
        return float((self.model.tokenize(batch.slices).labels != -100).sum())

    def loss(self, batch: Batch) -> BatchLoss:
        """Cross-entropy with label smoothing, summed over the analysis tokens [nats]."""
        result = self.model.analysis_loss(batch, self.label_smoothing)
        tokens = float(result.tokens.sum())
        statistics = {
            "cross_entropy": float(result.cross_entropy.sum()) / tokens,
            "token_accuracy": float(result.correct.sum()) / tokens,
        }
        return BatchLoss(result.loss, statistics)

    def validate(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Cross-entropy [nats per token], without smoothing, and token accuracy."""
        loss = correct = tokens = 0.0
        for batch in batches:
            result = self.model.analysis_loss(batch)
            loss += float(result.cross_entropy.sum())
            correct += float(result.correct.sum())
            tokens += float(result.tokens.sum())
        return {"loss": loss / tokens, "token_accuracy": correct / tokens}


class ReconstructionStage(Stage):
    """Stage 2: SSIM loss on the image; trains the image decoder."""

    trainable = "decoder"

    def __init__(self, model: TwoStageModel, name: str = "stage2") -> None:
        super().__init__(model)
        self.name = name
        self.ssim_loss = VolumeSSIMLoss().to(model.device)

    def weight(self, batch: Batch) -> float:
        """Slices."""
        return float(len(batch.slices))

    def reconstruct(self, batch: Batch) -> Tensor:
        """The image (B, h, w) [file units]; encoder and backbone are frozen, so they run without a graph."""
        decoder = self.model.decoder
        assert decoder is not None
        with torch.no_grad():
            tokens = self.model.image_tokens(batch) if decoder.token_dim else None
        return self.model.reconstruct(batch, tokens)

    def loss(self, batch: Batch) -> BatchLoss:
        """1 − SSIM, summed over the slices."""
        if batch.target is None:
            raise ValueError(f"{batch.slices[0].file} has no reconstruction_rss; stage 2 cannot train on it")
        image = self.reconstruct(batch)
        losses = self.ssim_loss(image, batch.target, batch.maximum)
        unit = positive(batch.maximum)[:, None, None]
        statistics: dict[str, float] = {}
        for name, values in (("reconstruction", image.detach() / unit), ("target", batch.target / unit)):
            statistics |= {f"{name}_mean": float(values.mean()), f"{name}_max": float(values.max())}
        statistics["reconstruction_min"] = float((image.detach() / unit).min())
        return BatchLoss(losses.sum(), statistics)

    def validate(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Mean SSIM loss of the slices; official SSIM, PSNR [dB] and NMSE of the volumes, over the slices used."""
        loss, count = 0.0, 0
        volumes: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        for batch in batches:
            assert batch.target is not None
            image = self.reconstruct(batch)
            loss += float(self.ssim_loss(image, batch.target, batch.maximum).sum())
            count += len(batch.slices)
            for one, target, reconstruction in zip(batch.slices, batch.target.cpu(), image.cpu(), strict=True):
                volumes[one.file].append((target.numpy(), reconstruction.numpy()))
        stacks = [tuple(np.stack(images) for images in zip(*pairs, strict=True)) for pairs in volumes.values()]
        scores = [evaluation.score_volume(*stack) for stack in stacks if evaluation.has_range(stack[0])]
        means = {name: float(np.mean([score[name] for score in scores])) for name in ("ssim", "psnr", "nmse")}
        return {"loss": loss / count, **means}


@dataclass
class History:
    """What happened, step by step and epoch by epoch, as plain numbers."""

    steps: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0  # of the whole fit
    best_epoch: int = 0
    best_loss: float = float("inf")


def pick_device(device: str) -> torch.device:
    """auto: cuda if there is one; config has refused cuda where it is absent."""
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def prepare(config: TrainingParameters) -> torch.device:
    """Seed every generator and choose the device. Deterministic kernels, so that a seed means the same numbers."""
    set_seed(config.seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return pick_device(config.device)


def fit(
    stage: Stage,
    config: TrainingParameters,
    train_loader: DataLoader[Batch],
    val_loader: DataLoader[Batch],
    directory: Path,
    *,
    interactive: bool = False,
    on_step: Callable[[dict[str, float]], None] | None = None,
    on_epoch: Callable[[History], None] | None = None,
) -> History:
    """Train one part of the model.

    Parameters
    ----------
    stage : Stage
    config : TrainingParameters
    train_loader, val_loader : DataLoader of Batch
        From `data.make_loader`; the training dataset's `epoch` is set before each pass.
    directory : Path
        Run folder: checkpoints go to ``<stage>_checkpoints/``, logs to ``logs/``.
    interactive : bool
        Show a notebook's progress widget.
    on_step : callable, optional
        Called with the log entry of each step.
    on_epoch : callable, optional
        Called with the history after each epoch.

    Returns
    -------
    History

    Raises
    ------
    FloatingPointError
        A loss or gradient that is not finite; epoch, step, files and slices are named.
    """
    model, part = stage.model, stage.part
    parameters = model.freeze(stage.trainable)
    frozen_hash = tensor_hash(model.backbone)
    encoder_hash = tensor_hash(model.encoder) if stage.trainable == "decoder" else ""
    AcceleratorState._reset_state()  # else a notebook that is run again with another precision is refused
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=model.device.type == "cpu")
    decayed = [p for p in parameters if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},  # norms, biases, single vectors
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2))
    accumulate = config.gradient_accumulation_steps
    steps_per_epoch = -(-len(train_loader) // accumulate)
    total_steps = steps_per_epoch * config.epochs
    schedule = get_scheduler(
        SCHEDULES[config.lr_schedule],
        optimizer,
        num_warmup_steps=round(config.warmup_ratio * total_steps),
        num_training_steps=total_steps,
    )
    folder = directory / f"{'stage1' if stage.trainable == 'encoder' else 'stage2'}_checkpoints"
    log = JsonLines(directory / "logs" / f"{stage.name}.jsonl")
    history = History()
    logger.info(
        "%s: %d epochs of %d steps, %d trainable parameters, %d frozen",
        stage.name,
        config.epochs,
        steps_per_epoch,
        count_parameters(part),
        count_parameters(model) - count_parameters(part),
    )

    def save(name: str, epoch: int) -> None:
        content = {
            "stage": stage.name,
            "epoch": epoch,
            "step": len(history.steps),
            "weights": part.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": rng_state(),
            "history": {"epochs": history.epochs, "best_epoch": history.best_epoch, "best_loss": history.best_loss},
            "config": config.to_dict(),
            "backbone": frozen_hash,
            "encoder": encoder_hash,
            "cost": {
                "seconds": time.perf_counter() - begin,
                "peak_memory_bytes": peak_memory_bytes(),
                "trainable_parameters": count_parameters(part),
            },
        }
        save_checkpoint(folder / f"{stage.name}_{name}.pt", content)

    begin = time.perf_counter()
    bar = progress_bar(total_steps, stage.name, interactive)
    for epoch in range(1, config.epochs + 1):
        dataset = train_loader.dataset
        assert isinstance(dataset, FastMRIDataset)
        dataset.epoch = epoch - 1
        model.train()
        epoch_start = time.perf_counter()
        for batches in _groups_of(train_loader, accumulate):
            step_start = time.perf_counter()
            step = len(history.steps) + 1
            moved = [batch.to(model.device) for batch in batches]
            total_weight = sum(stage.weight(batch) for batch in moved)
            loss_value, statistics = 0.0, {}
            for batch in moved:
                with accelerator.autocast():
                    result = stage.loss(batch)
                loss = result.total / total_weight
                loss_value += float(loss.detach())
                statistics = result.statistics
                accelerator.backward(loss)
            if step == 1:
                model.check_gradients()
            norms = gradient_norms(part)
            norm = float(accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
            if not (np.isfinite(loss_value) and np.isfinite(norm)):
                where = ", ".join(f"{s.file} slice {s.slice_num}" for batch in moved for s in batch.slices)
                told = f"loss {loss_value}, gradient norm {norm}"
                raise FloatingPointError(f"{stage.name}, epoch {epoch}, step {step}: {told}; slices: {where}")
            learning_rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            entry = {
                "epoch": epoch,
                "step": step,
                "loss": loss_value,
                "learning_rate": learning_rate,
                "gradient_norm": norm,
                **{f"gradient_norm_{name}": value for name, value in norms.items()},
                **statistics,
                "seconds": time.perf_counter() - step_start,
            }
            history.steps.append(entry)
            log.write(**entry)
            if on_step is not None:
                on_step(entry)
            bar.set_postfix(loss=f"{loss_value:.4f}", lr=f"{learning_rate:.1e}", refresh=False)
            bar.update()
            if step % config.log_interval == 0 or step == total_steps:
                logger.info(
                    "%s epoch %d/%d step %d/%d loss %.4f lr %.2e gradient norm %.3f, %.2f s/step",
                    *(stage.name, epoch, config.epochs, step, total_steps, loss_value, learning_rate, norm),
                    entry["seconds"],
                )
        metrics = validate(stage, val_loader, accelerator)
        history.epochs.append(
            {
                "epoch": epoch,
                "train_loss": float(np.mean([s["loss"] for s in history.steps if s["epoch"] == epoch])),
                **{f"val_{name}": value for name, value in metrics.items()},
                "seconds": time.perf_counter() - epoch_start,
            }
        )
        logger.info("%s epoch %d/%d %s", stage.name, epoch, config.epochs, _told(history.epochs[-1]))
        if metrics["loss"] < history.best_loss:
            history.best_loss, history.best_epoch = metrics["loss"], epoch
            save("best_model", epoch)
        if epoch % config.save_interval == 0:
            save(f"epoch_{epoch}", epoch)
        _write_csv(directory / "logs" / f"{stage.name}_history.csv", history.epochs)
        if on_epoch is not None:
            on_epoch(history)
        if config.early_stopping_patience and epoch - history.best_epoch >= config.early_stopping_patience:
            logger.info("%s: no better validation loss for %d epochs", stage.name, epoch - history.best_epoch)
            break
    save("final_model", int(history.epochs[-1]["epoch"]))
    bar.close()
    log.close()
    history.seconds = time.perf_counter() - begin
    model.freeze(None)
    if tensor_hash(model.backbone) != frozen_hash:
        raise RuntimeError("the frozen backbone has changed during training")
    if encoder_hash and tensor_hash(model.encoder) != encoder_hash:
        raise RuntimeError("the frozen k-space encoder has changed during training")
    return history


@torch.no_grad()
def validate(stage: Stage, loader: DataLoader[Batch], accelerator: Accelerator) -> dict[str, float]:
    """Validation metrics of a stage, everything in eval mode."""
    stage.model.train(False)
    with accelerator.autocast():
        return stage.validate(batch.to(stage.model.device) for batch in loader)


def gradient_norms(part: nn.Module) -> dict[str, float]:
    """Norm of the gradient of each of a module's children (varnet, vit, …), before clipping."""
    squares: dict[str, Tensor] = {}
    for name, parameter in part.named_parameters():
        if parameter.grad is not None:
            child = name.split(".")[0]
            squares[child] = squares.get(child, torch.zeros(())) + parameter.grad.float().square().sum().cpu()
    return {name: float(value.sqrt()) for name, value in squares.items()}


def _groups_of(loader: DataLoader[Batch], size: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in loader:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _told(entry: dict[str, Any]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in entry.items() if name != "epoch")


def _write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)
