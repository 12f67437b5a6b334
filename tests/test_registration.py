"""Each case runs in a process of its own: the order of imports is what is tested."""

import itertools
import json
import subprocess
import sys

import pytest

import hf_vq
from hf_vq.registration import MODELS, LazyTable, public_class


IMPORTS = {
    "hf_vq": "import hf_vq",
    "config": "from hf_vq import VQGPTConfig",
    "model": "from hf_vq import VQGPTForCausalLM",
    "auto": "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoImageProcessor",
    "gpt2": "from transformers import GPT2Config, GPT2Model",
    "diffusers": "from diffusers import DiffusionPipeline",
}
CHECK = """
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM
from transformers import BertConfig, CLIPImageProcessor
from hf_vq import VQGANConfig, VQGANModel, VQGPTConfig, VQGPTForCausalLM, VQVAEConfig, VQVAEModel, VQImageProcessor
from hf_vq.registration import MODELS
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING, get_image_processor_class_from_name
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

assert type(AutoConfig.for_model("hf_vq_vqvae")) is VQVAEConfig
assert AutoModel._model_mapping[VQGANConfig] is VQGANModel
assert AutoModel._model_mapping[VQVAEConfig] is VQVAEModel
assert AutoModelForCausalLM._model_mapping[VQGPTConfig] is VQGPTForCausalLM
assert VQGPTConfig not in AutoModel._model_mapping
assert BertConfig in AutoModel._model_mapping
assert IMAGE_PROCESSOR_MAPPING[VQGANConfig] == {"pil": VQImageProcessor}
assert get_image_processor_class_from_name("VQImageProcessor") is VQImageProcessor
assert "PreTrainedModel" in LOADABLE_CLASSES["hf_vq"]
"""


def run(code, *arguments):
    done = subprocess.run([sys.executable, *arguments, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("order", [("hf_vq",), ("auto", "hf_vq"), ("model",), ("diffusers", "hf_vq")], ids="-".join)
def test_order_of_imports(order):
    run("\n".join([*(IMPORTS[name] for name in order), CHECK]))


@pytest.mark.slow
@pytest.mark.parametrize("order", list(itertools.permutations(IMPORTS, 2)), ids="-".join)
def test_every_order_of_two_imports(order):
    run("\n".join([*(IMPORTS[name] for name in order), CHECK]))


def test_in_threads():
    run(
        "import threading, importlib\n"
        "names = ['hf_vq.models.autoencoders.modeling_vqgan', 'hf_vq.models.priors.modeling_vq_gpt', 'transformers.models.auto.modeling_auto',"
        " 'hf_vq', 'hf_vq.models.autoencoders.image_processing_vq']\n"
        "threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in names]\n"
        "failures = []\n"
        "threading.excepthook = failures.append\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "assert not failures, failures\n" + CHECK
    )


def test_reload_source_and_pickle():
    run(
        "import importlib, inspect, pickle, hf_vq\n"
        "import transformers.models.auto.configuration_auto as configuration_auto\n"
        "import transformers.models.auto.modeling_auto as modeling_auto\n"
        "assert 'MODEL_MAPPING_NAMES' in inspect.getsource(modeling_auto)\n"
        "mapping = pickle.loads(pickle.dumps(modeling_auto.MODEL_MAPPING))\n"
        "assert mapping[hf_vq.VQGANConfig] is hf_vq.VQGANModel\n"
        "importlib.reload(hf_vq)\n"
        "importlib.reload(configuration_auto)\n"
        "assert type(configuration_auto.AutoConfig.for_model('hf_vq_vqgan')) is hf_vq.VQGANConfig"
    )


def test_a_missing_module_is_still_a_missing_module():
    run(
        "import sys, hf_vq\n"
        "from hf_vq import registration\n"
        "registration.EXTENSIONS['no_such_module_anywhere'] = print\n"
        "try:\n    import no_such_module_anywhere\n"
        "except ModuleNotFoundError as error:\n    assert error.name == 'no_such_module_anywhere'\n"
        "else:\n    raise SystemExit('imported')"
    )


def test_lazy_table():
    calls = []

    def entry(key, value):
        calls.append(value)
        return key, value

    class Foreign:
        pass

    Foreign.__name__ = "VQGANConfig"
    config = public_class("VQGANConfig")
    pending = {"a": lambda: entry("a", 1), "b": lambda: entry("b", 2), "VQGANConfig": lambda: entry(config, 3)}
    table = LazyTable({"c": 0}, pending)
    assert "a" in table and "c" in table and "d" not in table and config in table and Foreign not in table
    assert len(table) == 4 and table["c"] == 0 and table.get("d") is None and not calls
    with pytest.raises(KeyError):
        table["d"]
    assert table["a"] == 1 and table["a"] == 1 and calls == [1]
    table["b"] = 5  # an entry of the user's replaces ours
    assert table["b"] == 5
    assert dict(table) == {"c": 0, "a": 1, "b": 5, config: 3} and len(table) == 4
    assert sorted(table.values()) == [0, 1, 3, 5] and "VQGANConfig" not in table


@pytest.mark.parametrize("model_type", MODELS)
def test_registered_names_exist_and_agree(model_type):
    config, classes = MODELS[model_type]
    assert getattr(hf_vq, config).model_type == model_type
    assert not model_type.removeprefix("hf_vq_").startswith("hf_vq")
    for auto_class, name in classes.items():
        if auto_class != "AutoImageProcessor":
            assert getattr(hf_vq, name).config_class is getattr(hf_vq, config)


def test_no_folder_is_named_like_a_diffusers_pipeline():
    """diffusers would look for our components in its own folder (`hasattr(diffusers.pipelines, folder)`)."""
    code = (
        "import diffusers.pipelines, json, pathlib, hf_vq\n"
        "folder = pathlib.Path(hf_vq.__file__).parent\n"
        "names = ['hf_vq', *(p.name for p in folder.rglob('*') if p.is_dir() and p.name != '__pycache__')]\n"
        "print(json.dumps([len(names), [name for name in names if hasattr(diffusers.pipelines, name)]]))"
    )
    count, clashes = json.loads(run(code))
    assert count >= 6 and clashes == []
