"""Each case runs in a process of its own: the order of imports is what is tested."""

import inspect
import itertools
import json
import subprocess
import sys

import pytest

import hf_vq
from hf_vq.registration import DIFFUSERS_CLASSES, MODELS


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
import diffusers, hf_vq.registration
assert diffusers.VQDiffusionTransformer2DModel.__module__.startswith("hf_vq.")
assert diffusers.DiffusionPipeline._dict_from_json_file.package == "hf_vq"
assert not hf_vq.registration.FINDER.pending and not hf_vq.registration.FINDER.executing
"""


def run(code, *arguments):
    done = subprocess.run([sys.executable, *arguments, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("order", [("auto", "hf_vq"), ("diffusers", "hf_vq")], ids="-".join)
def test_order_of_imports(order):
    run("\n".join([*(IMPORTS[name] for name in order), CHECK]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", [*itertools.permutations(IMPORTS, 1), *itertools.permutations(IMPORTS, 2)], ids="-".join
)
def test_every_order_of_one_or_two_imports(order):
    run("\n".join([*(IMPORTS[name] for name in order), CHECK]))


@pytest.mark.slow  # and fails now and then: transformers' own lazy names fail where two threads ask for them first
def test_in_threads():
    run(
        "import threading, importlib\n"
        "names = ['hf_vq.models.autoencoders.modeling_vqgan', 'hf_vq.models.priors.modeling_vq_gpt', "
        "'transformers.models.auto.modeling_auto',"
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
        "try:\n    import transformers.no_such_module_anywhere\n"
        "except ModuleNotFoundError as error:\n    assert error.name == 'transformers.no_such_module_anywhere'\n"
        "else:\n    raise SystemExit('imported')\n"
        "assert not hf_vq.registration.FINDER.executing"
    )


def test_an_error_of_a_registration_is_not_swallowed():
    run(
        "import hf_vq\n"
        "from hf_vq import registration\n"
        "def broken(module):\n    raise ImportError('broken')\n"
        "registration.REGISTRATIONS['transformers.models.auto.configuration_auto'] = broken\n"
        "try:\n    import transformers.models.auto.configuration_auto\n"
        "except ImportError as error:\n    assert 'broken' in str(error)\n"
        "else:\n    raise SystemExit('swallowed')"
    )


def test_a_module_of_ours_under_way_in_another_thread():
    """The thread that ends last registers: the others might be given unfinished modules."""
    run(
        "import sys, threading, types, hf_vq\n"
        "from hf_vq.registration import FINDER\n"
        "made = []\n"
        "FINDER.pending['types'] = made.append\n"
        "def other():\n"
        "    with FINDER:\n        started.set()\n        go_on.wait(60)\n"
        "    FINDER.register()\n"
        "started, go_on = threading.Event(), threading.Event()\n"
        "thread = threading.Thread(target=other)\n"
        "thread.start()\n"
        "started.wait(60)\n"
        "FINDER.register()\n"
        "assert not made and 'types' in FINDER.pending\n"
        "go_on.set()\n"
        "thread.join()\n"
        "assert made == [types] and 'types' not in FINDER.pending"
    )


def test_the_names_that_diffusers_does_not_publish():
    """If this fails, diffusers has changed what `hf_vq.registration` relies on; there was no published way, so look
    for one.

    - `LOADABLE_CLASSES` says for each library how its base classes are saved and loaded; a library that it lacks is
      indexed by module paths, which `DiffusionPipeline` refuses in repositories of the Hub.
    - `DiffusionPipeline._dict_from_json_file` reads `model_index.json` in `from_pretrained` and in `download`; ours
      replaces the files of a folder that carries its code by the installed package.
    - a class that an index names without a library, and one that `diffusers.AutoModel` loads, is looked for among the
      attributes of `diffusers`.
    """
    import diffusers
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.pipelines import pipeline_loading_utils

    assert pipeline_loading_utils.LOADABLE_CLASSES["diffusers"]["ModelMixin"] == ["save_pretrained", "from_pretrained"]
    assert isinstance(vars(ConfigMixin)["_dict_from_json_file"], classmethod)
    for method in (ConfigMixin.load_config, diffusers.DiffusionPipeline.download):
        assert "cls._dict_from_json_file(" in inspect.getsource(method)
    assert all(getattr(diffusers, name) is getattr(hf_vq, name) for name in DIFFUSERS_CLASSES)
    assert all(getattr(hf_vq, name) for name in hf_vq.registration.COMPONENT_BASES)


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
