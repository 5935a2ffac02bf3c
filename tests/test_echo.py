"""What frozen parts make of a batch is kept until it has come for the last time, and nothing else changes."""

import itertools

import pytest
import systems
import torch

from mrilib import analysis, bench, model, train, trainer, training
from mrilib.config import ParameterError, Stage1Parameters
from mrilib.data import FastMRIDataset, ShapeBatchSampler, index_volumes, load_annotations, make_loader
from mrilib.echo import Echoes

LABELS = ["Edema", "Mass", "Nonspecific white matter lesion"]


@pytest.fixture(scope="module")
def config(phantom_dir, tmp_path_factory):
    backbone = systems.write_backbone(tmp_path_factory.mktemp("backbone"))
    maps = {"finding_labels": LABELS, "finding_chans": 2, "restore_chans": 4, "varnet_image_weight": 1.0}
    late = {"text_from": 0.75, "varnet_until": 0.25, "data_echo": 3, "mirror_share": 0.5, "epochs": 4}
    return systems.stage1_config(phantom_dir, backbone, checkpoint_minutes=0, learning_rate=3e-3, **maps, **late)


@pytest.fixture(scope="module")
def dataset(config):
    return FastMRIDataset(index_volumes(config.data_dir), config, load_annotations(config))


def test_what_is_made_of_a_slice_is_made_once(dataset):
    batch, calls = next(iter(make_loader(dataset, 2))), []

    def make(given):
        calls.append(len(given.slices))
        return given.kspace.abs().sum((-3, -2, -1)), None

    echoes = Echoes()
    wanted = make(batch)
    calls.clear()
    times = [batch._replace(slices=[one._replace(echo=echo) for one in batch.slices]) for echo in range(3)]
    for again, left in zip((times[0], *times), (2, 2, 2, 0), strict=True):  # a step that is taken again is no echo
        made = echoes.get(again, 3, make)
        assert torch.equal(made[0], wanted[0]) and made[1] is None and len(echoes) == left
    assert calls == [2]
    echoes.get(batch, 1, make)
    assert len(echoes) == 0 and calls == [2, 2]  # what comes once is not kept
    for part in (*times[0].chunks(1), *times[1].chunks(1)):  # a batch that had to be split is known by its slices
        echoes.get(part, 3, make)
    assert torch.equal(echoes.get(times[2], 3, make)[0], wanted[0]) and calls == [2, 2, 1, 1] and len(echoes) == 0
    other = times[0]._replace(slices=[one._replace(look=1) for one in batch.slices])
    echoes.get(other, 3, make)  # another look at the same slices
    assert len(echoes) == 2
    echoes.clear()
    calls.clear()
    echoes.get(batch, 3, make)
    echoes.get(times[1], 3, make, lambda made: made[1] is not None)  # not what is wanted by now
    assert calls == [2, 2]
    echoes.clear()
    assert len(echoes) == 0


