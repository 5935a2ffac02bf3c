"""Speed of the language model on the GPU: prefill, decoding, backward pass. Recorded, not judged."""

import math

import pytest
import torch

from mrilib.comparison import backbone_speed
from mrilib.config import ROOT, CostParameters
from mrilib.files import read_json

pytestmark = pytest.mark.gpu


def test_speed_of_a_small_backbone(device, record_property):
    """The sizes of notebook 07, in float32."""
    config = CostParameters()
    costs = backbone_speed.measure(config, device)
    record_property("table", backbone_speed.table(costs, config).to_dict("records"))
    record_property("costs", costs)
    assert costs["backward"]["weight_gradients"] == 0
    assert all(0 < seconds < math.inf for seconds in costs["steps"]["seconds"])


def test_speed_of_the_backbone_of_params_full(device, record_property):
    """Prefill in float32 next to a Llama of 1.3B parameters, then decoding in bfloat16."""
    settings = read_json(ROOT / "models" / "nirvana_1_3B.json")
    config = CostParameters(**{name: value for name, value in settings.items() if name in CostParameters.model_fields})
    model = backbone_speed.build(config, device)
    prefill = backbone_speed.prefill(model, config.prefill_tokens, config.repeats)
    model.to(torch.bfloat16)
    decoding = backbone_speed.decoding(model, config.prefix_tokens, config.new_tokens)
    named = {f"prefill, float32: {name}": value for name, value in prefill.items()}
    record_property("values", named | {f"decoding, bfloat16: {name}": value for name, value in decoding.items()})
    assert 0 < prefill["nirvana_seconds"] < math.inf and 0 < decoding["generate_seconds"] < math.inf
