"""Browsers: every control changes the picture, and the picture is right."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mrilib.config import DataParameters, ParameterError
from mrilib.data.annotations import Box
from mrilib.data.fastmri_file import read_volume
from mrilib.data.splits import load_annotations
from mrilib.display import browsers
from mrilib.display import images as images_module
from mrilib.display.browsers import CAPTION, SIDE
from mrilib.evaluation import reconstructions as evaluation
from mrilib.phantom.scanner import SEQUENCES, write_h5


@pytest.fixture
def browser(phantom_dir, volumes):
    config = DataParameters.create({"data_dir": str(phantom_dir), "img_size": 64, "num_coils": 4})
    return browsers.SliceBrowser(volumes, config, load_annotations(config))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_tile_is_fitted_and_windowed():
    image = np.zeros((10, 20))
    image[0, :] = 3.0
    image[1, :] = 1.5
    picture = np.asarray(browsers.tile(image, 3.0, "×5 −"))
    assert picture.shape == (SIDE + CAPTION, SIDE, 3)
    top, scale = CAPTION + SIDE // 4, SIDE // 20  # the image is the middle half of the rows
    assert (picture[top + 1] == 255).all() and (picture[top - 1] == 255).all()
    assert (picture[top + 3 * scale // 2] == 127).all() and (picture[top + 5 * scale // 2] == 0).all()
    assert (picture[:CAPTION] < 128).any(), "no caption"


def test_boxes_are_drawn_on_their_pixels():
    image = np.zeros((32, 32))
    image[2:6, 20:26] = 1  # array coordinates
    picture = browsers.tile(images_module.display_image(image), 1.0, "")
    browsers.draw_boxes(picture, [Box(20, 2, 6, 4, "Mass")], (32, 32))
    drawn = np.asarray(picture)
    blue = (drawn == [86, 180, 233]).all(-1)
    rows, columns = np.nonzero(blue[:, : SIDE - 1])
    scale = SIDE / 32
    assert columns.min() == pytest.approx(20 * scale, abs=1)
    assert rows.max() == pytest.approx(CAPTION + 30 * scale, abs=2)


@pytest.mark.parametrize(
    ("control", "value"), [("volume", 1), ("slice", 2), ("acceleration", 8), ("mask_type", "random"), ("coil", 3)]
)
def test_every_control_changes_the_picture(browser, control, value):
    before = browser.picture.value
    assert getattr(browser, control).value != value
    getattr(browser, control).value = value
    assert browser.picture.value != before
    assert pixels(browser.picture.value).shape == pixels(before).shape


def test_slice_browser_shows_file_and_analysis(browser):
    browser.volume.value = 2
    volume = browser.volumes[2]
    assert f">{volume.file}: Axial " in browser.text.value
    assert ("unknown" in browser.text.value) == (not browser.annotations.reviewed(volume.file))


def test_coils_beyond_those_of_the_volume_are_drawn_as_its_last(browser):
    browser.coil.value = browser.coil.max
    fewest = min(range(len(browser.volumes)), key=lambda number: browser.volumes[number].coils)
    browser.volume.value = fewest
    assert browser.picture.value


def test_overview_equals_the_static_figure(browser):
    sample, parts = browser._parts(0, 1, 4, "equispaced_fraction")
    picture = pixels(browsers.overview_png(sample, parts))
    shown = picture[CAPTION : CAPTION + SIDE, 2 * (SIDE + browsers.GAP) :, 0].astype(float)
    figure = images_module.slice_overview(sample)
    axis = next(axis for axis in figure.axes if axis.get_title().startswith("target"))
    image, (_, high) = np.asarray(axis.get_images()[0].get_array()), axis.get_images()[0].get_clim()
    expected = 255 * np.clip(image / high, 0, 1)
    height, width = image.shape
    scale = SIDE / max(height, width)
    left = (SIDE - round(width * scale)) // 2
    rows = ((np.arange(height) + 0.5) * scale).astype(int)
    columns = left + ((np.arange(width) + 0.5) * scale).astype(int)
    assert np.abs(shown[np.ix_(rows, columns)] - expected).mean() < 3


def test_the_browser_is_fast_at_full_size(tmp_path):
    """A slider at 320 × 320 with 16 coils costs less than ten Fourier transforms of the slice (four or five are usual).

    Independent of the machine and its load: the best processor time of one thread.
    """
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((6, 16, 640, 320, 2), dtype=np.float32).view(np.complex64)[..., 0]
    write_h5(tmp_path / "f.h5", noise, (320, 320), "AXT2", "p", sequence=SEQUENCES["AXT2"])
    config = DataParameters.create({"data_dir": str(tmp_path), "num_coils": 16, "img_size": 320})
    browser = browsers.SliceBrowser([read_volume(tmp_path / "f.h5")], config)

    def seconds(work) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    redrawing, transforming = [], []
    for number in (0, 1, 2, 4, 5):  # it starts at slice 3
        redrawing.append(seconds(lambda number=number: setattr(browser.slice, "value", number)))
        transforming.append(seconds(lambda number=number: np.fft.ifft2(noise[number])))
    torch.set_num_threads(threads)
    assert min(redrawing) < 10 * min(transforming)


def test_the_error_scale_covers_the_whole_error_map():
    strip = np.asarray(browsers.error_scale_strip())
    row = strip[CAPTION // 2 - 5]
    white = (row == 255).all(-1)
    assert strip.shape == (CAPTION, SIDE, 3) and white[:4].all()
    colors = row[20 : 20 + int(np.argmax(white[20:]))]  # right of the 0, left of the text
    table = browsers._color_table("inferno")
    assert len(colors) > 60 and (colors[0] == table[0]).all() and (colors[-1] == table[-1]).all()


def test_the_scale_bar_has_its_stated_length():
    blank = np.zeros((100, 80))
    pixel = (3.0, 2.0)
    bare, drawn = (browsers.tile(blank, 1.0, "") for _ in range(2))
    browsers.draw_scale_bar(bare, blank.shape, None)
    assert (np.asarray(bare)[CAPTION:] == np.asarray(browsers.tile(blank, 1.0, ""))[CAPTION:]).all()
    browsers.draw_scale_bar(drawn, blank.shape, pixel)
    changed = (np.asarray(drawn) != np.asarray(bare)).any(-1)
    line = changed[CAPTION + SIDE - 10]
    assert images_module.scale_bar(blank.shape, pixel) == (
        50,
        25.0,
    )  # columns of 2 mm; 50 mm is less than a third of 80
    assert line.sum() == pytest.approx(25 * SIDE / 100, abs=1.5)


def test_overview_without_target(browser):
    sample, parts = browser._parts(0, 0, 4, "random")
    picture = browsers.overview_png(sample._replace(target=None), parts._replace(target=None))
    assert pixels(picture).shape == pixels(browser.picture.value).shape


@pytest.fixture
def reconstructions(volumes, tmp_path):
    rng = np.random.default_rng(0)
    for method, factor in (("zero_filled", 0.5), ("model", 0.9)):
        for acceleration in (4, 8):
            for volume in volumes:
                images = [factor * evaluation.read_target(volume, number) for number in range(volume.slices)]
                noisy = np.stack(images) * (1 + 0.01 * acceleration * rng.random((volume.slices, *volume.image_shape)))
                evaluation.write_reconstruction(tmp_path / method / str(acceleration) / volume.path.name, noisy)
    return tmp_path


@pytest.mark.parametrize(
    ("control", "value"),
    [("volume", 2), ("slice", 2), ("acceleration", 8), ("method", "zero_filled"), ("zoom", 3.0)],
)
def test_reconstruction_browser_follows_its_controls(volumes, reconstructions, control, value):
    browser = browsers.ReconstructionBrowser(reconstructions, volumes, [4, 8])
    assert browser.method.value == "model"
    before = browser.picture.value
    getattr(browser, control).value = value
    assert browser.picture.value != before


def test_reconstruction_browser_shares_one_window(volumes, reconstructions):
    browser = browsers.ReconstructionBrowser(reconstructions, volumes, [4])
    picture = pixels(browser.picture.value)[..., 0].astype(float)
    step_down, step_right = SIDE + CAPTION + browsers.GAP, SIDE + browsers.GAP
    target = picture[CAPTION : CAPTION + SIDE, :SIDE]
    zero_filled = picture[CAPTION : CAPTION + SIDE, step_right:]
    model = picture[step_down + CAPTION : step_down + CAPTION + SIDE, :SIDE]
    inside = (target > 60) & (target < 250)
    assert (zero_filled[inside] / target[inside]).mean() == pytest.approx(0.5 * 1.02, abs=0.03)
    assert (model[inside] / target[inside]).mean() == pytest.approx(0.9 * 1.02, abs=0.03)


def test_zoom_selects_the_region(volumes, reconstructions):
    browser = browsers.ReconstructionBrowser(reconstructions, volumes, [4])
    image = np.arange(48.0 * 40).reshape(48, 40)
    browser.zoom.value, browser.row.value, browser.column.value = 4, 1.0, 0.0
    assert np.array_equal(browser._zoomed(image), image[36:, :10])
    browser.zoom.value = 1
    assert np.array_equal(browser._zoomed(image), image)


def test_reconstruction_browser_needs_reconstructions(volumes, tmp_path):
    with pytest.raises(ParameterError, match="run 04_evaluate first"):
        browsers.ReconstructionBrowser(tmp_path / "nothing", volumes, [4])
