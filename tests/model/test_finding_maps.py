"""Detection maps: position, loss, detection, the finding embedding, and mirrored slices."""

import math

import pytest
import systems
import torch
from torch.nn import functional as F

from mrilib.config import ParameterError, Stage1Parameters
from mrilib.data.annotations import Box
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.findings import REGIONS, SIDES, box_finding
from mrilib.data.findings import mirrored as mirrored_facts
from mrilib.data.sampler import make_loader
from mrilib.data.splits import index_volumes, load_annotations, require_boxes
from mrilib.model.finding_maps import (
    DETECTION_LOGIT,
    FindingEmbedding,
    FindingMaps,
    detect_findings,
    ellipse_areas,
    finding_map_losses,
)
from mrilib.physics import fourier
from mrilib.training import setup, stages

LABELS = ("Edema", "Encephalomalacia", "Lacunar infarct", "Mass", "Nonspecific white matter lesion")
MASS = LABELS.index("Mass")


@pytest.fixture(scope="module")
def config(phantom_dir, tmp_path_factory):
    backbone = systems.write_backbone(tmp_path_factory.mktemp("backbone"))
    return systems.stage1_config(phantom_dir, backbone, finding_labels=list(LABELS), learning_rate=3e-3)


@pytest.fixture(scope="module")
def dataset(config):
    return FastMRIDataset(index_volumes(config.data_dir), config, load_annotations(config))


@pytest.fixture(scope="module")
def batches(dataset):
    return list(make_loader(dataset, 4))


@pytest.fixture(scope="module")
def batch(batches):
    """Three slices."""
    return next(b for b in batches if len(b.slices) == 3)


@pytest.fixture(scope="module")
def batch_with_boxes(batches):
    return next(b for b in batches if any(one.boxes for one in b.slices))


def randomize_head(encoder):
    """Make the maps depend on the image; the head is initialized with zeros."""
    torch.nn.init.normal_(encoder.finding_maps.unet.head.weight)


def test_ellipse_fills_its_box_on_the_map_of_its_label():
    boxes = [Box(10, 4, 12, 8, "Mass"), Box(3, 20, 5, 5, "Edema"), Box(12, 6, 4, 4, "Mass")]
    areas = ellipse_areas(boxes, LABELS, (31, 40))
    mass, edema = areas[MASS], areas[LABELS.index("Edema")]
    assert areas.shape == (len(LABELS), 31, 40) and edema.unique().tolist() == pytest.approx([0, math.pi / 4 * 25])
    # a pixel has the area of the smallest ellipse around it
    assert mass.unique().tolist() == pytest.approx([0, math.pi / 4 * 16, math.pi / 4 * 96])
    assert mass[8, 14] == pytest.approx(math.pi / 4 * 16) and mass[8, 20] == pytest.approx(math.pi / 4 * 96)
    assert (mass > 0).sum() == pytest.approx(math.pi / 4 * 12 * 8, rel=0.1)  # the small one lies within the large one
    rows, columns = mass.nonzero().T
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (4, 12, 10, 22)
    assert edema[22, 5] > 0 and (areas > 0).sum() == (mass > 0).sum() + (edema > 0).sum()
    assert ellipse_areas([], LABELS, (9, 8)).sum() == 0
    assert torch.equal(ellipse_areas(boxes, ["Edema"], (31, 40))[0], edema)


