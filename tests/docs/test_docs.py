"""The documentation: its Python runs, its commands have the options they name, its pages build without a warning."""

import ast
import dataclasses
import importlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hf_vq.cli import build_parser


ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs/pages").glob("*.md"))
READMES = sorted([ROOT / "README.md", ROOT / "conversion/README.md", *(ROOT / "examples").glob("**/README.md")])
MKDOCS = ROOT / ".venv-docs/bin/mkdocs"
NOTEBOOK = ROOT / "examples/notebook/codes.ipynb"


def fences(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def fresh_folder(tmp_path, monkeypatch):
    """An empty folder with the examples in it, as the current one."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT's calls
@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "python")], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, fresh_folder):
    names = {}
    for number, snippet in enumerate(fences(page, "python"), 1):
        exec(compile(snippet, f"{page.name}, snippet {number}", "exec"), names)
    check = CHECKS.get(page.stem)
    assert check is None or check(names)


CHECKS = {  # what the snippets of a page say they give
    "index": lambda names: len(names["images"]) == 4 and Path("flag.png").is_file(),
    "choose": lambda names: names["output"].indices.shape == (2, 8, 8),
    "train": lambda names: (
        names["images"][1]["pixel_values"].shape == (3, 32, 32) and names["images"][1]["text"] == "a green square"
    ),
    "evaluate": lambda names: 25 < names["figures"]["psnr"] < 31,  # of the card: 27.5 on all of the split
    "libraries": lambda names: type(names["merged"]).__name__ == "VQGPTForCausalLM" and Path("merged").is_dir(),
    "speed": lambda names: names["pipe"].vqvae.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last),
    "share": lambda names: names["image"].size == (64, 64) and Path("to_share/README.md").is_file(),
}


def test_every_page_with_python_is_checked():
    assert {page.stem for page in PAGES if fences(page, "python")} == set(CHECKS)


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_python_of_a_readme_is_python(path):
    for snippet in fences(path, "python"):
        ast.parse(snippet)


# Commands


def commands(path: Path) -> list[list[str]]:
    """The words of each command in the shell blocks of a page, variables and continued lines put together."""
    found = []
    for block in fences(path, "bash"):
        values = {}
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = re.sub(r"\$(\w+)", lambda match, values=values: values.get(match[1], match[0]), line)
            words = [word.rstrip(";") for word in shlex.split(line, comments=True)]
            while words and re.match(r"^[A-Z_]+=", words[0]):
                name, _, value = words.pop(0).partition("=")
                values[name] = value
            if words:
                found.append(words)
    return found


def script_options(path: Path) -> set[str]:
    """The options of a script; of one that trains, the fields of the dataclasses that `parse_arguments` gets."""
    training = ROOT / "hf_vq/training/scripts" / path.name
    if not training.is_file():
        return set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", path.read_text(encoding="utf-8")))
    module = importlib.import_module(f"hf_vq.training.scripts.{path.stem}")
    nodes = ast.walk(ast.parse(training.read_text(encoding="utf-8")))
    call = next(node for node in nodes if isinstance(node, ast.Call) and "parse_arguments" in ast.dump(node.func))
    types = [getattr(module, element.id) for element in call.args[0].elts]
    return {f"--{field.name}" for kind in types for field in dataclasses.fields(kind)}


def check_command(words: list[str]) -> None:
    """Raises an AssertionError where a command of the project does not have what is asked of it."""
    called = next((name for name in ("hf-vq", "hf_vq.cli") if name in words and words[0] != "pip"), None)
    if called is not None:
        arguments = words[words.index(called) + 1 :]
        options = build_parser().parse_args(arguments)
        if options.command == "train":
            check_script(ROOT / f"examples/{options.system}/train_{options.system}.py", options.arguments)
        return
    scripts = [word for word in words if word.endswith(".py") and not word.startswith("-")]
    if scripts:
        place = words.index(scripts[0])
        folder = [ROOT, *(ROOT / "examples").iterdir()]
        paths = [path for base in folder for path in base.glob(scripts[0])]
        assert paths, f"there is no {scripts[0]}"
        if words[0] != "cp":
            check_script(paths[0], words[place + 1 :])
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets), words


def check_script(path: Path, arguments: list[str]) -> None:
    known = script_options(path)
    given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    assert given <= known | {"--help"}, f"{path.name} has no {sorted(given - known)}"
    configurations = [word for word in arguments if word.startswith("examples/") and word.endswith(".yaml")]
    assert all((ROOT / name).is_file() for name in configurations if "$" not in name)


@pytest.mark.parametrize(
    "path", [path for path in PAGES + READMES if fences(path, "bash")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_commands_of_a_page_exist(path, capsys):
    for words in commands(path):
        try:
            check_command(words)
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")


def test_a_wrong_command_is_found(capsys):
    for words in (
        ["hf-vq", "sample", "folder", "--no-such-option"],
        ["hf-vq", "train", "vqgan", "--no_such_option", "1"],
        ["torchrun", "-m", "hf_vq.cli", "evaluate", "folder", "--no-such-option"],
        ["python", "examples/vqgan/train_vqgan.py", "examples/vqgan/no_such.yaml"],
        ["accelerate", "launch", "examples/vqgan/no_such.py"],
        ["make", "no-such-target"],
    ):
        with pytest.raises((SystemExit, AssertionError)):
            check_command(words)


# The notebook


def test_the_notebook_runs(fresh_folder):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names = {}
    for number, cell in enumerate(cells, 1):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), names)
    codes, edited = names["codes"], names["edited"]
    assert codes.shape == (1, 16, 16) and (edited[0, 7:10, 4:11] == codes[0, 4, 8]).all()
    assert (edited != codes).sum() == (codes[0, 7:10, 4:11] != codes[0, 4, 8]).sum() > 0  # and nothing else
    assert len(names["drawn"]) == 4 and len(names["completed"]) == 4


def test_the_notebook_holds_no_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)


# The site


class Files(dict):
    """Stands in for `mkdocs_gen_files`: keeps what the builder writes."""

    def open(self, name, mode):
        file = io.BytesIO() if "b" in mode else io.StringIO()
        file.close = lambda: self.__setitem__(name, file.getvalue())
        return file


@pytest.fixture(scope="module")
def site():
    """The pages, written and generated, as text, and the pictures beside them; made without MkDocs."""
    files = Files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mkdocs_gen_files", files)
        runpy.run_path(str(ROOT / "docs/generated_pages.py"))
    for path in (ROOT / "docs/pages").rglob("*.*"):
        name = path.relative_to(ROOT / "docs/pages").as_posix()
        assert name not in files, f"{name} is written and generated"
        files[name] = path.read_text(encoding="utf-8") if path.suffix == ".md" else path.read_bytes()
    return files


def anchors(text: str) -> set[str]:
    """Of the headings of a page, as Python-Markdown makes them."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def broken_links(files: dict) -> list[str]:
    """The links and pictures of the pages that lead nowhere in the site."""
    found = []
    for name, text in files.items():
        if not name.endswith(".md"):
            continue
        prose = re.sub(r"```.*?```|`[^`\n]*`(?!\])", "", text, flags=re.DOTALL)
        for address in re.findall(r"\]\(([^)\s]+)\)", prose):
            if "://" in address:
                continue
            page, _, anchor = address.partition("#")
            target = os.path.normpath(os.path.join(os.path.dirname(name), page)) if page else name
            if target not in files:
                found.append(f"{name}: {address}")
            elif anchor and anchor not in anchors(files[target]):
                found.append(f"{name}: {address} (no such heading)")
    return found


def nav_pages(entries) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    parts = entries.values() if isinstance(entries, dict) else entries
    return [page for part in parts for page in nav_pages(part)]


def test_the_navigation_has_every_page(site):
    pages = nav_pages(yaml.safe_load((ROOT / "docs/mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(pages) == len(set(pages)) and set(pages) <= set(site)
    written = {name for name in site if name.endswith(".md") and not name.startswith("classes/")}
    assert written <= set(pages)
    assert sum(name.startswith("classes/") for name in site) == len(importlib.import_module("hf_vq").__all__) + 1


def test_every_link_of_the_site_leads_somewhere(site):
    assert broken_links(site) == []
    pages = {
        "a.md": "[b](b/c.md#one-two) ![p](p.png) [no](no.md) [none](b/c.md#three)",
        "b/c.md": "# One, two!\n[a](../a.md)",
    }
    assert broken_links({**pages, "p.png": b""}) == ["a.md: no.md", "a.md: b/c.md#three (no such heading)"]


def test_every_link_of_a_readme_leads_somewhere():
    for path in [*READMES, *sorted((ROOT / "model_cards").glob("*.md")), ROOT / "CONTRIBUTING.md"]:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for address in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" not in address and "{{" not in address:
                assert (path.parent / address.partition("#")[0]).exists(), f"{path.relative_to(ROOT)}: {address}"


def test_every_public_name_has_a_room(monkeypatch):
    spec = importlib.util.spec_from_file_location("documented_rooms", ROOT / "docs/rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert sum(map(len, module.rooms().values())) == len(importlib.import_module("hf_vq").__all__)


@pytest.mark.slow
@pytest.mark.skipif(not MKDOCS.exists(), reason="needs the environment that make docs makes")
def test_the_site_builds_without_a_warning_and_calls_nobody(tmp_path):
    command = [MKDOCS, "build", "--strict", "--quiet", "--config-file", "docs/mkdocs.yml"]
    quiet = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)], cwd=ROOT, env={**os.environ, **quiet}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'(?:src|rel="stylesheet" href)="https?://', text), page
        assert not re.findall(r"fonts\.googleapis|cdn\.|unpkg", text), page
