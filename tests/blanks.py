"""Take functions apart by syntax tree: find them, blank them, and put other bodies into them.

make_assignment.py blanks the functions that students write. grade.py puts the students' bodies into
these blanks. A function is named by its path in its file: "function" or "Class.method".
"""

import ast
import functools
import textwrap

parse = functools.cache(ast.parse)


def find(source, path):
    """Find a function in the syntax tree: return its node, and the node of its class or None.

    If a name is defined twice, the last one counts, as in Python.
    Raise ValueError if there is no such function.
    """
    owner, node = None, parse(source)
    for name in path.split("."):
        owner = node
        named = [child for child in node.body if getattr(child, "name", None) == name]
        if not named:
            raise ValueError(f"no {path} in the file: has tests/concepts.py another name for it?")
        node = named[-1]
    if not isinstance(node, ast.FunctionDef):
        raise ValueError(f"{path} is not a function in the file: write `def {path}(...)`")
    return node, owner if isinstance(owner, ast.ClassDef) else None


def replace_bodies(source, bodies):
    """Return the source of a file with other bodies. bodies: {path of a function: lines of code}.

    Signatures, decorators, docstrings and all other lines stay as they are.
    """
    lines = source.splitlines(keepends=True)
    nodes = {path: find(source, path)[0] for path in bodies}
    for path, node in sorted(nodes.items(), key=lambda item: -item[1].lineno):  # from the end
        first = node.body[0]
        documented = ast.get_docstring(node)
        if first.lineno == node.lineno:
            raise ValueError(f"{path} is a function of one line: give its body a line of its own")
        start = first.end_lineno if documented else first.lineno - 1
        # comments above a statement belong to the body
        while not documented and lines[start - 1].lstrip().startswith("#"):
            start -= 1
        body = textwrap.indent(bodies[path], " " * first.col_offset)
        lines[start : node.end_lineno] = [body + "\n"]
    return "".join(lines)


def blank(source, concepts):
    """Return the source of a file with blanks. concepts: {path of a function: its concept}."""
    return replace_bodies(source, {
        path: f'raise NotImplementedError("{concept}: write {path}")'
        for path, concept in concepts.items()})


def body_of(source, path):
    """Return the body of a function as code, without its docstring and comments.

    Nothing else is taken: no decorator, no default value, and no other line of the file.
    """
    node, _ = find(source, path)
    statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return "\n".join(map(ast.unparse, statements)) or "pass"
