"""Every training script starts from its address alone: `uv run ADDRESS` and `hf jobs uv run ADDRESS` read its header
(PEP 723).
"""

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hf_vq.cli import SYSTEMS


tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# of the specification, https://peps.python.org/pep-0723/#specification
BLOCK = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")
SCRIPTS = {path.parent.name: path for path in (ROOT / "examples").glob("*/train_*.py")}


def header(path: Path) -> dict:
    (block,) = BLOCK.finditer(path.read_text(encoding="utf-8"))
    assert block["type"] == "script"
    lines = block["content"].splitlines()
    return tomllib.loads("\n".join(line[2:] for line in lines))


def test_each_system_has_a_script():
    assert set(SCRIPTS) == set(SYSTEMS)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_header_asks_for_what_the_package_asks_for(system):
    found = header(SCRIPTS[system])
    assert found["requires-python"] == PROJECT["requires-python"]
    extras = PROJECT["optional-dependencies"]
    known = {asked.name: asked for asked in map(Requirement, sum(extras.values(), PROJECT["dependencies"]))}
    asked = {requirement.name: requirement for requirement in map(Requirement, found["dependencies"])}
    own = asked.pop(PROJECT["name"])  # which brings its own dependencies, and the extra those of training
    assert "train" in own.extras and own.extras <= extras.keys()
    assert all(requirement.specifier == known[name].specifier for name, requirement in asked.items())


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_file_runs_the_script_of_its_name(system):
    tree = ast.parse(SCRIPTS[system].read_text(encoding="utf-8"))
    (statement,) = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    assert statement.module == f"hf_vq.training.scripts.train_{system}"
