"""Maps of findings: where they lie, what their loss counts, and that the encoder's tokens see them."""

import math

import pytest
import systems
import torch

from mrilib import charts, kspace, model, train, trainer, training
from mrilib.analysis import REGIONS, SIDES, Box, box_finding
from mrilib.analysis import mirrored as mirrored_facts
from mrilib.config import ParameterError, Stage1Parameters
from mrilib.data import FastMRIDataset, index_volumes, load_annotations, make_loader, require_boxes
from mrilib.finding_maps import SURE, FindingMaps, FindingWords, ellipses, finding_map_losses, findings_of
from mrilib.history import History
from mrilib.style import RecordFigure

LABELS = ("Edema", "Encephalomalacia", "Lacunar infarct", "Mass", "Nonspecific white matter lesion")


@pytest.fixture(scope="module")
def config(phantom_dir, tmp_path_factory):
    backbone = systems.write_backbone(tmp_path_factory.mktemp("backbone"))
    return systems.stage1_config(
        phantom_dir, backbone, finding_labels=list(LABELS), finding_chans=2, finding_map_weight=3.0, learning_rate=3e-3
    )


@pytest.fixture(scope="module")
def dataset(config):
    return FastMRIDataset(index_volumes(config.data_dir), config, load_annotations(config))


def batches(dataset, size=4):
    return list(make_loader(dataset, size))


def test_an_ellipse_fills_its_box_on_its_labels_map_alone():
    boxes = [Box(10, 4, 12, 8, "Mass"), Box(3, 20, 5, 5, "Edema"), Box(12, 6, 4, 4, "Mass")]
    marked = ellipses(boxes, LABELS, (31, 40))
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
    assert ellipses([], LABELS, (9, 8)).sum() == 0 and (ellipses(boxes, ["Edema"], (31, 40)) > 0).sum() == edema.sum()


