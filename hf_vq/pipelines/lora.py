"""LoRA weights (Hu et al. 2022) for the networks of a pipeline, by PEFT."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file


LORA_FILE = "pytorch_lora_weights.safetensors"


def load_lora_weights(
    pipeline: DiffusionPipeline,
    pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    component: str | None = None,
    weight_name: str = LORA_FILE,
    **options: Any,
) -> None:
    """
    Loads LoRA weights into the network that draws the codes or the latents.

    Args:
        pipeline ([`VQPipeline`]): its `lora_components` can take them.
        pretrained_model_name_or_path_or_dict: for a prior a folder or Hub repository with an adapter of PEFT
            (`adapter_config.json`); for a denoiser a folder, file or repository of diffusers' LoRA weights, as
            `save_lora_adapter` writes them, or the weights by name, with or without the component's name before them.
        adapter_name: a name for them, of which the network can hold several.
        component: which one of `lora_components`, where there are several.
        weight_name: the file in a folder or repository, for a denoiser.
        options: of `huggingface_hub.hf_hub_download` or, for a prior, of its `load_adapter`: `revision`, `token`, ….

    Raises:
        ValueError: a component that takes none, or weights that do not belong to it.
    """
    names = pipeline.lora_components
    if component is None and len(names) == 1:
        component = names[0]
    if component not in names:
        raise ValueError(f"`component` must be one of {names}, got {component!r}.")
    network, source = getattr(pipeline, component), pretrained_model_name_or_path_or_dict
    if isinstance(network, ModelMixin):
        _load_into_denoiser(network, component, source, adapter_name, weight_name, options)
        return
    if isinstance(source, Mapping):
        raise ValueError(
            "`pretrained_model_name_or_path_or_dict` must be a folder or repository with adapter_config.json for a "
            "prior, got weights without it."
        )
    info = network.load_adapter(str(source), adapter_name=adapter_name, **options)
    strangers = sorted(info.unexpected_keys) or sorted(info.missing_keys) or [key for key, *_ in info.mismatched_keys]
    if strangers:
        network.delete_adapter(adapter_name)
        raise ValueError(
            f"`pretrained_model_name_or_path_or_dict` {str(source)!r} must hold an adapter of `{component}`, a "
            f"{type(network).__name__}; these weights do not fit: {strangers[:5]}."
        )


def unload_lora_weights(pipeline: DiffusionPipeline) -> None:
    """Takes all LoRA weights out of the pipeline's networks again."""
    for name in pipeline.lora_components:
        network = getattr(pipeline, name)
        if isinstance(network, ModelMixin):
            network.unload_lora()
        elif getattr(network, "_hf_peft_config_loaded", False):
            network.delete_adapter(list(network.peft_config))


def _load_into_denoiser(network, component: str, source, adapter_name: str, weight_name: str, options: dict) -> None:
    if not hasattr(network, "load_lora_adapter"):
        raise ValueError(f"`component` must be a network that takes LoRA weights, got a {type(network).__name__}.")
    where, given, own = "a mapping", source, {}
    if not isinstance(source, Mapping):
        path = Path(source) / weight_name if Path(source).is_dir() else Path(source)
        if not path.is_file():
            path = Path(hf_hub_download(str(source), weight_name, **options))
        where, source = str(path), load_file(path)
        given, own = str(path.parent), {"weight_name": path.name}  # from the file, which also says how much they weigh
    prefix = f"{component}."
    weights = {name.removeprefix(prefix): weight for name, weight in source.items()}
    modules = dict(network.named_modules())
    if len({name.startswith(prefix) for name in source}) > 1:
        weights = dict(source)  # some have the prefix of this component, and others belong to another one
    strangers = [name for name in weights if _module_of(name) not in modules]
    if strangers or not weights:
        raise ValueError(
            f"`pretrained_model_name_or_path_or_dict` must hold LoRA weights of `{component}`, a "
            f"{type(network).__name__}, but {where} has {len(weights)} weights, among them of other "
            f"networks {strangers[:5]}."
        )
    has_prefix = all(name.startswith(prefix) for name in source)
    network.load_lora_adapter(given, prefix=component if has_prefix else None, adapter_name=adapter_name, **own)


def _module_of(name: str) -> str:
    """The layer that a LoRA weight is for: what comes before `.lora_A` and its relatives."""
    return name.split(".lora")[0].removesuffix(".processor")


__all__ = ["load_lora_weights", "unload_lora_weights"]
