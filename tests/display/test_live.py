"""What is seen while a stage trains: curves as they come, examples in their turn, and the training none the wiser."""

import io

import numpy as np
import pandas as pd
import pytest
import systems
import torch
from PIL import Image

from mrilib.data.dataset import FastMRIDataset
from mrilib.data.sampler import make_loader
from mrilib.data.splits import split_volumes
from mrilib.display import images as figures
from mrilib.display import live
from mrilib.display.tables import marked_text
from mrilib.evaluation import inference
from mrilib.evaluation.reconstructions import Comparison
from mrilib.training import device, loop, stages
from mrilib.training.history import History


def entries(count):
    steps = range(1, count + 1)
    return [{"epoch": 1, "step": n, "loss": 1 / n, "cross_entropy": 1 / n, "learning_rate": 1e-3} for n in steps]


def history(epochs: int, steps: int = 3) -> History:
    every = [{**entry, "epoch": epoch, "step": entry["step"] + steps * (epoch - 1)}
             for epoch in range(1, epochs + 1) for entry in entries(steps)]  # fmt: skip
    return History(every, [{"epoch": epoch, "val_loss": 1 / epoch} for epoch in range(1, epochs + 1)])


@pytest.mark.parametrize(
    ("epochs", "taken"), [(1, [1]), (3, [1, 2, 3]), (9, [2, 4, 6, 8, 9]), (100, [25, 50, 75, 100])]
)
def test_examples_have_their_turns(epochs, taken):
    watch = live.Watch(epochs, interactive=False, example=lambda: "text")
    for epoch in range(1, epochs + 1):
        watch.epoch(history(epoch, 1))
    assert list(watch.examples) == taken


def test_a_training_that_stopped_early_has_its_last_example():
    watch = live.Watch(100, interactive=False, example=lambda: "text")
    watch.epoch(history(1))
    watch.finish(history(7))
    watch.finish(history(7))
    assert list(watch.examples) == [7]


def test_curves_grow_while_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    table = pd.DataFrame([{"file": "f", "slice": 0, "true": "a", "generated": "b"}])
    displayed = []
    monkeypatch.setattr(live, "display", displayed.append)
    watch = live.Watch(2, True, lambda: table, live.text_progress)
    pictures = []
    for number, entry in enumerate(entries(8)):
        now[0] = 0.5 * number  # half a second a step: drawn every second
        watch.step(entry)
        pictures.append(watch.picture.value)
    assert len(set(pictures)) == 5 and pictures[0] == b"" != pictures[1]  # a single step is no line
    assert watch.picture.layout.display == "" and Image.open(io.BytesIO(pictures[-1])).format == "PNG"
    assert "step 8: loss 0.1250, learning rate 1.00e-03" in watch.text.value
    assert len(displayed) == 1  # the progress bar comes next, above the examples
    watch.epoch(history(1))
    assert displayed[1:] == [watch.shown]
    assert watch.picture.value not in pictures and "1 of 2 epochs done" in watch.text.value
    assert "after epoch 1" in watch.shown.value and "<b>b</b>" in watch.shown.value


def test_nothing_is_drawn_headless(monkeypatch):
    monkeypatch.setattr(live, "live_curves", None)
    monkeypatch.setattr(live, "display", None)
    watch = live.Watch(1, interactive=False)
    watch.step(entries(1)[0])
    watch.epoch(history(1))
    assert not hasattr(watch, "picture")


def test_curves_of_a_first_step_without_an_epoch():
    figure = live.live_curves(History(entries(1)))
    assert [axis.get_title() or axis.get_ylabel() for axis in figure.axes] == [
        "cross-entropy [nats per token]",
        "learning rate",
    ]


def test_text_progress_marks_what_differs():
    true = "Axial T2 image, middle third of the brain. Findings: none."
    told = [true.replace("T2", "T1"), "T2 <b>& so on", true]
    tables = {
        epoch: pd.DataFrame([{"file": "file_1", "slice": 3, "true": true, "generated": text}])
        for epoch, text in zip((2, 4, 6), told, strict=True)
    }
    page = live.text_progress(tables)
    assert page.count("<tr>") == 5 and page.count("file_1, slice 3") == 1
    assert "Axial <b>T1</b> image" in page and "<b>T2 &lt;b&gt;&amp; so on</b>" in page
    assert page.index("after epoch 2") < page.index("after epoch 6")
    assert page.count(true) == 2


def test_reconstruction_progress_shows_every_epoch():
    target = np.random.default_rng(0).random((20, 16))
    examples = {
        epoch: [Comparison(target, {"zero_filled": 0.5 * target, "model": share * target}, 1.0)]
        for epoch, share in ((1, 0.8), (2, 0.9))
    }
    figure = figures.reconstruction_progress(examples)
    shown = [axis.get_title().splitlines()[0] for axis in figure.axes if axis.get_images()]
    assert shown[:4] == ["target", "zero-filled", "after epoch 1", "after epoch 2"]
    image = next(axis for axis in figure.axes if axis.get_title().startswith("after epoch 2")).get_images()[0]
    assert np.allclose(image.get_array(), 0.9 * target[::-1])


