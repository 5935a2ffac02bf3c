"""torch.compile of the blocks: same results, no graph breaks, unchanged names."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import systems
import torch
from fastmri.models.varnet import NormUnet
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mrilib.backbone.nirvana import NirvanaConfig, NirvanaForCausalLM
from mrilib.model.compilation import compile_blocks
from mrilib.model.encoder import build_vit
from mrilib.model.unet import Depth, UNet
from mrilib.training import device, setup


class Nirvana(nn.Module):
    """A backbone from embeddings to logits."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 2}
        self.backbone = NirvanaForCausalLM(NirvanaConfig(**sizes, concept_dim=8, logit_dim=4))

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.backbone(inputs_embeds=embeddings).logits


class ViT(nn.Module):
    """The encoder's ViT from pixels to tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build_vit(32, 16, 2, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vit(pixel_values=pixels).last_hidden_state


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # network, shape of its input, blocks
    "image decoder": (lambda: UNet(2, 2, 8, Depth(1, (1, 1, 1))), (2, 2, 32, 32), 10),
    "VarNet": (lambda: NormUnet(4, 2), (2, 1, 32, 32, 2), 7),
    "ViT": (ViT, (2, 2, 32, 32), 2),
    "backbone": (Nirvana, (2, 20, 32), 3),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Leave no compiled code and no counts to other tests."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def compare(name: str, backend: str) -> None:
    """Compare outputs and gradients before and after compilation."""
    torch.manual_seed(0)
    make, shape, count = NETWORKS[name]
    network = make()
    inputs = torch.randn(shape, requires_grad=True)

    def results() -> list[Tensor]:
        network.zero_grad()
        output = network(inputs)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        gradients = torch.autograd.grad((output * weights).sum(), [inputs, *network.parameters()], allow_unused=True)
        return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]

    expected, names = results(), list(network.state_dict())
    assert compile_blocks(network, getattr(network, "backbone", None), backend) == count
    assert list(network.state_dict()) == names
    for result, value in zip(results(), expected, strict=True):
        assert (result - value).norm() <= 1e-4 * value.norm() + 1e-6
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_blocks_give_the_same_without_graph_breaks(name: str) -> None:
    """The backend traces forward and backward pass as inductor does, and needs no compiler."""
    compare(name, "aot_eager_decomp_partition")


@pytest.mark.fullsize
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", NETWORKS)
def test_inductor_gives_the_same(name: str) -> None:
    compare(name, "inductor")


def test_compile_trains_the_same_and_leaves_checkpoints_as_they_are(
    phantom_dir: Path, backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Any] = []

    def compile_and_count(model: nn.Module, backbone: Any) -> int:
        return compile_blocks(model, backbone, lambda graph, _: graphs.append(graph) or graph)

    monkeypatch.setattr(setup, "compile_blocks", compile_and_count)
    (tmp_path / "stage1.pt").touch()
    config = systems.stage2_config(phantom_dir, backbone_dir, tmp_path / "stage1.pt", decoder="no_token_decoder")
    batch = next(iter(systems.loaders(config)[1]))
    losses, names = [], []
    for is_compiled in (False, True):
        config = config.model_copy(update={"compile": is_compiled})
        stage = setup.build_stage(config, device.prepare(config))
        losses.append(float(stage.loss(batch).total))
        names.append(list(stage.part.state_dict()))
    assert len(graphs) > 5 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert names[0] == names[1]
