"""The two training stages: the trained module, its loss and its validation metrics.

`loop.fit` trains any `Stage`. For a loss of your own, subclass a stage, override `ReconstructionStage.image_loss` or
`AnalysisStage.loss`, and name the class in `setup.STAGES`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mrilib.data.dataset import Batch
from mrilib.metrics import image as image_metrics
from mrilib.model.encoder import KSpaceEncoder
from mrilib.model.finding_maps import finding_map_losses
from mrilib.model.two_stage import TwoStageModel
from mrilib.training.losses import VolumeSSIMLoss, positive
from mrilib.transfer import to_device

MAP_WEIGHT = 3.0  # of the detection-map loss, relative to the text loss


class BatchLoss(NamedTuple):
    """The loss of one batch."""

    total: Tensor  # summed over the batch's units
    statistics: dict[str, Tensor | float]  # for the step log; tensors of one element are read at the end of the step


class Stage:
    """One training task. The loss is a sum over units: analysis tokens in stage 1, slices in stage 2.

    Attributes
    ----------
    name : str
        "stage1", "stage2", or their controls "constant_prefix" and "no_token_decoder"; part of file names.
    model : TwoStageModel
    trainable : {"encoder", "decoder"}
    """

    name: str
    trainable: str

    def __init__(self, model: TwoStageModel) -> None:
        self.model = model

    @property
    def number(self) -> int:
        """1 if the encoder is trained, 2 if the decoder is."""
        return 1 if self.trainable == "encoder" else 2

    @property
    def part(self) -> nn.Module:
        """The trained module."""
        return getattr(self.model, self.trainable)

    def frozen_modules(self) -> dict[str, nn.Module]:
        """Frozen modules that the trained module depends on, by name."""
        if not self.model.uses_tokens:
            return {}
        names = ["backbone"] if self.trainable == "encoder" else ["backbone", "encoder"]
        return {name: getattr(self.model, name) for name in names}

    def weight(self, batch: Batch) -> float:
        """Count the units in a batch."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> BatchLoss:
        """Loss summed over the batch's units, with a graph to the trained module."""
        raise NotImplementedError

    def score(self, batch: Batch) -> list[dict[str, Any]]:
        """Compute validation scores, one dict of numbers and strings a slice.

        Scores are gathered from several processes, so a slice's score must not depend on other slices.
        """
        raise NotImplementedError

    def metrics(self, scores: list[dict[str, Any]]) -> dict[str, float]:
        """Compute validation metrics from the scores of all slices; "loss" selects the best checkpoint."""
        raise NotImplementedError

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Compute the validation metrics of some batches."""
        return self.metrics([score for batch in batches for score in self.score(batch)])


class AnalysisStage(Stage):
    """Stage 1: train the k-space encoder, or the constant prefix, on the cross-entropy of the analysis tokens.

    Parameters
    ----------
    model : TwoStageModel
    name : {"stage1", "constant_prefix"}
    label_smoothing : float
    map_weight : float
        Weight of the encoder's detection-map loss, added to the cross-entropy per token.
    """

    trainable = "encoder"

    def __init__(
        self, model: TwoStageModel, name: str = "stage1", label_smoothing: float = 0.0, map_weight: float = 0.0
    ) -> None:
        super().__init__(model)
        self.name, self.label_smoothing, self.map_weight = name, label_smoothing, map_weight

    def weight(self, batch: Batch) -> float:
        """Count the analysis tokens."""
        return float((self.model.tokenize(batch.slices).labels != -100).sum())

    def loss(self, batch: Batch) -> BatchLoss:
        """Cross-entropy with label smoothing plus the detection-map loss, summed over analysis tokens [nats]."""
        prefix, maps = self._prefix_and_maps(batch)
        result = self.model.analysis_loss_from_prefix(prefix, batch.slices, self.label_smoothing)
        total, tokens = result.loss, result.tokens.sum().double()
        statistics: dict[str, Tensor | float] = {
            "cross_entropy": result.cross_entropy.sum().double() / tokens,
            "token_accuracy": result.correct.sum().double() / tokens,
        }
        if maps is not None:
            matrix = (batch.kspace.shape[-2], batch.kspace.shape[-1])
            losses = finding_map_losses(maps, batch.slices, self.model.encoder.finding_labels, matrix)
            # Weighted by a slice's tokens, as its cross-entropy is, so that splitting a batch changes nothing.
            map_loss = (losses * result.tokens).sum()
            statistics["finding_map_loss"] = map_loss.detach().double() / tokens
            total = total + self.map_weight * map_loss
        return BatchLoss(total, statistics)

    def _prefix_and_maps(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """K-space tokens (B, N + 2, hidden) and detection maps (B, labels, img_size, img_size), if there are any."""
        encoder = self.model.encoder
        if not isinstance(encoder, KSpaceEncoder):
            return encoder(batch.kspace, batch.mask), None
        mirrored = to_device(torch.tensor([item.mirrored for item in batch.slices]), batch.mask.device)
        prefix, maps = encoder.tokens_and_maps(batch.kspace, batch.mask, mirrored)
        return prefix, maps

    def score(self, batch: Batch) -> list[dict[str, Any]]:
        """Sum over each slice's analysis tokens: cross-entropy without smoothing [nats], correct tokens, tokens."""
        result = self.model.analysis_loss(batch)
        columns = (result.cross_entropy.tolist(), result.correct.tolist(), result.tokens.tolist())
        return [
            {"file": item.file, "slice": item.slice_num, "loss": loss, "correct": correct, "tokens": tokens}
            for item, loss, correct, tokens in zip(batch.slices, *columns, strict=True)
        ]

    def metrics(self, scores: list[dict[str, Any]]) -> dict[str, float]:
        """Cross-entropy without smoothing [nats per token] and token accuracy."""
        total = {name: math.fsum(score[name] for score in scores) for name in ("loss", "correct", "tokens")}
        return {"loss": total["loss"] / total["tokens"], "token_accuracy": total["correct"] / total["tokens"]}


