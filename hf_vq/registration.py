"""Makes transformers' Auto classes and diffusers' loaders know the classes of this package, once both are imported.

Why a hook on imports: registering at once would import torch, transformers and diffusers for `import hf_vq`, 7 s in
place of 0.04 s. And it cannot be done the moment that an Auto module is there, since transformers imports its Auto
modules halfway through modules that ours import. So the hook waits for the end of the outermost import of these
packages, and then calls the libraries' own `register`. What it does to names that they do not document is in
`register_models`, `add_loadable_classes` and `read_installed_classes_first`, and nowhere else.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


# model_type: (config class, {auto class: class})
MODELS = {
    "hf_vq_gpt": ("VQGPTConfig", {"AutoModelForCausalLM": "VQGPTForCausalLM"}),
    "hf_vq_llama": ("VQLlamaConfig", {"AutoModelForCausalLM": "VQLlamaForCausalLM"}),
    "hf_vq_pixelcnn": ("PixelCNNConfig", {"AutoModelForCausalLM": "PixelCNNForCausalLM"}),
    "hf_vq_pixelsnail": ("PixelSNAILConfig", {"AutoModelForCausalLM": "PixelSNAILForCausalLM"}),
    "hf_vq_vqgan": ("VQGANConfig", {"AutoModel": "VQGANModel", "AutoImageProcessor": "VQImageProcessor"}),
    "hf_vq_vqvae": ("VQVAEConfig", {"AutoModel": "VQVAEModel", "AutoImageProcessor": "VQImageProcessor"}),
    "hf_vq_vqvae2": ("VQVAE2Config", {"AutoModel": "VQVAE2Model", "AutoImageProcessor": "VQImageProcessor"}),
}
# classes that diffusers looks for by name among its own: pipelines, and what `diffusers.AutoModel` loads
DIFFUSERS_CLASSES = (
    "VQAutoregressivePipeline",
    "VQDiffusionImagePipeline",
    "LatentUNet2DConditionModel",
    "LatentUNet2DModel",
    "VQDiffusionTransformer2DModel",
    "VQLatentDiffusionPipeline",
    "VQVAE2Pipeline",
)
# diffusers looks on a component's package for the base class that says how the component is saved and loaded
COMPONENT_BASES = {
    "ImageProcessingMixin": "transformers",
    "ModelMixin": "diffusers",
    "PreTrainedModel": "transformers",
    "SchedulerMixin": "diffusers",
}


def public_class(name: str) -> type:
    """A class of this package by its public name, imported now."""
    return getattr(importlib.import_module(__package__), name)


def register_configs(configuration_auto: ModuleType) -> None:
    """AutoConfig finds a configuration by its model_type."""
    for model_type, (config, _) in MODELS.items():
        configuration_auto.AutoConfig.register(model_type, public_class(config), exist_ok=True)


def register_models(modeling_auto: ModuleType) -> None:
    """AutoModel and AutoModelForCausalLM find a model by its configuration; `Trainer` knows the causal ones by name.

    It shifts the labels by one for its label smoothing if the name of the model's class is in transformers' table, and
    not otherwise, without a word; `register` leaves that table as it is.
    """
    for model_type, (_, classes) in MODELS.items():
        if "AutoModelForCausalLM" in classes:
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = classes["AutoModelForCausalLM"]
    for auto_class in ("AutoModel", "AutoModelForCausalLM"):
        for config, classes in MODELS.values():
            if auto_class in classes:
                model = public_class(classes[auto_class])
                getattr(modeling_auto, auto_class).register(public_class(config), model, exist_ok=True)


def register_image_processors(image_processing_auto: ModuleType) -> None:
    """AutoImageProcessor finds a processor by the model's configuration."""
    for config, classes in MODELS.values():
        if "AutoImageProcessor" in classes:
            processor = {"pil": public_class(classes["AutoImageProcessor"])}
            image_processing_auto.AutoImageProcessor.register(
                public_class(config), image_processor_classes=processor, exist_ok=True
            )


def add_loadable_classes(pipeline_loading_utils: ModuleType) -> None:
    """Components are indexed as ``["hf_vq", class name]``; else diffusers refuses them in repositories of the Hub."""
    pipeline_loading_utils.LOADABLE_CLASSES[__package__] = {
        base: ["save_pretrained", "from_pretrained"] for base in COMPONENT_BASES
    }
    for name in DIFFUSERS_CLASSES:
        setattr(sys.modules["diffusers"], name, public_class(name))


def read_installed_classes_first(pipeline_utils: ModuleType) -> None:
    """`DiffusionPipeline` takes the installed classes for a folder that carries its own code, and executes none of it.

    Such a folder's index names files where others name libraries. Nobody has to trust it then.
    """
    pipeline = pipeline_utils.DiffusionPipeline
    read = pipeline._dict_from_json_file.__func__
    if getattr(read, "package", None) == __package__:
        return

    def read_index(cls: type, json_file: Any) -> dict:
        return with_installed_classes(read(cls, json_file))

    read_index.package = __package__
    pipeline._dict_from_json_file = classmethod(read_index)


def with_installed_classes(index: dict) -> dict:
    """A `model_index.json` with this package in place of the files that carry its classes."""
    names = importlib.import_module(__package__).__all__
    changed = {}
    for key, value in index.items():
        if isinstance(value, list) and len(value) == 2 and value[1] in names:
            changed[key] = value[1] if key == "_class_name" else [__package__, value[1]]
    return index | changed


# what follows the import of a module, in this order
REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": register_configs,
    "transformers.models.auto.modeling_auto": register_models,
    "transformers.models.auto.image_processing_auto": register_image_processors,
    "diffusers.pipelines.pipeline_loading_utils": add_loadable_classes,
    "diffusers.pipelines.pipeline_utils": read_installed_classes_first,
}
WATCHED = ("transformers", "diffusers", __package__)


class RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds the modules of three packages as the other finders do, and registers when the outermost has executed."""

    def __init__(self) -> None:
        self.pending = dict(REGISTRATIONS)
        self.executing: dict[int, int] = {}  # modules under way, by thread
        self.lock = threading.Lock()
        self.wanted = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in WATCHED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with self:
                execute(module)
            if fullname in REGISTRATIONS:  # also when it is loaded again
                self.pending[fullname] = REGISTRATIONS[fullname]
            self.register()

        spec.loader.exec_module = exec_module
        return spec

    def __enter__(self) -> None:
        thread = threading.get_ident()
        self.executing[thread] = self.executing.get(thread, 0) + 1

    def __exit__(self, *error: object) -> None:
        thread = threading.get_ident()
        self.executing[thread] -= 1
        if not self.executing[thread]:
            del self.executing[thread]

    def register(self) -> None:
        """Makes the registrations whose modules are there, unless some thread is halfway through an import.

        The thread that ends last makes them: this one holds the locks of what it has just imported, and two that wait
        for each other would be given unfinished modules.
        """
        self.wanted = True
        while self.wanted and not self.executing and self.lock.acquire(blocking=False):
            try:
                self.wanted = False
                for name in [name for name in self.pending if name in sys.modules]:
                    with self:  # what is imported for it must not register in turn
                        self.pending[name](sys.modules[name])
                    del self.pending[name]
            finally:
                self.lock.release()


FINDER = RegisterAfterImport()


def install() -> None:
    """Register with the modules that are imported already, and with the others when they will be."""
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
    FINDER.register()
