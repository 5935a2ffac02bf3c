"""Two-stage MRI reconstruction with a frozen language-model backbone.

Importing the package is fast: its names are loaded at their first use (PEP 562), and the backbone is registered with
transformers when a model's configuration is first looked up.

Ten files lead from a file on disk to the loss. In the order of reading:

1. ``config``: every parameter of every notebook
2. ``physics/fourier``: Fourier transform, root sum of squares, crop
3. ``data/dataset``: one undersampled slice, and a batch of them
4. ``data/findings``: contrast, level and findings as text and back
5. ``model/unet``: the U-Net
6. ``model/encoder``: k-space to tokens
7. ``model/decoder``: tokens and measured data to an image
8. ``model/two_stage``: encoder, frozen backbone and decoder together
9. ``training/stages``: the two losses and the validation scores
10. ``training/loop``: the training loop

docs/architecture.md lists the packages and where a new loss, decoder, encoder or mask goes.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_MODULES = {
    "FastMRIDataset": "data.dataset",
    "ImageDecoder": "model.decoder",
    "KSpaceEncoder": "model.encoder",
    "NirvanaConfig": "backbone.nirvana",
    "NirvanaForCausalLM": "backbone.nirvana",
    "TwoStageModel": "model.two_stage",
    "evaluate_volumes": "evaluation.reconstructions",
    "from_pretrained": "runs.pretrained",
    "gated_delta_rule": "backbone.delta_rule",
}
_AUTO = "transformers.models.auto.configuration_auto"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mrilib' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mrilib.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


def _register_at_first_use(auto: ModuleType) -> None:
    """Let the first look-up of AutoConfig import `mrilib.backbone.nirvana`, which registers the backbone."""
    methods = {name: auto.AutoConfig.__dict__[name] for name in ("from_pretrained", "for_model")}

    def wrap(name: str) -> Any:
        def first_call(cls: type, *args: Any, **kwargs: Any) -> Any:
            for original_name, method in methods.items():
                setattr(auto.AutoConfig, original_name, method)
            importlib.import_module("mrilib.backbone.nirvana")
            return getattr(cls, name)(*args, **kwargs)

        return classmethod(first_call)

    for name in methods:
        setattr(auto.AutoConfig, name, wrap(name))


class _AutoConfigFinder(importlib.abc.MetaPathFinder):
    """Import hook that calls `_register_at_first_use` after transformers' AutoConfig is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the usual spec of AutoConfig's module, with the registration added; None for other modules."""
        if fullname != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register_at_first_use(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _AUTO in sys.modules:
    _register_at_first_use(sys.modules[_AUTO])
else:
    sys.meta_path.insert(0, _AutoConfigFinder())
