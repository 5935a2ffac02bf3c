"""Figures of images and data: orientation, windows and numbers."""

import io

import numpy as np
import pytest
import torch
from fastmri.data.subsample import create_mask_for_mask_type
from IPython.core.formatters import DisplayFormatter
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

from mrilib.config import DataParameters
from mrilib.data import annotations as analysis
from mrilib.data import splits
from mrilib.data.annotations import Annotations, Box
from mrilib.data.dataset import FastMRIDataset
from mrilib.display import images, style
from mrilib.evaluation.reconstructions import Comparison
from mrilib.metrics import methods
from mrilib.model import baselines
from mrilib.physics import coils, fourier
from mrilib.physics.masks import MASK_CLASSES


@pytest.fixture(scope="module")
def sample(phantom_dir):
    config = DataParameters.create({"data_dir": str(phantom_dir), "img_size": 64, "num_coils": 3})
    return FastMRIDataset(splits.index_volumes(phantom_dir), config, splits.load_annotations(config), acceleration=4)[1]


def images_of(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for axis in figure.axes for image in axis.get_images()]


def panels(figure: Figure) -> dict[str, tuple[np.ndarray, tuple[float, float]]]:
    """Title → (image, window)."""
    return {
        axis.get_title(): (np.asarray(axis.get_images()[0].get_array()), axis.get_images()[0].get_clim())
        for axis in figure.axes
        if axis.get_images() and axis.get_title()
    }


def test_display_image_flips_the_rows_only():
    image = np.arange(15.0).reshape(3, 5)
    assert np.array_equal(images.display_image(image), image[::-1])
    assert np.array_equal(images.display_image(torch.from_numpy(image)), image[::-1])
    assert images.display_image(np.zeros((2, 3, 5))).shape == (2, 3, 5)


def test_display_box_lands_on_the_same_pixels():
    image = np.zeros((11, 7))
    box = Box(x=2, y=1, width=3, height=4, label="Mass")
    image[1:5, 2:5] = 1  # array coordinates
    x, y, width, height = (int(value) for value in images.display_box(box, 11))
    shown = images.display_image(image)
    assert shown[y : y + height, x : x + width].all()
    assert shown.sum() == width * height


def test_display_box_undoes_the_flip_of_fastmri_plus():
    """The CSV and the display both count y on the flipped image."""
    annotations = Annotations(frozenset({"f"}), {("f", 0): (Box(3, 4, 5, 6, "Mass"),)}, {})
    (box,) = annotations.boxes("f", 0, 40)
    assert images.display_box(box, 40) == (3, 4, 5, 6)


def test_montage_with_an_odd_number():
    whole = images.montage(np.arange(5)[:, None, None] * np.ones((5, 2, 3)), 2)
    assert whole.shape == (6, 6)
    assert whole[2:4, 3:6].mean() == 3 and whole[4:, :3].mean() == 4 and whole[4:, 3:].max() == 0
    assert [images.montage_columns(count) for count in (1, 5, 16)] == [1, 3, 4]


def test_slice_parts(sample):
    parts = images.slice_parts(sample)
    assert parts.zero_filled.shape == parts.target.shape == tuple(sample.image_shape)
    assert parts.maps.shape == parts.coil_images.shape == (sample.kspace.shape[0], *sample.image_shape)
    expected = fourier.rss(fourier.center_crop_or_pad(fourier.ifft2c(sample.kspace), sample.image_shape)) * sample.scale
    assert np.allclose(parts.zero_filled, expected.numpy()[::-1])
    assert np.allclose(baselines.zero_filled_image(sample).numpy()[::-1], parts.zero_filled)
    assert np.allclose(np.sqrt((parts.maps**2).sum(0)), 1, atol=1e-4)
    lines = images.log_kspace(sample, 0)
    assert lines.max() == 0 and lines.min() >= -4
    assert (lines[:, ~sample.mask.numpy()] == -4).all()


def test_slice_overview(sample):
    box = Box(10, 5, 4, 6, "Mass")
    figure = images.slice_overview(sample, [box])
    shown = panels(figure)
    target, window = shown["target (RSS, fully sampled)"]
    assert np.array_equal(target, sample.target.numpy()[::-1])
    zero_filled = next(title for title in shown if title.startswith("zero-filled, SSIM"))
    assert shown[zero_filled][1] == window
    error, error_window = shown["|zero-filled − target| ×5"]
    assert error_window[1] == pytest.approx(window[1] / 5)
    assert np.allclose(error, np.abs(shown[zero_filled][0] - target))
    axis = next(axis for axis in figure.axes if axis.get_title().startswith("target"))
    rectangle = axis.patches[0]
    assert (rectangle.get_x() + 0.5, rectangle.get_y() + 0.5) == (10, sample.image_shape[0] - 5 - 6)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["Mass"]


def test_slice_overview_without_target(sample):
    figure = images.slice_overview(sample._replace(target=None))
    assert any("no target" in axis.get_title() for axis in figure.axes)


@pytest.mark.parametrize("errors_right", [True, False, None])
def test_reconstruction_comparison_has_one_window_per_row(errors_right):
    rng = np.random.default_rng(0)
    target = rng.random((20, 15)) * 1e-4
    rows = [
        Comparison(unit * target, {"zero_filled": unit * target * 0.5, "model": unit * target * 0.999}, 2e-4 * unit)
        for unit in (1.0, 3.0)
    ]
    figure = images.reconstruction_comparison(rows, errors_right=errors_right)
    windows = [axis.get_images()[0].get_clim()[1] for axis in figure.axes if axis.get_images()]
    high = [images.display_window(row.target) for row in rows]
    expected = sorted([*3 * high, *(2 * [value / 5 for value in high])])
    assert sorted(windows) == pytest.approx(expected)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles.count("zero-filled\n|error| ×5") == 2
    scored = [title for title in titles if title.startswith("two-stage model\nSSIM")]
    assert len(scored) == 2 and len(set(scored)) == 1  # they differ in units only
    assert np.array_equal(images_of(figure)[0], rows[0].target[::-1])


