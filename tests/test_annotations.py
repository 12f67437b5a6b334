"""Every public parameter has an annotation, and every described one exists."""

import ast
import pathlib
import re

import hf_vq


PACKAGE = pathlib.Path(hf_vq.__file__).parent


def unannotated(tree: ast.Module) -> list[str]:
    """`function.parameter` of each public function, and of the methods and `__init__` of each public class."""
    found = []

    def visit(body: list[ast.stmt], owner: str, is_class: bool):
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                visit(node.body, f"{owner}{node.name}.", True)
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if node.name.startswith("_") and node.name not in ("__init__", "__call__"):
                continue
            arguments = node.args
            parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            parameters += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
            is_static = any(isinstance(item, ast.Name) and item.id == "staticmethod" for item in node.decorator_list)
            skipped = 1 if is_class and not is_static else 0  # self or cls
            for parameter in parameters[skipped:]:
                if parameter.annotation is None and not parameter.arg.startswith("_"):
                    found.append(f"{owner}{node.name}.{parameter.arg}")

    visit(tree.body, "", False)
    return found


def test_what_counts():
    source = (
        "def f(a, b: int, *args, c=1, **kwargs: int): pass\n"
        "def _g(a): pass\n"
        "class A:\n"
        "    def __init__(self, x): pass\n"
        "    def _m(self, y): pass\n"
        "    @staticmethod\n"
        "    def s(z): pass\n"
        "class _B:\n"
        "    def m(self, a): pass\n"
    )
    assert unannotated(ast.parse(source)) == ["f.a", "f.c", "f.args", "A.__init__.x", "A.s.z"]


def test_every_public_parameter_is_annotated():
    found = {path: unannotated(ast.parse(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))}
    lines = [f"{path.relative_to(PACKAGE)}: {', '.join(names)}" for path, names in found.items() if names]
    assert not lines, "\n".join(lines)


def broken_entries(docstring: str, parameters: set[str] | None) -> list[str]:
    """Lines at the first depth of an "Args:" section that begin no entry, and entries of no parameter."""
    lines = docstring.split("\n")
    start = next((number for number, line in enumerate(lines) if line.strip() == "Args:"), len(lines))
    found, depth = [], None
    for line in lines[start + 1 :]:
        indent = len(line) - len(line.lstrip())
        if not line.strip() or indent <= len(lines[start]) - len(lines[start].lstrip()):
            break
        depth = indent if depth is None else depth
        if indent > depth:
            continue
        # `name:`, `name (type):` and `name, other:`; a list of names may go on in the next line
        entry = re.match(r"((?:[*\w]+|`[^`]*`)(?:, (?:[*\w]+|`[^`]*`)| `[^`]*`)*)( \(.*)?(:|,$)", line.strip())
        names = re.findall(r"\w+", re.sub(r"`[^`]*`", "", entry[1])) if entry else [None]
        if None in names or (parameters is not None and not parameters.issuperset(names)):
            found.append(line.strip())
    return found


def test_every_described_argument_exists():
    found = []
    nodes = [node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    for node in nodes:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or not (text := ast.get_docstring(node)):
            continue
        function = node
        if isinstance(node, ast.ClassDef):
            own = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
            function = own[0] if own else None
        parameters = None
        if function is not None and function.args.kwarg is None:
            arguments = function.args
            parameters = {item.arg for item in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
            parameters |= {arguments.vararg.arg} if arguments.vararg else set()
        found += [f"{node.name}: {line}" for line in broken_entries(text, parameters)]
    assert not found


def test_a_broken_entry_is_found():
    text = "Args:\n    one, two: both,\n        and more.\n    lost its indent. three: hidden.\n    four: unknown."
    assert broken_entries(text, {"one", "two", "three"}) == ["lost its indent. three: hidden.", "four: unknown."]
