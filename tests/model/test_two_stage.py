"""The two-stage model: freezing, the sequence, labels, image tokens."""

import pytest
import systems
import torch

from mrilib.backbone import tokenizer
from mrilib.data import findings
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.splits import load_annotations, split_volumes
from mrilib.model import two_stage


@pytest.fixture(scope="module")
def config(phantom_dir, backbone_dir):
    return systems.stage1_config(phantom_dir, backbone_dir)


@pytest.fixture(scope="module")
def dataset(config):
    return FastMRIDataset(split_volumes(config)["test"], config, load_annotations(config))


@pytest.fixture
def system(config):
    return systems.build(config)


def test_freeze_leaves_one_part_trainable_and_the_rest_in_eval_mode(system, dataset):
    parameters = system.freeze("encoder")
    system.train()
    assert {id(p) for p in parameters} == {id(p) for p in system.parameters() if p.requires_grad}
    assert all(module.training for module in system.encoder.modules())
    assert not any(module.training for module in system.backbone.modules())
    with pytest.raises(ValueError, match="no decoder"):
        system.freeze("decoder")
    with pytest.raises(ValueError, match="backbone"):
        system.freeze("backbone")


def test_unexpected_and_missing_gradients_are_errors(system, dataset):
    system.freeze("encoder")
    system.train()
    system.analysis_loss(systems.batch_of(dataset, 2)).loss.backward()
    system.check_gradients()
    frozen = system.backbone.get_input_embeddings().weight
    frozen.grad = torch.zeros_like(frozen)
    with pytest.raises(RuntimeError, match="backbone"):
        system.check_gradients()
    frozen.grad = None
    system.encoder.start.grad = None
    with pytest.raises(RuntimeError, match=r"encoder\.start"):
        system.check_gradients()


def test_labels_are_the_analysis_and_its_end(system, dataset):
    slices = systems.batch_of(dataset, 3).slices
    texts = system.tokenize(slices)
    prompt = system._ids(findings.prompt())
    for row, one in enumerate(slices):
        answer = system._ids(findings.answer(one.facts))
        labels = texts.labels[row][texts.labels[row] != -100].tolist()
        end = [system.tokenizer.eos_token_id] if one.facts.findings is not None else []
        assert labels == answer + end
        assert texts.ids[row, : len(prompt)].tolist() == prompt
        assert (texts.labels[row, : len(prompt)] == -100).all()
    assert system.tokenizer.pad_token_id == system.tokenizer.eos_token_id  # so masking by id would remove the end


def test_end_is_not_trained_for_an_unreviewed_volume(system, dataset):
    one = dataset[0]._replace(facts=findings.Facts("T2", "lower", None))
    texts = system.tokenize([one])
    assert texts.labels[0, -1] == -100
    assert texts.labels[0].max() >= 0


def test_loss_equals_a_loop_over_positions(system, dataset):
    batch = systems.batch_of(dataset, 2)
    result = system.analysis_loss(batch)
    prefix = system.encoder(batch.kspace, batch.mask)
    total = 0.0
    for row, one in enumerate(batch.slices):  # without padding
        texts = system.tokenize([one])
        embeds = torch.cat([prefix[row : row + 1], system.backbone.get_input_embeddings()(texts.ids)], dim=1)
        logits = system.backbone(inputs_embeds=embeds).logits[0].log_softmax(-1)
        offset = prefix.shape[1]
        for position, label in enumerate(texts.labels[0].tolist()):
            if label != -100:
                total -= float(logits[offset + position - 1, label])
    assert float(result.loss) == pytest.approx(total, rel=1e-4)
    assert float(result.cross_entropy.sum()) == pytest.approx(total, rel=1e-4)


def test_image_tokens_do_not_depend_on_the_prompt(system, dataset):
    batch = systems.batch_of(dataset, 2)
    prefix = system.encoder(batch.kspace, batch.mask)
    tokens = system.image_tokens_from_prefix(prefix)
    embeds = system.backbone.get_input_embeddings()(torch.tensor([system._ids("Some other prompt.")] * 2))
    hidden = system.backbone.base_model(inputs_embeds=torch.cat([prefix, embeds], dim=1)).last_hidden_state
    assert tokens.shape == (2, (systems.SIZE // 16) ** 2, 32)
    torch.testing.assert_close(hidden[:, 1 : prefix.shape[1] - 1], tokens, rtol=1e-4, atol=1e-5)


def test_generation_does_not_depend_on_the_other_rows(system, dataset):
    batch = systems.batch_of(dataset, 2)
    prefix = system.encoder(batch.kspace, batch.mask)
    prompts = ["Describe this scan.", "What do you see on this scan? Say it in one or two sentences."]
    together = system.generate(prefix, prompts, 12)
    separate = [system.generate(prefix[i : i + 1], [prompts[i]], 12)[0] for i in range(2)]
    assert together == separate


def test_constant_prefix_has_the_length_of_the_encoders_output(config, system, dataset):
    batch = systems.batch_of(dataset, 2)
    prefix = two_stage.build_constant_prefix(config, system.backbone)
    assert prefix(batch.kspace, batch.mask).shape == system.encoder(batch.kspace, batch.mask).shape


def test_fingerprint_changes_with_one_bit(system):
    before = two_stage.fingerprint(system)
    assert two_stage.fingerprint(system) == before
    weight = next(system.backbone.parameters())
    with torch.no_grad():
        weight.view(torch.int32)[0, 0] ^= 1
    assert two_stage.fingerprint(system)["tensors"] != before["tensors"]


def test_tokenizer_that_does_not_fit_the_backbone_is_refused(config, backbone_dir, tmp_path):
    tokenizer.mistral_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"31999.*500"):
        two_stage.build_backbone(config.model_copy(update={"tokenizer_path": str(tmp_path)}), "cpu")


def test_tensor_hash_does_not_depend_on_the_memory_format():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 1, 3)
    before = two_stage.tensor_hash(conv)
    assert two_stage.tensor_hash(conv.to(memory_format=torch.channels_last)) == before
