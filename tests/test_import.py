import ast
import importlib
import json
import pathlib
import subprocess
import sys

import pytest

import hf_vq


PACKAGE = pathlib.Path(hf_vq.__file__).parent
HEAVY = ("torch", "transformers", "diffusers", "accelerate", "datasets", "numpy", "PIL", "huggingface_hub")


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy():
    loaded = json.loads(run("import hf_vq, json, sys; print(json.dumps(sorted(sys.modules)))"))
    assert not set(HEAVY) & set(loaded)


def test_help_loads_nothing_heavy():
    """What makes it fast; a time would be the machine's."""
    code = (
        "import sys\n"
        "from hf_vq.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        f"assert not {set(HEAVY)} & set(sys.modules)"
    )
    assert "usage: hf-vq" in run(code)


def test_importing_a_model_costs_no_more_than_the_bases():
    """Beyond the modeling modules of transformers and diffusers, GPT-2, Llama and `UNet2DModel`, our models import
    only our own.
    """
    code = (
        "import sys\n"
        "from transformers import PreTrainedModel, GPT2Model, GenerationMixin\n"
        "from transformers.models.llama import modeling_llama\n"
        "from transformers.image_processing_backends import PilBackend\n"
        "from diffusers import ConfigMixin, ModelMixin, SchedulerMixin, UNet2DModel\n"
        "from diffusers.loaders import PeftAdapterMixin\n"
        "from diffusers.models import attention, attention_dispatch\n"
        "before = set(sys.modules)\n"
        "import hf_vq\nTOOLS = ('hf_vq.hub', 'hf_vq.hub_cards', 'hf_vq.conversion.load_tokenizer')\n"
        "[getattr(hf_vq, name) for name in hf_vq.__all__ if 'Pipeline' not in name and "
        "hf_vq._MODULES[name] not in TOOLS]\n"
        "print(sorted(name for name in set(sys.modules) - before if name.split('.')[0] != 'hf_vq'))"
    )
    assert run(code).strip() == "[]"


def test_every_public_name_exists():
    assert hf_vq.__all__ == sorted(hf_vq.__all__)
    assert set(hf_vq.__all__) <= set(dir(hf_vq))
    for name in hf_vq.__all__:
        assert getattr(hf_vq, name).__name__ == name
        assert name in importlib.import_module(hf_vq._MODULES[name]).__all__


def test_bases_are_attributes_for_diffusers():
    import diffusers
    import transformers

    assert hf_vq.PreTrainedModel is transformers.PreTrainedModel
    assert hf_vq.ImageProcessingMixin is transformers.ImageProcessingMixin
    assert hf_vq.ModelMixin is diffusers.ModelMixin
    assert hf_vq.SchedulerMixin is diffusers.SchedulerMixin


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'VQNothing'"):
        _ = hf_vq.VQNothing
    with pytest.raises(ImportError):
        from hf_vq import VQNothing  # noqa: F401


def test_file_names_are_unique():
    """diffusers copies every remote file of a pipeline into one flat folder."""
    rooms = ("models", "pipelines", "schedulers")
    names = [path.name for room in rooms for path in (PACKAGE / room).rglob("*.py") if path.name != "__init__.py"]
    assert len(names) == len(set(names))


def test_models_import_only_models():
    """A model's code is bundled by its relative imports, and nothing there may need training or pipelines."""
    seen = 0
    for path in (PACKAGE / "models").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "hf_vq" for alias in node.names), path
            elif isinstance(node, ast.ImportFrom) and node.level:
                source = path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
                inside = source.relative_to(PACKAGE).parts
                assert source.is_file() and (inside[0] == "models" or len(inside) == 1), f"{path}: {node.module}"
                seen += 1
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] != "hf_vq", path
    assert seen > 20


def test_editors_see_the_names_that_are_imported_late():
    """The imports under TYPE_CHECKING are the table that `__getattr__` reads, said again for those who do not
    execute it.
    """
    (block,) = [node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If)]
    found = {alias.name: "hf_vq." + node.module for node in block.body for alias in node.names}
    assert found == hf_vq._MODULES
    assert all(alias.asname == alias.name for node in block.body for alias in node.names)
    assert (PACKAGE / "py.typed").is_file()


def test_one_version_number():
    import tomllib

    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "hf_vq.__version__"}
    assert f"version: {hf_vq.__version__}\n" in (PACKAGE.parent / "CITATION.cff").read_text()
    assert f"## {hf_vq.__version__}" in (PACKAGE.parent / "CHANGELOG.md").read_text()


USER_PROGRAM = """
import torch
from hf_vq import {names}

tokenizer = VQGANModel(VQGANConfig())
codes = tokenizer.encode(torch.zeros(1, 3, 64, 64), return_dict=True)
reveal_type(tokenizer)
reveal_type(EMAVectorQuantizer)
"""


@pytest.mark.slow
def test_a_type_checker_finds_every_name(tmp_path):
    """Every name resolves to what defines it; other packages' types are not looked into."""
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n")
    for package in ("PIL", "accelerate", "datasets", "diffusers", "huggingface_hub", "numpy", "torch", "transformers"):
        with settings.open("a") as file:
            file.write(f"[mypy-{package},{package}.*]\nfollow_imports = skip\n")
    program = tmp_path / "program.py"
    program.write_text(USER_PROGRAM.format(names=", ".join(hf_vq.__all__)))
    command = [sys.executable, "-m", "mypy", f"--config-file={settings}", f"--cache-dir={tmp_path}"]
    done = subprocess.run([*command, str(program)], capture_output=True, text=True, timeout=600, cwd=PACKAGE.parent)
    assert "has no attribute" not in done.stdout and "error:" not in done.stdout, done.stdout + done.stderr
    assert 'Revealed type is "hf_vq.models.autoencoders.modeling_vqgan.VQGANModel"' in done.stdout, done.stdout
    assert "hf_vq.models.quantizers." in done.stdout.splitlines()[-2], done.stdout
