"""The documentation's site: `make docs` builds it; a warning is an error."""

import geo_r1

project = "geo_r1"
copyright = "the geo_r1 contributors"
release = version = geo_r1.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["*.in"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # links such as training.md#sampling

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
