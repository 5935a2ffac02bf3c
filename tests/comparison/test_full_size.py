"""The 1.3B backbone at its real size: loading without a second copy, forward, and backward to the embeddings.

Run by hand, some minutes and 6 GB: pytest -m fullsize tests/comparison/test_full_size.py -s. The file of random
weights (2.7 GB) is temporary. A separate process does the work, so that it holds the model only.
"""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mrilib.backbone.nirvana import load_backbone
from mrilib.comparison.full_size import write_random_backbone
from mrilib.model.two_stage import checkpoint_layers

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "models" / "nirvana_1_3B.json"
PREFIX, TEXT = 402, 64  # k-space tokens with start and end; prompt and analysis


def anonymous_bytes() -> int:
    """Return this process's memory without mapped files [bytes]."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


class Peak:
    """Context manager that records the largest anonymous memory."""

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
    """Load, forward, backward; for a separate process."""
    torch.zeros(8) @ torch.zeros(8)  # allocates the libraries' memory before the baseline
    costs: dict[str, float] = {"baseline": anonymous_bytes()}
    start = time.perf_counter()
    with Peak() as peak:
        model = load_backbone(CONFIG, path, dtype=torch.bfloat16).requires_grad_(False)
    costs["load_seconds"] = time.perf_counter() - start
    costs["weights"] = sum(p.numel() * p.element_size() for p in model.parameters())
    costs["parameters"] = sum(p.numel() for p in model.parameters())
    costs["load_peak"], costs["loaded"] = peak.bytes, anonymous_bytes()

    embeds = torch.randn(1, PREFIX + TEXT, model.config.hidden_size, dtype=torch.bfloat16)
    start = time.perf_counter()
    with Peak() as peak, torch.no_grad():
        logits = model(inputs_embeds=embeds, use_cache=False).logits
    costs |= {"forward_seconds": time.perf_counter() - start, "forward_peak": peak.bytes}
    costs["forward_finite"] = bool(logits.isfinite().all()) and float(logits.float().std()) > 0

    checkpoint_layers(model)
    leaf = embeds.requires_grad_()
    labels = torch.randint(model.config.vocab_size, (1, PREFIX + TEXT))
    labels[:, :PREFIX] = -100
    start = time.perf_counter()
    with Peak() as peak:
        model(inputs_embeds=leaf, labels=labels, use_cache=False).loss.backward()
    costs |= {"backward_seconds": time.perf_counter() - start, "backward_peak": peak.bytes}
    assert leaf.grad is not None
    costs["gradient_finite"] = bool(leaf.grad.isfinite().all())
    costs["gradient_at_start"] = float(leaf.grad[0, 0].float().norm())
    costs["weight_gradients"] = sum(p.grad is not None for p in model.parameters())
    return costs


@pytest.mark.fullsize
def test_full_size(tmp_path):
    path = tmp_path / "model.safetensors"
    try:
        write_random_backbone(CONFIG, path)
        size = path.stat().st_size
        result = subprocess.run(
            [sys.executable, __file__, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
        )
    finally:
        path.unlink(missing_ok=True)
    assert result.returncode == 0, result.stderr
    costs = json.loads(result.stdout.splitlines()[-1])
    print(json.dumps({"file": size, **costs}, indent=2))
    over = (costs["load_peak"] - costs["baseline"]) / costs["weights"]
    print(f"anonymous memory while loading, over the baseline: {over:.3f} of the weights")
    assert 1.2e9 < costs["parameters"] < 1.4e9
    assert over <= 1.25
    assert costs["forward_finite"] and costs["gradient_finite"]
    assert costs["gradient_at_start"] > 0
    assert costs["weight_gradients"] == 0
    # With activation checkpointing the backward pass needs less memory than the weights.
    assert costs["backward_peak"] - costs["loaded"] < costs["weights"]


if __name__ == "__main__":
    print(json.dumps(work(sys.argv[1])))
