"""What a tutorial's page has and its script has not: the first screen, and folds."""

import ast
import re
import sys
from importlib.metadata import version

from docutils import nodes
from pages import EXAMPLES, GALLERY, first_paragraph
from sphinx.addnodes import download_reference
from sphinx.util import logging
from sphinx_gallery.directives import imgsgnode

logger = logging.getLogger(__name__)
# For each module: what people call it, and what installs it.
PACKAGES = {
    "torch": ("PyTorch", "torch"),
    "backpack": ("BackPACK", "backpack-for-pytorch"),
    "sklearn": ("scikit-learn", "scikit-learn"),
}


LONG = 40  # lines of an output from which on it is closed


class details(nodes.General, nodes.Element):
    """Code or output that a reader need not read, closed until it is asked for."""


class summary(nodes.General, nodes.TextElement):
    """The line that stays when the code is closed."""


def packages(tree):
    """Return names and distributions of the packages that a module imports, sorted."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.partition(".")[0])
    order = [*PACKAGES, *sorted(modules - set(PACKAGES) - sys.stdlib_module_names)]
    return [PACKAGES.get(name, (name, name)) for name in order if name in modules]


def fold(document):
    """Close long outputs, and each cell that starts with, say, ``# fold: Training``."""
    for block in list(document.findall(nodes.literal_block)):
        if found := re.match(r"# fold: (.+)\n+", block.astext()):
            code = block.astext()[found.end() :]
            folded = block.copy()
            folded.rawsource = code
            folded += nodes.Text(code)
            block.replace_self(details("", summary(found[1], found[1]), folded))
        count = block.astext().count("\n") + 1
        if "sphx-glr-script-out" in block["classes"] and count >= LONG:
            text = f"Output of {count} lines"
            closed = details("", summary(text, text), classes=["output"])
            block.parent.replace(block, closed)
            closed += block
    if lost := re.search(r"^(# ?)?fold:.*", document.astext(), re.MULTILINE):
        text = "%r folds nothing: it has to be the first line of a cell of code"
        logger.warning(text, lost[0], location=document)


def enlarging(image, docname, *more):
    """Return a paragraph in which ``image`` is a link to its largest file.

    A phone shows that file at any size.
    """
    name = image["srcset"].split("/")[-1].split(" ")[0]
    uri = "../" * docname.count("/") + f"_images/{name}"
    link = nodes.reference("", "", image, *more, internal=True, refuri=uri)
    return nodes.paragraph("", "", link, classes=["enlarging"])


def place_figures(document, docname):
    """Link each figure, and show the first one below the first paragraph."""
    figures = list(document.findall(imgsgnode))
    for figure in figures:
        figure.replace_self(enlarging(figure.copy(), docname))
    if not figures:
        return
    main = next(document.findall(imgsgnode))
    main.parent.parent["ids"].append("main-figure")
    # The text stands below it, once for all readers.
    image = main.copy()
    image["alt"] = ""
    lead = enlarging(image, docname, nodes.inline("", main["alt"]))
    lead["classes"].append("lead-figure")
    text = "How this figure is made"
    lead += nodes.reference("", text, internal=True, refid="main-figure")
    first = first_paragraph(document)
    first.parent.insert(first.parent.index(first) + 1, lead)


def is_byline(paragraph):
    return "byline" in paragraph["classes"]


def introduce(document, script):
    """Say below the title what the page needs; offer the script and the notebook."""
    byline = nodes.paragraph("", "", classes=["byline"])
    links = {link["reftarget"]: link for link in document.findall(download_reference)}
    for kind, ending in {"Script": ".py", "Notebook": ".ipynb"}.items():
        link = next(link for name, link in links.items() if name.endswith(ending))
        link.children = [nodes.inline(kind, kind)]
        byline += [link, nodes.Text(" ")]
    for node in list(document.findall(nodes.Element)):
        if {"sphx-glr-download-link-note", "sphx-glr-footer"} & set(node["classes"]):
            node.parent.remove(node)
    used = ", ".join(
        f"{name} {version(package).partition('+')[0]}"
        for name, package in packages(ast.parse(script))
    )
    text = f"Needs Python 3.11, PyTorch 2.9, or newer. Ran with {used}."
    byline += nodes.inline(text, text)
    next(document.findall(nodes.section)).insert(1, byline)


def complete_tutorial(app, document):
    docname = app.env.docname
    path = EXAMPLES / f"{docname.removeprefix(GALLERY)}.py"
    if docname.startswith(GALLERY) and path.is_file():
        script = path.read_text()
        fold(document)
        introduce(document, script)
        place_figures(document, docname)


def offer_colab(app, document, docname):
    """Add the link when the page is written: where notebooks are is known then."""
    context = app.config.html_context
    repository, branch = context["repository"], context["notebook_branch"]
    for byline in filter(is_byline, document.findall(nodes.paragraph)):
        if repository and branch:
            notebook = f"{branch}/{docname.removeprefix(GALLERY)}.ipynb"
            uri = (
                f"https://colab.research.google.com/github/{repository}/blob/{notebook}"
            )
            link = nodes.reference("", "Open in Colab", refuri=uri)
            byline.insert(-1, [link, nodes.Text(" ")])


def visit_details(translator, node):
    classes = " ".join(["fold", *node["classes"]])
    translator.body.append(f'<details class="{classes}">')


def depart_details(translator, node):
    translator.body.append("</details>\n")


def visit_summary(translator, node):
    translator.body.append("<summary>")


def depart_summary(translator, node):
    translator.body.append("</summary>\n")


def setup(app):
    app.add_node(details, html=(visit_details, depart_details))
    app.add_node(summary, html=(visit_summary, depart_summary))
    # Before Sphinx collects the downloads, so that it copies no archive.
    app.connect("doctree-read", complete_tutorial, priority=400)
    app.connect("doctree-resolved", offer_colab)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
