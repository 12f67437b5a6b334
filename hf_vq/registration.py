"""Makes transformers' Auto classes and diffusers' pipelines know the classes of this package.

Nothing heavy is imported for it. The modules that hold the tables are extended right after they are imported, whenever
that is, and the entries import the classes that they name when they are first read. Reading late is a need, not only a
saving: transformers imports its Auto modules, and looks into their tables, halfway through modules that ours import.
"""

import importlib
import importlib.abc
import sys
from functools import partial


# model_type: (config class, {auto class: class})
MODELS = {
    "hf_vq_gpt": ("VQGPTConfig", {"AutoModelForCausalLM": "VQGPTForCausalLM"}),
    "hf_vq_pixelcnn": ("PixelCNNConfig", {"AutoModelForCausalLM": "PixelCNNForCausalLM"}),
    "hf_vq_pixelsnail": ("PixelSNAILConfig", {"AutoModelForCausalLM": "PixelSNAILForCausalLM"}),
    "hf_vq_vqgan": ("VQGANConfig", {"AutoModel": "VQGANModel", "AutoImageProcessor": "VQImageProcessor"}),
    "hf_vq_vqvae": ("VQVAEConfig", {"AutoModel": "VQVAEModel", "AutoImageProcessor": "VQImageProcessor"}),
    "hf_vq_vqvae2": ("VQVAE2Config", {"AutoModel": "VQVAE2Model", "AutoImageProcessor": "VQImageProcessor"}),
}
PIPELINES = ("VQAutoregressivePipeline", "VQDiffusionImagePipeline", "VQLatentDiffusionPipeline", "VQVAE2Pipeline")


def public_class(name: str) -> type:
    """A class of this package by its public name, imported now."""
    return getattr(importlib.import_module(__package__), name)


class LazyTable(dict):
    """A dict with entries that are imported when they are read.

    ``pending`` maps a name to a function that returns the entry's key and value. The key is that name, or the class of
    this package with that name, so asking for any other key imports nothing.
    """

    def __init__(self, entries: dict, pending: dict):
        super().__init__(entries)
        self.pending = pending

    @staticmethod
    def _name(key):
        if isinstance(key, type):
            return key.__name__ if key.__module__.startswith(f"{__package__}.") else None
        return key

    def _load(self, names):
        for name in names:
            key, value = self.pending[name]()
            self.setdefault(key, value)
            self.pending.pop(name, None)  # another thread may have been here

    def __contains__(self, key):
        return super().__contains__(key) or self._name(key) in self.pending

    def __getitem__(self, key):
        if not super().__contains__(key) and key in self:
            self._load([self._name(key)])
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default

    def __len__(self):
        return super().__len__() + len(self.pending)

    def __iter__(self):
        return iter(self.keys())

    def keys(self):
        self._load(list(self.pending))
        return super().keys()

    def values(self):
        self._load(list(self.pending))
        return super().values()

    def items(self):
        self._load(list(self.pending))
        return super().items()


def _by_model_type(model_type, config):
    return model_type, public_class(config)


def _by_config(config, name):
    return public_class(config), public_class(name)


def _by_config_and_backend(config, name):
    return public_class(config), {"pil": public_class(name)}


def _by_name(name):
    return name, public_class(name)


def add_configs(configuration_auto):
    """AutoConfig finds a configuration by its model_type."""
    mapping = configuration_auto.CONFIG_MAPPING
    pending = {model_type: partial(_by_model_type, model_type, config) for model_type, (config, _) in MODELS.items()}
    mapping._extra_content = LazyTable(mapping._extra_content, pending)


def add_models(modeling_auto):
    """AutoModel and AutoModelForCausalLM find a model by its configuration."""
    for auto_class in ("AutoModel", "AutoModelForCausalLM"):
        _add_classes(getattr(modeling_auto, auto_class)._model_mapping, auto_class, _by_config)


def add_image_processors(image_processing_auto):
    """AutoImageProcessor finds a processor by the model's configuration."""
    _add_classes(image_processing_auto.IMAGE_PROCESSOR_MAPPING, "AutoImageProcessor", _by_config_and_backend)


def _add_classes(mapping, auto_class, entry):
    classes = {config: names[auto_class] for config, names in MODELS.values() if auto_class in names}
    pending = {config: partial(entry, config, name) for config, name in classes.items()}
    mapping._extra_content = LazyTable(mapping._extra_content, pending)


def add_pipelines(pipeline_loading_utils):
    """Components are indexed as ``["hf_vq", class name]``, and ``DiffusionPipeline`` finds the pipeline classes.

    Without the first, diffusers refuses Hub repositories with components from outside of it. For the second there is a
    table only in diffusers' default import mode; with DIFFUSERS_SLOW_IMPORT a pipeline is loaded by its own class.
    """
    bases = ("ImageProcessingMixin", "ModelMixin", "PreTrainedModel", "SchedulerMixin")
    pipeline_loading_utils.LOADABLE_CLASSES[__package__] = {
        base: ["save_pretrained", "from_pretrained"] for base in bases
    }
    diffusers = sys.modules["diffusers"]
    if hasattr(diffusers, "_objects"):
        diffusers._objects = LazyTable(diffusers._objects, {name: partial(_by_name, name) for name in PIPELINES})


EXTENSIONS = {
    "transformers.models.auto.configuration_auto": add_configs,
    "transformers.models.auto.modeling_auto": add_models,
    "transformers.models.auto.image_processing_auto": add_image_processors,
    "diffusers.pipelines.pipeline_loading_utils": add_pipelines,
}


class ExtendAfterImport(importlib.abc.MetaPathFinder):
    """Finds the modules of ``EXTENSIONS`` as the other finders do, and extends them once they have executed."""

    def find_spec(self, fullname, path, target=None):
        extend = EXTENSIONS.get(fullname)
        if extend is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            extend(module)

        spec.loader.exec_module = exec_module
        return spec


FINDER = ExtendAfterImport()


def install():
    """Extend the modules that are imported already, and the others when they will be."""
    if FINDER in sys.meta_path:
        return
    sys.meta_path.insert(0, FINDER)
    for name, extend in EXTENSIONS.items():
        if name in sys.modules:
            extend(importlib.import_module(name))  # import_module waits for a thread that is importing it now
