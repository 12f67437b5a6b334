"""What all pipelines share: their parts, callbacks, decoding and output types."""

import functools
import inspect
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import nn

from ..argument_checks import check_integer, check_real
from ..images import images_as
from ..models.checked_loading import check_parts, check_pipeline_files, read_json_file
from .lora import load_lora_weights, unload_lora_weights
from .saving import without_path


PREPROCESSOR = "preprocessor_config.json"
OUTPUT_TYPES = ("pil", "np", "pt", "latent", "indices")


_TURNS = threading.RLock()  # of all pipelines: parts may belong to several


def taking_turns(function: Callable) -> Callable:
    """A method of a pipeline that threads may share. Where `enable_model_cpu_offload` moves its parts, they take
    turns: one would move a part away that another computes with.
    """

    @functools.wraps(function)
    def wrapped(pipeline: DiffusionPipeline, *arguments: Any, **options: Any) -> Any:
        is_offloaded = any(hasattr(part, "_hf_hook") for part in pipeline.components.values())
        with _TURNS if is_offloaded else nullcontext():
            return function(pipeline, *arguments, **options)

    return wrapped


class VQPipeline(DiffusionPipeline):
    """Base of the pipelines that decode what a prior draws with the image tokenizer `vqvae`.

    The configuration of an image processor in the folder that `vqvae` was loaded from is kept, and saved beside it
    again.
    """

    _callback_tensor_inputs: list[str] = []

    load_lora_weights = load_lora_weights
    unload_lora_weights = unload_lora_weights

    @property
    def lora_components(self) -> tuple[str, ...]:
        """The names of the networks that `load_lora_weights` can go to."""
        raise NotImplementedError

    def register_modules(self, **modules: Any) -> None:
        check_parts(modules)
        super().register_modules(**modules)
        vqvae = modules.get("vqvae")
        if vqvae is not None:
            file = Path(vqvae.name_or_path) / PREPROCESSOR
            found = vqvae.name_or_path and file.is_file()
            self._preprocessor_config = read_json_file(file) if found else None

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As diffusers saves pipelines, and with its code where it was loaded by `trust_remote_code`.

        Raises:
            ValueError: for `push_to_hub=True` then, which would upload the folder before its code is there.
        """
        if _is_remote(self) and kwargs.get("push_to_hub"):
            raise ValueError(
                "`push_to_hub` must be False for a pipeline that carries its code: upload the saved folder."
            )
        config = getattr(self, "_preprocessor_config", None)
        if config is not None:  # first, since the base class may upload the folder
            folder = Path(save_directory) / "vqvae"
            folder.mkdir(parents=True, exist_ok=True)
            config = {name: value for name, value in config.items() if name != "auto_map"}  # its code is not saved
            (folder / PREPROCESSOR).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        with without_path(self, *self.components.values()):
            super().save_pretrained(save_directory, *args, **kwargs)
        if _is_remote(self):
            _save_remote_code(self, Path(save_directory))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """As diffusers loads pipelines; the files in a folder are looked at first.

        Raises:
            OSError: a file is missing, truncated or no such file at all.
            ValueError: the folder of another pipeline, or files of other classes than its index says.
        """
        if Path(pretrained_model_name_or_path, "model_index.json").is_file():
            parameters = inspect.signature(cls.__init__).parameters.values()
            wanted = [p.name for p in parameters if p.default is p.empty and p.name != "self"]
            check_pipeline_files(pretrained_model_name_or_path, [name for name in wanted if name not in kwargs])
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any):
        """A pipeline of this class with the parts of `pipeline`; `kwargs` replace parts and options.

        diffusers moves a part over only if its class is the annotation of the argument. Here every part goes, and this
        class says whether it fits; nor is its dtype changed, unless `dtype` is given.
        """
        expected = inspect.signature(cls.__init__).parameters
        parts = {name: part for name, part in pipeline.components.items() if name in expected}
        if not {"dtype", "torch_dtype"} & set(kwargs):
            kwargs["dtype"] = pipeline.dtype
        return super().from_pipe(pipeline, **{**parts, **kwargs})

    # Callbacks

    def check_callback(self, callback: Callable | None, tensor_inputs: Sequence[str]) -> list[str]:
        """The names of what `callback_on_step_end` is given: a diffusers callback's own, or else `tensor_inputs`.

        Raises:
            ValueError: it is not callable, or wants what the pipeline does not have.
        """
        if callback is not None and not callable(callback):
            raise ValueError(f"`callback_on_step_end` must be callable, got a {type(callback).__name__}.")
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback.tensor_inputs
        names = [tensor_inputs] if isinstance(tensor_inputs, str) else tensor_inputs
        is_list = isinstance(names, (list, tuple))
        if not is_list or any(name not in self._callback_tensor_inputs for name in names):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got {names}."
            )
        return list(names)

    def call_back(
        self,
        callback: Callable,
        names: Sequence[str],
        step: int,
        timestep: Any,
        name: str,
        value: torch.Tensor,
        **others: Any,
    ) -> torch.Tensor:
        """Calls `callback(pipe, step, timestep, {...})` with those of `names` that are asked for.

        Returns:
            `value`, or what the callback has returned as `name` in place of it.

        Raises:
            ValueError: it returned neither None nor a dict, or a tensor of another shape or dtype.
        """
        given = {name: value, **others}
        changed = callback(self, step, timestep, {key: given[key] for key in names})
        if changed is None:
            return value
        if not isinstance(changed, dict):
            raise ValueError(f"`callback_on_step_end` must return a dict or None, got a {type(changed).__name__}.")
        result = changed.get(name, value)
        if not isinstance(result, torch.Tensor) or result.shape != value.shape or result.dtype != value.dtype:
            found = (
                f"{result.dtype} of shape {tuple(result.shape)}" if torch.is_tensor(result) else type(result).__name__
            )
            raise ValueError(
                f"`callback_on_step_end` must return `{name}` as {value.dtype} of shape {tuple(value.shape)}, got "
                f"{found}."
            )
        return result

    # Decoding

    @torch.no_grad()
    def decode_indices(
        self, indices: torch.LongTensor | tuple[torch.LongTensor, ...], batch_size: int = 16
    ) -> torch.FloatTensor:
        """
        Codes `(B, h, w)`, or a tuple of those of each level, to images `(B, C, H, W)` in [0, 1], float32, `batch_size`
        at a time.
        """
        batch_size = check_integer("batch_size", batch_size, 1)
        onload(self.vqvae)
        batches = zip(*(level.split(batch_size) for level in as_levels(indices)), strict=True)
        parts = [self.vqvae.decode_indices(of_levels(batch)).sample.float() for batch in batches]
        return (check_decoded(torch.cat(parts)) / 2 + 0.5).clamp(0, 1)

    def postprocess(
        self,
        indices: torch.LongTensor | tuple[torch.LongTensor, ...],
        output_type: str,
        decode_batch_size: int = 16,
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor | tuple[torch.Tensor, ...] | None:
        """The images of `indices`, as of `decode_indices`, as `output_type`, see [`VQPipelineOutput`]."""
        if output_type == "indices":
            return None
        if output_type == "latent":
            onload(self.vqvae)
            quantizers = self.vqvae.quantize
            quantizers = quantizers if isinstance(quantizers, torch.nn.ModuleList) else [quantizers]
            levels = zip(quantizers, as_levels(indices), strict=True)
            return of_levels([quantizer.indices_to_latents(level).to(self.vqvae.dtype) for quantizer, level in levels])
        return images_as(self.decode_indices(indices, decode_batch_size), output_type)

    def check_output(
        self,
        num_images_per_prompt: int,
        output_type: str,
        decode_batch_size: int,
        output_types: Sequence[str] = OUTPUT_TYPES,
    ) -> tuple[int, int]:
        """
        `num_images_per_prompt` and `decode_batch_size` as ints.

        Raises:
            ValueError: these, or `output_type`, are not what a call takes.
        """
        if not isinstance(output_type, str) or output_type not in output_types:
            raise ValueError(f"`output_type` must be one of {output_types}, got {output_type!r}.")
        if output_type == "pil" and self.vqvae.config.in_channels not in (1, 3):
            raise ValueError(
                f"`output_type` 'pil' needs images of 1 or 3 channels, got {self.vqvae.config.in_channels}; use 'pt' "
                "or 'np'."
            )
        return (
            check_integer("num_images_per_prompt", num_images_per_prompt, 1),
            check_integer("decode_batch_size", decode_batch_size, 1),
        )


def _is_remote(part: Any) -> bool:
    """Whether the class was executed from the code that a folder or repository carries."""
    return type(part).__module__.split(".")[0] in ("diffusers_modules", "transformers_modules")


def _save_remote_code(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Puts the one file of each such class where diffusers and the Auto classes look, and names it in the index."""
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    for name, part in {"": pipeline, **pipeline.components}.items():
        if not _is_remote(part):
            continue
        source = Path(inspect.getfile(type(part)))
        for place in {folder / name, folder}:
            shutil.copyfile(source, place / source.name)
        index[name or "_class_name"] = [source.stem, type(part).__name__]
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_part(name: str, part: Any, attributes: Sequence[str], wanted: str):
    """A ValueError unless the component `name` has the attributes of what is wanted, which may be dotted, or is None.

    Attributes, not classes: a pipeline that comes with its own code has copies of the classes.
    """

    def has(attribute: str) -> bool:
        value = part
        for step in attribute.split("."):
            value = getattr(value, step, None)
        return value is not None

    if part is not None and not all(has(attribute) for attribute in attributes):
        raise ValueError(f"`{name}` must be {wanted}, got a {type(part).__name__}.")


