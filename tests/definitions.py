"""Take a function of a tutorial, with what it needs, and not run the whole tutorial."""

import ast
import dis
import runpy

DEFINITIONS = ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom
SIMPLE = (*DEFINITIONS, ast.Assign, ast.AnnAssign, ast.AugAssign)
# Bare calls that change nothing that they get.
HARMLESS = "print(", "assert_close(", "torch.testing.assert_close(", "torch.set_"


def used(code, kind, deep):
    """Return the global names that code loads or stores, or code inside it, too."""
    opnames = f"{kind}_NAME", f"{kind}_GLOBAL"
    names = {i.argval for i in dis.get_instructions(code) if i.opname in opnames}
    inner = [const for const in code.co_consts if deep and hasattr(const, "co_code")]
    return names.union(*(used(const, kind, deep) for const in inner))


def changed(statement):
    """Return the names that ``x.y = ...``, ``x[y] = ...`` or a bare ``f(x)`` change."""
    changes = []
    for node in ast.walk(statement):
        if isinstance(node, ast.Expr) and not ast.unparse(node).startswith(HARMLESS):
            changes.append(node)
        elif isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
            while isinstance(node, ast.Attribute | ast.Subscript):
                node = node.value
            changes.append(node)
    names = [name for change in changes for name in ast.walk(change)]
    return {name.id for name in names if isinstance(name, ast.Name)}


class Statement:
    def __init__(self, node, script):
        self.code = compile(ast.Module([node], []), script, "exec")
        self.defines = isinstance(node, DEFINITIONS)
        self.sets = ast.unparse(node).startswith("torch.set_default_dtype(")
        self.is_simple = self.sets or isinstance(node, SIMPLE)
        self.reads = used(self.code, "LOAD", deep=True)
        self.binds = used(self.code, "STORE", deep=False)
        self.changes = changed(node) & self.reads  # not what is local to a function


class Definitions(dict):
    """The names of a tutorial.

    Asked for a name, execute what makes it, if that is definitions and assignments,
    one after the other. If it takes more than that, run the tutorial. The default type
    is set at once.
    """

    def __init__(self, script):
        super().__init__()
        self.script = str(script)
        body = ast.parse(script.read_text()).body
        self.statements = [Statement(node, self.script) for node in body]
        data = set().union(*(s.binds for s in self.statements if not s.defines))
        for statement in self.statements:
            statement.changes &= data
        self.namespace = {"__name__": "<run_path>", "__file__": self.script}
        self.done, self.results = [], None
        self.execute(self.makers(None))  # the settings

    def makers(self, name):
        """Return the statements that make a name, or ``None`` if it takes a run."""
        needed, before = {name}, None
        while needed != before:
            before = needed
            found = [
                s for s in self.statements if s.sets or (s.binds | s.changes) & needed
            ]
            if any(not s.is_simple or s.defines and s.changes & needed for s in found):
                return None
            needed = needed.union(*(s.reads for s in found))
        return found

    def execute(self, statements):
        for statement in statements:
            if statement not in self.done:
                self.done.append(statement)
                exec(statement.code, self.namespace)

    def __missing__(self, name):
        makers = self.makers(name)
        if makers is None:
            self.results = self.results or runpy.run_path(self.script)
            self[name] = self.results[name]
        else:
            self.execute(makers)
            self[name] = self.namespace[name]
        return self[name]
