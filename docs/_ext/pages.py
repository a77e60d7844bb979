"""What the theme and Sphinx-Gallery leave out of a page."""

import platform
import re
import struct
import warnings
from html import escape
from importlib.metadata import version
from pathlib import Path

from docutils import nodes
from pygments.formatters import HtmlFormatter
from sphinx.util import logging

logger = logging.getLogger(__name__)
GALLERY = "auto_examples/"
OTHER_PAGES = {"search": "search all tutorials", "404": "there is no such page"}
EXAMPLES = Path(__file__).parents[2] / "examples"
VERSIONS = {
    "Python": platform.python_version(),
    "PyTorch": version("torch").partition("+")[0],
    "BackPACK": version("backpack-for-pytorch"),
    "matplotlib": version("matplotlib"),
    "Sphinx-Gallery": version("sphinx-gallery"),
}


def ignore_new_processes():
    """Ignore that joblib replaces a process whose memory grew, after its tutorial."""
    warnings.filterwarnings("ignore", "A worker stopped while some jobs were given")


def fresh_start(gallery_conf, fname):
    """Make a Python warning stop the tutorial, and put back what the last one set.

    Sphinx-Gallery calls this before each.
    """
    import torch  # takes as long as a build in which no tutorial runs

    warnings.simplefilter("error")
    ignore_new_processes()
    torch.set_default_dtype(torch.float32)


def source(pagename):
    """Return the file, relative to the repository, that an author edits for a page."""
    if pagename.startswith(GALLERY):
        return f"examples/{pagename.removeprefix(GALLERY)}.py"
    return f"docs/{pagename}.rst"


def link_tutorials(app, doctree, docname):
    """Turn the name of a tutorial or a file to take away into a link to it."""
    for literal in list(doctree.findall(nodes.literal)):
        if name := re.fullmatch(r"([\w/]+)\.py", literal.astext()):
            target = GALLERY + name[1]
            if name[1] in app.config.take_away:
                uri = f"{'../' * docname.count('/')}take/{name[0]}"
            elif target in app.env.all_docs:
                uri = app.builder.get_relative_uri(docname, target)
            else:
                logger.warning("there is no tutorial %s", name[0], location=literal)
                continue
            link = nodes.reference("", "", internal=True, refuri=uri)
            link += literal.deepcopy()
            literal.replace_self(link)


def keep_short_code_whole(app, doctree):
    """Mark code in a text that is so short that it fits into a line of its own."""
    for literal in doctree.findall(nodes.literal):
        if len(literal.astext()) <= 20:
            literal["classes"].append("short")


def first_paragraph(doctree):
    """Return the paragraph that says what the page is for."""
    paragraphs = next(doctree.findall(nodes.section)).findall(nodes.paragraph)
    return next(p for p in paragraphs if "byline" not in p["classes"])


def describe(doctree):
    """Return what the page is for, in one line."""
    return " ".join(first_paragraph(doctree).astext().split())


def with_size(image, outdir):
    """Return the tag of a figure with its size, so that nothing jumps as it loads."""
    png = Path(outdir, "_images", image[1]).read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    return f'{image[0]}width="{width}" height="{height}" '


def keep_lines_apart(output):
    """Give each line of an output an element, and keep numbers such as 5e-04 whole."""
    start, text, end = output.groups()
    text = re.sub(r"\d[\d.]*e[+-]\d+", r'<span class="number">\g<0></span>', text)
    lines = text.splitlines(keepends=True)
    return start + "".join(f'<span class="line">{line}</span>' for line in lines) + end


def complete(app, pagename, templatename, context, doctree):
    """Add the description, a link to GitHub, versions, and the sizes of figures."""
    context["versions"] = ", ".join(" ".join(item) for item in VERSIONS.items())
    context.setdefault("metatags", "")
    # The captions in the menu are headings, of a level that Sphinx leaves out.
    menu = context["toctree"]
    context["toctree"] = lambda **options: (menu(**options) or "").replace(
        'role="heading"', 'role="heading" aria-level="2"'
    )
    if pagename == "404":  # served under any path, so its links start from the site's
        context["metatags"] += f'<base href="{app.config.html_baseurl or "/"}">'
    if doctree:
        text = describe(doctree)
    else:
        text = f"{context['project']}: {OTHER_PAGES[pagename]}."
    context["metatags"] += f'<meta name="description" content="{escape(text)}">'
    if not doctree:
        return

    if context["repository"]:
        edit = (
            f"https://github.com/{context['repository']}/edit/main/{source(pagename)}"
        )
        context["meta"] = {**(context["meta"] or {}), "github_url": edit}
    context["body"] = re.sub(
        r"(<div class=\"sphx-glr-script-out[^>]*>.*?<pre><span></span>)(.*?)(</pre>)",
        keep_lines_apart,
        context["body"],
        flags=re.DOTALL,
    )
    context["body"] = re.sub(
        r'<img src="[^"]*?/_images/([^"/]+\.png)" (?=srcset)',
        lambda image: with_size(image, app.outdir),
        context["body"],
    )


def write_dark_code_colors(app):
    """Write them before the pages, which name the checksum of each style sheet."""
    if app.builder.format == "html":
        static = Path(app.outdir, "_static")
        static.mkdir(parents=True, exist_ok=True)
        styles = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
        (static / "pygments_dark.css").write_text(styles)


def forget_failures(app, exception):
    """Let a tutorial that failed run again, even if it is put back as it was before."""
    for script in app.config.sphinx_gallery_conf.get("failing_examples", ()):
        copy = Path(app.srcdir, GALLERY, Path(script).relative_to(EXAMPLES))
        Path(f"{copy}.md5").unlink(missing_ok=True)


def forget_words(app):
    """Drop the words that no page holds any more: Sphinx keeps them in the index."""
    for words in app.builder.indexer._mapping, app.builder.indexer._title_mapping:
        for word in [word for word, pages in words.items() if not pages]:
            del words[word]
    return ()


def setup(app):
    ignore_new_processes()
    app.connect("doctree-read", keep_short_code_whole)
    app.connect("doctree-resolved", link_tutorials)
    app.connect("builder-inited", write_dark_code_colors)
    app.connect("html-page-context", complete)
    app.connect("html-collect-pages", forget_words)
    app.connect("build-finished", forget_failures, priority=1)
    dark = "(prefers-color-scheme: dark)"
    app.add_css_file("pygments_dark.css", media=dark, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
