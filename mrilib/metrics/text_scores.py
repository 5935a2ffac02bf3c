"""Scores of generated texts: findings by label, side and region, and contrast or level accuracy."""

import logging
from collections import Counter
from collections.abc import Sequence

from mrilib.data.findings import Facts, Finding

logger = logging.getLogger("mrilib")


# ------------------------------------------------------------------------------------------------- scores


def finding_scores(truth: Sequence[Facts], predicted: Sequence[Facts | None]) -> dict[str, float | None]:
    """Micro-averaged scores of findings over exact (label, side, region).

    Over all reviewed slices, F1 = 2 TP / (2 TP + FP + FN). A clean slice counts: every finding claimed on it is a
    false positive (and calling it clean adds nothing, as there is nothing to find). Text that did not parse (None),
    or that says nothing about findings, misses every true finding and counts as one false positive, so that
    rubbish costs on clean slices too. Slices that nobody reviewed are left out.

    Parameters
    ----------
    truth : sequence of Facts
    predicted : sequence of Facts or None
        what ``parse`` gave for the generated text, None where it raised

    Returns
    -------
    dict
        f1, precision, recall, any_finding_accuracy (share of slices rightly called clean or not), parsed (share of
        slices with readable findings), samples (reviewed slices). A ratio of nothing to nothing is None: F1 where
        there was nothing to find and nothing claimed, all of them where nothing was reviewed.
    """
    true_positives = false_positives = false_negatives = right = readable = samples = 0
    for facts, guess in zip(truth, predicted, strict=True):
        counts = finding_counts(facts, guess)
        if counts is None:
            continue
        samples += 1
        right_ones, wrong_ones, missed = counts
        true_positives += right_ones
        false_positives += wrong_ones
        false_negatives += missed
        if guess is not None and guess.findings is not None:
            readable += 1
            right += bool(facts.findings) == bool(guess.findings)
    return {
        "f1": _ratio(2 * true_positives, 2 * true_positives + false_positives + false_negatives),
        "precision": _ratio(true_positives, true_positives + false_positives),
        "recall": _ratio(true_positives, true_positives + false_negatives),
        "any_finding_accuracy": _ratio(right, samples),
        "parsed": _ratio(readable, samples),
        "samples": samples,
    }


def finding_counts(facts: Facts, guess: Facts | None) -> tuple[int, int, int] | None:
    """True positives, false positives and false negatives of one slice, as `finding_scores` sums them.

    None of a slice that nobody reviewed.
    """
    if facts.findings is None:
        return None
    found = set(facts.findings)
    if guess is None or guess.findings is None:
        return 0, 1, len(found)
    claimed = set(guess.findings)
    return len(found & claimed), len(claimed - found), len(found - claimed)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def best_constant_answer(facts: Sequence[Facts]) -> tuple[Finding, ...]:
    """The one set of findings that, given for every slice, has the highest F1 of ``finding_scores`` on `facts`.

    With N reviewed slices and T true findings, a constant set K scores 2 Σ n_f / (N |K| + T), n_f being the number of
    slices with finding f. For a given size the commonest findings are best, so taking them one by one as long as the
    score rises is exact. Returns () where no slice has a finding.
    """
    reviewed = [one.findings for one in facts if one.findings is not None]
    counts = Counter(found for findings in reviewed for found in findings)
    total = sum(counts.values())
    best, best_f1, hits = 0, 0.0, 0
    ranked = sorted(counts, key=lambda found: (-counts[found], found))
    for size, found in enumerate(ranked, start=1):
        hits += counts[found]
        f1 = 2 * hits / (len(reviewed) * size + total)
        if f1 > best_f1:
            best, best_f1 = size, f1
    return tuple(sorted(ranked[:best]))


def attribute_accuracy(truth: Sequence[Facts], predicted: Sequence[Facts | None], attribute: str) -> float | None:
    """Share of slices whose "contrast" or "level" the text names rightly; text that did not parse is wrong.

    Slices of an unknown contrast are left out. None where no slice is left.
    """
    if attribute not in ("contrast", "level"):
        raise ValueError(f"attribute {attribute!r} is neither 'contrast' nor 'level'")
    right = [
        guess is not None and getattr(facts, attribute) == getattr(guess, attribute)
        for facts, guess in zip(truth, predicted, strict=True)
        if getattr(facts, attribute) is not None
    ]
    return _ratio(sum(right), len(right))
