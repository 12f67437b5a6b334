"""Texts, or their states, as conditions: what the pipelines with a `text_encoder` and its `tokenizer` share."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel

from .conditioning import TextCondition, as_texts, encode_text
from .vq_pipeline import check_part


def encode_prompt(pipeline: DiffusionPipeline, prompt: str | list[str], name: str = "prompt") -> TextCondition:
    """
    The states `(B, S, D)` of prompts, as the options of this pipeline say.

    Raises:
        ValueError: there is no text encoder to make `name` with, or it is neither a str nor a list of them.
    """
    if pipeline.text_encoder is None or pipeline.tokenizer is None:
        raise ValueError(f"`{name}_embeds` must be given: the pipeline has no text_encoder with a tokenizer.")
    config = pipeline.config
    return encode_text(
        pipeline.text_encoder,
        pipeline.tokenizer,
        as_texts(prompt, name),
        max_length=config.text_max_length,
        lower_case=config.text_lower_case,
        normalize=config.text_normalize,
        device=pipeline._execution_device,
        mask_padding=pipeline.encoder_passes_over_padding,
        pad_token_id=config.text_pad_token_id,
        pooled=config.get("text_pooled", False),
    )


def text_states(
    pipeline: DiffusionPipeline,
    name: str,
    prompt: str | list[str] | None = None,
    embeds: torch.FloatTensor | None = None,
    mask: torch.BoolTensor | None = None,
) -> TextCondition | None:
    """
    What the arguments `name`, `{name}_embeds` and `{name}_attention_mask` of a call stand for; None if none is
    given.

    Raises:
        ValueError: text and states at once, a mask without states, or states or a mask of the wrong shape.
    """
    if prompt is not None and embeds is not None:
        raise ValueError(f"Only one of `{name}` and `{name}_embeds` can be given.")
    if mask is not None and embeds is None:
        raise ValueError(f"`{name}_attention_mask` needs `{name}_embeds`.")
    if prompt is not None:
        return pipeline.encode_prompt(prompt, name)
    if embeds is None:
        return None
    if not isinstance(embeds, torch.Tensor) or not embeds.is_floating_point() or embeds.ndim != 3:
        raise ValueError(f"`{name}_embeds` must be a float tensor (B, S, D).")
    if not embeds.numel() or not embeds.isfinite().all():
        raise ValueError(f"`{name}_embeds` must be finite and not empty, got shape {tuple(embeds.shape)}.")
    mask = torch.ones(embeds.shape[:2]) if mask is None else mask
    try:
        mask = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{name}_attention_mask` must be a tensor of 0 and 1, got {mask!r}.") from error
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"`{name}_attention_mask` must have shape {tuple(embeds.shape[:2])}, got {tuple(mask.shape)}."
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"`{name}_attention_mask` must hold 0 and 1 alone, got {mask.dtype} of others.")
    mask = mask.bool()
    return TextCondition(embeds.to(pipeline._execution_device), mask.to(pipeline._execution_device))


def check_text_parts(text_encoder: PreTrainedModel | None, tokenizer: Any):
    """ValueErrors unless these are a text encoder of transformers and its tokenizer, or None."""
    wanted = "a text encoder of transformers"
    check_part("text_encoder", text_encoder, ("config", "forward", "get_input_embeddings"), wanted)
    if hasattr(text_encoder, "decode_indices") or hasattr(text_encoder, "extract_indices"):
        raise ValueError(f"`text_encoder` must be {wanted}, got a {type(text_encoder).__name__}.")
    attributes = ("convert_tokens_to_ids", "model_max_length", "num_special_tokens_to_add")
    check_part("tokenizer", tokenizer, attributes, "a text tokenizer of transformers")


def aligned_right(condition: TextCondition, length: int) -> TextCondition:
    """The states of texts at the end of `length` places, and 0 before them, as LlamaGen's prior reads them.

    Raises:
        ValueError: texts of more tokens.
    """
    states, mask = condition.embeddings, condition.mask
    order = mask.int().argsort(dim=1, stable=True)  # padding first, and tokens in their order
    states, mask = states.gather(1, order[..., None].expand_as(states)), mask.gather(1, order)
    cut, added = states.shape[1] - length, max(length - states.shape[1], 0)
    if cut > 0 and mask[:, :cut].any():
        raise ValueError(f"`prompt_embeds` must have at most {length} tokens, got {int(mask.sum(dim=1).max())}.")
    states, mask = states[:, max(cut, 0) :], mask[:, max(cut, 0) :]
    states = torch.where(mask[..., None], states, 0)
    pad = torch.nn.functional.pad
    return TextCondition(pad(states, (0, 0, added, 0)), pad(mask, (added, 0)))


__all__ = ["aligned_right", "check_text_parts", "encode_prompt", "text_states"]
