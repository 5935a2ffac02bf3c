"""The value of the image tokens on validation volumes: SSIM with tokens minus SSIM of the decoder trained without."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader

from mrilib.data.dataset import Batch
from mrilib.data.fastmri_file import Volume
from mrilib.metrics import image as image_metrics
from mrilib.training.stages import ReconstructionStage


@torch.no_grad()
def volume_ssim(stage: ReconstructionStage, loader: DataLoader[Batch]) -> dict[str, float]:
    """SSIM of each volume as fastMRI defines it; volumes with an all-zero target are left out."""
    slices = defaultdict(list)
    for batch in loader:
        for score in stage.score(batch.to(stage.model.device)):
            slices[score["file"]].append(score)
    return {
        file: image_metrics.volume_metrics(scores)["ssim"]
        for file, scores in slices.items()
        if any(score["energy"] for score in scores)
    }


def token_value(
    stage: ReconstructionStage, control: ReconstructionStage, loader: DataLoader[Batch], volumes: Sequence[Volume]
) -> tuple[float, list[float] | None]:
    """Compare the trained stage with its control on the same slices and masks.

    Parameters
    ----------
    stage, control : ReconstructionStage
        With and without image tokens.
    loader : DataLoader
        Validation slices.
    volumes : sequence of Volume
        Their volumes, for the patients.

    Returns
    -------
    mean : float
        SSIM of the stage minus that of the control, mean over volumes.
    interval : list of float or None
        95% bootstrap interval over patients; None for a single patient.
    """
    own, other = (volume_ssim(one, loader) for one in (stage, control))
    patients = {volume.file: volume.patient for volume in volumes}
    change = [own[file] - other[file] for file in own]
    interval = image_metrics.bootstrap_interval(change, [patients[file] for file in own])
    return sum(change) / len(change), interval


def token_value_sentence(mean: float, interval: Sequence[float] | None) -> str:
    """State the value of the tokens in a sentence."""
    if interval is None:
        return f"With tokens SSIM changes by {mean:+.4f}; one validation patient gives no interval, so no verdict."
    low, high = interval
    verdict = "improve the image in this training" if low > 0 else "make the image worse" if high < 0 else ""
    return (
        f"With tokens SSIM changes by {mean:+.4f} (95% interval over validation patients {low:+.4f} to {high:+.4f}): "
        f"the tokens {verdict or 'do not improve the image measurably'}."
    )
