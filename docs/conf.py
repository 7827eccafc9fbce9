"""How is the site built? `python -m sphinx -W docs build/site`: everything that a page loads lies beside it."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jupyter_cache import get_cache

if TYPE_CHECKING:
    from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent / "_site"))  # the site's own Sphinx extensions
os.environ["OMP_NUM_THREADS"] = (
    "1"  # -j 2 runs two notebooks at once, whose threads would wait for one another
)


project = "depthscope"
author = "The depthscope authors"
copyright = "The depthscope authors, Apache-2.0"  # noqa: A001
release = importlib.metadata.version("depthscope")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "github_pages",
    "public_names",
]
exclude_patterns = ["_site"]

# GitHub shows the same files: its headings are linked by their text, and its equations are fences.
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 4
myst_fence_as_directive = ["math"]
suppress_warnings = [
    "myst.header",  # pages that are written for GitHub jump from a title to the third level
]

# A cell that raises is a page that lies: the build ends there.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 180
nb_execution_show_tb = True
nb_merge_streams = True

default_role = "code"  # names in docstrings
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": True}
napoleon_google_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"depthscope {release}"
html_static_path = ["_static"]
html_css_files = ["depthscope.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5f8b", "color-brand-content": "#1f5f8b"},
    "dark_css_variables": {"color-brand-primary": "#7fb8dd", "color-brand-content": "#7fb8dd"},
}
pygments_style = "a11y-light"
pygments_dark_style = "a11y-dark"


def _make_cache(app: Sphinx) -> None:
    # Before the build forks (-j 2): two processes that each create the missing database fail.
    _ = get_cache(app.env.mystnb_config.execution_cache_path).db


def setup(app: Sphinx) -> None:
    """What Sphinx calls before it builds."""
    app.connect("builder-inited", _make_cache, priority=900)  # after myst_nb has set the path
