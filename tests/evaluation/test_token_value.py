"""The value of the tokens: a paired difference of SSIM over validation volumes, with an interval over patients."""

from types import SimpleNamespace

import pytest
import systems
import torch
from torch import nn

from mrilib.evaluation.token_value import token_value, token_value_sentence, volume_ssim
from mrilib.model.baselines import zero_filled
from mrilib.model.two_stage import TwoStageModel
from mrilib.training import setup, stages


class Blurred(nn.Module):
    """The zero-filled image times a factor."""

    token_dim = 0

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, tokens, kspace, mask, scale, image_shape, acquired=None):
        return self.factor * zero_filled(kspace, scale, image_shape)


@pytest.fixture(scope="module")
def loaders(phantom_dir, backbone_dir):
    config = systems.stage2_config(phantom_dir, backbone_dir, "", decoder="fastmri_unet")
    return setup.make_loaders(config)


def stage(factor: float) -> stages.ReconstructionStage:
    return stages.ReconstructionStage(TwoStageModel(decoder=Blurred(factor)))


def test_value_is_the_paired_difference(loaders):
    volumes = loaders.split["val"]
    own, other = (volume_ssim(stage(factor), loaders.val) for factor in (1.0, 0.5))
    assert set(own) == {volume.file for volume in volumes}
    mean, interval = token_value(stage(1.0), stage(0.5), loaders.val, volumes)
    assert mean == pytest.approx(sum(own[file] - other[file] for file in own) / len(own))
    if len({volume.patient for volume in volumes}) > 1:
        assert interval[0] <= mean <= interval[1]
    assert token_value(stage(1.0), stage(1.0), loaders.val, volumes)[0] == 0


def test_one_patient_has_no_interval(loaders):
    same = [SimpleNamespace(file=volume.file, patient="p") for volume in loaders.split["val"]]
    assert token_value(stage(1.0), stage(0.5), loaders.val, same)[1] is None


@pytest.mark.parametrize(
    ("mean", "interval", "words"),
    [
        (0.01, [0.005, 0.02], "improve the image in this training"),
        (0.0, [-0.01, 0.01], "do not improve the image measurably"),
        (-0.1, [-0.2, -0.05], "make the image worse"),
        (0.01, None, "no verdict"),
    ],
)
def test_sentence(mean, interval, words):
    assert words in token_value_sentence(mean, interval)
