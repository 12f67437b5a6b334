"""The public parameters without an annotation: their number may only fall."""

import ast
import pathlib

import hf_vq


PACKAGE = pathlib.Path(hf_vq.__file__).parent
MOST = 0


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


def test_their_number_only_falls():
    found = {path: unannotated(ast.parse(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))}
    lines = [f"{path.relative_to(PACKAGE)}: {', '.join(names)}" for path, names in found.items() if names]
    assert sum(map(len, found.values())) <= MOST, "\n".join(lines)
