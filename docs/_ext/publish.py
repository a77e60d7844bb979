"""What others read of a published site: search engines, chats, language models."""

from html import escape
from pathlib import Path

from pages import GALLERY, describe
from sphinx_gallery.directives import imgsgnode
from take_away import FILES, FOLDER

CARD = "sphx_glr_batched_jacobians_thumb.png"  # of a page without a figure


def add_card(app, pagename, templatename, context, doctree):
    """Say what a chat shows of a link to the page."""
    base = app.config.html_baseurl
    if not base or not doctree:
        return
    lead = next(doctree.findall(imgsgnode), None)
    image = Path(lead["uri"]).name if lead else CARD
    properties = {
        "og:title": app.env.titles[pagename].astext(),
        "og:description": describe(doctree),
        "og:url": f"{base}{pagename}.html",
        "og:image": f"{base}_images/{image}",
        "og:type": "article",
    }
    context["metatags"] += "".join(
        f'<meta property="{name}" content="{escape(text)}">'
        for name, text in properties.items()
    )


def write_lists(app, exception):
    """List the pages for search engines, and what they are for, for language models."""
    base = app.config.html_baseurl
    if exception or not base or app.builder.name != "html":
        return
    names = [app.config.root_doc, *app.env.toctree_includes[app.config.root_doc]]
    urls = "".join(f"<url><loc>{base}{name}.html</loc></url>\n" for name in names)
    start = '<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n'
    Path(app.outdir, "sitemap.xml").write_text(f"{start}{urls}</urlset>\n")

    pages = {name: describe(app.env.get_doctree(name)) for name in names}
    text = f"# {app.config.project}\n\n> {pages.pop(app.config.root_doc)}\n"
    text += "\n## Pages\n\n"
    for name, description in pages.items():
        title = app.env.titles[name].astext()
        text += f"- [{title}]({base}{name}.html): {description}\n"
    text += "\n## Functions, each with what it needs in one file\n\n"
    for name, file in FILES.items():
        page = f"{base}{GALLERY}{file['tutorial']}.html"
        link = f"[{name}.py]({base}{FOLDER}/{name}.py)"
        text += f"- {link}: {file['facts']}, from {page}\n"
    Path(app.outdir, "llms.txt").write_text(text)


def setup(app):
    app.connect("html-page-context", add_card, priority=600)  # after the description
    app.connect("build-finished", write_lists)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
