"""No module of the package needs, directly or through others, a module that needs it."""

import ast
from pathlib import Path

import hf_vq


ROOT = Path(hf_vq.__file__).parent


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", getattr(node.test, "attr", "")) == "TYPE_CHECKING"


def imports(tree: ast.AST, package: str):
    """`(module, name)` of every import that may run, inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if is_for_type_checkers(node):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            module = ".".join(part for part in (base if node.level else "", node.module) if part)
            yield from ((module, alias.name) for alias in node.names)
        yield from imports(node, package)


def import_graph(root: Path) -> dict[str, set[str]]:
    files = {module_name(path, root): path for path in root.rglob("*.py")}
    graph = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = imports(ast.parse(path.read_text()), package)
        wanted = {f"{module}.{alias}" if f"{module}.{alias}" in files else module for module, alias in found}
        graph[name] = (wanted & files.keys()) - {name}
    return graph


def first_circle(graph: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph[name]):
            circle = visit(other, [*path, name])
            if circle is not None:
                return circle
        done.add(name)
        return None

    return next(filter(None, (visit(name, []) for name in sorted(graph))), None)


def test_no_circle():
    graph = import_graph(ROOT)
    assert len(graph) > 80 and "hf_vq.training.data.samplers" in graph["hf_vq.training.data.streaming"]
    circle = first_circle(graph)
    assert circle is None, " → ".join(circle)


def test_circles_are_found(tmp_path):
    root = tmp_path / "package"
    (root / "room").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "room" / "__init__.py").write_text("")
    (root / "a.py").write_text("def late():\n    from .room.b import thing\n")
    (root / "room" / "b.py").write_text("from typing import TYPE_CHECKING\nfrom ..c import thing\n")
    (root / "c.py").write_text("if TYPE_CHECKING:\n    from . import a\n")
    assert first_circle(import_graph(root)) is None
    (root / "c.py").write_text("try:\n    from . import a\nexcept ImportError:\n    a = None\n")
    assert first_circle(import_graph(root)) == ["package.a", "package.room.b", "package.c", "package.a"]