def check_tokenizer(vqvae: Any, name: str = "vqvae"):
    """A ValueError unless `vqvae`, or the component `name`, is an image tokenizer with one level of codes, one code at
    each position.
    """
    check_any_tokenizer(vqvae, name)
    if vqvae is not None and len(vqvae.config.downsample_factors) > 1:
        raise ValueError(
            f"`{name}` must have one level of codes, got {len(vqvae.config.downsample_factors)}: several need a prior "
            "for each, see `VQVAE2Pipeline`."
        )


def check_any_tokenizer(vqvae: Any, name: str = "vqvae"):
    """A ValueError unless `vqvae` is an image tokenizer with one code at each position of each level."""
    attributes = ("encode", "decode_indices", "quantize", "config.num_embeddings", "config.downsample_factors")
    check_part(name, vqvae, attributes, "an image tokenizer (VQGANModel, VQVAEModel, VQVAE2Model)")
    if vqvae is not None and vqvae.config.quantizer == "residual":
        raise ValueError(f"`{name}` must have one code at each position, got the quantizer 'residual'.")


def as_levels(indices: torch.LongTensor | Sequence[torch.LongTensor]) -> tuple[torch.LongTensor, ...]:
    """The codes of each level, from top to bottom, of what a tokenizer calls `indices`."""
    return tuple(indices) if isinstance(indices, (tuple, list)) else (indices,)