@pytest.mark.parametrize(
    ("matrix", "image_shape", "size"), [((40, 36), (40, 36), 32), ((33, 45), (27, 30), 32), ((64, 21), (32, 32), 48)]
)
def test_loss_marks_the_finding_where_the_encoder_has_it(matrix, image_shape, size, dataset):
    """A spot and its box through all crops: odd sizes, narrower and wider than the ViT's input."""
    box = Box(image_shape[1] // 3, image_shape[0] // 2, 3, 3, "Mass")
    evaluated = torch.zeros(image_shape)
    evaluated[int(box.y) + 1, int(box.x) + 1] = 1
    spot = fourier.center_crop_or_pad(fourier.center_crop_or_pad(evaluated, matrix), (size, size))
    one = dataset[0]._replace(boxes=(box,), image_shape=image_shape)
    # The logits differ at the spot alone, so the losses differ only if the spot is marked.
    logits = torch.full((1, len(LABELS), size, size), -20.0)
    missed = finding_map_losses(logits, [one], LABELS, matrix)
    logits[0, MASS] = torch.where(spot > 0, 20.0, -20.0)
    detected = finding_map_losses(logits, [one], LABELS, matrix)
    weight = 3 * math.sqrt(size**2 / 160 / (math.pi / 4 * 9))  # POSITIVE_WEIGHT and the root of the relative area
    assert float(missed - detected) == pytest.approx(weight * 20 / size**2, rel=1e-4)


def test_loss_is_zero_for_unknown_findings_and_independent_of_other_slices(dataset):
    logits = torch.randn(3, len(LABELS), 32, 32, generator=torch.Generator().manual_seed(0))
    first = dataset[0]
    slices = [first._replace(boxes=boxes) for boxes in ((Box(4, 5, 6, 6, "Edema"),), None, ())]
    losses = finding_map_losses(logits, slices, LABELS, first.image_shape)
    assert losses[1] == 0 and losses[0] > 0 and losses[2] > 0
    for row, one in enumerate(slices):
        separate = finding_map_losses(logits[row : row + 1], [one], LABELS, first.image_shape)
        torch.testing.assert_close(separate[0], losses[row])
    torch.testing.assert_close(losses[2], F.softplus(logits[2]).sum(0).mean())  # no finding: −log(1 − p) of every label


def test_slices_have_their_boxes_and_unreviewed_slices_none(dataset, config):
    kinds = set()
    for index in range(len(dataset)):
        one = dataset[index]
        reviewed = dataset.annotations.reviewed(one.file)
        assert (one.boxes is None) == (not reviewed) == (one.facts.findings is None)
        if one.boxes is not None:
            assert {box.label for box in one.boxes} == {finding.label for finding in one.facts.findings}
        kinds.add(None if one.boxes is None else bool(one.boxes))
    assert kinds == {None, False, True}
    assert FastMRIDataset(dataset.volumes, config)[0].boxes is None


@pytest.mark.parametrize("img_size", [32, 48, 96])
def test_boxes_are_cropped_with_the_image(config, dataset, img_size):
    """With crop: image the evaluated image is the cropped one, and so are its boxes."""
    changed = config.model_copy(update={"crop": "image", "img_size": img_size})
    cropped = FastMRIDataset(dataset.volumes, changed, dataset.annotations)
    visible = 0
    for index in range(len(dataset)):
        one, other = dataset[index], cropped[index]
        for full, part in zip(one.boxes or (), other.boxes or (), strict=True):
            spot = ellipse_areas([full], LABELS, one.image_shape).amax(0)
            expected = fourier.center_crop_or_pad(spot, (img_size, img_size))
            assert torch.equal(ellipse_areas([part], LABELS, other.image_shape).amax(0), expected)
            visible += int(expected.any())
        assert (one.boxes is None) == (other.boxes is None) and one.facts == other.facts
    assert visible > 3


def test_labels_without_a_training_box_are_refused(config, dataset):
    require_boxes(dataset, LABELS[:1])
    with pytest.raises(ParameterError, match="finding_labels: no training slice has a box of 'Edma'; did you mean 'Ed"):
        require_boxes(dataset, ["Edma"])
    with pytest.raises(ParameterError, match="Boxes come with annotations_dir"):
        require_boxes(FastMRIDataset(dataset.volumes, config), ["Edema"])
    with pytest.raises(ParameterError, match=r"finding_labels: the U-Net .* img_size is below 32"):
        Stage1Parameters.create({**config.to_dict(), "img_size": 16})


@pytest.mark.parametrize(
    ("labels", "message"), [(("Mass", "Mas"), "'Mas' is none of"), (("Mass", "Mass"), "is repeated")]
)
def test_unknown_and_repeated_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        FindingMaps(labels, 2)


def test_tokens_depend_on_the_maps(config, batches):
    encoder = systems.build(config).encoder
    inputs = batches[0].kspace, batches[0].mask
    tokens, maps = encoder.tokens_and_maps(*inputs)
    assert maps.shape == (len(tokens), len(LABELS), config.img_size, config.img_size) and maps.dtype == torch.float32
    assert torch.equal(tokens, encoder(*inputs))
    with torch.no_grad():
        encoder.finding_maps.unet.head.bias.view(len(LABELS), -1)[MASS] = 4
    assert not torch.allclose(tokens, encoder(*inputs), atol=1e-6)


def test_mirrored_slices_have_mirrored_facts_and_losses(config, dataset):
    options = {"annotations": dataset.annotations, "training": True}
    mirrored = FastMRIDataset(dataset.volumes, config, **options, mirror_fraction=1.0)
    original = FastMRIDataset(dataset.volumes, config, **options)
    for index in range(len(original)):
        one, other = original[index], mirrored[index]
        assert other.mirrored and not one.mirrored and torch.equal(one.kspace, other.kspace)
        assert other.facts == mirrored_facts(one.facts) and mirrored_facts(other.facts) == one.facts
        if one.boxes:
            flipped = [Box(one.image_shape[1] - b.x - b.width, b.y, b.width, b.height, b.label) for b in one.boxes]
            assert sorted({box_finding(box, one.image_shape) for box in flipped}) == list(other.facts.findings)
            matrix = (one.kspace.shape[-2], one.image_shape[1] + 2 * ((one.kspace.shape[-1] - one.image_shape[1]) // 2))
            logits = torch.randn(1, len(LABELS), one.image_shape[0], one.image_shape[1])
            expected = finding_map_losses(logits.flip(-1), [one], LABELS, matrix)
            torch.testing.assert_close(finding_map_losses(logits, [other], LABELS, matrix), expected)


def test_mirror_fraction_is_drawn_in_each_training_epoch(config, dataset):
    half = FastMRIDataset(dataset.volumes, config, training=True, mirror_fraction=0.5)
    epochs = []
    for half.epoch in range(8):
        epochs.append([half[index].mirrored for index in range(len(half))])
    assert 0.35 < sum(map(sum, epochs)) / sum(map(len, epochs)) < 0.65 and epochs[0] != epochs[1]
    assert not FastMRIDataset(dataset.volumes, config, mirror_fraction=1.0)[0].mirrored, "not in training"
    loaders = setup.make_loaders(config.model_copy(update={"mirror_fraction": 1.0, "finding_labels": []}))
    assert all(one.mirrored for batch in loaders.train for one in batch.slices)
    assert not any(one.mirrored for batch in loaders.val for one in batch.slices)


def test_encoder_flips_the_image_of_a_mirrored_slice(config, batch):
    encoder = systems.build(config).encoder
    mirrored = torch.tensor([True, False, True])
    image = encoder.phase_corrected_image(batch.kspace, batch.mask)
    original, pixels = encoder.pixels(image), encoder.pixels(image, mirrored)
    torch.testing.assert_close(pixels, torch.where(mirrored[:, None, None, None], original.flip(-1), original))


def test_stage_uses_the_mirror_flag_of_a_slice(config, batch):
    system = systems.build(config)
    system.encoder.train()  # in eval mode the maps are averaged over mirroring
    randomize_head(system.encoder)
    stage = stages.AnalysisStage(system, map_weight=1.0)
    mirrored = batch._replace(slices=[one._replace(mirrored=True) for one in batch.slices])
    assert not torch.allclose(stage.loss(batch).total, stage.loss(mirrored).total)


def test_in_eval_mode_maps_are_averaged_over_mirroring(config, batches):
    encoder = systems.build(config).encoder
    randomize_head(encoder)
    batch = batches[0]
    flags = torch.ones(len(batch.slices), dtype=torch.bool)

    def maps(mirrored):
        return encoder.tokens_and_maps(batch.kspace, batch.mask, mirrored).maps

    encoder.train()
    original, mirrored = maps(None), maps(flags).flip(-1)
    assert not torch.allclose(original, mirrored, atol=1e-3)
    encoder.eval()
    torch.testing.assert_close(maps(None), (original + mirrored) / 2)
    torch.testing.assert_close(maps(None), maps(flags).flip(-1))


def test_without_labels_the_encoder_has_no_detection_maps(config):
    encoder = systems.build(config.model_copy(update={"finding_labels": []})).encoder
    assert encoder.finding_maps is None
    assert not [name for name in encoder.state_dict() if "finding" in name or "patch_features" in name]


def test_unet_features_are_added_to_the_tokens_of_their_patches(config, batches):
    """They are normalised, the class token gets none, and no gradient returns to the U-Net."""
    encoder = systems.build(config).encoder.eval()
    pixels = encoder.pixels(encoder.phase_corrected_image(batches[0].kspace, batches[0].mask))
    _, features = encoder.finding_maps(pixels)
    side = pixels.shape[-1] // 16
    assert features.shape == (len(pixels), side * side, encoder.patch_features.in_features)
    changed_pixels = pixels.clone()
    changed_pixels[:, :, 16:32, :16] += 3  # the first patch of the second row
    change = (encoder.finding_maps(changed_pixels)[1] - features).norm(dim=-1)
    assert change.argmax(1).tolist() == [side] * len(pixels)

    patches = []
    hook = encoder.vit.layers[0].register_forward_pre_hook(lambda module, inputs: patches.append(inputs[0]))
    random = torch.randn_like(features[:1]).expand_as(features).clone()
    negated = random.clone()
    negated[:, 1] = -negated[:, 1]
    for variant in (random, 3 * random + 1, negated):
        encoder._vit_tokens(pixels, variant)
    hook.remove()
    torch.testing.assert_close(patches[0], patches[1], rtol=1e-3, atol=1e-4)
    changed = (patches[0] - patches[2]).abs().amax((0, -1)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [2]  # the class token comes first

    encoder.patch_features.requires_grad_(True)
    features = features.detach().requires_grad_()
    encoder._vit_tokens(pixels, features).square().sum().backward()
    assert features.grad is None and encoder.patch_features.weight.grad.abs().sum() > 0


def test_losses_of_parts_sum_to_the_batchs(config, batch):
    system = systems.build(config)
    stage = stages.AnalysisStage(system, map_weight=2.0)
    full = stage.loss(batch)
    parts = torch.stack([stage.loss(part).total for part in batch.chunks(1)])
    torch.testing.assert_close(full.total, parts.sum(), rtol=1e-4, atol=1e-4)
    text = stages.AnalysisStage(system).loss(batch)
    map_loss = float((full.total - text.total) / stage.weight(batch))
    assert map_loss == pytest.approx(2 * float(full.statistics["finding_map_loss"]), rel=1e-4)
    assert text.statistics["finding_map_loss"] == full.statistics["finding_map_loss"] > 0


def test_activation_checkpointing_keeps_every_gradient(config, batch_with_boxes):
    gradients = []
    for checkpointing in (False, True):
        system = systems.build(config.model_copy(update={"activation_checkpointing": checkpointing}))
        system.freeze("encoder")
        system.train()
        stages.AnalysisStage(system, map_weight=3.0).loss(batch_with_boxes).total.backward()
        system.check_gradients()
        gradients.append({name: value.grad for name, value in system.encoder.named_parameters()})
    for name, value in gradients[1].items():
        expected = gradients[0][name]
        rounding = 1e-6 + 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=rounding)


def test_training_raises_the_maps_inside_their_boxes(config, batch_with_boxes):
    batch = batch_with_boxes
    system = systems.build(config)
    stage = stages.AnalysisStage(system, map_weight=10.0)
    optimizer = torch.optim.Adam(system.freeze("encoder"), lr=3e-3)
    marked = torch.stack([ellipse_areas(one.boxes or (), LABELS, one.image_shape) for one in batch.slices]) > 0

    def contrast() -> float:
        with torch.no_grad():
            maps = system.encoder.tokens_and_maps(batch.kspace, batch.mask).maps
        maps = fourier.center_crop_or_pad(maps, batch.slices[0].image_shape)
        return float(maps[marked].mean() - maps[~marked].mean())

    before = contrast()
    for _ in range(30):
        optimizer.zero_grad()
        stage.loss(batch).total.backward()
        system.check_gradients()
        optimizer.step()
    assert contrast() > before + 1


@pytest.fixture
def embedding() -> FindingEmbedding:
    """A finding embedding with one axis for each label, side and region."""
    axes = torch.eye(len(LABELS) + 6)
    embedding = FindingEmbedding(len(LABELS), axes.shape[1])
    embedding.initialize_from_words(*axes.split([len(LABELS), 3, 3]))
    return embedding


@pytest.mark.parametrize(("size", "image_shape"), [(128, (128, 128)), (128, (128, 113)), (96, (96, 96))])
def test_embedding_of_a_box_has_the_label_side_and_region_of_its_text(embedding, size, image_shape):
    rng = torch.Generator().manual_seed(0)
    rows, columns = image_shape
    for _ in range(40):
        width, height = (int(torch.randint(4, 24, (1,), generator=rng)) for _ in range(2))
        x = int(torch.randint(0, columns - width, (1,), generator=rng))
        y = int(torch.randint(0, rows - height, (1,), generator=rng))
        label = LABELS[int(torch.randint(0, len(LABELS), (1,), generator=rng))]
        box = Box(x, y, width, height, label)
        across, down = (x + width / 2) / columns, (y + height / 2) / rows
        edges = [abs(across - 0.45), abs(across - 0.55), abs(down - 1 / 3), abs(down - 2 / 3)]
        if min(edges) < 0.02:  # rounding decides: an odd width shifts the crop by half a pixel
            continue
        areas = fourier.center_crop_or_pad(ellipse_areas([box], LABELS, image_shape), (size, size))
        vectors = embedding((20 * areas - 10)[None])[0]
        left = (size - columns) // 2
        patch = (int(down * rows) // 16) * (size // 16) + int(across * columns + left) // 16
        labels, sides, regions = vectors[patch].split([len(LABELS), 3, 3])
        finding = box_finding(box, image_shape)
        assert LABELS[int(labels.argmax())] == finding.label and labels.max() > 0.99
        assert SIDES[int(sides.argmax())] == finding.side and REGIONS[int(regions.argmax())] == finding.region


@pytest.mark.parametrize(
    ("size", "logit", "count"), [(2, 1.01, 1), (14, 1.01, 1), (60, 9, 1), (8, 0.99, 0), (8, -4, 0), (1, 9, 0)]
)
def test_a_region_adds_its_label_once_or_not_at_all(embedding, size, logit, count):
    """The threshold is 1, and at least 3 pixels."""
    maps = torch.full((1, len(LABELS), 128, 128), -6.0)
    maps[0, 1, 20 : 20 + size, 20 : 20 + size] = logit
    assert float(embedding(maps)[0, :, 1].sum().detach()) == count


def test_detected_findings_are_connected_regions():
    maps = torch.full((3, 2, 48, 32), -6.0)
    maps[0, 1, 4:9, 10:14] = 2.0
    maps[0, 1, 9:11, 14] = 2.0  # connected by a corner
    maps[0, 1, 30:32, 0:2] = 1.5
    maps[2, 0, 47, 29:32] = 9.0
    maps[2, 1, 0, 0] = 9.0
    assert detect_findings(maps).tolist() == [[0, 1, 7.5, 12.5], [0, 1, 31, 1], [2, 0, 47.5, 30.5]]
    assert detect_findings(maps[:0]).shape == detect_findings(torch.full((1, 2, 32, 32), -6.0)).shape == (0, 4)


def test_text_trains_the_embedding_and_not_the_maps(config, batch_with_boxes):
    system = systems.build(config)
    system.freeze("encoder")
    torch.nn.init.constant_(system.encoder.finding_maps.unet.head.bias, DETECTION_LOGIT)
    randomize_head(system.encoder)
    stages.AnalysisStage(system, map_weight=0.0).loss(batch_with_boxes).total.backward()
    for parameter in system.encoder.finding_words.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
    for parameter in system.encoder.finding_maps.parameters():
        assert not parameter.grad.any()


def test_embedding_is_initialized_with_word_embeddings(config):
    system = systems.build(config)
    embedding, words = system.encoder.finding_words, system.backbone.get_input_embeddings().weight
    vocabulary, hidden = system.tokenizer.get_vocab(), words.shape[1]
    for row, label in enumerate(LABELS):
        fact_id = vocabulary.get(f"<{label}>")
        ids = [fact_id] if fact_id is not None else system._ids(f" {label.lower()}")
        torch.testing.assert_close(embedding.label.view(-1, hidden)[row], words[ids].mean(0))
    column = embedding.column.view(-1, hidden)
    assert torch.equal(column[0], column[20]) and not torch.equal(column[0], column[-1])
