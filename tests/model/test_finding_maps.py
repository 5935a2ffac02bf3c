"""Maps of findings: where they lie, what their loss counts, and that the encoder's tokens see them."""

import math

import pytest
import systems
import torch

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


@pytest.fixture(scope="module")
def config(phantom_dir, tmp_path_factory):
    backbone = systems.write_backbone(tmp_path_factory.mktemp("backbone"))
    return systems.stage1_config(phantom_dir, backbone, finding_labels=list(LABELS), learning_rate=3e-3)


@pytest.fixture(scope="module")
def dataset(config):
    return FastMRIDataset(index_volumes(config.data_dir), config, load_annotations(config))


def batches(dataset, size=4):
    return list(make_loader(dataset, size))


def test_an_ellipse_fills_its_box_on_its_labels_map_alone():
    boxes = [Box(10, 4, 12, 8, "Mass"), Box(3, 20, 5, 5, "Edema"), Box(12, 6, 4, 4, "Mass")]
    marked = ellipse_areas(boxes, LABELS, (31, 40))
    mass, edema = marked[LABELS.index("Mass")], marked[LABELS.index("Edema")]
    assert marked.shape == (len(LABELS), 31, 40) and edema.unique().tolist() == pytest.approx([0, math.pi / 4 * 25])
    # each pixel knows the smallest ellipse that it is in
    assert mass.unique().tolist() == pytest.approx([0, math.pi / 4 * 16, math.pi / 4 * 96])
    assert mass[8, 14] == pytest.approx(math.pi / 4 * 16) and mass[8, 20] == pytest.approx(math.pi / 4 * 96)
    marked, mass, edema = (marked > 0).float(), (mass > 0).float(), (edema > 0).float()
    assert mass.sum() == pytest.approx(math.pi / 4 * 12 * 8, rel=0.1)  # the small one lies within the large one
    rows, columns = mass.nonzero().T
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (4, 12, 10, 22)
    assert edema[22, 5] == 1 and marked.sum() == mass.sum() + edema.sum()
    assert ellipse_areas([], LABELS, (9, 8)).sum() == 0
    assert (ellipse_areas(boxes, ["Edema"], (31, 40)) > 0).sum() == edema.sum()


