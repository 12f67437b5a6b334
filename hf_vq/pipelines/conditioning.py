"""Conditions: classes, texts and maps, from what a user gives to the rows of tensors that a network takes."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..argument_checks import check_integer, check_real
from ..images import to_pixel_values


logger = logging.get_logger(__name__)

# A fast tokenizer keeps truncation and padding as its state, which a call of another thread would change under it.
TOKENIZER_LOCK = threading.Lock()


def class_ids(
    class_labels: Any, num_classes: int, id2label: dict[int, str] | None = None, null_class_id: int | None = None
) -> torch.LongTensor:
    """
    Ids of classes.

    Args:
        class_labels: an id or a name, a list of them, or an array or tensor of ids.
        num_classes: ids lie below it.
        id2label (*optional*): the names of the classes.
        null_class_id (*optional*): the id that stands for no class, which is none of them.

    Returns:
        int64 `(B,)`.

    Raises:
        ValueError: no label, an id out of range, or a name that is not one of `id2label`.
    """
    given = class_labels
    if isinstance(class_labels, (torch.Tensor, np.ndarray)):
        class_labels = class_labels.reshape(-1).tolist()
    labels = list(class_labels) if isinstance(class_labels, (list, tuple)) else [class_labels]
    names = {name: number for number, name in (id2label or {}).items()}
    last = num_classes - 1
    last -= null_class_id == last
    ids = []
    for label in labels:
        number = names.get(label) if isinstance(label, str) else label
        try:
            ids.append(check_integer("class_labels", number, 0, last))
        except ValueError as error:
            known = f", or one of {sorted(names)}" if names else ""
            raise ValueError(f"`class_labels` must be ids from 0 to {last}{known}, got {given!r}.") from error
    if not ids:
        raise ValueError("`class_labels` must hold at least one class, got none.")
    if null_class_id in ids:
        raise ValueError(f"`class_labels` must be None for the null class, got its id {null_class_id}.")
    return torch.tensor(ids)


def class_names(id2label: dict[int | str, str] | None) -> dict[int, str] | None:
    """`id2label` with ints as ids, which are strings where it comes from JSON."""
    if id2label is None:
        return None
    wrong = [i for i in id2label if not str(i).isdecimal()]
    if wrong:
        raise ValueError(f"`id2label` must map ids, ints from 0, to names of classes, got the ids {wrong}.")
    return {int(i): name for i, name in id2label.items()}


@dataclass
class TextCondition:
    """
    Args:
        embeddings: float `(B, S, D)`, one vector for each token.
        mask: bool `(B, S)`, false where a prompt is padded.
    """

    embeddings: torch.FloatTensor
    mask: torch.BoolTensor

    def repeat(self, times: int) -> "TextCondition":
        """Each prompt `times` times, those of one prompt adjacent."""
        return TextCondition(
            self.embeddings.repeat_interleave(times, dim=0), self.mask.repeat_interleave(times, dim=0)
        )


def text_length(text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """S, the most tokens that both the encoder and its tokenizer take."""
    longest = getattr(text_encoder.config, "max_position_embeddings", None)
    lengths = [length for length in (longest, tokenizer.model_max_length) if length and length < 1_000_000]
    if not lengths:
        raise ValueError("`max_length` must be given: neither `text_encoder` nor `tokenizer` has a longest length.")
    return min(lengths)


@torch.no_grad()
def encode_text(
    text_encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | list[str],
    max_length: int | None = None,
    lower_case: bool = False,
    normalize: bool = False,
    device: torch.device | None = None,
    mask_padding: bool = True,
    pad_token_id: int | None = None,
    pooled: bool = False,
) -> TextCondition:
    """
    Tokenizes, encodes and pads prompts. The part of a prompt that is too long is cut, and named in a warning.

    Args:
        text_encoder: a transformers text encoder; its `last_hidden_state` is the condition.
        tokenizer: its tokenizer.
        prompts: one prompt or a list of them; "" is the usual negative prompt.
        max_length: S, every prompt's length after padding or cutting; by default the most that the encoder takes.
        lower_case: lower the prompts' case first.
        normalize: divide each token's vector by its length.
        device: where the encoder runs; by default where it is.
        mask_padding: the encoder passes over padding. The original VQ-Diffusion's CLIP reads it like any token.
        pad_token_id: pads in place of the tokenizer's own token; 0 is the original CLIP's.
        pooled: the condition is the one projected vector of the whole text, `text_embeds`, so that S is 1.

    Raises:
        ValueError: `prompts` or `max_length` is not of the right kind, or the tokenizer cannot pad.
    """
    prompts = as_texts(prompts, "prompts")
    longest = (
        text_length(text_encoder, tokenizer) if max_length is None else check_integer("max_length", max_length, 1)
    )
    positions = getattr(text_encoder.config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise ValueError(f"`max_length` must be at most {positions}, the positions of the encoder, got {max_length}.")
    if tokenizer.pad_token is None:
        raise ValueError("`tokenizer` must have a padding token, since prompts are padded to one length.")
    if pad_token_id is not None and not 0 <= pad_token_id < len(tokenizer):
        raise ValueError(f"`pad_token_id` must lie in 0 … {len(tokenizer) - 1}, got {pad_token_id}.")
    if lower_case:
        prompts = [prompt.lower() for prompt in prompts]
    with TOKENIZER_LOCK:
        tokens = tokenizer(prompts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        _warn_of_cuts(tokenizer, prompts, longest)
    device = text_encoder.device if device is None else device
    input_ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
    if pad_token_id is not None:
        input_ids = input_ids.masked_fill(mask == 0, pad_token_id)
    output = text_encoder(input_ids=input_ids, attention_mask=mask if mask_padding else None)
    hidden = output.text_embeds.unsqueeze(1) if pooled else output.last_hidden_state
    mask = torch.ones_like(mask[:, :1]) if pooled else mask
    if normalize:
        hidden = hidden / hidden.norm(dim=-1, keepdim=True)
    return TextCondition(hidden, mask.bool())


def as_texts(prompts: str | Sequence[str], name: str) -> list[str]:
    """One text or several as a list; a ValueError that names the argument `name` for anything else, or none."""
    texts = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`{name}` must be a str or a list of them that is not empty, got {prompts!r}.")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise ValueError(f"`{name}` must hold text that UTF-8 can write, got {text!r}.") from error
    return texts


def _warn_of_cuts(tokenizer, prompts: list[str], longest: int) -> None:
    kept = max(0, longest - tokenizer.num_special_tokens_to_add())
    for prompt in prompts:
        own = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        cut = own[: max(0, len(own) - kept)] if tokenizer.truncation_side == "left" else own[kept:]
        if cut:
            logger.warning("The text encoder takes %d tokens; it does not see %r.", longest, tokenizer.decode(cut))


def to_mask(mask: Any, name: str = "mask_image") -> torch.FloatTensor:
    """
    What a pipeline is given as a mask, as 0 and 1 `(B, 1, H, W)`, float32; 1 is painted, and values from the middle on
    are 1.

    Args:
        mask: a Pillow image of any mode (white is painted), or a list of them; or an array or tensor `(H, W)`, `(B, H,
            W)`, `(B, 1, H, W)`, or an array with one channel last: of bool, of numbers in [0, 1], or uint8 in 0 … 255.
            uint8 without a value above 1 counts as 0 and 1. A list of arrays or tensors stands for their rows.
        name: of the argument, for error messages.

    Raises:
        ValueError: anything else.
    """
    if isinstance(mask, (list, tuple)) and mask and all(isinstance(row, (np.ndarray, torch.Tensor)) for row in mask):
        rows = [to_mask(row, name) for row in mask]
        if len({row.shape[1:] for row in rows}) > 1:
            raise ValueError(f"`{name}` must hold masks of one size, got {[tuple(row.shape[-2:]) for row in rows]}.")
        return torch.cat(rows)
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "biuf":
        if mask.ndim >= 3 and mask.shape[-1] == 1 and not (mask.ndim == 4 and mask.shape[1] == 1):
            mask = mask[..., 0]
        mask = torch.as_tensor(np.ascontiguousarray(mask))
    if not isinstance(mask, torch.Tensor):
        return (to_pixel_values(mask, 1, name) >= 0).float()
    shape = tuple(mask.shape)
    mask = mask[None] if mask.ndim == 2 else mask
    mask = mask[:, None] if mask.ndim == 3 else mask
    values = mask.float() / 255 if mask.dtype == torch.uint8 and mask.numel() and mask.max() > 1 else mask.float()
    if mask.ndim != 4 or mask.shape[1] != 1 or not mask.numel() or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            f"`{name}` must be an image, or (H, W), (B, H, W) or (B, 1, H, W) with values in [0, 1], got {mask.dtype} "
            f"of shape {shape}{_range_of(values)}."
        )
    return (values >= 0.5).float()


def _range_of(values: torch.Tensor) -> str:
    return f" from {values.min().item():g} to {values.max().item():g}" if values.numel() else ""


def to_map(values: Any) -> torch.FloatTensor:
    """A map to concatenate: a tensor `(B, C, H, W)` or `(C, H, W)` of any kind of number, or images in [-1, 1].

    Raises:
        ValueError: neither; numbers that are not finite.
    """
    if not isinstance(values, torch.Tensor):
        return to_pixel_values(values, 3, "condition_image")
    if values.ndim not in (3, 4) or not values.numel():
        raise ValueError(f"`condition_image` must be (B, C, H, W), got {tuple(values.shape)}.")
    values = values.float()
    if not values.isfinite().all():
        raise ValueError("`condition_image` must be finite, got nan or infinity.")
    return values if values.ndim == 4 else values[None]


def resize_map(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    `(B, C, H, W)` to `size`: the mean of the pixels that fall on a latent where it shrinks (two bilinear halvings, the
    original's way for a factor of 4, are the same), bilinear where it grows.
    """
    if values.shape[-2:] == tuple(size):
        return values
    shrinks = values.shape[-2] >= size[0] and values.shape[-1] >= size[1]
    if shrinks:
        return F.interpolate(values, size=size, mode="area")
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False)