def test_an_echo_may_be_flipped_and_has_the_same_mask(config):
    dataset = FastMRIDataset(
        index_volumes(config.data_dir), config, load_annotations(config), training=True, mirror_share=0.5
    )
    sampler = ShapeBatchSampler(dataset, 1, seed=3, shuffle=True, echo=4)
    flips = {}
    for (index,) in sampler:
        one = dataset[index]
        flips.setdefault((one.file, one.slice_num), []).append((one.mirrored, one.mask.tolist(), one.facts))
        if one.mirrored:
            assert one.facts == analysis.mirrored(dataset.facts(index[0] if isinstance(index, tuple) else index))
    assert len(flips) == len(dataset) and all(len(seen) == 4 for seen in flips.values())
    assert all(len({str(mask) for _, mask, _ in seen}) == 1 for seen in flips.values())
    turned = [len({flip for flip, _, _ in seen}) for seen in flips.values()]
    assert turned.count(2) > len(turned) / 2  # 14 of 16, by chance
    again = [dataset[index].mirrored for (index,) in sampler]
    assert again == [dataset[index].mirrored for (index,) in sampler]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_varnet_stands_before_the_text_joins(config, tmp_path, monkeypatch, optimizer):
    """From then on it runs once a batch; what restores its image, and the maps, learn on. Resumed is the same."""
    config = config.model_copy(update={"optimizer": optimizer, "weight_decay": 0.1, "train_control": False})
    monkeypatch.setattr(ShapeBatchSampler, "ECHO_SPAN", 2)
    volumes, annotations = index_volumes(config.data_dir), load_annotations(config)
    seen = FastMRIDataset(volumes, config, annotations, training=True, mirror_share=0.5, max_slices=12)
    states, progress = {}, []

    def trained(folder, stop_after=None, keeps=True, **changes):
        training.prepare(config)
        (stage,) = train.make_stages(config, torch.device("cpu"))
        data = make_loader(seen, 4, shuffle=True, echo=config.data_echo), make_loader(seen, 4)
        progress.clear()
        upright = stage.part.upright_image

        def counted(*measured):
            if stage.part.training:
                progress.append(stage.progress)
            return upright(*measured)

        stage.part.upright_image = counted

        def on_step(entry):
            if keeps:
                states[entry["step"]] = {name: value.clone() for name, value in stage.part.state_dict().items()}
            if entry["step"] == stop_after:
                raise KeyboardInterrupt

        one = trainer.Trainer(stage, config.model_copy(update=changes), *data, folder, on_step=on_step)
        stage.data_echo = 3 if keeps else 1
        one.run()
        return one

    whole = trained(tmp_path / "a")
    total, batches = whole.step, len(whole.sampler.plan())
    assert total == 4 * 3 * batches
    stands = [each for each in progress if each >= 0.25]
    echoed = [each for each in stands if each < 0.75]
    assert len(progress) - len(stands) == total // 4 and len(echoed) == 2 * batches  # an epoch learns, two stand,
    assert len(stands) - len(echoed) == total // 4  # and in the last texts are told, of new slices
    moved = {
        (early, late): {
            name.split(".")[0] for name in states[1] if not torch.equal(states[early][name], states[late][name])
        }
        for early, late in ((1, total // 4), (total // 4, 3 * total // 4), (3 * total // 4, total))
    }
    first, second, third = moved.values()
    assert first == {"varnet", "restoration", "finding_maps"} and second == {"restoration", "finding_maps"}
    assert "vit" in third and not third & {"varnet", "restoration", "finding_maps"}
    weights = model.tensor_hash(whole.stage.part)
    plain = trained(tmp_path / "b", keeps=False)
    assert model.tensor_hash(plain.stage.part) == weights and len(progress) == total
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "c", stop_after=total // 2 + 3)  # within a block
    assert model.tensor_hash(trained(tmp_path / "c", resume=True).stage.part) == weights


def test_varnet_may_stand_where_nothing_waits(config, dataset):
    """Without maps the text is there from the first step; then it alone goes on."""
    plain = config.model_copy(update={"finding_labels": [], "restore_chans": 0, "text_from": 0.0})
    (stage, *_) = train.make_stages(plain, torch.device("cpu"))
    assert isinstance(stage, training.AnalysisStage) and stage.partial and stage.complete
    stage.model.freeze("encoder")
    batch = next(iter(make_loader(dataset, 2)))
    for stage.progress in (0.0, 0.25):
        stage.model.zero_grad()
        stage.loss(batch).total.backward()
        learns = {
            name.split(".")[0] for name, p in stage.part.named_parameters() if p.grad is not None and p.grad.any()
        }
        assert ("varnet" in learns) == (stage.progress < 0.25) and "vit" in learns
        stage.model.check_gradients()  # what stands has a gradient, of zeros


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"varnet_until": 0.8}, "varnet_until: VarNet stands from text_from on"),
        ({"varnet_keep": True, "varnet_weights": "w.pt"}, "varnet_until: with varnet_keep VarNet never learns"),
        ({"varnet_until": 1.0, "text_from": 0.0}, "data_echo: while VarNet learns"),
    ],
)
def test_what_would_be_of_no_use_is_refused(config, tmp_path, changed, told):
    if "varnet_weights" in changed:
        (tmp_path / "w.pt").touch()
        changed = {**changed, "varnet_weights": str(tmp_path / "w.pt")}
    with pytest.raises(ParameterError, match=told):
        Stage1Parameters.create({**config.to_dict(), **changed})


@pytest.mark.parametrize(("slices", "step", "echo"), [(30, 4, 2), (25, 1, 3), (23, 2, 2), (49, 7, 2), (3, 4, 2)])
def test_each_process_gets_its_own_batches_again_in_other_steps(dataset, slices, step, echo):
    """Whatever is left over at an epoch's end: but for a last step that has fewer batches."""
    sampler = ShapeBatchSampler(dataset, 1, echo=echo)
    sampler.plan = lambda number=0: [[i] for i in range(slices)]
    sampler.step = step
    order = [batch[0] for batch in sampler]
    assert len(order) == len(sampler) == slices * echo
    places = {}
    for place, index in enumerate(order):
        places.setdefault(index[0] if isinstance(index, tuple) else index, []).append(place)
    whole = slices - slices % step
    for index, seen in places.items():
        assert len(seen) == echo
        if index < whole:
            gaps = {second - first for first, second in itertools.pairwise(seen)}
            assert all(gap % step == 0 and gap >= min(whole, 12) for gap in gaps)


def test_batches_come_again_in_a_part_of_the_epoch_alone(config):
    volumes, annotations = index_volumes(config.data_dir), load_annotations(config)
    dataset = FastMRIDataset(volumes, config, annotations, training=True, mirror_share=0.5, max_slices=12)
    for sampler in (
        ShapeBatchSampler(dataset, 2, seed=1, shuffle=True, echo=3),
        bench.FixedSteps(dataset, 2, seed=1, steps=18, echo=3),
    ):
        everything, total = list(sampler), sampler.total
        for first, last in ((0, total), (4, 10), (0, 7), (11, total), (total, total), (0, 0)):
            sampler.echoed = first, last
            order = list(sampler)
            assert len(order) == len(sampler) == total and list(sampler) == order
            assert (order == everything) == (last - first == total)
            times = [{one[2] if isinstance(one, tuple) and len(one) == 3 else 0 for one in batch} for batch in order]
            assert all(seen == {0} for seen in times[:first] + times[last:])
            assert sum(seen == {0} for seen in times[first:last]) == -(-(last - first) // 3)
            new = [one for batch, seen in zip(order, times, strict=True) if seen == {0} for one in batch]
            assert len(set(new)) == len(new)  # each a slice, or a look, of its own
            sampler.skip, sampler.share = 5, (1, 2)
            assert list(sampler) == order[6::2]
            sampler.skip, sampler.share = 0, (0, 1)
