"""What is trained, on which loss, judged how; `fit` trains it.

The stages differ by a loss: a `Stage` says what is trained, its loss and its validation metrics. The loop that is the
same for all of them is `trainer.Trainer`. A loss of your own is a subclass of a stage with another `loss`.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mrilib import evaluation
from mrilib.config import Stage1Parameters, Stage2Parameters, TrainingParameters
from mrilib.data import Batch
from mrilib.decoder import VolumeSSIMLoss, from_patches, positive
from mrilib.distributed import launched
from mrilib.echo import Echoes, Made
from mrilib.encoder import KSpaceEncoder
from mrilib.finding_maps import ellipses_seen, finding_map_losses
from mrilib.history import History
from mrilib.kspace import center_crop_or_pad
from mrilib.lesions import lesion_shares
from mrilib.model import TwoStageModel
from mrilib.trainer import Trainer


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
    joining : {"text_from", "tokens_from"}
        The attribute, and parameter, that says from which share of the steps on everything takes part.
    progress : float
        Share of the training's steps that lie before the one that is taken, or was taken last; the trainer sets it.
        1 outside of a training.
    data_echo : int
        Times that each batch of a training comes; the trainer takes it from the loader.
    echoes : Echoes
        What frozen parts have made of batches that come again.
    """

    name: str
    trainable: str
    joining: str

    def __init__(self, model: TwoStageModel) -> None:
        self.model = model
        self.progress = 1.0
        self.data_echo = 1
        self.echoes = Echoes()

    @property
    def part(self) -> nn.Module:
        """The trained module."""
        return getattr(self.model, self.trainable)

    @property
    def complete(self) -> bool:
        """Whether all that is trained takes part by now; an epoch before that can be no best one."""
        return True

    @property
    def partial(self) -> bool:
        """Whether some of what is trained stands still in this step: its gradient is zero."""
        return not self.complete

    @property
    def rate_anew_from(self) -> float:
        """Share of the steps after which the learning rate begins anew, warm-up and all; 0: it never does."""
        return 0.0

    @property
    def echoed(self) -> tuple[float, float]:
        """From which to which share of the steps batches come again; all beside are new ones."""
        return 0.0, 1.0

    @property
    def echoes_now(self) -> bool:
        """Whether batches come again at this point of the training."""
        first, last = self.echoed
        return first <= self.progress < last

    def begin_epoch(self) -> None:
        """Called before an epoch's first step, or the first after a resumption; echoes end with an epoch."""
        self.echoes.clear()

    def _echoed(self, batch: Batch, make: Callable[[Batch], Made], *fits: Callable[[Made], bool]) -> Made:
        """What frozen parts make of a batch, in training once for all the times that it comes."""
        return self.echoes.get(batch, self.data_echo if self.part.training and self.echoes_now else 1, make, *fits)

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
    """Stage 1: cross-entropy on the tokens of the analysis; trains the k-space encoder, or its control.

    Parameters
    ----------
    model : TwoStageModel
    name : {"stage1", "control"}
    label_smoothing : float
    map_weight : float
        Of the loss of an encoder's maps of findings, beside the cross-entropy per token.
    recon_weight : float
        Of the reconstruction term, for an encoder with a `pixel_head`: the mean absolute difference between what it
        reads off the image tokens and the target, both in units of the target's root mean square.
    image_weight : float
        Of VarNet's image, restored where the encoder restores it, beside the text or, until that joins, the maps: the
        mean absolute difference between its magnitude and the target, in units of the target's root mean square, and
        1 − SSIM (the two together: Zhao et al., IEEE TCI 3:47, 2017).
        Through a map of a few small spots VarNet learns slowly what an image is, so before the text joins
        (`text_from`) the maps then ask nothing of it.
    text_from : float
        Share of the steps before the text joins, for an encoder with maps of findings. Until then VarNet and the maps
        learn by the maps' loss, and that of VarNet's image, alone, and then they stand and the rest learns by the text:
        one that is taught by maps which know nothing yet learns not to listen to them. The learning rate begins anew
        with the text. The reconstruction term joins with the text, so it does not reach VarNet.
    varnet_until : float
        Share of the steps after which VarNet stands, if the text has not ended its learning by then; what restores its
        image, and the maps, go on. A batch that comes again (`data_echo`) then costs these alone. Texts are told of new
        slices each time, once they have joined: with the same ones again less was learned (LOG.md).
    """

    trainable, joining = "encoder", "text_from"

    def __init__(
        self,
        model: TwoStageModel,
        name: str = "stage1",
        label_smoothing: float = 0.0,
        map_weight: float = 0.0,
        recon_weight: float = 0.0,
        image_weight: float = 0.0,
        text_from: float = 0.0,
        varnet_until: float = 1.0,
    ) -> None:
        super().__init__(model)
        self.name, self.label_smoothing = name, label_smoothing
        self.map_weight, self.recon_weight, self.image_weight = map_weight, recon_weight, image_weight
        self.text_from, self.varnet_until = text_from, varnet_until
        self.ssim_loss = VolumeSSIMLoss().to(model.device)

    @classmethod
    def of(cls, model: TwoStageModel, config: Stage1Parameters) -> Self:
        """Stage 1 as its parameters have it; its control has no maps to wait for, and is made with less."""
        weights = config.label_smoothing, config.finding_map_weight, config.recon_weight, config.varnet_image_weight
        return cls(model, "stage1", *weights, config.text_from, config.varnet_until)

    @property
    def complete(self) -> bool:
        """Whether the text has joined, where there are maps that it could wait for."""
        return not self._maps_first or self.progress >= self.text_from

    @property
    def partial(self) -> bool:
        """The maps and VarNet learn, or all the rest; or all but VarNet."""
        return self._maps_first or self._varnet_stands

    @property
    def rate_anew_from(self) -> float:
        """Where the text joins: a ViT that has not learned yet would begin at what the maps have left of the rate."""
        return self.text_from if self._maps_first else 0.0

    @property
    def _maps_first(self) -> bool:
        return self.text_from > 0 and getattr(self.model.encoder, "finding_maps", None) is not None

    @property
    def echoed(self) -> tuple[float, float]:
        """While VarNet stands and the text is waited for, if it is; for the control, which keeps nothing, never."""
        encoder = self.model.encoder
        if not isinstance(encoder, KSpaceEncoder):
            return 1.0, 1.0
        last = self.text_from if self._maps_first else 1.0
        return min(0.0 if encoder.keep_varnet else self.varnet_until, last), last

    @property
    def _varnet_stands(self) -> bool:
        over = self.varnet_until < 1 and self.progress >= self.varnet_until
        return over or (self._maps_first and self.complete) or getattr(self.model.encoder, "keep_varnet", False)

    def weight(self, batch: Batch) -> float:
        """Analysis tokens."""
        return float((self.model.tokenize(batch.slices).labels != -100).sum())

    def loss(self, batch: Batch) -> BatchLoss:
        """Cross-entropy with label smoothing, summed over the analysis tokens [nats]; of maps of findings too."""
        encoder = self.model.encoder
        if not isinstance(encoder, KSpaceEncoder):  # the control, which has neither maps nor pixels
            return self._text_loss(batch, encoder(batch.kspace, batch.mask))[0]
        mirrored = torch.tensor([one.mirrored for one in batch.slices], device=batch.mask.device)
        image = None
        if self._varnet_stands:
            (image,) = self._echoed(batch, self._varnet_image)
        if not self.complete:
            return self._map_loss(batch, encoder, mirrored, image)
        stand = self._maps_first
        instead = self._true_maps(batch, encoder)
        prefix, maps, pixels = encoder.tokens_and_maps(batch.kspace, batch.mask, mirrored, stand, image, instead)
        (total, statistics), tokens = self._text_loss(batch, prefix)
        terms: dict[str, tuple[float, Tensor]] = {}
        if maps is not None:
            terms["finding_map_loss"] = 0.0 if stand else self.map_weight, self._map_losses(batch, encoder, maps)
        if encoder.pixel_head is not None:
            terms["recon_loss"] = self.recon_weight, self._recon_losses(batch, prefix, encoder, mirrored)
        if self.image_weight and not stand and (image is None or encoder.restoration is not None):
            terms["varnet_image_loss"] = self.image_weight, self._image_losses(batch, pixels, mirrored)
        added = _weighed(terms, tokens)
        total = total + added.total
        if stand:
            total = total + _zero(encoder.restoration, encoder.finding_maps)
        if image is not None:
            total = total + _zero(encoder.varnet)
        return BatchLoss(total, {**statistics, **added.statistics})

    @torch.no_grad()
    def _varnet_image(self, batch: Batch) -> Made:
        assert isinstance(self.model.encoder, KSpaceEncoder)
        return (self.model.encoder.upright_image(batch.kspace, batch.mask),)

    def _map_loss(self, batch: Batch, encoder: KSpaceEncoder, mirrored: Tensor, image: Tensor | None) -> BatchLoss:
        """That of the maps, and of VarNet's image, alone, in the same units."""
        pixels = encoder.pixels(batch.kspace, batch.mask, mirrored, image)
        # Held against the target, the image is learned from that alone: what maps ask of it is mostly noise beside.
        maps = encoder.maps_alone(pixels.detach() if self.image_weight else pixels)
        losses = self._map_losses(batch, encoder, maps)
        terms = {"finding_map_loss": (self.map_weight, losses)}
        if self.image_weight:
            terms["varnet_image_loss"] = self.image_weight, self._image_losses(batch, pixels, mirrored)
        total, statistics = _weighed(terms, (self.model.tokenize(batch.slices).labels != -100).sum(1))
        return BatchLoss(total + _zero(encoder), statistics)

    def _map_losses(self, batch: Batch, encoder: KSpaceEncoder, maps: Tensor) -> Tensor:
        """The maps' loss of each slice (B,)."""
        matrix = (batch.kspace.shape[-2], batch.kspace.shape[-1])
        return finding_map_losses(maps, batch.slices, encoder.finding_labels, matrix)

    @staticmethod
    def _true_maps(batch: Batch, encoder: KSpaceEncoder) -> tuple[Tensor, Tensor] | None:
        """Maps that show what is there, and the `forced` slices, where that is known; None if there is none."""
        forced = torch.tensor([one.forced and one.boxes is not None for one in batch.slices])
        if encoder.finding_maps is None or not forced.any():
            return None
        matrix, size = (batch.kspace.shape[-2], batch.kspace.shape[-1]), (encoder.img_size, encoder.img_size)
        there = ellipses_seen(batch.slices, encoder.finding_labels, matrix, size) > 0
        maps = torch.where(there, math.inf, -math.inf)
        return maps.to(batch.mask.device), forced.to(batch.mask.device)

    def _text_loss(self, batch: Batch, prefix: Tensor) -> tuple[BatchLoss, Tensor]:
        """Cross-entropy from k-space tokens, and each slice's analysis tokens (B,)."""
        result = self.model.analysis_loss_from_prefix(prefix, batch.slices, self.label_smoothing)
        tokens = float(result.tokens.sum())
        statistics = {
            "cross_entropy": float(result.cross_entropy.sum()) / tokens,
            "token_accuracy": float(result.correct.sum()) / tokens,
        }
        return BatchLoss(result.loss, statistics), result.tokens

    def _recon_losses(self, batch: Batch, prefix: Tensor, encoder: KSpaceEncoder, mirrored: Tensor) -> Tensor:
        """The reconstruction term of each slice (B,)."""
        assert encoder.pixel_head is not None
        target = self._target(batch, mirrored, encoder.img_size, "recon_weight")
        image = from_patches(encoder.pixel_head(self.model.image_tokens_from_prefix(prefix)), encoder.img_size).float()
        return (image - target).abs().mean((-2, -1))

    def _image_losses(self, batch: Batch, pixels: Tensor, mirrored: Tensor) -> Tensor:
        """That of VarNet's image, of each slice (B,)."""
        target = self._target(batch, mirrored, pixels.shape[-1], "varnet_image_weight")
        # a root has no gradient at zero, which is what lies beside a narrow image
        magnitude = pixels.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        return (magnitude - target).abs().mean((-2, -1)) + self.ssim_loss(magnitude, target, target.amax((-2, -1)))

    @staticmethod
    def _target(batch: Batch, mirrored: Tensor, size: int, parameter: str) -> Tensor:
        """The target as the encoder sees the slice, mean square 1 unless it is empty: (B, size, size)."""
        if batch.target is None:
            raise ValueError(f"{parameter}: {batch.slices[0].file} has no reconstruction_rss; set it to 0")
        # by way of the matrix, as the encoder's image: at odd sizes a direct crop may lie a pixel beside it
        target = center_crop_or_pad(center_crop_or_pad(batch.target, batch.kspace.shape[-2:]), (size, size))
        target = torch.where(mirrored[:, None, None], target.flip(-1), target)
        return target / positive(target.square().mean((-2, -1), keepdim=True).sqrt())

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
    name : {"stage2", "plain"}
    image_tokens : callable, optional
        Gives a batch's image tokens: the model if left out, or `TokenCache.image_tokens`.
    tokens_from : float
        Share of the steps before image tokens join. Until then zeros are in their place, and neither encoder (but for
        the image that a decoder with `encoder_image` starts from) nor backbone runs: the decoder learns what the
        measured data say first, which is the longer and cheaper part.
    data_echo : int
        Steps that each batch is decoded in (`ShapeBatchSampler`'s `echo`): what encoder and backbone make of it, and
        what of the decoder is not learned, is kept from the first to the last of them, in the host's memory.
    lesion_weight : float
        Of the mean of 1 − SSIM over the windows centred in or close to a slice's boxes, beside that over the image.
        Small lesions are the first that a mean over the image gives up. Validation judges by the image alone.
    """

    trainable, joining = "decoder", "tokens_from"

    def __init__(
        self,
        model: TwoStageModel,
        name: str = "stage2",
        image_tokens: Callable[[Batch], Tensor] | None = None,
        tokens_from: float = 0.0,
        lesion_weight: float = 0.0,
        data_echo: int = 1,
    ) -> None:
        super().__init__(model)
        self.data_echo = data_echo
        self.name, self.tokens_from, self.lesion_weight = name, tokens_from, lesion_weight
        self.image_tokens = image_tokens
        self.ssim_loss = VolumeSSIMLoss().to(model.device)

    @classmethod
    def of(
        cls,
        model: TwoStageModel,
        config: Stage2Parameters,
        name: str = "stage2",
        image_tokens: Callable[[Batch], Tensor] | None = None,
    ) -> Self:
        """Stage 2, or its control, as its parameters have it."""
        return cls(model, name, image_tokens, config.tokens_from, config.lesion_weight, config.data_echo)

    @property
    def complete(self) -> bool:
        """Whether image tokens have joined, where there are any."""
        decoder = self.model.decoder
        assert decoder is not None
        return not decoder.token_dim or self.progress >= self.tokens_from

    def weight(self, batch: Batch) -> float:
        """Slices."""
        return float(len(batch.slices))

    def reconstruct(self, batch: Batch) -> Tensor:
        """The image (B, h, w) [file units]; encoder and backbone are frozen, so they run without a graph."""
        return self.model.reconstruct(batch, *self._echoed(batch, self._frozen, self._enough))

    def _enough(self, made: Made) -> bool:
        """Whether image tokens are among what was kept, if they are wanted by now."""
        return made[0] is not None or not self._wants_tokens

    @torch.no_grad()
    def _frozen(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Image tokens, where they have joined, and the images that a decoder with `encoder_image` starts from."""
        if not self._wants_tokens:
            return None, self.model.start_images(batch)
        if self.image_tokens is not None:
            return self.image_tokens(batch), self.model.start_images(batch)
        return self.model.tokens_and_starts(batch)

    @property
    def _wants_tokens(self) -> bool:
        decoder = self.model.decoder
        assert decoder is not None
        return decoder.token_dim > 0 and self.complete

    def loss(self, batch: Batch) -> BatchLoss:
        """1 − SSIM, and its weighted mean over lesions, summed over the slices."""
        if batch.target is None:
            raise ValueError(f"{batch.slices[0].file} has no reconstruction_rss; stage 2 cannot train on it")
        image = self.reconstruct(batch)
        weights = None
        if self.lesion_weight:
            shares = torch.stack([lesion_shares(one.boxes or (), one.recon) for one in batch.slices])
            weights = self.lesion_weight * shares.to(image.device)
        losses = self.ssim_loss(image, batch.target, batch.maximum, weights)
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


def _weighed(terms: dict[str, tuple[float, Tensor]], tokens: Tensor) -> BatchLoss:
    """Slices' losses by their weights, summed over tokens (B,) as a text's are, so that batches can be split."""
    total, statistics = torch.zeros((), device=tokens.device), {}
    for name, (weight, losses) in terms.items():
        term = (losses * tokens).sum()
        statistics[name] = float(term.detach()) / float(tokens.sum())
        total = total + weight * term
    return BatchLoss(total, statistics)


def _zero(*modules: nn.Module | None) -> Tensor | int:
    """Zero, with a graph to all that is trained in some modules: what stands has a gradient of zeros, not none."""
    return 0 * sum(p.sum() for one in modules if one is not None for p in one.parameters() if p.requires_grad)


def pick_device(device: str) -> torch.device:
    """auto: cuda if there is one, of several processes each its own; config has refused cuda where it is absent."""
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


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
    """Train one part of the model, from its start or from where an earlier process left off.

    With ``config.num_processes`` above 1 the training itself happens in as many processes of its own, started with
    `accelerate launch`; this one shows how far they are and takes over what they have learned.

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
        Called after each step with the step's entry in the log.
    on_epoch : callable, optional
        Called with the history after each epoch.

    Returns
    -------
    History
        The model holds the last epoch's weights; the best epoch's are in ``<stage>_best_model.pt``.

    Raises
    ------
    ParameterError
        The folder holds a training of this stage already and `config.resume` is false, or was begun with other
        parameters, or another process is at work in it.
    FloatingPointError
        A loss or gradient that is not finite; epoch, step, files and slices are named.
    MemoryError
        Naming the parameters to turn.
    TrainingStopped
        On the run's stop file (see `runs.request_stop`), after the step, with the state saved.
    """
    trainer = Trainer(stage, config, train_loader, val_loader, directory, interactive, on_step, on_epoch)
    try:
        return trainer.run_in_processes() if config.num_processes > 1 and not launched() else trainer.run()
    finally:
        stage.progress = 1.0
        stage.echoes.clear()
