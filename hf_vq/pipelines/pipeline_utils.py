"""What the pipelines share: decoding, output types, and randomness that comes from the caller's generators."""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..images import images_as


PREPROCESSOR = "preprocessor_config.json"
OUTPUT_TYPES = ("pil", "np", "pt", "indices")


class VQPipeline(DiffusionPipeline):
    """
    Base of the pipelines that draw codes from a prior and decode them with the image tokenizer `vqvae`.

    The configuration of an image processor in the folder that `vqvae` was loaded from is kept, and saved beside it again.
    """

    def register_modules(self, **modules):
        super().register_modules(**modules)
        vqvae = modules.get("vqvae")
        if vqvae is not None:
            file = Path(vqvae.name_or_path) / PREPROCESSOR
            found = vqvae.name_or_path and file.is_file()
            self._preprocessor_config = json.loads(file.read_text(encoding="utf-8")) if found else None

    def save_pretrained(self, save_directory, *args, **kwargs):
        config = getattr(self, "_preprocessor_config", None)
        if config is not None:  # first, since the base class may upload the folder
            folder = Path(save_directory) / "vqvae"
            folder.mkdir(parents=True, exist_ok=True)
            config = {name: value for name, value in config.items() if name != "auto_map"}  # its code is not saved
            (folder / PREPROCESSOR).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        """
        Reads `model_index.json`. A folder that carries its own code names files in place of libraries; where the installed
        hf_vq has the class, that one is used, and nothing of the folder is executed.
        """
        index = super()._dict_from_json_file(json_file)
        package = sys.modules.get("hf_vq")
        for name, value in index.items():
            if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)):
                continue
            if hasattr(package, value[1]):
                index[name] = value[1] if name == "_class_name" else ["hf_vq", value[1]]
        return index

    @torch.no_grad()
    def decode_indices(self, indices, batch_size: int = 16) -> torch.FloatTensor:
        """
        Codes `(B, h, w)`, or a tuple of those of each level, to images `(B, C, H, W)` in [0, 1], float32, `batch_size` at a
        time.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        onload(self.vqvae)
        batches = zip(*(level.split(batch_size) for level in as_levels(indices)), strict=True)
        parts = [self.vqvae.decode_indices(of_levels(batch)).sample.float() for batch in batches]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def postprocess(self, indices, output_type: str, decode_batch_size: int = 16):
        """The images of `indices`, as of `decode_indices`, as `output_type`, see [`VQPipelineOutput`]."""
        if output_type == "indices":
            return None
        return images_as(self.decode_indices(indices, decode_batch_size), output_type)

    def check_output(self, num_images_per_prompt: int, output_type: str, decode_batch_size: int):
        """ValueErrors for the arguments that say how many images of what kind are wanted, and how they are decoded."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        if output_type == "pil" and self.vqvae.config.in_channels not in (1, 3):
            raise ValueError(
                f"`output_type` 'pil' needs images of 1 or 3 channels, got {self.vqvae.config.in_channels}; use 'pt' or 'np'."
            )
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` must be a positive int, got {num_images_per_prompt!r}.")
        if not isinstance(decode_batch_size, int) or decode_batch_size < 1:
            raise ValueError(f"`decode_batch_size` must be a positive int, got {decode_batch_size!r}.")


def check_single_codes(vqvae):
    """A ValueError unless the tokenizer `vqvae` has one code at each position of a grid: no prior draws several."""
    if vqvae.config.quantizer == "residual":
        raise ValueError("`vqvae` must have one code at each position, got the quantizer 'residual'.")


def as_levels(indices) -> tuple[torch.LongTensor, ...]:
    """The codes of each level, from top to bottom, of what a tokenizer calls `indices`."""
    return tuple(indices) if isinstance(indices, (tuple, list)) else (indices,)


def of_levels(levels) -> torch.LongTensor | tuple[torch.LongTensor, ...]:
    """What a tokenizer with as many levels calls `indices`: the inverse of `as_levels`."""
    return levels[0] if len(levels) == 1 else tuple(levels)


def check_generator(generator, batch_size: int):
    """A ValueError unless `generator` is None, a `torch.Generator`, or a list of one for each of `batch_size` images."""
    generators = generator if isinstance(generator, list) else [generator]
    if any(not isinstance(g, torch.Generator) for g in generators if generator is not None):
        raise ValueError("`generator` must be a torch.Generator or a list of them.")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"`generator` must hold one torch.Generator for each of {batch_size} images, got {len(generator)}."
        )


def onload(model):
    """
    Moves a model to its device if `enable_model_cpu_offload` waits for its `forward`, which `encode` and `decode` pass by.
    """
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(model)


def last_steps(count: int, strength: float) -> int:
    """How many of `count` steps the share `strength` in (0, 1] is, rounded down; a ValueError if that is none."""
    taken = int(count * strength + 1e-6)  # 0.29 of 100 would be 28: the product is 28.999999999999996
    if taken < 1:
        raise ValueError(f"`strength` must leave at least one of {count} steps, got {strength}.")
    return taken


def changed_by_callback(changed, name: str, value: torch.Tensor) -> torch.Tensor:
    """
    `value`, or what a `callback_on_step_end` has returned as `name` in place of it.

    Raises:
        ValueError: it returned neither None nor a dict, or a tensor of another shape or dtype.
    """
    if changed is None:
        return value
    if not isinstance(changed, dict):
        raise ValueError(f"`callback_on_step_end` must return a dict or None, got a {type(changed).__name__}.")
    result = changed.get(name, value)
    if not isinstance(result, torch.Tensor) or result.shape != value.shape or result.dtype != value.dtype:
        found = f"{result.dtype} of shape {tuple(result.shape)}" if torch.is_tensor(result) else type(result).__name__
        raise ValueError(
            f"`callback_on_step_end` must return `{name}` as {value.dtype} of shape {tuple(value.shape)}, got {found}."
        )
    return result


def draw_codes(log_probs: torch.FloatTensor, generator=None) -> torch.LongTensor:
    """
    One sample of each row's categorical distribution.

    The code with the largest `log p - log q`, `q ~ Exp(1)`, is distributed as p (the Gumbel-max trick). Unlike
    `torch.multinomial` it takes a generator of each row, and one that lives on another device.

    Args:
        log_probs (`(B, K)`): log-probabilities up to a constant of the row; -inf is never drawn.
        generator: `None` for torch's global randomness, a `torch.Generator`, or a list of one for each row, with which a
            row's sample does not depend on the other rows.

    Returns:
        int64 `(B,)`.
    """
    rows, device = log_probs.shape[0], log_probs.device

    def exponential(shape, source):
        where = device if source is None else source.device
        return torch.empty(shape, device=where).exponential_(generator=source).to(device)

    if isinstance(generator, list):
        noise = torch.cat([exponential((1, log_probs.shape[1]), source) for source in generator])
    else:
        noise = exponential((rows, log_probs.shape[1]), generator)
    noise = noise.clamp_min(torch.finfo(noise.dtype).tiny)
    return (log_probs.float() - noise.log()).argmax(dim=-1)


__all__ = [
    "VQPipeline",
    "as_levels",
    "changed_by_callback",
    "check_generator",
    "check_single_codes",
    "draw_codes",
    "last_steps",
    "of_levels",
    "onload",
]