def test_training_is_the_same_whether_or_not_it_is_watched(phantom_dir, tmp_path):
    config = systems.stage1_config(phantom_dir, systems.write_backbone(tmp_path / "backbone"), epochs=2)
    volumes = split_volumes(config)
    val_data = FastMRIDataset(volumes["val"], config, max_slices=3)
    losses = []
    for watched in (False, True):
        device.prepare(config)
        system = systems.build(config)
        train = make_loader(FastMRIDataset(volumes["train"], config, training=True, max_slices=6), 3, shuffle=True)
        watch = live.Watch(2, False, lambda system=system: inference.example_texts(system, val_data, 2))
        callbacks = {"on_step": watch.step, "on_epoch": watch.epoch} if watched else {}
        stage = stages.AnalysisStage(system)
        made = loop.fit(stage, config, train, make_loader(val_data, 3), tmp_path / str(watched), **callbacks)
        losses.append([step["loss"] for step in made.steps] + [epoch["val_loss"] for epoch in made.epochs])
        assert list(watch.examples) == ([1, 2] if watched else [])
    assert losses[0] == losses[1]
    assert list(watch.examples[2].columns) == ["file", "slice", "true", "generated"]


@pytest.mark.parametrize(
    ("true", "generated", "shown"),
    [
        ("Findings: mass, left anterior.", "Findings: mass, left anterior.", "Findings: mass, left anterior."),
        (
            "Findings: extra-axial mass, left anterior.",
            "Findings: extra-axial mass, left anterior; mass, left anterior.",
            "Findings: extra-axial mass, left anterior; <b>mass, left anterior</b>.",
        ),
        (
            "Findings: mass, left anterior; edema, left central.",
            "Findings: none.",
            "Findings: <b>none</b>. <i>(missed: mass, left anterior; edema, left central)</i>",
        ),
        ("Findings: mass, left anterior.", "", "<i>(missed: mass, left anterior)</i>"),
        ("Findings: none.", "", "<i>(missed: none)</i>"),
        ("", "Findings: mass, left anterior.", "Findings: mass, left anterior."),
        (
            "Findings: none.",
            "Findings: none. Whole study: motion artifact.",
            "Findings: none. Whole study: <b>motion artifact</b>.",
        ),
        (
            "Findings: none.",
            "Findings: edema, left central; edema, left central.",
            "Findings: <b>edema, left central</b>; <b>edema, left central</b>.",
        ),
    ],
)
def test_differing_facts_are_marked_word_for_word(true, generated, shown):
    first = "Axial T1 image, upper third of the brain."
    marked = marked_text(f"{first} {true}".strip(), f"{first} {generated}".strip())
    assert marked == f"{first} {shown}"
    assert marked_text(first, first.replace("T1", "T2")) == first.replace("T1", "<b>T2</b>")
    assert marked_text(first, "Rubbish <") == "<b>Rubbish &lt;</b>"


def test_a_resumed_training_shows_the_examples_of_earlier_epochs(tmp_path):
    def text():
        return pd.DataFrame([{"file": "f", "slice": 3, "true": "wörd", "generated": "w\nb"}])

    def images():
        picture = torch.rand(8, 8)
        both = {"zero_filled": picture, "model": picture.numpy()}
        return [Comparison(picture, both, 2.5, title="T1", pixel=(1, 2.0)), Comparison(picture, both, 1.0)]

    for example, kept in ((text, live.texts_in(tmp_path)), (images, live.images_in(tmp_path))):
        begun = live.Watch(4, False, example, kept=kept)
        begun.epoch(history(1))
        begun.epoch(history(2))
        resumed = live.Watch(4, False, example, kept=kept)
        assert list(resumed.examples) == [1, 2]
        resumed.epoch(history(3))
        assert list(live.Watch(4, False, example, kept=kept).examples) == [1, 2, 3]
        (kept.folder / "epoch_1.npz").write_bytes(b"damaged")
        assert list(live.Watch(4, False, example, kept=kept).examples) == [2, 3]
        one, other = begun.examples[2], resumed.examples[2]
        if example is text:
            pd.testing.assert_frame_equal(one, other)
            assert live.text_progress({2: one}) == live.text_progress({2: other})
        for before, after in zip(one, other, strict=True) if example is images else ():
            assert before._replace(target=0, images=0) == after._replace(target=0, images=0)
            assert np.array_equal(before.target, after.target) and list(before.images) == list(after.images)
            assert all(np.array_equal(before.images[name], after.images[name]) for name in before.images)


def test_no_example_is_kept_that_runs_code(tmp_path):
    kept = live.texts_in(tmp_path)
    kept.folder.mkdir(parents=True)
    np.savez(kept.folder / "epoch_1.npz", **{"column.file": np.array([object()])})
    assert kept.load() == {}