RESIZE_METHODS = ("nearest", "bilinear", "bicubic", "area")


def check_stages(name: str, stages: Any) -> dict:
    """The arguments of `resize_by_stages`, or a ValueError that names `stages` for anything else."""
    if not isinstance(stages, dict) or set(stages) != {"method", "multiplier", "n_stages"}:
        raise ValueError(f"`{name}` must be a dict with method, multiplier and n_stages, got {stages!r}.")
    if stages["method"] not in RESIZE_METHODS:
        raise ValueError(f"`{name}` must have a method of {RESIZE_METHODS}, got {stages['method']!r}.")
    return {
        "method": stages["method"],
        "multiplier": check_real(f"{name}.multiplier", stages["multiplier"], above=0),
        "n_stages": check_integer(f"{name}.n_stages", stages["n_stages"], 1, 1000),
    }


def size_after_stages(size: tuple[int, int], multiplier: float, n_stages: int) -> tuple[int, int]:
    """Height and width times `multiplier`, rounded down, `n_stages` times."""
    for _ in range(n_stages):
        size = tuple(math.floor(side * multiplier) for side in size)
    return size


def resize_by_stages(values: torch.Tensor, method: str, multiplier: float, n_stages: int) -> torch.Tensor:
    """`(B, C, H, W)` to the size of `size_after_stages`, each stage by torch's own `method`."""
    for _ in range(n_stages):
        values = F.interpolate(values, scale_factor=multiplier, mode=method)
    return values


