"""The 1.3B backbone at its real size: filled without a second copy, one forward, one backward to the embeddings.

Run by hand, some minutes and 6 GB: pytest -m fullsize tests/comparison/test_full_size.py -s. The file of random
weights (2.7 GB) is written to pytest's temporary folder and removed
again. A fresh process does the work, so that what it holds is the model's alone.
"""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "models" / "nirvana_1_3B.json"
PREFIX, TEXT = 402, 64  # k-space tokens with start and end; prompt and analysis


def anonymous_bytes() -> int:
    """Anonymous memory of this process; a mapped file is not part of it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


class Peak:
    """The largest anonymous memory while it is open."""

    def __enter__(self) -> "Peak":
        self.bytes, self.ended = anonymous_bytes(), threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.ended.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())


def work(path: str) -> dict[str, float]:
    """Load, forward, backward; run in a process of its own."""
    from mrilib.backbone.nirvana import load_backbone
    from mrilib.model.two_stage import checkpoint_layers

    torch.zeros(8) @ torch.zeros(8)  # the libraries' own memory is not the model's
    found: dict[str, float] = {"baseline": anonymous_bytes()}
    start = time.perf_counter()
    with Peak() as peak:
        model = load_backbone(CONFIG, path, dtype=torch.bfloat16).requires_grad_(False)
    found["load_seconds"] = time.perf_counter() - start
    found["weights"] = sum(p.numel() * p.element_size() for p in model.parameters())
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["load_peak"], found["loaded"] = peak.bytes, anonymous_bytes()

    embeds = torch.randn(1, PREFIX + TEXT, model.config.hidden_size, dtype=torch.bfloat16)
    start = time.perf_counter()
    with Peak() as peak, torch.no_grad():
        logits = model(inputs_embeds=embeds, use_cache=False).logits
    found |= {"forward_seconds": time.perf_counter() - start, "forward_peak": peak.bytes}
    found["forward_finite"] = bool(logits.isfinite().all()) and float(logits.float().std()) > 0

    checkpoint_layers(model)
    leaf = embeds.requires_grad_()
    labels = torch.randint(model.config.vocab_size, (1, PREFIX + TEXT))
    labels[:, :PREFIX] = -100
    start = time.perf_counter()
    with Peak() as peak:
        model(inputs_embeds=leaf, labels=labels, use_cache=False).loss.backward()
    found |= {"backward_seconds": time.perf_counter() - start, "backward_peak": peak.bytes}
    assert leaf.grad is not None
    found["gradient_finite"] = bool(leaf.grad.isfinite().all())
    found["gradient_at_start"] = float(leaf.grad[0, 0].float().norm())
    found["weight_gradients"] = sum(p.grad is not None for p in model.parameters())
    return found


def write_random_weights(path: Path) -> None:
    """A file with the published names, in bfloat16; the norms and decays are such that nothing overflows."""
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from mrilib.backbone.nirvana import NirvanaForCausalLM

    config = AutoConfig.for_model(**json.loads(CONFIG.read_text()))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in NirvanaForCausalLM(config).named_parameters()}
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            tensors[name] = torch.randn(shape, dtype=torch.bfloat16).mul_(0.02)
    save_file(tensors, path)


@pytest.mark.fullsize
def test_full_size(tmp_path):
    path = tmp_path / "model.safetensors"
    try:
        write_random_weights(path)
        size = path.stat().st_size
        result = subprocess.run(
            [sys.executable, __file__, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
        )
    finally:
        path.unlink(missing_ok=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    print(json.dumps({"file": size, **found}, indent=2))
    over = (found["load_peak"] - found["baseline"]) / found["weights"]
    print(f"anonymous memory while loading, over the baseline: {over:.3f} of the weights")
    assert 1.2e9 < found["parameters"] < 1.4e9
    assert over <= 1.25
    assert found["forward_finite"] and found["gradient_finite"]
    assert found["gradient_at_start"] > 0
    assert found["weight_gradients"] == 0
    # recomputing keeps layer inputs alone: the backward pass fits beside the weights
    assert found["backward_peak"] - found["loaded"] < found["weights"]


if __name__ == "__main__":
    print(json.dumps(work(sys.argv[1])))
