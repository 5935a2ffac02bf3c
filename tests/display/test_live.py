"""Live view of a training: growing curves, examples at their epochs, and no effect on the training."""

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
from mrilib.display import images, live
from mrilib.evaluation import inference
from mrilib.evaluation.reconstructions import Comparison
from mrilib.training import device, loop, stages
from mrilib.training.history import History


def entries(count):
    steps = range(1, count + 1)
    return [{"epoch": 1, "step": n, "loss": 1 / n, "cross_entropy": 1 / n, "learning_rate": 1e-3} for n in steps]


def history(epochs: int, steps: int = 3) -> History:
    rows = [{**entry, "epoch": epoch, "step": entry["step"] + steps * (epoch - 1)}
            for epoch in range(1, epochs + 1) for entry in entries(steps)]  # fmt: skip
    return History(rows, [{"epoch": epoch, "val_loss": 1 / epoch} for epoch in range(1, epochs + 1)])


@pytest.mark.parametrize(
    ("epochs", "expected"), [(1, [1]), (3, [1, 2, 3]), (9, [2, 4, 6, 8, 9]), (100, [25, 50, 75, 100])]
)
def test_examples_are_spread_over_the_epochs(epochs, expected):
    monitor = live.Monitor(epochs, interactive=False, example=lambda: "text")
    for epoch in range(1, epochs + 1):
        monitor.epoch(history(epoch, 1))
    assert list(monitor.examples) == expected


def test_a_training_that_stopped_early_has_its_last_example():
    monitor = live.Monitor(100, interactive=False, example=lambda: "text")
    monitor.epoch(history(1))
    monitor.finish(history(7))
    monitor.finish(history(7))
    assert list(monitor.examples) == [7]


def test_curves_grow_during_the_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    table = pd.DataFrame([{"file": "f", "slice": 0, "true": "a", "generated": "b"}])
    displayed = []
    monkeypatch.setattr(live, "display", displayed.append)
    monitor = live.Monitor(2, True, lambda: table, live.text_progress)
    pictures = []
    for number, entry in enumerate(entries(8)):
        now[0] = 0.5 * number  # half a second per step: redrawn every second
        monitor.step(entry)
        pictures.append(monitor.picture.value)
    assert len(set(pictures)) == 5 and pictures[0] == b"" != pictures[1]  # a single step is no line
    assert monitor.picture.layout.display == "" and Image.open(io.BytesIO(pictures[-1])).format == "PNG"
    assert "step 8: loss 0.1250, learning rate 1.00e-03" in monitor.text.value
    assert len(displayed) == 1  # the progress bar comes next, above the examples
    monitor.epoch(history(1))
    assert displayed[1:] == [monitor.example_widget]
    assert monitor.picture.value not in pictures and "1 of 2 epochs done" in monitor.text.value
    assert "after epoch 1" in monitor.example_widget.value and "<b>b</b>" in monitor.example_widget.value


def test_nothing_is_drawn_headless(monkeypatch):
    monkeypatch.setattr(live, "live_curves", None)
    monkeypatch.setattr(live, "display", None)
    monitor = live.Monitor(1, interactive=False)
    monitor.step(entries(1)[0])
    monitor.epoch(history(1))
    assert not hasattr(monitor, "picture")


def test_text_progress_marks_differences():
    true = "Axial T2 image, middle third of the brain. Findings: none."
    texts = {2: true.replace("T2", "T1"), 4: "T2 <b>& so on", 6: true}
    page = live.text_progress(
        {epoch: pd.DataFrame([{"file": "file_1", "slice": 3, "true": true, "generated": text}])
         for epoch, text in texts.items()}
    )  # fmt: skip
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
    figure = images.reconstruction_progress(examples)
    titles = [axis.get_title().splitlines()[0] for axis in figure.axes if axis.get_images()]
    assert titles[:4] == ["target", "zero-filled", "after epoch 1", "after epoch 2"]
    image = next(axis for axis in figure.axes if axis.get_title().startswith("after epoch 2")).get_images()[0]
    assert np.allclose(image.get_array(), 0.9 * target[::-1])


def test_monitoring_does_not_change_the_training(phantom_dir, tmp_path):
    config = systems.stage1_config(phantom_dir, systems.write_backbone(tmp_path / "backbone"), epochs=2)
    volumes = split_volumes(config)
    val_data = FastMRIDataset(volumes["val"], config, max_slices=3)
    losses = []
    for monitored in (False, True):
        device.prepare(config)
        system = systems.build(config)
        train = make_loader(FastMRIDataset(volumes["train"], config, training=True, max_slices=6), 3, shuffle=True)
        monitor = live.Monitor(2, False, lambda system=system: inference.example_texts(system, val_data, 2))
        callbacks = {"on_step": monitor.step, "on_epoch": monitor.epoch} if monitored else {}
        stage = stages.AnalysisStage(system)
        fitted = loop.fit(stage, config, train, make_loader(val_data, 3), tmp_path / str(monitored), **callbacks)
        losses.append([step["loss"] for step in fitted.steps] + [epoch["val_loss"] for epoch in fitted.epochs])
        assert list(monitor.examples) == ([1, 2] if monitored else [])
    assert losses[0] == losses[1]
    assert list(monitor.examples[2].columns) == ["file", "slice", "true", "generated"]


def text_example():
    return pd.DataFrame([{"file": "f", "slice": 3, "true": "wörd", "generated": "w\nb"}])


def image_example():
    picture = torch.rand(8, 8)
    methods = {"zero_filled": picture, "model": picture.numpy()}
    return [Comparison(picture, methods, 2.5, title="T1", pixel=(1, 2.0)), Comparison(picture, methods, 1.0)]


@pytest.mark.parametrize(
    ("example", "make_store"), [(text_example, live.text_store), (image_example, live.image_store)]
)
def test_a_resumed_training_shows_the_examples_of_earlier_epochs(tmp_path, example, make_store):
    store = make_store(tmp_path)
    first = live.Monitor(4, False, example, store=store)
    first.epoch(history(1))
    first.epoch(history(2))
    resumed = live.Monitor(4, False, example, store=store)
    assert list(resumed.examples) == [1, 2]
    resumed.epoch(history(3))
    assert list(live.Monitor(4, False, example, store=store).examples) == [1, 2, 3]
    (store.folder / "epoch_1.npz").write_bytes(b"damaged")
    assert list(live.Monitor(4, False, example, store=store).examples) == [2, 3]
    written, read = first.examples[2], resumed.examples[2]
    if example is text_example:
        pd.testing.assert_frame_equal(written, read)
        return
    for before, after in zip(written, read, strict=True):
        assert before._replace(target=0, images=0) == after._replace(target=0, images=0)
        assert np.array_equal(before.target, after.target) and list(before.images) == list(after.images)
        assert all(np.array_equal(before.images[name], after.images[name]) for name in before.images)


def test_stored_examples_cannot_run_code(tmp_path):
    store = live.text_store(tmp_path)
    store.folder.mkdir(parents=True)
    np.savez(store.folder / "epoch_1.npz", **{"column.file": np.array([object()])})
    assert store.load() == {}
