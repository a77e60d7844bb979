"""Write math as MathML when the site is built: it shows without JavaScript."""

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.util import logging

logger = logging.getLogger(__name__)
convert = LatexToMathML(fancy_error=False).convert_with_local_state


def mathml(node, display):
    tex = node.astext()
    if r"\\" in tex and r"\begin{" not in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    try:
        return convert(tex, displaystyle=display)
    except LatexError as error:
        logger.warning("cannot convert %r to MathML: %s", tex, error, location=node)
        return ""


def visit_inline(translator, node):
    translator.body.append(mathml(node, display=False))
    raise nodes.SkipNode


def visit_block(translator, node):
    start = translator.starttag(node, "div", CLASS="math")
    translator.body.append(f"{start}{mathml(node, display=True)}</div>\n")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
