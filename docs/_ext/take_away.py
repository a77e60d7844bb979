"""Functions of the tutorials as files to import, made from the tutorials themselves."""

import ast
import builtins
import re
import symtable
import sys
from html import escape
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from pages import EXAMPLES, GALLERY
from sphinx.errors import ConfigError
from tutorial import details, is_byline, packages

FOLDER = "take"
CODE = '<code class="docutils literal">'
FILES = {}  # name: what ``offer`` and the directive say about the file


def bound_and_read(statement):
    """Return the names that a statement binds in its module, and those it looks up."""
    top = symtable.symtable(ast.unparse(statement), "tutorial", "exec")
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned()}
    bound |= {s.get_name() for s in top.get_symbols() if s.is_imported()}
    read, tables = set(), [top]
    for table in tables:  # grows: functions and classes have their own tables
        tables += table.get_children()
        symbols = [
            s for s in table.get_symbols() if s.is_referenced() and s.is_global()
        ]
        read |= {symbol.get_name() for symbol in symbols}
    return bound, read - set(dir(builtins))


def kind(statement):
    """Return what a statement is for a module that only defines, or ``None``."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return "definition"
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        return "constant"
    if isinstance(statement, ast.Import | ast.ImportFrom):
        name = getattr(statement, "module", None) or statement.names[0].name
        standard = name.partition(".")[0] in sys.stdlib_module_names
        return "standard import" if standard else "import"
    return None


def reach(tree, functions):
    """Return the statements that define functions and what they need, and all names."""
    names = [(statement, *bound_and_read(statement)) for statement in tree.body]
    kept, used, missing = set(), set(), set(functions)
    while missing:
        name = missing.pop()
        used.add(name)
        found = {s: read for s, bound, read in names if name in bound}
        kinds = {kind(statement) for statement in found}
        if name in functions and kinds != {"definition"}:
            raise LookupError(f"defines no function {name!r}")
        if not found or None in kinds:
            raise LookupError(f"has nothing to take along that defines {name!r}")
        if len(found) > 1 and not kinds <= {"import", "standard import"}:
            raise LookupError(f"defines {name!r} more than once")
        kept |= set(found)
        missing |= set().union(*found.values()) - used
    return [statement for statement in tree.body if statement in kept], used


def import_lines(statement, used):
    """Return an import of just the names that are used, as the formatter writes it."""
    bound = [a.asname or a.name.partition(".")[0] for a in statement.names]
    statement.names = [a for a, name in zip(statement.names, bound) if name in used]
    line = ast.unparse(statement)
    if len(line) > 88:
        start, _, names = line.partition("import ")
        names = names.replace(", ", ",\n    ")
        line = f"{start}import (\n    {names},\n)"
    return line


def own_lines(statement, lines):
    """Return the lines of a statement, with the comment right above it."""
    start = min(
        s.lineno for s in [statement, *getattr(statement, "decorator_list", [])]
    )
    first = start = start - 1
    while lines[first - 1].startswith("#"):
        first -= 1
    if lines[first].startswith(("# %%", "# fold:")):
        first = start
    return "\n".join(lines[first : statement.end_lineno])


def module(source, functions, introduction):
    """Return a module with functions of a tutorial and all that they need."""
    statements, used = reach(ast.parse(source), functions)
    text, last = introduction, None
    for statement in statements:
        new = kind(statement)
        if "import" in new:
            part = import_lines(statement, used)
        else:
            part = own_lines(statement, source.splitlines())
        blank = 2 if "definition" in (new, last) else int(new != last)
        text += "\n" * blank + part + "\n"
        last = new
    return text


def says(tree, function):
    """Return the first paragraph of a function's docstring, as HTML."""
    (found,) = [s for s in tree.body if getattr(s, "name", "") == function]
    text = (ast.get_docstring(found) or "").partition("\n\n")[0]
    return re.sub("``(.*?)``", rf"{CODE}\1</code>", escape(text))


