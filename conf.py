"""Configuration of the site. ``make html`` builds it into docs/_build/html."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

project = "Batched Jacobians"
author = "the Batched Jacobians authors"
copyright = f"2026, {author}"
language = "en"
extensions = [
    "gallery",
    "mathml",
    "pages",
    "tutorial",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "publish",
    "take_away",
]
exclude_patterns = ["_build", "auto_examples/index.rst"]  # index.rst includes it
nitpicky = True  # a broken reference is a warning, and so an error
# A checkout may lie in a folder whose name has a space: the pages have relative links.
suppress_warnings = ["sphinx_gallery.space_in_filename"]

# Rooms and tutorials in a learner's order; a tutorial that is not listed comes last.
tutorial_order = {
    "compute": ["torch_func_jacobians", "choosing_a_method", "models_and_outputs"],
    "trust": [
        "check_a_jacobian",
        "layer_support",
        "silent_failures",
        "residual_networks",
        "sequence_models",
        "precision_and_randomness",
    ],
    "scale": [
        "jacobians_without_memory",
        "layer_structure",
        "universal_jacobian",
        "neural_tangent_kernel",
        "compiled_jacobians",
        "checkpoints_and_growing_memory",
        "distributed_jacobians",
    ],
    "use": [
        "error_bars",
        "classifier_confidence",
        "training_predicted",
        "levenberg_marquardt",
        "influence",
        "active_learning",
        "private_training",
    ],
}
sphinx_gallery_conf = {
    "examples_dirs": "../examples",  # relative to docs/, as are the next two
    "gallery_dirs": "auto_examples",
    "backreferences_dir": "_build/backreferences",
    "filename_pattern": r"\.py$",  # the default runs files named plot_* only
    "subsection_order": [f"../examples/{room}" for room in tutorial_order] + ["*"],
    "within_subsection_order": "gallery.LearnersOrder",
    "nested_sections": False,  # the theme's menu needs one toctree for all rooms
    # A Python warning in a tutorial fails the build, and each starts as a script does.
    "reset_modules": ("matplotlib", "pages.fresh_start"),
    # By joblib, which scikit-learn needs. A tutorial that measures time runs alone: it
    # ends with "sphinx_gallery_parallel = False".
    "parallel": 2,
    "first_notebook_cell": "%pip install -q backpack-for-pytorch matplotlib "
    "scikit-learn",
    "image_srcset": ["2x"],
    "remove_config_comments": True,
    "show_signature": False,
    # Timings and archives would differ in each build.
    "download_all_examples": False,
    "min_reported_time": float("inf"),
    "write_computation_times": False,
}
# Files to import, made at build time: name: (tutorial, functions that it has to hold).
take_away = {
    "jacobians": ("compute/torch_func_jacobians", ["jacobians"]),
    "batched_jacobian": ("scale/universal_jacobian", ["batched_jacobian"]),
    "check_jacobian": ("trust/check_a_jacobian", ["check_jacobian"]),
    "verdicts": ("trust/layer_support", ["verdicts"]),
    "memory_plan": (
        "scale/jacobians_without_memory",
        ["memory_plan", "jacobian_chunks", "write_jacobian"]
        + ["transposed_product", "jacobian_product", "gram_operator", "gram_diagonal"],
    ),
    "ntk": (
        "scale/neural_tangent_kernel",
        ["ntk", "write_ntk", "ntk_cost", "jacobian_factors", "squared_norms"],
    ),
    "error_bars": ("use/error_bars", ["error_bars"]),
    "laplace_softmax": (
        "use/classifier_confidence",
        [
            "laplace_softmax",
            "softmax_ggn",
            "kronecker_softmax",
            "kronecker_factors",
            "last_inputs",
        ],
    ),
    "levenberg_marquardt": ("use/levenberg_marquardt", ["levenberg_marquardt"]),
    "influence": ("use/influence", ["influence", "optimum"]),
    "clipped_gradient": (
        "use/private_training",
        ["clipped_gradient", "clipped_in_chunks"],
    ),
    "fisher": ("use/active_learning", ["most_informative", "fisher_rows"]),
}
# Local inventories of the names that the tutorials use: no request at build time.
intersphinx_mapping = {
    "torch": ("https://docs.pytorch.org/docs/stable/", "_ext/torch.inv"),
    "backpack": ("https://docs.backpack.pt/en/master/", "_ext/backpack.inv"),
    "sklearn": ("https://scikit-learn.org/stable/", "_ext/sklearn.inv"),
}
copybutton_selector = ":not(.sphx-glr-script-out) > div.highlight > pre"

html_theme = "sphinx_rtd_theme"
html_title = project
html_static_path = ["docs/_static"]  # relative to this file, as are the next two
templates_path = ["docs/_templates"]
html_favicon = "docs/_static/favicon.svg"
html_css_files = ["fonts/icons.css", "custom.css"]
html_js_files = ["menu.js"]
html_math_renderer = "mathml"
html_additional_pages = {"404": "404.html"}
html_use_index = False
html_copy_source = False
html_show_sphinx = False  # its text stands outside every landmark


def repository():
    """Return ``owner/name`` on GitHub, from the workflow or the clone, or nothing."""
    if name := os.environ.get("GITHUB_REPOSITORY"):
        return name
    if not (ROOT / ".git").exists():  # a copy, perhaps inside another repository
        return ""
    command = ["git", "-C", ROOT, "remote", "get-url", "origin"]
    try:
        remote = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:  # no git on this machine
        return ""
    found = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?$", remote.strip())
    return found[1] if found else ""


# Set by the workflow that publishes: the site's address and the notebooks' branch.
html_baseurl = os.environ.get("SITE_URL", "")
html_context = {
    "repository": repository(),
    "notebook_branch": os.environ.get("NOTEBOOK_BRANCH", ""),
}
