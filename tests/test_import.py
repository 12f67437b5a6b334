import importlib
import json
import pathlib
import subprocess
import sys
import time

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


def test_help_is_fast_and_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from hf_vq.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        f"assert not {set(HEAVY)} & set(sys.modules)"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert "usage: hf-vq" in run(code)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0


def test_importing_a_model_costs_no_more_than_the_bases():
    """Beyond the modeling modules of transformers and diffusers, and GPT-2, our models import only our own."""
    code = (
        "import sys\n"
        "from transformers import PreTrainedModel, GPT2Model, GenerationMixin\n"
        "from transformers.image_processing_backends import PilBackend\n"
        "from diffusers import ConfigMixin, ModelMixin, SchedulerMixin\n"
        "from diffusers.models import attention, attention_dispatch\n"
        "before = set(sys.modules)\n"
        "import hf_vq\n"
        "[getattr(hf_vq, name) for name in hf_vq.__all__ if not name.endswith('Pipeline')]\n"
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
    names = [path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert len(names) == len(set(names))


def test_models_import_only_their_own_folder():
    """transformers copies the code of a model only for `from .name import ...`, and nothing there may need training."""
    for path in (PACKAGE / "models").glob("*.py"):
        lines = [line.strip() for line in path.read_text().splitlines()]
        for line in lines:
            assert not line.startswith(("from ..", "from . ", "import hf_vq", "from hf_vq")), f"{path.name}: {line}"
            if line.startswith("from ."):
                assert (path.parent / f"{line.split()[1][1:]}.py").is_file(), f"{path.name}: {line}"
