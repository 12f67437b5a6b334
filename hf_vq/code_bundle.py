"""One self-contained file out of a module and the modules of its package that it imports.

A checkpoint that carries its code carries one file per class: diffusers downloads a single file for each component, so
a second one would be missing for whoever has no hf_vq.
"""

import ast
from pathlib import Path


def bundle(path: str | Path) -> str:
    """The source of the module at ``path``, with every relative ``from`` import replaced by that module's own source.

    ``from .name import ...``, ``from ..folder.name import ...`` and so on are followed across the package's folders.

    Raises:
        ValueError: if the modules cannot share one file: an import of a whole module or of a folder, one that is not
            at the top level, or two modules that give one name different meanings.
    """
    path = Path(path).resolve()
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
        if _is_foreign(node) or (_is_own_import(node) and not (node in tree.body and _source(path, node).is_file())):
            raise ValueError(
                f"{path.name}, line {node.lineno}: only `from .name import ...` of a module of the "
                f"package, at the top "
                "level, can be bundled."
            )
    for node in filter(_is_own_import, tree.body):
        needed = _source(path, node)
        if needed not in modules and needed != path:
            _in_order(needed, modules)
    modules[path] = tree
    return modules


def _is_own_import(node) -> bool:
    return isinstance(node, ast.ImportFrom) and node.level > 0


def _source(path: Path, node: ast.ImportFrom) -> Path:
    """The file that a relative import in the module at ``path`` reads."""
    return path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")


def _is_foreign(node) -> bool:
    """An import of this package that is not of the form ``from .name import a, b``, with any number of dots."""
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == __package__ for alias in node.names)
    if not isinstance(node, ast.ImportFrom):
        return False
    if node.level == 0:
        return node.module.split(".")[0] in (__package__, "__future__")
    return node.module is None or node.names[0].name == "*"


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
            yield node.name, _meaning(path)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias.name if alias.asname else "a package"
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if node.level == 0:
                    yield alias.asname or alias.name, f"{node.module}.{alias.name}"
                else:
                    yield alias.asname or alias.name, _meaning(_source(path, node))
        else:
            stored = (child for child in ast.walk(node) if isinstance(child, ast.Name))
            for child in stored:
                if isinstance(child.ctx, ast.Store) and child.id != "__all__":
                    yield child.id, _meaning(path)


def _meaning(path: Path) -> str:
    """Two modules of one name in different folders are two meanings."""
    return f"{path.parent.name}/{path.name}"


def _without_own_imports(path: Path, tree: ast.Module) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in filter(_is_own_import, tree.body):
        renamed = [f"{alias.asname} = {alias.name}" for alias in node.names if alias.asname not in (None, alias.name)]
        lines[node.lineno - 1 : node.end_lineno] = ["; ".join(renamed), *[""] * (node.end_lineno - node.lineno)]
    return "\n".join(lines).strip() + "\n"