@pytest.mark.parametrize(
    ("matrix", "image_shape", "size"), [((40, 36), (40, 36), 32), ((33, 45), (27, 30), 32), ((64, 21), (32, 32), 48)]
)
def test_maps_lie_where_the_encoder_sees_the_finding(matrix, image_shape, size, dataset):
    """A spot of the evaluated image, and its box, through all crops: odd sizes, narrower and wider than the ViT's."""
    box = Box(image_shape[1] // 3, image_shape[0] // 2, 3, 3, "Mass")
    evaluated = torch.zeros(image_shape)
    evaluated[int(box.y) + 1, int(box.x) + 1] = 1
    image = fourier.center_crop_or_pad(evaluated, matrix)  # what the evaluated image is cropped or padded from
    assert torch.equal(fourier.center_crop_or_pad(image, image_shape), evaluated)
    seen = fourier.center_crop_or_pad(image, (size, size))
    one = dataset[0]._replace(boxes=(box,), image_shape=image_shape)
    # Logits that are right at the spot alone: the loss of a marked pixel is there if the map is, and only there.
    logits = torch.full((1, len(LABELS), size, size), -20.0)
    logits[0, LABELS.index("Mass")] = torch.where(seen > 0, 20.0, -20.0)
    missed = finding_map_losses(torch.full_like(logits, -20.0), [one], LABELS, matrix)
    found = finding_map_losses(logits, [one], LABELS, matrix)
    # three times, and again by the root of how much smaller it is than the 160th part of the image
    weight = 3 * math.sqrt(size**2 / 160 / (math.pi / 4 * 9))
    assert float(missed - found) == pytest.approx(weight * 20 / size**2, rel=1e-4)


def test_unknown_findings_count_nothing_and_known_ones_add_up(dataset):
    logits = torch.randn(3, len(LABELS), 32, 32, generator=torch.Generator().manual_seed(0))
    first = dataset[0]
    box = Box(4, 5, 6, 6, "Edema")
    slices = [first._replace(boxes=boxes) for boxes in ((box,), None, ())]
    losses = finding_map_losses(logits, slices, LABELS, first.image_shape)
    assert losses[1] == 0 and losses[0] > 0 and losses[2] > 0
    for number, one in enumerate(slices):
        alone = finding_map_losses(logits[number : number + 1], [one], LABELS, first.image_shape)
        torch.testing.assert_close(alone[0], losses[number])
    inside = torch.nn.functional.softplus(logits[2])
    torch.testing.assert_close(losses[2], inside.sum(0).mean())  # nothing there: every label's −log(1 − p)


def test_slices_carry_their_boxes_and_unreviewed_ones_none(dataset, config):
    annotations = dataset.annotations
    seen = set()
    for index in range(len(dataset)):
        one = dataset[index]
        assert (one.boxes is None) == (not annotations.reviewed(one.file)) == (one.facts.findings is None)
        if one.boxes is not None:
            assert {box.label for box in one.boxes} == {finding.label for finding in one.facts.findings}
        seen.add(None if one.boxes is None else bool(one.boxes))
    without = FastMRIDataset(index_volumes(config.data_dir), config)
    assert without[0].boxes is None
    assert seen == {None, False, True}


@pytest.mark.parametrize("img_size", [32, 48, 96])
def test_boxes_go_with_a_crop_of_the_image(config, dataset, img_size):
    """Cropped or padded before masking, the evaluated image is the cropped one, and so are its boxes."""
    changed = config.model_copy(update={"crop": "image", "img_size": img_size})
    cropped = FastMRIDataset(dataset.volumes, changed, dataset.annotations)
    seen = 0
    for index in range(len(dataset)):
        one, other = dataset[index], cropped[index]
        for whole, part in zip(one.boxes or (), other.boxes or (), strict=True):
            spot = ellipse_areas([whole], LABELS, one.image_shape).amax(0)
            expected = fourier.center_crop_or_pad(spot, (img_size, img_size))
            assert torch.equal(ellipse_areas([part], LABELS, other.image_shape).amax(0), expected)
            seen += int(expected.any())
        assert (one.boxes is None) == (other.boxes is None) and one.facts == other.facts
    assert seen > 3


def test_findings_without_a_box_to_learn_from_are_refused(config, dataset):
    require_boxes(dataset, LABELS[:1])
    with pytest.raises(ParameterError, match="finding_labels: no training slice has a box of 'Edma'; did you mean 'Ed"):
        require_boxes(dataset, ["Edma"])
    with pytest.raises(ParameterError, match="Boxes come with annotations_dir"):
        require_boxes(FastMRIDataset(dataset.volumes, config), ["Edema"])
    with pytest.raises(ParameterError, match=r"finding_labels: the U-Net .* img_size is below 32"):
        Stage1Parameters.create({**config.to_dict(), "img_size": 16})


def test_tokens_see_the_maps_and_nothing_of_the_boxes(config, dataset):
    system = systems.build(config)
    batch = batches(dataset)[0]
    tokens, maps = system.encoder.tokens_and_maps(batch.kspace, batch.mask)
    side = config.img_size
    assert maps.shape == (len(batch.slices), len(LABELS), side, side) and maps.dtype == torch.float32
    assert torch.equal(tokens, system.encoder(batch.kspace, batch.mask))
    with torch.no_grad():
        system.encoder.finding_maps.unet.head.bias.view(len(LABELS), -1)[LABELS.index("Mass")] = 4
    assert not torch.allclose(tokens, system.encoder(batch.kspace, batch.mask), atol=1e-6)


def test_mirrored_slices_are_seen_and_told_flipped(config, dataset):
    annotations = dataset.annotations
    mirrored = FastMRIDataset(dataset.volumes, config, annotations, training=True, mirror_fraction=1.0)
    plain = FastMRIDataset(dataset.volumes, config, annotations, training=True)
    for index in range(len(plain)):
        one, other = plain[index], mirrored[index]
        assert other.mirrored and not one.mirrored and torch.equal(one.kspace, other.kspace)
        assert other.facts == mirrored_facts(one.facts) and mirrored_facts(other.facts) == one.facts
        if one.boxes:
            flipped = [Box(one.image_shape[1] - b.x - b.width, b.y, b.width, b.height, b.label) for b in one.boxes]
            assert sorted({box_finding(box, one.image_shape) for box in flipped}) == list(other.facts.findings)
            matrix = (one.kspace.shape[-2], one.image_shape[1] + 2 * ((one.kspace.shape[-1] - one.image_shape[1]) // 2))
            logits = torch.randn(1, len(LABELS), one.image_shape[0], one.image_shape[1])
            expected = finding_map_losses(logits.flip(-1), [one], LABELS, matrix)
            torch.testing.assert_close(finding_map_losses(logits, [other], LABELS, matrix), expected)
    half = FastMRIDataset(dataset.volumes, config, annotations, training=True, mirror_fraction=0.5)
    drawn = []
    for half.epoch in range(8):
        drawn.append([half[index].mirrored for index in range(len(half))])
    assert 0.35 < sum(map(sum, drawn)) / sum(map(len, drawn)) < 0.65 and drawn[0] != drawn[1]
    assert not FastMRIDataset(dataset.volumes, config, annotations, mirror_fraction=1.0)[0].mirrored, "not in training"


def test_the_encoder_flips_the_image_of_a_mirrored_slice(config, dataset, monkeypatch):
    encoder = systems.build(config).encoder
    batch = next(b for b in batches(dataset) if len(b.slices) == 3)
    seen = []
    real = encoder.vit.embeddings.forward
    monkeypatch.setattr(encoder.vit.embeddings, "forward", lambda pixels: seen.append(pixels) or real(pixels))
    encoder.tokens_and_maps(batch.kspace, batch.mask)
    encoder.tokens_and_maps(batch.kspace, batch.mask, torch.tensor([True, False, True]))
    for number, flipped in enumerate((True, False, True)):
        image = seen[0][number, :2]
        torch.testing.assert_close(seen[1][number, :2], image.flip(-1) if flipped else image)


def test_a_stage_trains_on_mirrored_slices_and_judges_on_none(config, dataset):
    system = systems.build(config)
    system.encoder.train()  # maps that do not learn look both ways
    torch.nn.init.normal_(system.encoder.finding_maps.unet.head.weight)  # it starts by finding nothing, flipped or not
    stage = stages.AnalysisStage(system, map_weight=1.0)
    batch = next(b for b in batches(dataset) if len(b.slices) == 3)
    flipped = batch._replace(slices=[one._replace(mirrored=True) for one in batch.slices])
    assert not torch.allclose(stage.loss(batch).total, stage.loss(flipped).total)
    loaders = setup.make_loaders(config.model_copy(update={"mirror_fraction": 1.0, "finding_labels": []}))
    assert all(one.mirrored for batch in loaders.train for one in batch.slices)
    assert not any(one.mirrored for batch in loaders.val for one in batch.slices)


def test_without_maps_the_encoder_is_as_before(config):
    plain = systems.build(config.model_copy(update={"finding_labels": []})).encoder
    names = [name for name in plain.state_dict() if "finding" in name or "patch_features" in name]
    assert plain.finding_maps is None and not names
    assert plain.vit.embeddings.patch_embeddings.projection.in_channels == 2


def test_the_vit_sees_what_the_maps_unet_makes_of_each_patch(config, dataset):
    """A patch's features reach its token first, stay out of the class token, and bring no gradient back."""
    encoder = systems.build(config).encoder.eval()
    batch = batches(dataset)[0]
    pixels = encoder.pixels(batch.kspace, batch.mask)
    maps, features = encoder.finding_maps(pixels)
    side = pixels.shape[-1] // 16
    assert features.shape == (len(pixels), side * side, encoder.patch_features.in_features) and maps.shape[1:] == (
        len(LABELS),
        *pixels.shape[-2:],
    )
    # row by row, as the ViT's patches: a spot in one patch changes that one's features most
    spot = pixels.clone()
    spot[:, :, 16:32, :16] += 3
    change = (encoder.finding_maps(spot)[1] - features).norm(dim=-1)
    assert change.argmax(1).tolist() == [side] * len(pixels)
    seen = []
    hook = encoder.vit.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    one = torch.randn_like(features[:1]).expand_as(features).clone()
    other = one.clone()
    other[:, 1] = -other[:, 1]
    for given in (one, 3 * one + 1, other):  # normalized: neither size nor offset of the features is heard
        encoder._vit_tokens(pixels, given)
    hook.remove()
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-3, atol=1e-4)
    changed = (seen[0] - seen[2]).abs().amax((0, -1)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [2]  # behind the class token
    encoder.patch_features.requires_grad_(True)
    features = features.detach().requires_grad_()
    encoder._vit_tokens(pixels, features).square().sum().backward()
    assert features.grad is None and encoder.patch_features.weight.grad.abs().sum() > 0


def test_the_loss_of_parts_adds_up_to_the_batchs(config, dataset):
    system = systems.build(config)
    stage = stages.AnalysisStage(system, map_weight=2.0)
    batch = next(b for b in batches(dataset) if len(b.slices) == 3)
    whole = stage.loss(batch)
    parts = [stage.loss(part) for part in batch.chunks(1)]
    torch.testing.assert_close(whole.total, torch.stack([part.total for part in parts]).sum(), rtol=1e-4, atol=1e-4)
    text = stages.AnalysisStage(system).loss(batch)
    tokens = stage.weight(batch)
    added = float((whole.total - text.total) / tokens)
    assert added == pytest.approx(2 * whole.statistics["finding_map_loss"], rel=1e-4)
    assert text.statistics["finding_map_loss"] == whole.statistics["finding_map_loss"] > 0


def test_outside_of_training_maps_are_the_mean_of_both_views(config, dataset):
    """Then a flipped slice has the flipped maps, up to rounding; in training it need not."""
    encoder = systems.build(config).encoder
    torch.nn.init.normal_(encoder.finding_maps.unet.head.weight)
    batch = batches(dataset)[0]
    flipped = torch.ones(len(batch.slices), dtype=torch.bool)

    def maps(mirrored):
        return encoder.tokens_and_maps(batch.kspace, batch.mask, mirrored).maps

    encoder.train()
    once, other = maps(None), maps(flipped).flip(-1)
    assert not torch.allclose(once, other, atol=1e-3)
    encoder.eval()
    torch.testing.assert_close(maps(None), (once + other) / 2)
    torch.testing.assert_close(maps(None), maps(flipped).flip(-1))


def test_activation_checkpointing_changes_no_gradient_of_maps_and_text(config, dataset):
    batch = next(b for b in batches(dataset) if any(one.boxes for one in b.slices))
    gradients = []
    for checkpointing in (False, True):
        system = systems.build(config.model_copy(update={"activation_checkpointing": checkpointing}))
        system.freeze("encoder")
        system.train()
        stages.AnalysisStage(system, map_weight=3.0).loss(batch).total.backward()
        system.check_gradients()
        gradients.append({name: value.grad for name, value in system.encoder.named_parameters()})
    for name, value in gradients[1].items():
        expected = gradients[0][name]
        rounding = 1e-6 + 1e-5 * float(expected.abs().max())  # sums of many terms of the largest one's size
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=rounding)


def test_maps_learn_where_findings_are(config, dataset):
    """After some steps a map is higher inside its boxes than outside of them, on the slices it learned from."""
    system = systems.build(config)
    stage = stages.AnalysisStage(system, map_weight=10.0)
    parameters = system.freeze("encoder")
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    found = next(b for b in batches(dataset) if any(one.boxes for one in b.slices))

    def gap() -> float:
        with torch.no_grad():
            maps = system.encoder.tokens_and_maps(found.kspace, found.mask)[1]
        wanted = torch.stack([ellipse_areas(one.boxes or (), LABELS, one.image_shape) for one in found.slices])
        maps = fourier.center_crop_or_pad(maps, found.slices[0].image_shape)
        return float(maps[wanted > 0].mean() - maps[wanted == 0].mean())

    before = gap()
    for _ in range(30):
        optimizer.zero_grad()
        stage.loss(found).total.backward()
        system.check_gradients()
        optimizer.step()
    assert gap() > before + 1


def test_the_unet_takes_every_size_of_the_vit():
    for size in (32, 48):
        assert FindingMaps(LABELS, 2)(torch.randn(1, 2, size, size))[0].shape == (1, len(LABELS), size, size)


def spoken() -> FindingEmbedding:
    """Words of which every label, side and region is an axis of its own."""
    axes = torch.eye(len(LABELS) + 6)
    words = FindingEmbedding(len(LABELS), axes.shape[1])
    words.initialize_from_words(*axes.split([len(LABELS), 3, 3]))
    return words


@pytest.mark.parametrize(("size", "image_shape"), [(128, (128, 128)), (128, (128, 113)), (96, (96, 96))])
def test_what_is_said_of_a_box_is_what_the_text_says_of_it(size, image_shape):
    words, rng = spoken(), torch.Generator().manual_seed(0)
    rows, columns = image_shape
    for _ in range(40):
        width, height = (int(torch.randint(4, 24, (1,), generator=rng)) for _ in range(2))
        x = int(torch.randint(0, columns - width, (1,), generator=rng))
        y = int(torch.randint(0, rows - height, (1,), generator=rng))
        label = LABELS[int(torch.randint(0, len(LABELS), (1,), generator=rng))]
        box = Box(x, y, width, height, label)
        across, down = (x + width / 2) / columns, (y + height / 2) / rows
        edges = [abs(across - 0.45), abs(across - 0.55), abs(down - 1 / 3), abs(down - 2 / 3)]
        if min(edges) < 0.02:  # at a boundary rounding decides, and an odd width lies half a pixel beside its crop
            continue
        marked = fourier.center_crop_or_pad(ellipse_areas([box], LABELS, image_shape), (size, size))
        said = words((20 * marked - 10)[None])[0]
        left = (size - columns) // 2
        patch = (int(down * rows) // 16) * (size // 16) + int(across * columns + left) // 16
        found, side, region = said[patch].split([len(LABELS), 3, 3])
        told = box_finding(box, image_shape)
        assert LABELS[int(found.argmax())] == told.label and found.max() > 0.99
        assert SIDES[int(side.argmax())] == told.side and REGIONS[int(region.argmax())] == told.region, (box, told)


def test_a_finding_is_said_once_whatever_its_size_and_doubt_is_not_told():
    words = spoken()

    def told(size: int, logit: float) -> float:
        maps = torch.full((1, len(LABELS), 128, 128), -6.0)
        maps[0, 1, 20 : 20 + size, 20 : 20 + size] = logit
        return float(words(maps)[0, :, 1].sum().detach())

    assert told(2, DETECTION_LOGIT + 0.01) == told(14, DETECTION_LOGIT + 0.01) == told(60, 9.0) == 1
    assert told(8, DETECTION_LOGIT - 0.01) == told(8, -4.0) == told(1, 9.0) == 0  # a pixel is no finding


def test_findings_are_the_maps_regions():
    maps = torch.full((3, 2, 48, 32), -6.0)
    maps[0, 1, 4:9, 10:14] = 2.0
    maps[0, 1, 9:11, 14] = 2.0  # touches it by a corner
    maps[0, 1, 30:32, 0:2] = 1.5
    maps[2, 0, 47, 29:32] = 9.0
    maps[2, 1, 0, 0] = 9.0
    found = detect_findings(maps).tolist()
    assert found == [[0, 1, 7.5, 12.5], [0, 1, 31, 1], [2, 0, 47.5, 30.5]]
    assert detect_findings(maps[:0]).shape == detect_findings(torch.full((1, 2, 32, 32), -6.0)).shape == (0, 4)


def test_words_learn_from_the_text(config, dataset):
    """Gradients reach every table, and none the maps."""
    system = systems.build(config)
    system.freeze("encoder")
    batch = next(b for b in batches(dataset) if any(one.boxes for one in b.slices))
    torch.nn.init.constant_(system.encoder.finding_maps.unet.head.bias, DETECTION_LOGIT)
    torch.nn.init.normal_(system.encoder.finding_maps.unet.head.weight)
    stages.AnalysisStage(system, map_weight=0.0).loss(batch).total.backward()
    for parameter in system.encoder.finding_words.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
    for parameter in system.encoder.finding_maps.parameters():
        assert not parameter.grad.any()


def test_words_start_as_the_language_models_own(config):
    plain = systems.build(config)
    words = plain.encoder.finding_words
    vocabulary, table = plain.tokenizer.get_vocab(), plain.backbone.get_input_embeddings().weight
    hidden = table.shape[1]
    for place, label in enumerate(LABELS):
        own = vocabulary.get(f"<{label}>")
        ids = [own] if own is not None else plain.tokenizer(f" {label.lower()}", add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(words.label.view(-1, hidden)[place], table[ids].mean(0))
    column = words.column.view(-1, hidden)
    assert torch.equal(column[0], column[20]) and not torch.equal(column[0], column[-1])


@pytest.mark.parametrize(("labels", "told"), [(("Mass", "Mas"), "'Mas' is none of"), (("Mass", "Mass"), "is repeated")])
def test_labels_without_boxes_are_refused(labels, told):
    with pytest.raises(ValueError, match=told):
        FindingMaps(labels, 2)
