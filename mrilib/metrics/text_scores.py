"""Scores of generated texts: findings by label, side and region; accuracy of contrast and level."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mrilib.data.findings import Facts, Finding


def finding_scores(truth: Sequence[Facts], predicted: Sequence[Facts | None]) -> dict[str, float | None]:
    """Compute micro-averaged scores of findings, which match if label, side and region are equal.

    F1 = 2 TP / (2 TP + FP + FN) over all reviewed slices. On a slice without findings, every predicted finding is a
    false positive. A text that cannot be parsed, or that leaves findings out, misses every true finding and counts as
    one false positive. Unreviewed slices are left out.

    Parameters
    ----------
    truth : sequence of Facts
    predicted : sequence of Facts or None
        Parsed generated texts; None where `findings.parse` failed.

    Returns
    -------
    dict
        f1, precision, recall; any_finding_accuracy (fraction of slices with a correct "any finding or none"); parsed
        (fraction of slices with readable findings); samples (reviewed slices). A ratio of nothing to nothing is None.
    """
    true_positives = false_positives = false_negatives = correct = readable = samples = 0
    for facts, guess in zip(truth, predicted, strict=True):
        counts = finding_counts(facts, guess)
        if counts is None:
            continue
        samples += 1
        true_positives += counts[0]
        false_positives += counts[1]
        false_negatives += counts[2]
        if guess is not None and guess.findings is not None:
            readable += 1
            correct += bool(facts.findings) == bool(guess.findings)
    return {
        "f1": _ratio(2 * true_positives, 2 * true_positives + false_positives + false_negatives),
        "precision": _ratio(true_positives, true_positives + false_positives),
        "recall": _ratio(true_positives, true_positives + false_negatives),
        "any_finding_accuracy": _ratio(correct, samples),
        "parsed": _ratio(readable, samples),
        "samples": samples,
    }


def finding_counts(facts: Facts, guess: Facts | None) -> tuple[int, int, int] | None:
    """Count one slice's true positives, false positives and false negatives for `finding_scores`.

    Returns None for an unreviewed slice.
    """
    if facts.findings is None:
        return None
    true = set(facts.findings)
    if guess is None or guess.findings is None:
        return 0, 1, len(true)
    predicted = set(guess.findings)
    return len(true & predicted), len(predicted - true), len(true - predicted)


def count_errors(truth: Sequence[Facts], predicted: Sequence[Facts | None]) -> dict[str, int]:
    """Count true, found, missed and invented findings over the reviewed slices, as "analysis" keys of metrics.json.

    A text that cannot be parsed misses every true finding and invents none.

    Returns
    -------
    dict
        findings_true, findings_found, findings_missed, findings_invented; clean_slices (reviewed, without findings)
        and clean_slices_with_invented.
    """
    names = ("findings_true", "findings_found", "findings_missed", "findings_invented")
    counts = dict.fromkeys((*names, "clean_slices", "clean_slices_with_invented"), 0)
    for facts, guess in zip(truth, predicted, strict=True):
        if facts.findings is None:
            continue
        true, claimed = set(facts.findings), set((guess and guess.findings) or ())
        for name, findings in zip(names, (true, true & claimed, true - claimed, claimed - true), strict=True):
            counts[name] += len(findings)
        counts["clean_slices"] += not true
        counts["clean_slices_with_invented"] += not true and bool(claimed)
    return counts


def list_errors(facts: Facts, guess: Facts | None) -> list[str]:
    """List the errors of a generated text in words. Facts that are unknown are not counted as errors."""
    if guess is None:
        return ["not readable"]
    errors = []
    if facts.contrast is not None and guess.contrast != facts.contrast:
        errors.append(f"wrong contrast: {guess.contrast or 'none'}")
    if guess.level != facts.level:
        errors.append(f"wrong level: {guess.level}")
    if facts.findings is not None:
        true, claimed = set(facts.findings), set(guess.findings or ())
        for name, findings in (("missed", true - claimed), ("invented", claimed - true)):
            errors += [f"{name}: {one.label.lower()}, {one.side} {one.region}" for one in sorted(findings)]
    return errors


def contrast_confusion(truth: Sequence[Facts], predicted: Sequence[Facts | None]) -> dict[str, dict[str, int]]:
    """Count slices by true and generated contrast; a text without a readable contrast counts as "none"."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for facts, guess in zip(truth, predicted, strict=True):
        if facts.contrast is not None:
            counts[facts.contrast][(guess and guess.contrast) or "none"] += 1
    return {true: dict(row) for true, row in counts.items()}


def text_warning(analysis: Mapping[str, Any] | None) -> str:
    """State what a generated text is, and how often it misses and invents findings on the test data of its run.

    Parameters
    ----------
    analysis : mapping or None
        metrics.json's "analysis" section.
    """
    start = "Generated by a research model, not by a radiologist; not for diagnosis."
    if not analysis or not analysis.get("reviewed_samples") or "findings_true" not in analysis:
        return f"{start} How often it misses and invents findings: not measured."
    clean = analysis["clean_slices"]
    on_clean = f" {analysis['clean_slices_with_invented']} of {clean} texts on slices without findings invent one."
    return (
        f"{start} In {analysis['reviewed_samples']} texts on {analysis.get('test_set', 'the test data')} it missed "
        f"{analysis['findings_missed']} of {analysis['findings_true']} findings and invented "
        f"{analysis['findings_invented']}.{on_clean if clean else ''}"
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def best_constant_answer(facts: Sequence[Facts]) -> tuple[Finding, ...]:
    """Find the set of findings with the highest F1 of `finding_scores` when it is the answer for every slice.

    With N reviewed slices and T true findings, a constant set of k findings scores 2 Σ n_f / (N k + T), where n_f is
    the number of slices with finding f. The best set of a given size has the most frequent findings, so adding them
    one at a time while the score rises is exact. Returns () if no slice has a finding.
    """
    reviewed = [one.findings for one in facts if one.findings is not None]
    counts = Counter(finding for findings in reviewed for finding in findings)
    total = sum(counts.values())
    best_size, best_f1, hits = 0, 0.0, 0
    ranked = sorted(counts, key=lambda finding: (-counts[finding], finding))
    for size, finding in enumerate(ranked, start=1):
        hits += counts[finding]
        f1 = 2 * hits / (len(reviewed) * size + total)
        if f1 > best_f1:
            best_size, best_f1 = size, f1
    return tuple(sorted(ranked[:best_size]))


def attribute_accuracy(truth: Sequence[Facts], predicted: Sequence[Facts | None], attribute: str) -> float | None:
    """Compute the fraction of slices with a correct "contrast" or "level"; a text that was not parsed is wrong.

    Slices of unknown contrast are left out; None if no slice remains.
    """
    if attribute not in ("contrast", "level"):
        raise ValueError(f"attribute {attribute!r} is neither 'contrast' nor 'level'")
    correct = [
        guess is not None and getattr(facts, attribute) == getattr(guess, attribute)
        for facts, guess in zip(truth, predicted, strict=True)
        if getattr(facts, attribute) is not None
    ]
    return _ratio(sum(correct), len(correct))


def contrast_floor(counts: Mapping[str, int]) -> tuple[float | None, float | None]:
    """Compute the accuracy of always answering the most frequent contrast, and its binomial standard error.

    `counts` are the test slices of each contrast. Both values are None if it is empty.
    """
    total = sum(counts.values())
    if not total:
        return None, None
    share = max(counts.values()) / total
    return share, float(np.sqrt(share * (1 - share) / total))
