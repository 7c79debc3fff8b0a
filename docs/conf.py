"""How Sphinx makes the pages of docs/: `make docs`. It reads no network."""

import re
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

project = "mpoe"
author = "the mpoe contributors"
release = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "code"  # `x` in a docstring is code, as in Markdown

html_theme = "furo"
html_title = f"mpoe {release}"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False

myst_heading_anchors = 3  # links such as results.md#in-short, as on GitHub

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what goes in and out, shapes and units too
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)$")
_LINK_OUT = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def _fences(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """The docstrings' Markdown, of which they use code fences, as reStructuredText; |W| is a norm there, no name."""
    written, indent = [], ""
    for line in lines:
        fence = _FENCE.match(line)
        if fence:
            indent = "" if indent else "    "
            if indent:
                written += ["", f"{fence['indent']}.. code-block:: {fence['language'] or 'text'}"]
            written.append("")
        else:
            written.append(indent + line if indent else re.sub(r"(?<!`)\|(?=\w)|(?<=\w)\|(?!`)", r"\\|", line))
    lines[:] = written


def _links_out(app: Sphinx, page: str, source: list[str]) -> None:
    """Links that leave docs/ work where the repository is read; here the README is the first page, others are text."""
    source[0] = _LINK_OUT.sub(lambda link: f"[{link[1]}](index.md)" if link[2] == "README.md" else link[1], source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _fences, priority=400)  # before napoleon's 500
    app.connect("source-read", _links_out)