def repeat_rows(
    rows: dict[str, Sequence[torch.Tensor]], num_images_per_prompt: int, batch_size: int | None = None
) -> dict[str, list[torch.Tensor]]:
    """
    Tensors with 1 or B rows, to `B * num_images_per_prompt` rows, those of one input adjacent.

    Args:
        rows: by the name of the argument that they come from, a tensor for each level.
        num_images_per_prompt: images for each input.
        batch_size: B, by default the most rows that one of them has.

    Raises:
        ValueError: one of them has another number of rows.
    """
    batch_size = batch_size or max(len(tensor) for tensors in rows.values() for tensor in tensors)
    for name, tensors in rows.items():
        for tensor in tensors:
            if len(tensor) not in (1, batch_size):
                raise ValueError(f"`{name}` must have 1 or {batch_size} rows, got {len(tensor)}.")
    return {
        name: [
            tensor.expand(batch_size, *tensor.shape[1:]).repeat_interleave(num_images_per_prompt, dim=0)
            for tensor in tensors
        ]
        for name, tensors in rows.items()
    }


def repeat_to(values: torch.Tensor, count: int, name: str, times: int = 1) -> torch.Tensor:
    """
    The rows for `count` inputs with `times` images each, those of one input adjacent. `values`, of the argument
    `name`, has
    a row for each input, or 1 for all: nothing else says which rows belong together.
    """
    if len(values) not in (1, count):
        raise ValueError(
            f"`{name}` must hold one entry for all, or one for each of {count} inputs, got {len(values)}."
        )
    return values.repeat_interleave(count * times // len(values), dim=0)


def repeat_inputs(inputs: dict[str, torch.Tensor] | None, times: int) -> dict[str, torch.Tensor] | None:
    """A denoiser's keyword arguments, or None, with each row `times` times, those of one adjacent."""
    return inputs and {name: rows.repeat_interleave(times, dim=0) for name, rows in inputs.items()}


def count_inputs(batch_size: int | None, *values: Any) -> int:
    """
    How many inputs the arguments of a call hold together: as many as the longest of `values`, or `batch_size`, which
    is for calls without any.

    Raises:
        ValueError: `batch_size` is no positive int, or contradicts the values.
    """
    lengths = [len(value) for value in values if isinstance(value, (list, tuple, torch.Tensor))]
    count = max(lengths, default=1)
    if batch_size is None:
        return count
    batch_size = check_integer("batch_size", batch_size, 1)
    if count not in (1, batch_size):
        raise ValueError(f"`batch_size` must be the number of inputs, {count}, or left out, got {batch_size}.")
    return batch_size


__all__ = [
    "TextCondition",
    "as_texts",
    "check_stages",
    "class_ids",
    "class_names",
    "count_inputs",
    "encode_text",
    "repeat_inputs",
    "repeat_rows",
    "repeat_to",
    "resize_by_stages",
    "resize_map",
    "size_after_stages",
    "text_length",
    "to_map",
    "to_mask",
]
