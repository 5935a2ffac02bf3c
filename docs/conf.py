"""Sphinx configuration. ``make docs`` builds the site: sphinx-build -W --keep-going -n docs docs/_build/html."""

import importlib
import inspect
import logging
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from nbconvert import HTMLExporter
from sphinx.addnodes import download_reference
from sphinx.application import Sphinx

# First of all, because Sphinx tries every import hook and this one removes itself at its first use.
import mrilib.backbone.nirvana  # noqa: F401
from mrilib.config import ROOT
from mrilib.parameters import Parameters

project = "mrilib"
author = "The mrilib authors"
copyright = "The mrilib authors; MIT licence"
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "mrilib"
html_copy_source = False

myst_heading_anchors = 3  # GitHub's anchors

add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "exclude-members": "model_config"}
numpydoc_show_class_members = False

# Single backticks link to a documented object and are code otherwise. Types of other packages have no page here.
default_role = "py:obj"
nitpick_ignore_regex = [("py:obj", r".*"), ("py:class", r"(?!mrilib\.).*|.*\.(_check_cuda|T)")]
suppress_warnings = ["ref.python"]  # Python's type slice has the name of attributes of two classes here

PAGES = {"../dev/LOG.md": "log.md", "../README.md": "quickstart.md"}  # pages in place of files outside of docs/
EXPORTER = HTMLExporter()
logging.getLogger("traitlets").setLevel(logging.ERROR)  # nbconvert misses alternative texts in executed notebooks


def link_pages(app: Sphinx, page: str, source: list[str]) -> None:
    """Point links to files of the repository that have a page in this site to that page."""
    for file, target in PAGES.items():
        source[0] = source[0].replace(f"]({file})", f"]({target})")


def shorten_signature(app: Sphinx, what: str, name: str, obj: Any, *_: Any) -> tuple[str, None] | None:
    """Leave out the arguments of a class of parameters: the page of parameters lists them."""
    return ("", None) if what == "class" and issubclass(obj, Parameters) else None


def describe_field(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Describe a field of a named tuple by the comment in its line."""
    if what == "attribute" and any(line.startswith("Alias for field number") for line in lines):
        module, cls, field = name.rsplit(".", 2)
        source = inspect.getsource(getattr(importlib.import_module(module), cls))
        comment = re.search(rf"^ +{field}: .*?(?:  # (.*))?$", source, re.MULTILINE)
        lines[:] = [(comment[1] or "") if comment else ""]


def show_notebooks(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Let links to executed notebooks open a rendered copy. GitHub renders the notebook itself."""
    for link in list(doctree.findall(download_reference)):
        notebook = Path(app.env.relfn2path(link["reftarget"], page)[1]).resolve()
        if notebook.suffix == ".ipynb":
            name = notebook.relative_to(ROOT).with_suffix(".html")
            copy = Path(app.outdir) / name
            if not copy.exists() or copy.stat().st_mtime < notebook.stat().st_mtime:
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(EXPORTER.from_filename(str(notebook))[0], encoding="utf-8")
            link.replace_self(nodes.reference("", "", *link.children, refuri="../" * page.count("/") + name.as_posix()))


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("source-read", link_pages)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", describe_field)
    app.connect("doctree-resolved", show_notebooks)
