"""The documentation's site: `make docs` builds it; a warning is an error."""

import geo_r1

project = "geo_r1"
copyright = "the geo_r1 contributors"
release = version = geo_r1.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["*.in"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # links such as training.md#sampling

default_role = "code"  # one backtick in a docstring
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_rtype = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"geo_r1 {release}"
html_copy_source = False
html_show_sphinx = False


def show_formulas(app, what, name, obj, options, lines):
    """Show the indented blocks above a docstring's sections, which are formulas, as they stand."""
    sections = ("Args:", "Attributes:", "Returns:", "Raises:")
    end = next((number for number, line in enumerate(lines) if line in sections), len(lines))
    shown = []
    for before, line in zip(["", *lines], lines[:end], strict=False):
        starts = line.startswith("    ") and not before.strip()
        shown += [".. code-block:: text", "", line] if starts else [line]
    lines[:] = [*shown, *lines[end:]]


def setup(app):
    app.connect("autodoc-process-docstring", show_formulas, priority=400)  # napoleon's is 500