def write_files(app):
    """Write all files before the tutorials run, which takes longer to fail."""
    FILES.clear()
    base = app.config.html_baseurl
    for name, (tutorial, functions) in app.config.take_away.items():
        introduction = f'"""From the tutorial {tutorial}.py of Batched Jacobians.\n\n'
        introduction += 'For PyTorch 2.9 and newer.\n"""\n'
        if base:
            introduction += f"# {base}{GALLERY}{tutorial}.html\n"
        try:
            source = (EXAMPLES / f"{tutorial}.py").read_text()
            text = module(source, functions, introduction)
        except (OSError, LookupError) as error:
            text = f"conf.py, take_away, {name}: examples/{tutorial}.py {error}"
            raise ConfigError(text) from error
        needs = ", ".join(package for _, package in packages(ast.parse(text)))
        facts = f"{len(text.splitlines())} lines, needs {needs or 'only Python'}"
        FILES[name] = {"tutorial": tutorial, "functions": functions, "facts": facts}
        FILES[name]["title"] = ast.get_docstring(ast.parse(source)).splitlines()[0]
        FILES[name]["says"] = says(ast.parse(text), functions[0])
        if app.builder.format == "html":
            folder = Path(app.outdir, FOLDER)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.py").write_text(text)


def link(name, docname, text):
    """Return the link from a page to a file."""
    uri = f"{'../' * docname.count('/')}{FOLDER}/{name}.py"
    return f'<a href="{uri}" download>{text}</a>'


def link_with_facts(name, docname):
    """Return the link from a page to a file, and what there is to know about it."""
    code = f"{CODE}{name}.py</code>"
    return f"{link(name, docname, code)} ({FILES[name]['facts']})"


def offer(app, document):
    """Link each file below the title, and above the first cell that it holds."""
    docname = app.env.docname
    for name, file in FILES.items():
        if docname != GALLERY + file["tutorial"]:
            continue
        (byline,) = (p for p in document.findall(nodes.paragraph) if is_byline(p))
        html = link(name, docname, f"{name}.py") + " "
        byline.insert(-1, nodes.raw("", html, format="html"))
        pattern = rf"^(def|class) ({'|'.join(file['functions'])})\b"
        blocks = document.findall(nodes.literal_block)
        block = next(b for b in blocks if re.search(pattern, b.astext(), re.MULTILINE))
        cell = block.parent if isinstance(block.parent, details) else block
        code = f"{CODE}from {name} import {', '.join(file['functions'])}</code>"
        html = (
            f"In one file, with what it needs: {link_with_facts(name, docname)}. {code}"
        )
        html = f'<p class="take-away" id="take-{name}">{html}</p>'
        cell.parent.insert(cell.parent.index(cell), nodes.raw("", html, format="html"))


class TakeAway(Directive):
    """``.. take-away::`` lists all files: what they hold, need, and come from."""

    def run(self):
        env = self.state.document.settings.env
        items = []
        for name, file in FILES.items():
            env.note_dependency(str(EXAMPLES / f"{file['tutorial']}.py"))
            page = f"{'../' * env.docname.count('/')}{GALLERY}{file['tutorial']}.html"
            title = f'<a href="{page}#take-{name}">{escape(file["title"])}</a>'
            linked = link_with_facts(name, env.docname)
            said = f"{linked}, from {title}. {file['says']}"
            if others := file["functions"][1:]:
                codes = (f"{CODE}{other}</code>" for other in others)
                said += f" With {', '.join(codes)}."
            items.append(f"<li>{said}</li>")
        html = f'<ul class="simple">{"".join(items)}</ul>' if items else ""
        return [nodes.raw("", html, format="html")]


def setup(app):
    app.add_config_value("take_away", {}, "env", dict)
    app.add_directive("take-away", TakeAway)
    app.connect("builder-inited", write_files, priority=100)
    app.connect("doctree-read", offer)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