def test_reconstruction_comparison_shows_given_scores():
    image = np.ones((16, 16))
    row = Comparison(image, {"model": image}, 1.0, scores={"model": {"ssim": 0.1234, "psnr": 20.06}})
    titles = [axis.get_title() for axis in images.reconstruction_comparison(row).axes]
    assert "two-stage model\nSSIM 0.123, 20.1 dB" in titles


def test_reconstruction_comparison_refuses_other_shapes_and_methods():
    image = np.ones((16, 16))
    with pytest.raises(ValueError, match=r"model has shape \(16, 15\), its target \(16, 16\)"):
        images.reconstruction_comparison(Comparison(image, {"model": image[:, :15]}, 1.0))
    with pytest.raises(ValueError, match="same methods"):
        images.reconstruction_comparison([Comparison(image, {"a": image}, 1.0), Comparison(image, {"b": image}, 1.0)])


def test_slice_scores_are_the_official_ones():
    from fastmri import evaluate as official

    rng = np.random.default_rng(1)
    target, image = rng.random((24, 17)), rng.random((24, 17))
    scores = images.slice_scores(target, torch.from_numpy(image), 1.5)
    assert scores["psnr"] == pytest.approx(10 * np.log10(1.5**2 / np.mean((target - image) ** 2)))
    assert scores["ssim"] == pytest.approx(float(official.ssim(target[None], image[None], maxval=1.5)[0]))


def test_mask_gallery_shows_the_sampled_fraction():
    figure = images.mask_gallery(101, [(0.08, 4), (0.04, 8)], seed=3, padding=(2, 99))
    assert len(figure.axes) == 2
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert len(texts) == len(MASK_CLASSES)
    function = create_mask_for_mask_type("random", [0.04], [8])
    mask = function((1, 101, 2), None, 3)[0].reshape(-1).numpy() > 0
    mask[:2] = mask[99:] = False
    assert texts[0].startswith(f"{mask.mean():.1%} = 1/")


def test_retained_energy_is_that_of_compression():
    rng = np.random.default_rng(2)
    samples = torch.from_numpy(rng.normal(size=(5, 9, 7)) + 1j * rng.normal(size=(5, 9, 7))).to(torch.complex64)
    energy = images.retained_energy(samples)
    assert energy.shape == (5,) and np.all(np.diff(energy) > 0) and energy[-1] == pytest.approx(1)
    compressed = coils.compress_coils(samples, 3)
    assert energy[2] == pytest.approx(float(compressed.abs().square().sum() / samples.abs().square().sum()), rel=1e-5)
    figure = images.coil_compression_curve({"a": energy, "one coil": images.retained_energy(samples[:1])}, 3)
    assert np.allclose(figure.axes[0].lines[0].get_ydata(), 1 - energy[:-1])


def test_dataset_summary_counts(phantom_dir, volumes):
    split = {"train": volumes[:8], "val": volumes[8:]}
    annotations = analysis.read_annotations(phantom_dir / "brain.csv", phantom_dir / "brain_file_list.csv")
    figure = images.dataset_summary(split, annotations)
    heights: dict[float, float] = {}
    for patch in figure.axes[0].patches:
        heights[round(patch.get_x(), 3)] = heights.get(round(patch.get_x(), 3), 0) + patch.get_height()
    assert list(heights.values()) == [8, 4]
    slices = sum(
        len({box.label for box in annotations.boxes(volume.file, number, volume.image_shape[0])})
        for volume in volumes
        for number in range(volume.slices)
    )
    assert sum(patch.get_width() for patch in figure.axes[3].patches) == slices
    unknown = images.dataset_summary(split, None).axes[3]
    assert "unknown" in unknown.texts[0].get_text()


def test_notebooks_show_figures_as_small_png_and_leave_no_pyplot_figure(sample):
    before = pyplot.get_fignums()
    figure = images.slice_overview(sample)
    shown, metadata = DisplayFormatter().format(figure)  # as in a notebook
    png = shown["image/png"]
    title = f"{sample.file}, slice {sample.slice_num}, {sample.acceleration}x"
    assert metadata["image/png"]["alt"].startswith(f"{title}; measured")
    assert pyplot.get_fignums() == before
    image = Image.open(io.BytesIO(png))
    assert image.mode == "P" and metadata["image/png"]["width"] == image.width // 2 <= 1000  # for HiDPI screens
    assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    full = io.BytesIO()
    figure.savefig(full, format="png", dpi=200)
    assert len(png) < 0.6 * len(full.getvalue())


def test_palette_keeps_greys_errors_and_colours():
    greys = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    back = np.asarray(style.to_palette(greys).convert("RGB")).astype(int)
    assert np.abs(back - greys).max() <= 3  # 138 greys of 256
    pure = np.array([[[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in style.COLORS]], np.uint8)
    assert np.array_equal(np.asarray(style.to_palette(pure).convert("RGB")), pure)


def test_method_labels():
    assert methods.method_label("zero_filled") == "zero-filled"
    assert methods.method_label("bart_l1") == "bart l1"