@pytest.mark.parametrize(
    ("matrix", "recon", "size"), [((40, 36), (40, 36), 32), ((33, 45), (27, 30), 32), ((64, 21), (32, 32), 48)]
)
def test_maps_lie_where_the_encoder_sees_the_finding(matrix, recon, size, dataset):
    """A spot of the evaluated image, and its box, through all crops: odd sizes, narrower and wider than the ViT's."""
    box = Box(recon[1] // 3, recon[0] // 2, 3, 3, "Mass")
    evaluated = torch.zeros(recon)
    evaluated[int(box.y) + 1, int(box.x) + 1] = 1
    image = kspace.center_crop_or_pad(evaluated, matrix)  # what the evaluated image is cropped or padded from
    assert torch.equal(kspace.center_crop_or_pad(image, recon), evaluated)
    seen = kspace.center_crop_or_pad(image, (size, size))
    one = dataset[0]._replace(boxes=(box,), recon=recon)
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
    losses = finding_map_losses(logits, slices, LABELS, first.recon)
    assert losses[1] == 0 and losses[0] > 0 and losses[2] > 0
    for number, one in enumerate(slices):
        alone = finding_map_losses(logits[number : number + 1], [one], LABELS, first.recon)
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
            spot = ellipses([whole], LABELS, one.recon).amax(0)
            expected = kspace.center_crop_or_pad(spot, (img_size, img_size))
            assert torch.equal(ellipses([part], LABELS, other.recon).amax(0), expected)
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
    tokens, maps, _ = system.encoder.tokens_and_maps(batch.kspace, batch.mask)
    side = config.img_size
    assert maps.shape == (len(batch.slices), len(LABELS), side, side) and maps.dtype == torch.float32
    assert torch.equal(tokens, system.encoder(batch.kspace, batch.mask))
    with torch.no_grad():
        system.encoder.finding_maps.unet.head.bias.view(len(LABELS), -1)[LABELS.index("Mass")] = 4
    assert not torch.allclose(tokens, system.encoder(batch.kspace, batch.mask), atol=1e-6)


def test_mirrored_slices_are_seen_and_told_flipped(config, dataset):
    annotations = dataset.annotations
    mirrored = FastMRIDataset(dataset.volumes, config, annotations, training=True, mirror_share=1.0)
    plain = FastMRIDataset(dataset.volumes, config, annotations, training=True)
    for index in range(len(plain)):
        one, other = plain[index], mirrored[index]
        assert other.mirrored and not one.mirrored and torch.equal(one.kspace, other.kspace)
        assert other.facts == mirrored_facts(one.facts) and mirrored_facts(other.facts) == one.facts
        if one.boxes:
            flipped = [Box(one.recon[1] - b.x - b.width, b.y, b.width, b.height, b.label) for b in one.boxes]
            assert sorted({box_finding(box, one.recon) for box in flipped}) == list(other.facts.findings)
            matrix = (one.kspace.shape[-2], one.recon[1] + 2 * ((one.kspace.shape[-1] - one.recon[1]) // 2))
            logits = torch.randn(1, len(LABELS), one.recon[0], one.recon[1])
            expected = finding_map_losses(logits.flip(-1), [one], LABELS, matrix)
            torch.testing.assert_close(finding_map_losses(logits, [other], LABELS, matrix), expected)
    half = FastMRIDataset(dataset.volumes, config, annotations, training=True, mirror_share=0.5)
    drawn = []
    for half.epoch in range(8):
        drawn.append([half[index].mirrored for index in range(len(half))])
    assert 0.35 < sum(map(sum, drawn)) / sum(map(len, drawn)) < 0.65 and drawn[0] != drawn[1]
    assert not FastMRIDataset(dataset.volumes, config, annotations, mirror_share=1.0)[0].mirrored, "not in training"


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
    stage = training.AnalysisStage(system, map_weight=1.0)
    batch = next(b for b in batches(dataset) if len(b.slices) == 3)
    flipped = batch._replace(slices=[one._replace(mirrored=True) for one in batch.slices])
    assert not torch.allclose(stage.loss(batch).total, stage.loss(flipped).total)
    _, train_loader, val_loader = train.make_loaders(
        config.model_copy(update={"mirror_share": 1.0, "finding_labels": []})
    )
    assert all(one.mirrored for batch in train_loader for one in batch.slices)
    assert not any(one.mirrored for batch in val_loader for one in batch.slices)


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
        encoder._patches(pixels, given)
    hook.remove()
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-3, atol=1e-4)
    changed = (seen[0] - seen[2]).abs().amax((0, -1)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [2]  # behind the class token
    encoder.patch_features.requires_grad_(True)
    features = features.detach().requires_grad_()
    encoder._patches(pixels, features).square().sum().backward()
    assert features.grad is None and encoder.patch_features.weight.grad.abs().sum() > 0


def test_the_loss_of_parts_adds_up_to_the_batchs(config, dataset):
    system = systems.build(config)
    stage = training.AnalysisStage(system, map_weight=2.0)
    batch = next(b for b in batches(dataset) if len(b.slices) == 3)
    whole = stage.loss(batch)
    parts = [stage.loss(part) for part in batch.chunks(1)]
    torch.testing.assert_close(whole.total, torch.stack([part.total for part in parts]).sum(), rtol=1e-4, atol=1e-4)
    text = training.AnalysisStage(system).loss(batch)
    tokens = stage.weight(batch)
    added = float((whole.total - text.total) / tokens)
    assert added == pytest.approx(2 * whole.statistics["finding_map_loss"], rel=1e-4)
    assert text.statistics["finding_map_loss"] == whole.statistics["finding_map_loss"] > 0


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_text_may_join_late(config, dataset, tmp_path, optimizer):
    """Until then VarNet and the maps learn, then they stand; a training resumed on either side is the same."""
    config = config.model_copy(
        update={"text_from": 0.5, "optimizer": optimizer, "epochs": 2, "checkpoint_minutes": 0, "weight_decay": 0.1}
    )
    train_loader, val_loader = make_loader(dataset, 4, shuffle=True), make_loader(dataset, 4)
    total = 2 * len(train_loader)
    standing = {}

    def trained(folder, stop_after=None, **changes):
        training.prepare(config)
        stage = next(train.make_stages(config, torch.device("cpu")))
        start = {name: value.clone() for name, value in stage.part.state_dict().items()}

        def on_step(entry):
            if entry["step"] == total // 2:  # the last one without text
                now = stage.part.state_dict()
                standing.update({name: now[name].clone() for name in now if not torch.equal(now[name], start[name])})
            if entry["step"] == stop_after:
                raise KeyboardInterrupt

        changed = config.model_copy(update=changes)
        return trainer.Trainer(stage, changed, train_loader, val_loader, folder, on_step=on_step).run(), stage

    history, whole = trained(tmp_path / "a")
    assert len(history.steps) == total
    assert {name.split(".")[0] for name in standing} == {"varnet", "finding_maps"}
    assert all(torch.equal(whole.part.state_dict()[name], value) for name, value in standing.items())
    rates = [step["learning_rate"] for step in history.steps]
    assert rates[: total // 2] == rates[total // 2 :] and rates[0] == 0 < max(rates)  # anew, warm-up and all
    for step in history.steps:
        late = step["step"] > total // 2
        assert (step["gradient_norm_vit"] > 0) == ("cross_entropy" in step) == late
        # a batch of slices that nobody reviewed teaches the maps nothing
        assert (step["gradient_norm_finding_maps"] > 0) == (step["finding_map_loss"] > 0 and not late)
        assert (step["gradient_norm_varnet"] > 0) <= (step["finding_map_loss"] > 0 and not late)
    assert history.steps[0]["finding_map_loss"] > 0
    assert [epoch["complete"] for epoch in history.epochs] == [0, 1] and history.best_epoch == 2
    for number, step in enumerate((total // 2 - 1, total // 2 + 1)):
        folder = tmp_path / f"interrupted{number}"
        with pytest.raises(KeyboardInterrupt):
            trained(folder, stop_after=step)
        assert (folder / "stage1_checkpoints" / "stage1_resume.pt").exists()
        _, resumed = trained(folder, resume=True)
        assert model.tensor_hash(resumed.part) == model.tensor_hash(whole.part)
    joining = History(steps=history.steps[: total // 2])
    for one in (history, joining):
        axis = RecordFigure(4, 3).subplots()
        charts.plot_loss(axis, one, "", "black")
        text = one is history
        assert axis.get_ylabel() == (
            "cross-entropy [nats per token]" if text else "loss of the maps of findings [nats]"
        )
        key = "cross_entropy" if text else "finding_map_loss"
        assert axis.lines[0].get_ydata().tolist() == [step[key] for step in one.steps if key in step]
    panels = [axis.get_title() for axis in charts.training_curves({"stage 1": history}).axes]
    assert "token accuracy" in " ".join(panels) and "images in a batch" not in " ".join(panels)
    batch = next(iter(val_loader))
    whole.label_smoothing = 0.0
    result = whole.loss(batch)
    assert result.statistics["finding_map_loss"] > 0  # told, but no part of the loss
    assert float(result.total.detach()) == pytest.approx(
        result.statistics["cross_entropy"] * whole.weight(batch), rel=1e-6
    )


def test_the_control_has_no_maps_to_wait_for(config, dataset, tmp_path):
    """Its text is there from the first step, and its learning rate rises and falls once."""
    config = config.model_copy(update={"text_from": 0.5, "epochs": 2, "train_control": True})
    loader = make_loader(dataset, 4, shuffle=True)
    control = list(train.make_stages(config, torch.device("cpu")))[1]
    steps = trainer.Trainer(control, config, loader, loader, tmp_path).run().steps
    assert control.name == "control" and all("cross_entropy" in step for step in steps)
    rates = [step["learning_rate"] for step in steps]
    top = rates.index(max(rates))
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True)


def test_a_forced_slice_tells_of_its_boxes_where_they_are_seen(config, dataset):
    """Its tokens are those of maps that show the boxes; unknown findings, and other slices, are told as they look."""
    system = systems.build(config)
    stage = training.AnalysisStage(system, map_weight=3.0, text_from=0.5)
    batch = next(b for b in batches(dataset) if any(one.boxes for one in b.slices))
    found = next(number for number, one in enumerate(batch.slices) if one.boxes)
    kspace, mask = (measured[[found] * 4] for measured in (batch.kspace, batch.mask))
    one = batch.slices[found]._replace(forced=True)
    four = [one, one._replace(mirrored=True), one._replace(forced=False), one._replace(boxes=None)]
    batch = batch._replace(kspace=kspace, mask=mask, slices=four)
    maps, forced = stage._true_maps(batch, system.encoder)
    assert forced.tolist() == [True, True, False, False] and torch.equal(maps[1], maps[0].flip(-1))
    told = findings_of(maps[:1])
    top, left = ((config.img_size - length) / 2 for length in one.recon)
    points = [Box(x - left, y - top, 0, 0, LABELS[int(label)]) for _, label, y, x in told.tolist()]
    assert points and {box_finding(point, one.recon) for point in points} <= set(one.facts.findings)

    own = system.encoder.tokens_and_maps(kspace, mask, maps_stand=True)
    true = system.encoder.tokens_and_maps(kspace, mask, maps_stand=True, instead=(maps, forced))
    words = system.encoder.finding_words
    torch.testing.assert_close(true.tokens[:2, 1:-1] - own.tokens[:2, 1:-1], words(maps[:2]) - words(own.maps[:2]))
    assert torch.equal(true.tokens[2:], own.tokens[2:]) and torch.equal(true.maps, own.maps)
    losses = [stage.loss(batch._replace(slices=[one._replace(forced=f) for one in four])).total for f in (True, False)]
    assert losses[0] != losses[1]
    stage.progress = 0.0  # the maps learn where findings are; they are not told
    losses = [stage.loss(batch._replace(slices=[one._replace(forced=f) for one in four])).total for f in (True, False)]
    assert losses[0] == losses[1]


def test_forced_slices_are_drawn_beside_the_mirrored_ones(config, dataset):
    annotations, volumes = dataset.annotations, dataset.volumes
    plain, half = (
        FastMRIDataset(volumes, config, annotations, training=True, mirror_share=0.5, teacher_forcing=share)
        for share in (0.0, 0.5)
    )
    drawn = []
    for plain.epoch in range(8):
        half.epoch = plain.epoch
        pairs = [(plain[index], half[index]) for index in range(len(half))]
        assert all(one.mirrored == other.mirrored and not one.forced for one, other in pairs)
        drawn += [(other.mirrored, other.forced) for _, other in pairs]
    shares = [drawn.count(both) / len(drawn) for both in ((False, False), (False, True), (True, False), (True, True))]
    assert min(shares) > 0.12
    assert not FastMRIDataset(volumes, config, annotations, teacher_forcing=1.0)[0].forced, "not in training"
    late = config.model_copy(update={"teacher_forcing": 1.0, "finding_labels": []})
    assert all(one.forced for batch in train.make_loaders(late)[1] for one in batch.slices)


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_activation_checkpointing_and_a_kept_varnet_before_and_after_the_text(config, dataset, progress):
    batch = next(b for b in batches(dataset) if any(one.boxes for one in b.slices))
    gradients = {}
    for name, checkpointing, kept in (("plain", False, False), ("checkpointed", True, False), ("kept", False, True)):
        system = systems.build(config.model_copy(update={"activation_checkpointing": checkpointing}))
        system.encoder.keep_varnet = kept
        system.freeze("encoder")
        stage = training.AnalysisStage(system, map_weight=3.0, text_from=0.5)
        stage.progress = progress
        system.train()
        stage.loss(batch).total.backward()
        gradients[name] = {key: value.grad for key, value in system.encoder.named_parameters()}
    learns = {key.split(".")[0] for key, value in gradients["plain"].items() if value is not None and value.any()}
    assert ("finding_maps" in learns) == ("vit" not in learns) == (progress == 0)
    for name in ("checkpointed", "kept"):
        for key, value in gradients[name].items():
            if name == "kept" and key.startswith("varnet."):
                assert value is None or not value.any()
            else:
                expected = gradients["plain"][key]
                if expected is None:
                    assert value is None
                    continue
                rounding = 1e-6 + 1e-5 * float(expected.abs().max())  # sums of many terms of the largest one's size
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=rounding)


def test_varnets_image_is_learned_with_the_maps_and_stands_with_them(config, dataset):
    """Also from slices that nobody reviewed, which teach the maps nothing."""
    system = systems.build(config.model_copy(update={"restore_chans": 4}))
    system.freeze("encoder")
    stage = training.AnalysisStage(system, map_weight=3.0, image_weight=1.0, text_from=0.5)
    batch = next(b for b in batches(dataset, 1) if b.slices[0].boxes is None)
    for stage.progress in (0.0, 0.9):
        system.zero_grad()
        result = stage.loss(batch)
        result.total.backward()
        varnet = any(bool(p.grad.any()) for p in system.encoder.varnet.parameters())
        restored = any(bool(p.grad.any()) for p in system.encoder.restoration.parameters())
        assert varnet == restored == ("varnet_image_loss" in result.statistics) == (stage.progress == 0)
        assert not any(bool(p.grad.any()) for p in system.encoder.finding_maps.parameters())


def test_an_image_held_against_the_target_learns_from_that_alone(config, dataset):
    """The maps ask nothing of VarNet then; without a target they are all that teaches it."""
    system = systems.build(config)
    torch.nn.init.normal_(system.encoder.finding_maps.unet.head.weight, std=0.3)
    system.freeze("encoder")
    batch = next(b for b in batches(dataset, 1) if b.slices[0].boxes)
    for image_weight in (1.0, 0.0):
        gradients = []
        for map_weight in (3.0, 0.0):
            system.zero_grad()
            stage = training.AnalysisStage(system, map_weight=map_weight, image_weight=image_weight, text_from=0.5)
            stage.progress = 0.0
            stage.loss(batch).total.backward()
            gradients.append([p.grad.clone() for p in system.encoder.varnet.parameters()])
            assert any(bool(p.grad.any()) for p in system.encoder.finding_maps.parameters()) == (map_weight > 0)
        same = all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
        assert same == (image_weight > 0) and any(bool(each.any()) for each in gradients[0])


def test_maps_that_do_not_learn_look_both_ways(config, dataset):
    """Then a flipped slice has the flipped maps, to the last bit; while they learn it need not."""
    encoder = systems.build(config).encoder
    torch.nn.init.normal_(encoder.finding_maps.unet.head.weight)
    batch = batches(dataset)[0]
    flipped = torch.ones(len(batch.slices), dtype=torch.bool)

    def maps(mirrored, **how):
        return encoder.tokens_and_maps(batch.kspace, batch.mask, mirrored, **how)[1]

    pixels = encoder.train().pixels(batch.kspace, batch.mask)
    once = encoder.maps_alone(pixels)
    assert torch.equal(maps(None), once)
    other = encoder.maps_alone(encoder.pixels(batch.kspace, batch.mask, flipped)).flip(-1)
    assert not torch.allclose(once, other, atol=1e-3)
    for how in ({"maps_stand": True}, {}):
        if not how:
            encoder.eval()
        torch.testing.assert_close(maps(None, **how), (once + other) / 2)
        assert torch.equal(maps(None, **how), maps(flipped, **how).flip(-1))
    assert not encoder.train().tokens_and_maps(batch.kspace, batch.mask, maps_stand=True)[1].requires_grad


def test_epochs_before_the_text_has_joined_are_not_waited_for(config, dataset, tmp_path):
    """Early stopping counts from the first epoch that could be the best, also where a training goes on within it."""
    late = {"text_from": 0.5, "early_stopping_patience": 1, "epochs": 3, "checkpoint_minutes": 0}
    config = config.model_copy(update=late)
    loader = make_loader(dataset, 4)

    def run(**given):
        training.prepare(config)
        stage = next(train.make_stages(config, torch.device("cpu")))
        changed = config.model_copy(update={"resume": not given})
        return trainer.Trainer(stage, changed, loader, loader, tmp_path, **given).run()

    def stop(entry):
        if entry["step"] == 2 * len(loader) - 1:  # the text has joined within this epoch, the second
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(on_step=stop)
    assert [epoch["complete"] for epoch in run().epochs][:2] == [0, 1]


def test_text_cannot_wait_for_maps_that_do_not_learn(config):
    with pytest.raises(ParameterError, match="text_from: until then nothing would learn"):
        Stage1Parameters.create({**config.to_dict(), "text_from": 0.5, "finding_labels": []})
    with pytest.raises(ParameterError, match="teacher_forcing: there are no maps"):
        Stage1Parameters.create({**config.to_dict(), "teacher_forcing": 0.5, "finding_labels": []})
    with pytest.raises(ParameterError, match="finding_map_weight: nothing else teaches"):
        Stage1Parameters.create({**config.to_dict(), "finding_map_weight": 0.0})
    plain = Stage1Parameters.create({**config.to_dict(), "finding_map_weight": 0.0, "finding_labels": []})
    assert training.AnalysisStage(systems.build(plain), text_from=0.5).complete


def test_maps_learn_where_findings_are(config, dataset):
    """After some steps a map is higher inside its boxes than outside of them, on the slices it learned from."""
    system = systems.build(config)
    stage = training.AnalysisStage(system, map_weight=10.0)
    parameters = system.freeze("encoder")
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    found = next(b for b in batches(dataset) if any(one.boxes for one in b.slices))

    def gap() -> float:
        with torch.no_grad():
            maps = system.encoder.tokens_and_maps(found.kspace, found.mask)[1]
        wanted = torch.stack([ellipses(one.boxes or (), LABELS, one.recon) for one in found.slices])
        maps = kspace.center_crop_or_pad(maps, found.slices[0].recon)
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


def spoken() -> FindingWords:
    """Words of which every label, side and region is an axis of its own."""
    axes = torch.eye(len(LABELS) + 6)
    words = FindingWords(len(LABELS), axes.shape[1])
    words.start_from(*axes.split([len(LABELS), 3, 3]))
    return words


@pytest.mark.parametrize(("size", "recon"), [(128, (128, 128)), (128, (128, 113)), (96, (96, 96))])
def test_what_is_said_of_a_box_is_what_the_text_says_of_it(size, recon):
    words, rng = spoken(), torch.Generator().manual_seed(0)
    rows, columns = recon
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
        marked = kspace.center_crop_or_pad(ellipses([box], LABELS, recon), (size, size))
        said = words((20 * marked - 10)[None])[0]
        left = (size - columns) // 2
        patch = (int(down * rows) // 16) * (size // 16) + int(across * columns + left) // 16
        found, side, region = said[patch].split([len(LABELS), 3, 3])
        told = box_finding(box, recon)
        assert LABELS[int(found.argmax())] == told.label and found.max() > 0.99
        assert SIDES[int(side.argmax())] == told.side and REGIONS[int(region.argmax())] == told.region, (box, told)


def test_a_finding_is_said_once_whatever_its_size_and_doubt_is_not_told():
    words = spoken()

    def told(size: int, logit: float) -> float:
        maps = torch.full((1, len(LABELS), 128, 128), -6.0)
        maps[0, 1, 20 : 20 + size, 20 : 20 + size] = logit
        return float(words(maps)[0, :, 1].sum().detach())

    assert told(2, SURE + 0.01) == told(14, SURE + 0.01) == told(60, 9.0) == 1
    assert told(8, SURE - 0.01) == told(8, -4.0) == told(1, 9.0) == 0  # a pixel is no finding


def test_findings_are_the_maps_regions():
    maps = torch.full((3, 2, 48, 32), -6.0)
    maps[0, 1, 4:9, 10:14] = 2.0
    maps[0, 1, 9:11, 14] = 2.0  # touches it by a corner
    maps[0, 1, 30:32, 0:2] = 1.5
    maps[2, 0, 47, 29:32] = 9.0
    maps[2, 1, 0, 0] = 9.0
    found = findings_of(maps).tolist()
    assert found == [[0, 1, 7.5, 12.5], [0, 1, 31, 1], [2, 0, 47.5, 30.5]]
    assert findings_of(maps[:0]).shape == findings_of(torch.full((1, 2, 32, 32), -6.0)).shape == (0, 4)


def test_words_learn_from_the_text(config, dataset):
    """Gradients reach every table, and none the maps."""
    system = systems.build(config)
    system.freeze("encoder")
    batch = next(b for b in batches(dataset) if any(one.boxes for one in b.slices))
    torch.nn.init.constant_(system.encoder.finding_maps.unet.head.bias, SURE)
    torch.nn.init.normal_(system.encoder.finding_maps.unet.head.weight)
    training.AnalysisStage(system, map_weight=0.0).loss(batch).total.backward()
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


@pytest.mark.parametrize(("labels", "told"), [(("Mass", "Mas"), "'Mas' is none of"), (("Mass", "Mass"), "named twice")])
def test_labels_without_boxes_are_refused(labels, told):
    with pytest.raises(ValueError, match=told):
        FindingMaps(labels, 2)
