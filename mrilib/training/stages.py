"""What is trained, on which loss, judged how; `fit` trains it.

The stages differ by a loss: a `Stage` says what is trained, its loss and its validation metrics. The loop that is the
same for all of them is `trainer.Trainer`. A loss of your own is a subclass of a stage with another `loss`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mrilib.data.dataset import Batch
from mrilib.metrics import image as evaluation
from mrilib.model.encoder import KSpaceEncoder
from mrilib.model.finding_maps import finding_map_losses
from mrilib.model.two_stage import TwoStageModel
from mrilib.training.losses import VolumeSSIMLoss, positive

MAP_WEIGHT = 3.0  # of the detection maps' loss, added to the text's


class BatchLoss(NamedTuple):
    """What a stage says of one batch."""

    total: Tensor  # loss summed over the batch's units
    statistics: dict[str, float]  # for the step's log


class Stage:
    """What is trained, on which loss, judged how.

    Attributes
    ----------
    name : str
        "stage1", "stage2", or their controls "constant_prefix" and "no_token_decoder"; names checkpoints and logs.
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

    def score(self, batch: Batch) -> list[dict[str, Any]]:
        """What validation needs to know of each slice of a batch: plain numbers and strings, one dict a slice.

        Several processes share the slices out and put the dicts together, so none may depend on another slice.
        """
        raise NotImplementedError

    def metrics(self, scores: list[dict[str, Any]]) -> dict[str, float]:
        """Validation metrics from the scores of all slices; "loss" decides which checkpoint is best."""
        raise NotImplementedError

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Validation metrics of some batches."""
        return self.metrics([score for batch in batches for score in self.score(batch)])


class AnalysisStage(Stage):
    """Stage 1: cross-entropy on the tokens of the analysis; trains the k-space encoder or its control.

    Parameters
    ----------
    model : TwoStageModel
    name : {"stage1", "constant_prefix"}
    label_smoothing : float
    map_weight : float
        Weight of the loss of the encoder's detection maps, added to the cross-entropy per token.
    """

    trainable = "encoder"

    def __init__(
        self, model: TwoStageModel, name: str = "stage1", label_smoothing: float = 0.0, map_weight: float = 0.0
    ) -> None:
        super().__init__(model)
        self.name, self.label_smoothing, self.map_weight = name, label_smoothing, map_weight

    def weight(self, batch: Batch) -> float:
        """Analysis tokens."""
        return float((self.model.tokenize(batch.slices).labels != -100).sum())

    def loss(self, batch: Batch) -> BatchLoss:
        """Cross-entropy with label smoothing, plus the detection maps' loss, summed over analysis tokens [nats]."""
        encoder, maps = self.model.encoder, None
        if isinstance(encoder, KSpaceEncoder):
            mirrored = torch.tensor([one.mirrored for one in batch.slices], device=batch.mask.device)
            prefix, maps = encoder.tokens_and_maps(batch.kspace, batch.mask, mirrored)
        else:  # the control, which has no maps
            prefix = encoder(batch.kspace, batch.mask)
        result = self.model.analysis_loss_from_prefix(prefix, batch.slices, self.label_smoothing)
        total, tokens = result.loss, float(result.tokens.sum())
        statistics = {
            "cross_entropy": float(result.cross_entropy.sum()) / tokens,
            "token_accuracy": float(result.correct.sum()) / tokens,
        }
        if maps is not None:
            assert isinstance(encoder, KSpaceEncoder)
            matrix = (batch.kspace.shape[-2], batch.kspace.shape[-1])
            losses = finding_map_losses(maps, batch.slices, encoder.finding_labels, matrix)
            # weighted by a slice's tokens, as its text is: a batch can then be split without a change
            term = (losses * result.tokens).sum()
            statistics["finding_map_loss"] = float(term.detach()) / tokens
            total = total + self.map_weight * term
        return BatchLoss(total, statistics)

    def score(self, batch: Batch) -> list[dict[str, Any]]:
        """Sums over each slice's analysis tokens: cross-entropy without smoothing [nats], tokens right, tokens."""
        result = self.model.analysis_loss(batch)
        columns = (result.cross_entropy.tolist(), result.correct.tolist(), result.tokens.tolist())
        return [
            {"file": one.file, "slice": one.slice_num, "loss": loss, "correct": correct, "tokens": tokens}
            for one, loss, correct, tokens in zip(batch.slices, *columns, strict=True)
        ]

    def metrics(self, scores: list[dict[str, Any]]) -> dict[str, float]:
        """Cross-entropy [nats per token], without smoothing, and token accuracy."""
        total = {name: math.fsum(score[name] for score in scores) for name in ("loss", "correct", "tokens")}
        return {"loss": total["loss"] / total["tokens"], "token_accuracy": total["correct"] / total["tokens"]}


class ReconstructionStage(Stage):
    """Stage 2: SSIM loss on the image; trains the image decoder.

    Parameters
    ----------
    model : TwoStageModel
    name : {"stage2", "no_token_decoder"}

    Attributes
    ----------
    image_tokens : callable
        From a batch to its image tokens: the model's, or `TokenCache.image_tokens` where `setup.stage_loaders` sets it.
    """

    trainable = "decoder"

    def __init__(
        self,
        model: TwoStageModel,
        name: str = "stage2",
    ) -> None:
        super().__init__(model)
        self.name = name
        self.image_tokens: Callable[[Batch], Tensor] = model.image_tokens
        self.ssim_loss = VolumeSSIMLoss().to(model.device)

    def weight(self, batch: Batch) -> float:
        """Slices."""
        return float(len(batch.slices))

    def reconstruct(self, batch: Batch) -> Tensor:
        """The image (B, h, w) [file units]; encoder and backbone are frozen, so they run without a graph."""
        if not self.uses_tokens:
            return self.model.reconstruct(batch, None)
        with torch.no_grad():
            tokens = self.image_tokens(batch)
        return self.model.reconstruct(batch, tokens)

    @property
    def uses_tokens(self) -> bool:
        """Whether the decoder reads image tokens; without them neither encoder nor backbone runs."""
        return self.model.uses_tokens

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

    def score(self, batch: Batch) -> list[dict[str, Any]]:
        """SSIM loss of each slice, and what the official metrics of its volume are made of."""
        assert batch.target is not None
        image = self.reconstruct(batch)
        losses = self.ssim_loss(image, batch.target, batch.maximum).tolist()
        return [
            {"file": one.file, "slice": one.slice_num, "loss": loss}
            | evaluation.score_slice(target.numpy(), reconstruction.numpy(), one.maximum)
            for one, loss, target, reconstruction in zip(
                batch.slices, losses, batch.target.cpu(), image.float().cpu(), strict=True
            )
        ]

    def metrics(self, scores: list[dict[str, Any]]) -> dict[str, float]:
        """Mean SSIM loss of the slices; official SSIM, PSNR [dB] and NMSE of the volumes, over the slices used."""
        volumes: dict[str, list[dict[str, float]]] = defaultdict(list)
        for score in scores:
            volumes[score["file"]].append(score)
        scored = [
            slices for slices in volumes.values() if any(one["energy"] for one in slices)
        ]  # not a target of zeros
        rows = [evaluation.volume_metrics(slices) for slices in scored]
        means = {name: math.fsum(row[name] for row in rows) / len(rows) for name in ("ssim", "psnr", "nmse")}
        return {"loss": math.fsum(score["loss"] for score in scores) / len(scores), **means}
