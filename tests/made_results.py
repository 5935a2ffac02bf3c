"""Invented histories and scores of trainings."""

from typing import Any

from mrilib.metrics.image import VolumeScore
from mrilib.training.history import History


def history(steps: int = 12, epochs: int = 3, text: bool = True) -> History:
    """Return the history of stage 1 (`text`) or stage 2."""
    result = History(best_epoch=2)
    for step in range(1, steps + 1):
        entry = {"epoch": (step - 1) * epochs // steps + 1, "step": step, "loss": 3.0 + 1 / step, "learning_rate": 1e-3}
        entry |= {"gradient_norm": 2.0, "gradient_norm_vit": 1.0, "gradient_norm_frozen": 0.0, "seconds": 0.1}
        entry |= {"cross_entropy": 1 / step, "token_accuracy": 0.5} if text else {}
        if not text:
            entry |= {f"{what}_{how}": 0.5 for what in ("target", "reconstruction") for how in ("mean", "max")}
        result.steps.append(entry)
    for epoch in range(1, epochs + 1):
        scores = {"val_token_accuracy": 0.4} if text else {"val_ssim": 0.8, "val_psnr": 25.0, "val_nmse": 0.1}
        result.epochs.append({"epoch": epoch, "train_loss": 3.0, "val_loss": 0.5 / epoch, **scores, "seconds": 1.0})
    return result


def volume_scores(ssim: float, patients: int = 4) -> list[VolumeScore]:
    """Return scores of two volumes per patient, with rising SSIM."""
    return [
        VolumeScore(f"f{i}", f"p{i // 2}", ("AXT1", "AXT2")[i % 2], ssim + 0.01 * i, 20.0 + i, 0.1, ssim - 0.1, 18.0)
        for i in range(2 * patients)
    ]


def score(patient: str, ssim: float, **others: Any) -> VolumeScore:
    """Return the scores of one volume."""
    values = {"file": patient, "acquisition": "AXT1", "psnr": 0, "nmse": 0, "ssim_head": ssim, "psnr_head": 0}
    return VolumeScore(patient=patient, ssim=ssim, **{**values, **others})


def image_scores(
    ssim: float, difference: float | None = None, lost: int | None = None, spread: float | None = 0.01
) -> Any:
    """Return a method's entry in metrics.json; `spread` is half the width of the intervals, None for one patient."""

    def interval(value: float) -> list[float] | None:
        return None if spread is None else [value - spread, value + spread]

    entry: dict[str, Any] = {"ssim": ssim, "ssim_ci95": interval(ssim), "ssim_head": ssim, "psnr": 30.0}
    entry |= {"volumes": 6, "patients": 1 if spread is None else 3}
    if difference is not None:
        entry |= {"ssim_difference": difference, "ssim_difference_ci95": interval(difference)}
    if lost is not None:
        entry |= {"lesions": 20, "lesions_lost": lost, "lesion_retention_quartiles": [0.4, 0.7, 0.9]}
    return entry
