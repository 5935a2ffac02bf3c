"""The methods of metrics.json and of params/comparison: their order and their labels in tables and figures."""

from collections.abc import Iterable

# Labels by key of metrics.json or file in params/comparison/methods, in the order of tables and figures.
METHOD_LABELS = {
    "model": "two-stage model",
    "two_stage": "two-stage model",
    "trained_without_tokens": "decoder trained without tokens",
    "no_token_decoder": "decoder trained without tokens (same steps)",
    "no_token_decoder_equal_time": "decoder trained without tokens (time of both stages)",
    "no_tokens": "zero tokens",
    "other_patient_tokens": "shuffled tokens",
    "varnet": "fastMRI's VarNet",
    "varnet_measured_lines": "VarNet with measured lines",
    "varnet_combined": "VarNet's cascades on the combined image",
    "fastmri_unet": "fastMRI's U-Net",
    "bart": "BART l1-wavelet",
    "nearest_training_slice": "nearest training slice (oracle)",
    "zero_filled": "zero-filled",
    "zero_filled_compressed": "zero-filled, compressed coils",
}


def in_order(names: Iterable[str]) -> list[str]:
    """Sort methods, without repeats, by the order of `METHOD_LABELS`; unknown ones come last."""
    methods = list(dict.fromkeys(names))
    return [name for name in METHOD_LABELS if name in methods] + [name for name in methods if name not in METHOD_LABELS]


def method_label(name: str) -> str:
    """Return a method's label in tables and figures from its key: "fastmri_unet" → "fastMRI's U-Net"."""
    return METHOD_LABELS[name] if name in METHOD_LABELS else name.replace("_", " ")
