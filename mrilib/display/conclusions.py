"""Conclusions of 04_evaluate in words, computed from metrics.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from mrilib.display.tables import SMALL_SSIM, markdown_text
from mrilib.metrics.methods import in_order, method_label

Section = Mapping[str, Mapping[str, Mapping[str, Any]]]  # metrics.json's "reconstruction": acceleration → method
CONTROL = "trained_without_tokens"
LESION_METHODS = ("model", CONTROL, "zero_filled")


def _interval(values: Sequence[float] | None, form: str = ".3f") -> str:
    """Format an interval: "0.857 to 0.885"; empty if there is none."""
    return f"{values[0]:{form}} to {values[1]:{form}}".replace("-", "−") if values else ""


def with_interval(value: float | None, values: Sequence[float] | None, form: str = ".3f") -> str:
    """Format a value with its interval: "0.872 (0.857 to 0.885)"; "–" without a value."""
    if value is None:
        return "–"
    return f"{value:{form}}".replace("-", "−") + (f" ({_interval(values, form)})" if values else "")


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


# ------------------------------------------------------------------------------------------------- the answer


def answer(metrics: Mapping[str, Any], test_set: str, decoder_uses_tokens: bool) -> str:
    """Answer the questions of the notebook in a paragraph and a table, in Markdown.

    Parameters
    ----------
    metrics : mapping
        metrics.json.
    test_set : str
        `inference.describe_test_set`.
    decoder_uses_tokens : bool
    """
    section = _scored(metrics)
    first_sentence, *others = sentences(metrics, decoder_uses_tokens)
    lines = [" ".join([f"**{first_sentence}**", *others]), ""]
    if section:
        first = next(iter(section.values()))["model"]
        data = f"{first['volumes']} test volumes of {_patients(first['patients'])}, {markdown_text(test_set)}"
        intervals = "In brackets: 95% intervals over patients. " if first["patients"] > 1 else ""
        seeds = "The intervals do not hold the spread between trainings." if intervals else ""
        lines += [*_answer_table(section), "", f"*{data}. {intervals}{seeds}*"]
    return "\n".join(lines)


def _scored(metrics: Mapping[str, Any]) -> Section:
    return {a: methods for a, methods in metrics.get("reconstruction", {}).items() if "model" in methods}


def sentences(metrics: Mapping[str, Any], decoder_uses_tokens: bool) -> list[str]:
    """State what metrics.json means: value of the tokens, lost lesions, quality of the text."""
    section, analysis = _scored(metrics), metrics.get("analysis")
    stated = [_token_sentence(section, decoder_uses_tokens), _lesion_sentence(section)]
    stated += [_text_sentence(analysis)] if analysis else []
    return [sentence for sentence in stated if sentence]


def _patients(count: int) -> str:
    return f"{count} patient{'s' * (count != 1)}"


def _token_sentence(section: Section, decoder_uses_tokens: bool) -> str:
    if not section:
        return "The images were written but not scored: no test volume has a target."
    if not decoder_uses_tokens:
        return "The decoder uses no image tokens: the language model has no part in the image."
    compared = {acceleration: methods[CONTROL] for acceleration, methods in section.items() if CONTROL in methods}
    if not compared:
        return "Whether the image tokens help was not measured: there is no decoder trained without tokens."
    if any(scores["ssim_difference_ci95"] is None for scores in compared.values()):
        return "Whether the image tokens help is open: one test patient gives no interval."
    verdicts: dict[str, list[str]] = {}
    for acceleration, scores in compared.items():
        low, high = scores["ssim_difference_ci95"]
        verdict = "do not measurably change the image"
        if low > 0 or high < 0:
            small = "slightly " if abs(scores["ssim_difference"]) < SMALL_SSIM else ""
            verdict = f"make the image {small}{'better' if low > 0 else 'worse'}"
        verdicts.setdefault(verdict, []).append(f"{acceleration}x")
    parts = [f"{verdict} at {_listed(places)}" for verdict, places in verdicts.items()]
    return f"By SSIM the image tokens {_listed(parts)}, compared with the same decoder trained without them."


def _lesion_sentence(section: Section) -> str:
    measured = {a: methods for a, methods in section.items() if "lesions" in methods["model"]}
    if not measured:
        return ""
    parts = [f"{m['model']['lesions_lost']} of {m['model']['lesions']} lesions at {a}x" for a, m in measured.items()]
    text = f"The model loses {_listed(parts)}"
    control = [str(methods[CONTROL]["lesions_lost"]) for methods in measured.values() if CONTROL in methods]
    return f"{text}; the decoder trained without tokens loses {_listed(control)}." if control else f"{text}."


def _text_sentence(analysis: Mapping[str, Any]) -> str:
    sentences = []
    if analysis["contrast_accuracy"] is not None:
        sentences.append(
            f"The generated text names the right contrast in {analysis['contrast_accuracy']:.0%} of the cases "
            f"(always the commonest contrast: {analysis['contrast_commonest']:.0%})."
        )
    if analysis["finding_f1"] is not None:
        interval = _interval(analysis["finding_f1_ci95"], ".2f")
        best = analysis["finding_f1_best_constant"]
        sentences.append(
            f"Over all accelerations it finds {analysis['findings_found']} of {analysis['findings_true']} findings and "
            f"invents {analysis['findings_invented']}: F1 {analysis['finding_f1']:.2f}"
            + (f", 95% interval {interval}" if interval else "")
            + ("." if best is None else f"; the best constant answer has {best:.2f}.")
        )
    return " ".join(sentences) or "The generated text could not be scored."


def _answer_table(section: Section) -> list[str]:
    """Write a row per acceleration; columns without a value are left out."""
    columns: dict[str, list[str]] = {"acceleration": [f"{acceleration}x" for acceleration in section]}

    def add(name: str, method: str, key: str, has_interval: bool = False, form: str = "") -> None:
        cells = []
        for methods in section.values():
            scores = methods.get(method, {})
            if key not in scores:
                cells.append("–")
            elif has_interval:
                cells.append(with_interval(scores[key], scores[f"{key}_ci95"], form))
            else:
                cells.append(f"{scores[key]} of {scores['lesions']}")
        if set(cells) != {"–"}:
            columns[name] = cells

    add("SSIM, two-stage model", "model", "ssim", True, ".3f")
    add("SSIM, decoder trained without tokens", CONTROL, "ssim", True, ".3f")
    add("difference", CONTROL, "ssim_difference", True, "+.4f")
    add("lesions lost, two-stage model", "model", "lesions_lost")
    add("lesions lost, decoder trained without tokens", CONTROL, "lesions_lost")
    rows = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return [f"| {' | '.join(row)} |" for row in rows]


# ------------------------------------------------------------------------------------------------- images


def image_conclusion(section: Section) -> str:
    """Compare the model's SSIM with every other method's at each acceleration; the token ablations are left out."""
    ablations = ("no_tokens", "other_patient_tokens", "zero_filled_compressed")
    lines = []
    for acceleration, methods in section.items():
        groups: dict[str, list[str]] = {}
        for name in in_order(methods):
            if name == "model" or name in ablations:
                continue
            interval = methods[name]["ssim_difference_ci95"]
            verdict = "not compared with (one test patient)"
            if interval is not None:
                low, high = interval
                verdict = "better than" if low > 0 else "worse than" if high < 0 else "not measurably different from"
            groups.setdefault(verdict, []).append(method_label(name))
        parts = [f"{verdict}: {', '.join(names)}" for verdict, names in groups.items()]
        lines.append(f"- **{acceleration}x**: by SSIM the two-stage model is {'; '.join(parts)}.")
    return "\n".join(lines)


def lesion_conclusion(section: Section, left_out: int) -> str:
    """Count the lost lesions of each method, and the boxes that were left out."""
    lines = []
    for acceleration, methods in section.items():
        measured = {name: methods[name] for name in LESION_METHODS if "lesions" in methods.get(name, {})}
        if not measured:
            continue
        total = measured["model"]["lesions"]
        parts = [f"{method_label(name)} {scores['lesions_lost']}" for name, scores in measured.items()]
        quartiles = _interval(measured["model"]["lesion_retention_quartiles"][::2], ".2f")
        lines.append(
            f"- **{acceleration}x**: lost of {total} lesions: {', '.join(parts)}. "
            f"The middle half of the model's contrast retentions is {quartiles}."
        )
    if left_out:
        lines.append(f"- Left out for all methods: {left_out} boxes with a lesion that the target hardly shows.")
    return "\n".join(lines)


def token_conclusion(section: Section) -> str:
    """Answer "do the tokens help the image?" by paired SSIM differences with 95% intervals over patients."""
    lines = []
    for acceleration, methods in section.items():
        parts = []
        for method, words in (
            (CONTROL, "the decoder trained without tokens"),
            ("other_patient_tokens", "itself with shuffled tokens"),
            ("no_tokens", "itself with zero tokens"),
        ):
            if method not in methods:
                continue
            mean, interval = (methods[method][f"ssim_difference{end}"] for end in ("", "_ci95"))
            if interval is None:
                parts.append(f"{with_interval(mean, None, '+.4f')} against {words}")
                continue
            low, high = interval
            verdict = "better" if low > 0 else "worse" if high < 0 else "not measurably different"
            if abs(mean) < SMALL_SSIM and verdict in ("better", "worse"):
                verdict = f"slightly {verdict}"
            preposition = "from" if verdict.startswith("not") else "than"
            measured = f"{with_interval(mean, None, '+.4f')}, 95% interval {_interval(interval, '+.4f')}"
            parts.append(f"{verdict} {preposition} {words} ({measured})")
        if methods["model"]["patients"] < 2:
            lines.append(
                f"- **{acceleration}x**: SSIM of the model with its own tokens: {'; '.join(parts)} "
                "(one test patient: no interval, so no verdict)."
            )
        else:
            lines.append(f"- **{acceleration}x**: by SSIM the model with its own tokens is {'; '.join(parts)}.")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- texts


def text_conclusion(scores: Mapping[str, Any]) -> str:
    """Answer "does the text know the scan?" from the "analysis" section; standard errors are clustered by patient."""
    lines = [
        _cross_entropy_sentence(scores, baseline, words)
        for baseline, words in (
            ("without_kspace", "the constant prefix (baseline without k-space)"),
            ("other_patient", "shuffled tokens"),
        )
        if scores.get(f"cross_entropy_gain_over_{baseline}") is not None
    ]
    left_out = scores["samples"] - scores["other_patient_samples"]
    if left_out:
        excluded = " They are left out on both sides of the difference." if scores["other_patient_samples"] else ""
        lines.append(
            f"{left_out} of {scores['samples']} samples have no score with shuffled tokens: there is no other patient "
            f"at their acceleration.{excluded}"
        )
    if not scores["contrast_samples"]:
        lines.append("Contrast: no score, as no test sample has a contrast that is in the list.")
    else:
        share, error = scores["contrast_commonest"], scores["contrast_commonest_se"]
        lines.append(
            f"The contrast accuracy is {scores['contrast_accuracy']:.1%} of {scores['contrast_samples']} slices; "
            f"the commonest contrast as a constant answer has {share:.1%}{'' if error is None else f' ± {error:.1%}'}."
        )
    lines.append(f"Findings (exact label, side and region): {_findings_sentence(scores)}")
    return "\n".join(f"- {line}" for line in lines)


def _cross_entropy_sentence(scores: Mapping[str, Any], baseline: str, words: str) -> str:
    gain, error = (scores[f"cross_entropy_gain_over_{baseline}{end}"] for end in ("", "_se"))
    if error is None:
        return (
            f"The cross-entropies with the own k-space and with {words} differ by {gain:.3f} nats per token; "
            "one patient gives no standard error."
        )
    verdict = "lower than" if gain > 2 * error else "higher than" if gain < -2 * error else "no different from that"
    return (
        f"The cross-entropy with the own k-space is {verdict} with {words}: by {gain:.3f} ± {error:.3f} nats per token "
        "(standard error clustered by patient)."
    )


def _findings_sentence(scores: Mapping[str, Any]) -> str:
    if not scores["reviewed_samples"]:
        return "no score, as no test sample was reviewed for findings."
    best = scores["finding_f1_best_constant"]
    constant = f"the best constant answer has {'none' if best is None else f'{best:.3f}'}."
    if scores["finding_f1"] is None:
        return f"no F1, as there was nothing to find and nothing was claimed; {constant}"
    interval = _interval(scores["finding_f1_ci95"])
    spread = f" (95% interval {interval})" if interval else ""
    return f"F1 {scores['finding_f1']:.3f}{spread}; {constant}"
