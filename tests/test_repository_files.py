"""What hosts of repositories read (workflows, issue forms, the citation) is valid by their own schemas."""

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "vendor.github-workflows": [
        ".github/workflows/quality.yml",
        ".github/workflows/tests.yml",
        ".github/workflows/newest.yml",
    ],
    "vendor.github-issue-forms": [".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/feature.yml"],
    "vendor.citation-file-format": ["CITATION.cff"],
}


@pytest.mark.parametrize("schema", FILES)
def test_schema(schema):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *FILES[schema]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_workflow_and_form_is_checked():
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / ".github").rglob("*.yml")}
    checked = {name for names in FILES.values() for name in names if name.startswith(".github")}
    assert found - checked == {".github/ISSUE_TEMPLATE/config.yml"}


def test_the_oldest_and_the_pinned_python_are_tested():
    """The matrix covers what `requires-python` allows."""
    tests = (ROOT / ".github/workflows/tests.yml").read_text()
    assert 'python-version: ["3.10", "3.11", "3.12", "3.13"]' in tests
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()