class ReconstructionStage(Stage):
    """Stage 2: train the image decoder on the SSIM loss.

    Parameters
    ----------
    model : TwoStageModel
    name : {"stage2", "no_token_decoder"}

    Attributes
    ----------
    image_tokens : callable
        Image tokens of a batch: `TwoStageModel.image_tokens`, or `TokenCache.image_tokens` to read them from disk.
    """

    trainable = "decoder"

    def __init__(self, model: TwoStageModel, name: str = "stage2") -> None:
        super().__init__(model)
        self.name = name
        self.image_tokens: Callable[[Batch], Tensor] = model.image_tokens
        self.ssim_loss = VolumeSSIMLoss()

    def weight(self, batch: Batch) -> float:
        """Count the slices."""
        return float(len(batch.slices))

    def reconstruct(self, batch: Batch) -> Tensor:
        """Reconstruct the image (B, h, w) [file units]; encoder and backbone are frozen and run without a graph."""
        if not self.model.uses_tokens:
            return self.model.reconstruct(batch, None)
        with torch.no_grad():
            tokens = self.image_tokens(batch)
        return self.model.reconstruct(batch, tokens)

    def image_loss(self, image: Tensor, batch: Batch) -> Tensor:
        """Compute the loss of each slice, here 1 − SSIM; training and validation use it.

        Parameters
        ----------
        image : Tensor, shape (B, h, w) [file units]
            The reconstruction.
        batch : Batch
            With the target (B, h, w) and the volumes' maxima (B,), both [file units].

        Returns
        -------
        Tensor, shape (B,)
        """
        return self.ssim_loss(image, batch.target, batch.maximum)

    def loss(self, batch: Batch) -> BatchLoss:
        """Sum `image_loss` over slices.

        Raises
        ------
        ValueError
            The file has no target image.
        """
        if batch.target is None:
            raise ValueError(f"{batch.slices[0].file} has no reconstruction_rss; stage 2 cannot train on it")
        image = self.reconstruct(batch)
        losses = self.image_loss(image, batch)
        unit = positive(batch.maximum)[:, None, None]
        statistics: dict[str, Tensor | float] = {}
        for name, values in (("reconstruction", image.detach() / unit), ("target", batch.target / unit)):
            statistics |= {f"{name}_mean": values.mean(), f"{name}_max": values.max()}
        statistics["reconstruction_min"] = (image.detach() / unit).min()
        return BatchLoss(losses.sum(), statistics)

    def score(self, batch: Batch) -> list[dict[str, Any]]:
        """Loss of each slice, and the sums from which fastMRI's metrics of its volume are computed."""
        assert batch.target is not None
        image = self.reconstruct(batch)
        losses = self.image_loss(image, batch).tolist()
        columns = (losses, batch.target.cpu(), image.float().cpu())
        return [
            {"file": item.file, "slice": item.slice_num, "loss": loss}
            | image_metrics.score_slice(target.numpy(), reconstruction.numpy(), item.maximum)
            for item, loss, target, reconstruction in zip(batch.slices, *columns, strict=True)
        ]

    def metrics(self, scores: list[dict[str, Any]]) -> dict[str, float]:
        """Mean loss over slices; mean SSIM, PSNR [dB] and NMSE over volumes, as fastMRI defines them."""
        volumes: dict[str, list[dict[str, float]]] = defaultdict(list)
        for score in scores:
            volumes[score["file"]].append(score)
        # A volume with an all-zero target has no defined metrics.
        scored = [slices for slices in volumes.values() if any(score["energy"] for score in slices)]
        rows = [image_metrics.volume_metrics(slices) for slices in scored]
        means = {name: math.fsum(row[name] for row in rows) / len(rows) for name in ("ssim", "psnr", "nmse")}
        return {"loss": math.fsum(score["loss"] for score in scores) / len(scores), **means}
