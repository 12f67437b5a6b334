"""One self-contained file out of a module and the modules of its folder that it imports.

A checkpoint that carries its code carries one file per class: diffusers downloads a single file for each component, so
a second one would be missing for whoever has no hf_vq.
"""

import ast
from pathlib import Path


def bundle(path: str | Path) -> str:
    """The source of the module at ``path``, with every ``from .name import ...`` replaced by that module's own source.

    Raises:
        ValueError: if the modules cannot share one file: an import from elsewhere in the package, or of a whole module,
            or two modules that give one name different meanings.
    """
    path = Path(path)
    modules = _in_order(path, {})
    _check_names(modules)
    names = ", ".join(module.name for module in modules)
    parts = [f"# One file made of {names} of hf_vq (Apache-2.0), so that it loads where hf_vq is not installed.\n"]
    parts += [f"# {module.name}\n{_without_own_imports(module, tree)}" for module, tree in modules.items()]
    return "\n\n".join(parts)


def _in_order(path: Path, modules: dict[Path, ast.Module]) -> dict[Path, ast.Module]:
    """Adds the modules that ``path`` needs, and then ``path`` itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if _is_foreign(node) or (_is_own_import(node) and node not in tree.body):
            raise ValueError(
                f"{path.name}, line {node.lineno}: only `from .name import ...` at the top level can be bundled."
            )
    for node in filter(_is_own_import, tree.body):
        needed = path.parent / f"{node.module}.py"
        if needed not in modules and needed != path:
            _in_order(needed, modules)
    modules[path] = tree
    return modules


def _is_own_import(node) -> bool:
    return isinstance(node, ast.ImportFrom) and node.level > 0


def _is_foreign(node) -> bool:
    """An import of this package that is not of the form ``from .name import a, b``."""
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == __package__ for alias in node.names)
    if not isinstance(node, ast.ImportFrom):
        return False
    if node.level == 0:
        return node.module.split(".")[0] in (__package__, "__future__")
    return node.level > 1 or node.module is None or "." in node.module or node.names[0].name == "*"


def _check_names(modules: dict[Path, ast.Module]):
    meanings = {}
    for path, tree in modules.items():
        for name, meaning in _top_level_names(path, tree):
            if meanings.setdefault(name, meaning) != meaning:
                raise ValueError(
                    f"`{name}` has two meanings: {meanings[name]} and {meaning}; rename one to bundle them."
                )


def _top_level_names(path: Path, tree: ast.Module):
    """Pairs of a name that the module binds and what it means: its origin if imported, the module if defined there."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, path.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias.name if alias.asname else "a package"
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if node.level == 0:
                    yield alias.asname or alias.name, f"{node.module}.{alias.name}"
                else:
                    yield alias.asname or alias.name, f"{node.module}.py"
        else:
            stored = (child for child in ast.walk(node) if isinstance(child, ast.Name))
            for child in stored:
                if isinstance(child.ctx, ast.Store) and child.id != "__all__":
                    yield child.id, path.name


def _without_own_imports(path: Path, tree: ast.Module) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in filter(_is_own_import, tree.body):
        renamed = [f"{alias.asname} = {alias.name}" for alias in node.names if alias.asname not in (None, alias.name)]
        lines[node.lineno - 1 : node.end_lineno] = ["; ".join(renamed), *[""] * (node.end_lineno - node.lineno)]
    return "\n".join(lines).strip() + "\n"
