"""The documentation: the site builds without warnings, its links work, its examples run, its API is complete."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import mrilib
from mrilib.config import ROOT
from mrilib.model import decoders, two_stage
from mrilib.physics import masks
from mrilib.training import setup

DOCS = ROOT / "docs"
PREAMBLE, *SECTIONS = re.split(r"^## ", (DOCS / "extending.md").read_text(encoding="utf-8"), flags=re.M)


class Page(HTMLParser):
    """The links, images and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.links |= {values[name] for name in ("href", "src") if name in values and tag != "link"}
        self.anchors |= {values["id"]} if "id" in values else set()


def test_the_site_builds_without_warnings_and_its_links_work(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", str(DOCS), str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    paths = [*tmp_path.glob("*.html"), *tmp_path.glob("api/*.html")]
    pages = {path: Page(path) for path in paths}
    assert {path.stem for path in paths} >= {page.stem for page in [*DOCS.glob("*.md"), *DOCS.glob("api/*.md")]}
    for path, page in pages.items():
        for link in map(urlsplit, page.links):
            if link.scheme or link.netloc:
                continue
            target = (path.parent / unquote(link.path)).resolve() if link.path else path
            assert target.is_file(), f"{path.name}: {link.path}"
            if link.fragment and target in pages:
                assert unquote(link.fragment) in pages[target].anchors, f"{path.name}: {link.path}#{link.fragment}"
    index = (tmp_path / "quickstart.html").read_text(encoding="utf-8")
    assert 'href="outputs/reference/04_evaluate.html"' in index, "links to notebooks open a rendered copy"
    assert "Alias for field number" not in (tmp_path / "api" / "model.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", ["physics", "backbone", "data", "phantom", "metrics", "model", "training", "evaluation"]
)
def test_the_api_names_every_module(page: str) -> None:
    named = re.findall(r"automodule:: mrilib\.([\w.]+)", (DOCS / "api" / f"{page}.md").read_text(encoding="utf-8"))
    modules = {f"{page}.{path.stem}" for path in (ROOT / "mrilib" / page).glob("*.py")} - {f"{page}.__init__"}
    assert sorted(named) == sorted({*modules, page}), f"list every module in docs/api/{page}.md"


def test_the_api_lists_the_names_of_the_top_level() -> None:
    page = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    named = re.findall(r"`mrilib\.(\w+) <mrilib\.([\w.]+)\.\1>`", page)
    assert dict(named) == mrilib._MODULES


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_the_examples_train(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for table, name in ((setup, "STAGES"), (decoders, "DECODERS"), (masks, "MASK_CLASSES")):
        monkeypatch.setattr(table, name, dict(getattr(table, name)))
    monkeypatch.setattr(two_stage, "ENCODER", two_stage.ENCODER)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PREAMBLE + section, re.M | re.S))
    names: dict[str, Any] = {"__name__": "example"}
    called = set()

    def note_call(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename == "example":
            called.add(frame.f_code.co_name)

    compiled = compile(code, "example", "exec")
    sys.setprofile(note_call)
    try:
        exec(compiled, names)
    finally:
        sys.setprofile(None)
    methods = set(re.findall(r"^    def (\w+)", code, re.M))
    assert methods and methods <= called, "the training does not use the example"
    assert len(names["history"].steps) == 2
    assert list((tmp_path / "run").glob("stage?_checkpoints/*_best_model.pt"))


def test_there_is_an_example_for_each_extension() -> None:
    assert [section.splitlines()[0] for section in SECTIONS] == ["A loss", "An encoder", "A decoder", "A mask"]
