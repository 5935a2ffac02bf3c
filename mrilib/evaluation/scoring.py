"""Scores of an evaluation: images, lesions and texts, as metrics.json holds them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mrilib.config import EvaluateParameters, resolve
from mrilib.data.annotations import Annotations
from mrilib.data.dataset import FastMRIDataset, Volume
from mrilib.data.fastmri_file import is_phantom
from mrilib.evaluation.inference import score_texts, training_cost
from mrilib.evaluation.reconstructions import by_acceleration, score_reconstructions, summarize_methods
from mrilib.files import display_path
from mrilib.metrics.image import VolumeScore
from mrilib.metrics.lesions import Lesion, add_lesions, lesions_in


class Evaluation(NamedTuple):
    """Scores of a run's test data."""

    metrics: dict[str, dict[str, Any]]  # sections of metrics.json; "analysis" is missing without texts
    scores: dict[str, dict[str, list[VolumeScore]]]  # acceleration → method; empty without targets
    lesions: dict[str, dict[str, list[Lesion]]]  # acceleration → method; without accelerations that have no lesion
    faint_lesions: int  # boxes with a lesion that the target hardly shows, left out
    test_set: str


def score_evaluation(
    config: EvaluateParameters,
    volumes: Mapping[str, Sequence[Volume]],
    annotations: Annotations | None,
    rows: Sequence[dict[str, Any]],
    directory: Path,
) -> Evaluation:
    """Score the written reconstructions and the generated texts of the test volumes.

    Parameters
    ----------
    config : EvaluateParameters
    volumes : mapping
        "train" and "test" → volumes.
    annotations : Annotations or None
        Without annotations, or with ``crop: image``, no lesion is measured.
    rows : sequence of dict
        Rows of `Evaluator.run`; empty if the decoder uses no tokens.
    directory : Path
        The run's ``reconstructions/``.
    """
    groups = by_acceleration(volumes["test"], config.accelerations)
    scores = score_reconstructions(directory, volumes["test"], config.accelerations)
    reconstruction = summarize_methods(scores, config.seed)
    lesions: dict[str, dict[str, list[Lesion]]] = {}
    faint = 0
    if annotations is not None and config.crop == "readout":
        lesions, faint = lesions_in(directory, groups, annotations, scores)
        add_lesions(reconstruction, lesions)
    metrics = {"reconstruction": reconstruction, "cost": training_cost(config)}
    test_set = describe_test_set(config, volumes["test"])
    if rows:
        train = FastMRIDataset(volumes["train"], config, annotations)
        training_facts = [train.facts(index) for index in range(len(train))]
        analysis = score_texts(rows, training_facts) | {"test_set": test_set}
        parts = {str(a): [row for row in rows if row["acceleration"] == a] for a in groups}
        analysis["by_acceleration"] = {a: score_texts(part, training_facts) for a, part in parts.items()}
        metrics["analysis"] = analysis
    return Evaluation(metrics, scores, lesions, faint, test_set)


def describe_test_set(config: EvaluateParameters, volumes: Sequence[Volume]) -> str:
    """Name the test data: folder, phantom or not, distribution shift."""
    name = f"the test files of {display_path(resolve(config.test_dir or config.data_dir))}"
    if all(is_phantom(volume.path) for volume in volumes):
        name += " (a phantom)"
    return f"{name} with shift {config.shift}" if config.shift else name
