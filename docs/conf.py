"""Sphinx configuration; `make docs` builds the pages and treats a warning as an error."""

from importlib.metadata import version as installed_version

project = "Tigon"
author = "the Tigon contributors"
version = release = installed_version("tigon")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
add_module_names = False

html_theme = "alabaster"
html_theme_options = {"description": "Kernels for hybrid Mamba-2 / LatentMoE models"}
html_show_copyright = False


def keep_layout(app, what, name, obj, options, lines):
    """Show a docstring below its first line as it was typed: formulas and shapes are aligned by hand."""
    if any(lines[1:]):
        lines[1:] = ["", "::", "", *(f"    {line}" for line in lines[1:])]


def setup(app):
    app.connect("autodoc-process-docstring", keep_layout)
