"""What the token cache saves: an epoch of stage 2 with and without it, beside the decoder's own steps."""

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from mrilib.config import Stage1Parameters, Stage2Parameters
from mrilib.data.dataset import Batch
from mrilib.training import device as device_module
from mrilib.training import loop, setup, stages

PASSES = 2  # over the cached data; the best is told


class CacheTimes(NamedTuple):
    """Seconds of one epoch of stage 2, its training and validation slices."""

    steps: int  # of training
    tokens_computed: float  # slices loaded and image tokens computed
    tokens_cached: float  # slices and image tokens read from the disk
    decoder: float  # the decoder's own training steps, on batches in memory
    epoch: float  # the whole epoch with the cache: training, validation, checkpoints

    @property
    def saved(self) -> float:
        """How many times faster everything but the decoder is."""
        return self.tokens_computed / self.tokens_cached

    @property
    def overhead(self) -> float:
        """The whole epoch over the decoder's own steps."""
        return self.epoch / self.decoder


def measure(stage1: Stage1Parameters, stage2: Stage2Parameters) -> CacheTimes:
    """Time an epoch's parts on the data of `stage2`, with one mask a slice.

    The encoder is one of `stage1` without training, which costs the same. The cache is filled into a temporary folder
    and is read from the page cache, as it is in a training whose tokens fit in memory.

    Raises
    ------
    DataError
        If the data are not there.
    """
    with tempfile.TemporaryDirectory(prefix="token-cache-") as name:
        folder = Path(name)
        given = {"epochs": 1 + PASSES, "masks_per_slice": 1, "train_control": False}
        config = stage2.model_copy(update=given | {"token_cache_dir": str(folder / "cache")})
        loaders = setup.make_loaders(config)
        computed = _seconds(_stage(stage1, config), loaders)
        stage = _stage(stage1, config)
        loaders = setup.stage_loaders(config, stage, loaders)
        cached = min(_seconds(stage, loaders) for _ in range(PASSES))
        batches = list(loaders.train)
        history = loop.fit(stage, config, loaders.train, loaders.val, folder / "run")
        epoch = min(entry["seconds"] for entry in history.epochs[1:])
        decoder = min(_decoder_seconds(stage, batches, config.max_grad_norm) for _ in range(PASSES))
    return CacheTimes(len(batches), computed, cached, decoder, epoch)


def _stage(stage1: Stage1Parameters, config: Stage2Parameters) -> stages.ReconstructionStage:
    device = device_module.prepare(config)
    stage = setup.build_stage(config, device, setup.build_stage(stage1, device).model.encoder)
    assert isinstance(stage, stages.ReconstructionStage)
    return stage


def _seconds(stage: stages.ReconstructionStage, loaders: setup.Loaders) -> float:
    """Everything that an epoch does before the decoder: slices loaded, image tokens got."""
    begin = time.perf_counter()
    with torch.no_grad():
        for loader in (loaders.train, loaders.val):
            for batch in loader:
                stage.image_tokens(batch.to(stage.model.device))
    return time.perf_counter() - begin


def _decoder_seconds(stage: stages.ReconstructionStage, batches: list[Batch], max_grad_norm: float) -> float:
    parameters = stage.model.freeze("decoder")
    optimizer = torch.optim.AdamW(parameters)
    stage.model.train()
    begin = time.perf_counter()
    for batch in batches:
        (stage.loss(batch.to(stage.model.device)).total / len(batch.slices)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - begin


def table(times: CacheTimes) -> pd.DataFrame:
    """The seconds in words, one line each."""
    rows = {
        "slices and image tokens, computed": f"{times.tokens_computed:.1f} s",
        "slices and image tokens, from the cache": f"{times.tokens_cached:.2f} s ({times.saved:.0f} times faster)",
        f"the decoder's own {times.steps} steps": f"{times.decoder:.1f} s",
        "whole epoch with the cache": f"{times.epoch:.1f} s ({times.overhead:.2f} times the decoder's steps)",
    }
    return pd.DataFrame({"what": rows.keys(), "seconds an epoch": rows.values()})
