"""The backbone's measurements measure what they name; their size is for notebook 07."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from mrilib.comparison import backbone_speed
from mrilib.config import ROOT, CostParameters
from mrilib.display import speeds

CPU = torch.device("cpu")
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_heads": 2,
    "vocab_size": 100,
    "concept_dim": 8,
    "logit_dim": 4,
    "prefill_tokens": 64,
    "prefix_tokens": 30,
    "new_tokens": 6,
    "repeats": 1,
}


@pytest.fixture(scope="module")
def config():
    return CostParameters(**TINY)


@pytest.fixture(scope="module")
def costs(config):
    return backbone_speed.measure(config, CPU)


def test_llama_has_as_many_parameters(config, costs):
    pre = costs["prefill"]
    assert pre["llama_parameters"] == pytest.approx(pre["parameters"], rel=0.01)
    assert pre["share_of_matmul"] == pre["matmul_seconds"] / pre["nirvana_seconds"]
    model = backbone_speed.build(config, CPU)
    assert pre["parameters"] == sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())


def test_products_are_those_of_the_model(config, costs):
    """The counted operations are those of the model's linear maps in a pass."""
    model = backbone_speed.build(config, CPU)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(inputs_embeds=torch.randn(1, config.prefill_tokens, config.hidden_size))
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    # The Trigger also multiplies with weights outside linear maps: twice with W, six times with the vectors.
    n, c, versions = config.prefill_tokens, config.concept_dim, config.logit_dim
    trigger = 2 * (2 * n * c * c * versions) + 6 * (2 * n * c * versions)
    assert counted == costs["prefill"]["matmul_flops"] + trigger * (config.num_hidden_layers - 2)


def test_decoding_is_compared_on_the_same_tokens(costs):
    assert costs["decoding"]["same_tokens"]
    sizes = costs["steps"]["cache_bytes"]
    assert len(sizes) == len(costs["steps"]["seconds"]) >= 510
    assert sizes[-1] < 4 * sizes[0] + 2**20


def test_saved_bytes_are_counted():
    """x·w saves x if w is trainable, and only the weight if it is frozen."""
    linear = torch.nn.Linear(10, 20, bias=False)
    x = torch.randn(7, 10, requires_grad=True)
    with backbone_speed.SavedTensors(linear) as saved:
        linear(x)
    assert saved.bytes == 7 * 10 * 4
    linear.requires_grad_(False)
    with backbone_speed.SavedTensors(linear) as saved:
        linear(x)
    assert saved.bytes == 0


def test_memory_of_the_backward_pass(config, costs):
    back = costs["backward"]
    assert back["recomputed_bytes"] < back["frozen_bytes"] < back["trainable_bytes"]
    assert back["weight_gradients"] == 0
    model = backbone_speed.build(config, CPU)
    backbone_speed.backward_memory(model, 10)
    assert all("forward" not in vars(module) for module in model.modules())


def test_cost_around_ignores_one_slow_step():
    times = [1.0] * 100
    times[20] = 50.0
    assert backbone_speed.cost_around(times, 20) == 1.0


def test_table_and_chart(config, costs):
    table = backbone_speed.table(costs, config)
    judged = table[table["met"] != ""]
    assert len(judged) == 6 and set(judged["met"]) <= {"yes", "no"}
    assert costs["decoding"]["speed_up"] < 20 and "no" in set(judged["met"])  # small models gain little
    assert len(speeds.backbone_chart(costs, config).axes) == 3


def test_notebook(tmp_path):
    values = yaml.safe_load((ROOT / "params" / "costs" / "costs.yaml").read_text())
    off = {name: False for name, value in values.items() if value is True}  # the other sections are tested elsewhere
    params = tmp_path / "costs.yaml"
    params.write_text(
        yaml.safe_dump({**values, **off, **TINY, "backbone_speed": True, "output_dir": str(tmp_path / "run")})
    )
    command = [sys.executable, "-m", "papermill", "notebooks/07_costs.ipynb", str(tmp_path / "out.ipynb")]
    result = subprocess.run(
        [*command, "-f", str(params), "--no-progress-bar"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "done" and record["notebooks"]["costs"]["backbone"]["decoding"]["same_tokens"]
    assert (tmp_path / "run" / "figures" / "backbone_speed.png").exists()
