"""Time saved by the token cache: an epoch of stage 2 with and without it, next to the decoder's training steps."""

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

PASSES = 2  # over the cached data; the best counts


class CacheTimes(NamedTuple):
    """Times of one epoch of stage 2 on its training and validation slices [s]."""

    steps: int  # number of training steps
    tokens_computed: float  # load slices and compute image tokens
    tokens_cached: float  # read slices and image tokens from the disk
    decoder: float  # the decoder's training steps, on batches in memory
    epoch: float  # the whole epoch with the cache: training, validation, checkpoints

    @property
    def saved(self) -> float:
        """Speed-up of everything but the decoder."""
        return self.tokens_computed / self.tokens_cached

    @property
    def overhead(self) -> float:
        """Time of the whole epoch over the decoder's training steps."""
        return self.epoch / self.decoder


def measure(stage1: Stage1Parameters, stage2: Stage2Parameters) -> CacheTimes:
    """Time the parts of an epoch on the data of `stage2`, with one mask per slice.

    The encoder of `stage1` is untrained, which costs the same. The cache is in a temporary folder and read from the
    page cache, as in a training whose tokens fit in memory.

    Raises
    ------
    DataError
        If the data are missing.
    """
    with tempfile.TemporaryDirectory(prefix="token-cache-") as name:
        folder = Path(name)
        values = {"epochs": 1 + PASSES, "masks_per_slice": 1, "train_control": False}
        config = stage2.model_copy(update=values | {"token_cache_dir": str(folder / "cache")})
        loaders = setup.make_loaders(config)
        computed = _token_seconds(_stage(stage1, config), loaders)
        stage = _stage(stage1, config)
        loaders = setup.stage_loaders(config, stage, loaders)
        cached = min(_token_seconds(stage, loaders) for _ in range(PASSES))
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


def _token_seconds(stage: stages.ReconstructionStage, loaders: setup.Loaders) -> float:
    """Time everything before the decoder in an epoch: loading slices and computing or reading image tokens."""
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
    """Tabulate the times."""
    rows = {
        "slices and image tokens, computed": f"{times.tokens_computed:.1f} s",
        "slices and image tokens, from the cache": f"{times.tokens_cached:.2f} s ({times.saved:.0f} times faster)",
        f"{times.steps} training steps of the decoder alone": f"{times.decoder:.1f} s",
        "whole epoch with the cache": f"{times.epoch:.1f} s ({times.overhead:.2f} times the decoder's steps)",
    }
    return pd.DataFrame({"part": rows.keys(), "time per epoch": rows.values()})
