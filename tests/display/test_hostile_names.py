"""Untrusted names of files and runs never become HTML, Markdown, formulas or terminal commands."""

import html
import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from made_results import history, image_scores

from mrilib.config import ROOT, printable
from mrilib.data.annotations import Box
from mrilib.display import compare_runs, conclusions, curves, images, live, results, tables
from mrilib.evaluation.examples import DescribedSlice
from mrilib.evaluation.reconstructions import Comparison

NAMES = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    r"a$\frac$b",
    r"$\href{javascript:alert(1)}{x}$",
    "back\\slash",
    "new\nline",
    "\"quotes' & `ticks`",
    "\x1b]0;title\x07\x1b[31mred",
    "\u202egnp.5h",
    "[link](javascript:alert(1)) | cell **bold**",
)


def assert_inert(page: str, name: str) -> None:
    """The name is readable and neither a tag, nor a formula, nor a control character."""
    known = r"</?(?:table|thead|tbody|tr|th|td|b|i|code|p)(?: (?:style|scope|class|role)=\"[^\"<>]*\")*>"
    rest = re.sub(known, "", page)
    assert "<" not in rest and ">" not in rest, rest
    assert printable(name, keep="\n") in html.unescape(rest)
    assert printable(page, keep="\n") == page
    for table in re.findall(r"<table[^>]*>", page):
        assert "tex2jax_ignore" in table and "mathjax_ignore" in table


@pytest.fixture
def runs(tmp_path):
    """Two run folders with such names in their records."""
    for folder, rate in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        entry = {"status": "failed", "error": f"DataError: {NAMES[0]}.h5", "config": {"data_dir": NAMES[rate]}}
        record = {"status": "failed", "started": "", "planned": ["stage1"], "notebooks": {"stage1": entry}}
        (tmp_path / folder / "run.json").write_text(json.dumps(record))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_names_in_tables_are_escaped(name, runs):
    text = "Axial T1 image, lower third of the brain."
    row = {"file": name, "slice": 1, "acceleration": 4, "true": text, "generated": f"{text} {name}"}
    runs = {name: runs / "a", "other": runs / "b"}
    assert_inert(live.text_progress({1: pd.DataFrame([row])}), name)
    assert_inert(tables.html_table((name,), [(name,)]), name)
    assert_inert(tables.as_html(pd.DataFrame({name: {name: name}}), index=True).data, name)
    assert_inert(tables.as_html(compare_runs.metrics_table(runs), index=True).data, name)
    assert_inert(tables.as_html(compare_runs.differing_parameters(runs), index=True).data, name)
    states = [(run, path, compare_runs.states(runs)[run]) for run, path in runs.items()]
    assert_inert(tables.html_table(("run", "folder", "state"), states), name)


def test_paths_in_a_model_card_are_escaped():
    for name in NAMES:
        text = tables._code(name)
        assert "\n" not in text and not re.search(r"[\\`*_\[\]|$]", text)
        assert_inert(text, printable(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_test_set_is_escaped_in_the_answer(name):
    text = conclusions.answer({"reconstruction": {"4": {"model": image_scores(0.5)}}}, name, True)
    last = text.splitlines()[-1].strip("*")
    assert not re.search(r"[<>\\`*\[\]|$]", last) and printable(name) in html.unescape(last)


def test_figures_show_names_as_they_are():
    image = np.random.default_rng(0).random((16, 16))
    losses = curves.compare_curves({name: {"stage1": history()} for name in NAMES})
    methods = dict.fromkeys(NAMES[2:5], image)
    shown = images.reconstruction_comparison(Comparison(image, methods, 1.0, title=NAMES[7]), title=NAMES[2])
    box = [Box(2, 2, 4, 4, "Mass")]
    texts_below = [DescribedSlice(image, name, name, name, [name], box) for name in NAMES]
    described = results.described_slices(texts_below)
    headline = results.headline([Comparison(image, {"model": image}, 1.0, title=NAMES[7])], NAMES[2])
    for figure in (losses, shown, described, headline):
        figure.draw_without_rendering()  # a broken formula raises here
        assert printable(figure.alt_text()) == figure.alt_text()
    texts = {text.get_text() for text in losses.legends[0].get_texts()}
    assert texts >= {f"{printable(name, keep=chr(10))} training" for name in NAMES}
    assert shown.get_suptitle() == NAMES[2]


def test_logarithmic_axes_keep_their_formulas():
    figure = curves.training_curves(history())
    figure.draw_without_rendering()
    labels = [label for axis in figure.axes for label in axis.get_yticklabels(which="both") if "$" in label.get_text()]
    assert labels and all(label.get_parse_math() for label in labels)


def test_notebooks_show_escaped_tables_only():
    """No notebook displays a DataFrame or a Styler, which do not escape; HTML comes from tables and live only."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
            assert ".style." not in source and ".style)" not in source, path.name
            assert not re.search(r"display\((?:tables|compare|\w+)\.\w*table\(", source), path.name
            for function in re.findall(r"HTML\((?=[^)])(\w+\.\w+)", source):
                assert function.startswith(("tables.", "live.")), (path.name, function)


def test_the_log_names_the_error(tmp_path, monkeypatch, caplog):
    """The text of an error may begin with an empty line, as that of a formula does."""
    from mrilib import progress
    from mrilib.runs import record as record_module

    events = SimpleNamespace(
        register=lambda name, function: monkeypatch.setattr(record_module, "after_cell", function, False)
    )
    monkeypatch.setattr(progress, "ipython_shell", lambda: SimpleNamespace(events=events))
    run = SimpleNamespace(record={"notebooks": {"explore": {"status": "running"}}}, finish=lambda *a, **k: None)
    record_module._mark_failures(run, "explore")
    monkeypatch.setattr(record_module.logger, "propagate", True)
    record_module.after_cell(
        SimpleNamespace(error_in_exec=ValueError("\na$b\n  ^\nParseException"), error_before_exec=None)
    )
    assert "explore failed: ValueError: a$b" in caplog.text


def test_the_table_of_runs_has_no_control_characters(tmp_path):
    name = "a\nb\x1b[31m|x"
    (tmp_path / name).mkdir()
    record = {"started": "2026-01-01T00:00:00+0000", "status": "done", "planned": [], "notebooks": {}}
    (tmp_path / name / "run.json").write_text(json.dumps(record))
    lines = tables.runs_text(tmp_path).split("\n")
    assert len(lines) == 2 and all(line.isprintable() for line in lines)
    (tmp_path / "empty\udcff").mkdir()
    assert tables.runs_text(tmp_path / "empty\udcff").endswith("empty\\udcff")
