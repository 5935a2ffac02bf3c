"""Two-stage MRI reconstruction with a frozen language-model backbone.

Importing the package is fast: its names are loaded at their first use (PEP 562), and the backbone is registered with
transformers when a model's configuration is first looked up.
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