def of_levels(levels: Sequence[torch.LongTensor]) -> torch.LongTensor | tuple[torch.LongTensor, ...]:
    """What a tokenizer with as many levels calls `indices`: the inverse of `as_levels`."""
    return levels[0] if len(levels) == 1 else tuple(levels)


def check_generator(generator: torch.Generator | list[torch.Generator] | None, batch_size: int):
    """A ValueError unless `generator` is None, a `torch.Generator`, or a list of one for each of `batch_size` rows."""
    generators = generator if isinstance(generator, list) else [generator]
    if any(not isinstance(g, torch.Generator) for g in generators if generator is not None):
        raise ValueError("`generator` must be a torch.Generator or a list of them.")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"`generator` must hold one torch.Generator for each of {batch_size} images, got {len(generator)}."
        )


def check_codes(name: str, codes: Any, grid_size: Sequence[int], codebook_size: int) -> torch.LongTensor:
    """`codes`, or a ValueError that names them if they are no grids `(B, h, w)` of codes."""
    height, width = grid_size
    is_grid = isinstance(codes, torch.Tensor) and codes.dtype == torch.int64 and codes.ndim == 3
    if not is_grid or tuple(codes.shape[1:]) != (height, width) or not len(codes):
        is_tensor = isinstance(codes, torch.Tensor)
        found = f"{codes.dtype} of shape {tuple(codes.shape)}" if is_tensor else f"a {type(codes).__name__}"
        raise ValueError(f"`{name}` must be int64 codes of shape (B, {height}, {width}), got {found}.")
    least, most = (bound.item() for bound in codes.aminmax())
    if least < 0 or most >= codebook_size:
        raise ValueError(f"`{name}` must lie in 0 … {codebook_size - 1}, got values from {least} to {most}.")
    return codes


def check_decoded(images: torch.FloatTensor) -> torch.FloatTensor:
    """`images`, or a ValueError if the tokenizer gave values that no picture has: NaN would become black pixels."""
    if not images.isfinite().all():
        raise ValueError("`vqvae` must decode to finite values, got nan or infinity: load it in float32 or bfloat16.")
    return images


def check_guidance_scale(value: float) -> float:
    """`value` as a float, or a ValueError; far beyond what guides, logits and latents leave float32."""
    return check_real("guidance_scale", value, minimum=0, maximum=10000)


def check_temperature(value: float) -> float:
    """`value` as a float, or a ValueError; logits divided by less could leave float32 (`top_k=1` is greedy)."""
    return check_real("temperature", value, minimum=1e-6)


def onload(model: nn.Module):
    """
    Moves a model to its device if `enable_model_cpu_offload` waits for its `forward`, which `encode` and `decode` pass
    by.
    """
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(model)


__all__ = [
    "VQPipeline",
    "as_levels",
    "check_any_tokenizer",
    "check_codes",
    "check_decoded",
    "check_generator",
    "check_guidance_scale",
    "check_part",
    "check_temperature",
    "check_tokenizer",
    "of_levels",
    "onload",
    "taking_turns",
]
