"""The README's Python examples run, in its order, from the project's root; its shell commands name real files."""

import math
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_there_are_examples():
    assert len(SNIPPETS) == 4


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_example_runs(number, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(SNIPPETS[number], f"README.md, example {number + 1}", "exec"), names)
    if "images" in names:
        assert [image.size for image in names["images"]] == [(64, 64)] * 4
    if "reconstruction" in names:
        assert names["indices"].shape == (1, 16, 16)
        # a picture comes back as itself, and not as another one
        assert (names["reconstruction"] - names["pixel_values"]).abs().mean() < 0.15
    if "bits" in names:
        # between none and what a uniform draw of 64 codes costs, and less than that draw would
        codes = names["indices"].shape[1:].numel()
        uniform = codes * math.log2(names["prior"].config.codebook_size)
        assert names["bits"].shape == (4,) and (names["bits"] > 1).all() and (names["bits"] < 0.9 * uniform).all()


def test_public_names_are_enough():
    assert not re.search(r"(?:from|import) hf_vq\.", TEXT)


def test_files_that_the_readme_names_exist():
    named = re.findall(r"(?:docs|examples|conversion|tests)/[\w./-]+\.(?:py|yaml|png|svg|md)", TEXT)
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
