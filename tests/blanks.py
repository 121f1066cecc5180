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
            raise ValueError(
                f"there is no {path} in the file: has tests/concepts.py another name for it?"
            )
        node = named[-1]
    if not isinstance(node, ast.FunctionDef):
        raise ValueError(f"{path} is not a function in the file: write `def {path}(...)`")
    return node, owner if isinstance(owner, ast.ClassDef) else None


def replace_body(source, path, body):
    """Return the source of a file with `body`, lines of code, as the body of a function.

    Signature, decorators, docstring and all other lines stay as they are.
    """
    node, _ = find(source, path)
    lines = source.splitlines(keepends=True)
    first = node.body[0]
    documented = ast.get_docstring(node)
    if first.lineno == node.lineno:
        raise ValueError(f"{path} is a function of one line: give its body a line of its own")
    start = first.end_lineno if documented else first.lineno - 1
    # comments above a statement belong to the body
    while not documented and lines[start - 1].lstrip().startswith("#"):
        start -= 1
    indent = " " * first.col_offset
    lines[start : node.end_lineno] = [textwrap.indent(body, indent) + "\n"]
    return "".join(lines)


def blank(source, path, concept):
    """Return the source of a file with one function's body replaced by an error."""
    return replace_body(source, path, f'raise NotImplementedError("{concept}: write {path}")')


def body_of(source, path):
    """Return the body of a function as code, without its docstring and comments.

    Nothing else is taken: no decorator, no default value, and no other line of the file.
    """
    node, _ = find(source, path)
    statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return "\n".join(map(ast.unparse, statements)) or "pass"
