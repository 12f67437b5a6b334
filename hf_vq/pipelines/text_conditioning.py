"""Text as a condition: from prompts to the vectors and the mask that cross-attention takes."""

from dataclasses import dataclass

import torch
from diffusers.utils import logging


logger = logging.get_logger(__name__)


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


def text_length(text_encoder, tokenizer) -> int:
    """S, the most tokens that both the encoder and its tokenizer take."""
    longest = getattr(text_encoder.config, "max_position_embeddings", None)
    lengths = [length for length in (longest, tokenizer.model_max_length) if length and length < 1_000_000]
    if not lengths:
        raise ValueError("`max_length` must be given: neither `text_encoder` nor `tokenizer` has a longest length.")
    return min(lengths)


@torch.no_grad()
def encode_text(
    text_encoder,
    tokenizer,
    prompts: str | list[str],
    max_length: int | None = None,
    lower_case: bool = False,
    normalize: bool = False,
    device: torch.device | None = None,
    mask_padding: bool = True,
    pad_token_id: int | None = None,
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

    Raises:
        ValueError: `prompts` or `max_length` is not of the right kind, or the tokenizer cannot pad.
    """
    prompts = _texts(prompts, "prompts")
    longest = text_length(text_encoder, tokenizer) if max_length is None else max_length
    positions = getattr(text_encoder.config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        raise ValueError(f"`max_length` must be a positive int, got {max_length!r}.")
    if positions and longest > positions:
        raise ValueError(f"`max_length` must be at most {positions}, the positions of the encoder, got {max_length}.")
    if tokenizer.pad_token is None:
        raise ValueError("`tokenizer` must have a padding token, since prompts are padded to one length.")
    if pad_token_id is not None and not 0 <= pad_token_id < len(tokenizer):
        raise ValueError(f"`pad_token_id` must lie in 0 … {len(tokenizer) - 1}, got {pad_token_id}.")
    if lower_case:
        prompts = [prompt.lower() for prompt in prompts]
    tokens = tokenizer(prompts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
    _warn_of_cuts(tokenizer, prompts, longest)
    device = text_encoder.device if device is None else device
    input_ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
    if pad_token_id is not None:
        input_ids = input_ids.masked_fill(mask == 0, pad_token_id)
    hidden = text_encoder(input_ids=input_ids, attention_mask=mask if mask_padding else None).last_hidden_state
    if normalize:
        hidden = hidden / hidden.norm(dim=-1, keepdim=True)
    return TextCondition(hidden, mask.bool())


class TextConditionMixin:
    """
    For a pipeline that may have a `text_encoder` and its `tokenizer`, with `text_max_length`, `text_lower_case` and
    `text_normalize` in its config.
    """

    def encode_prompt(self, prompt: str | list[str], name: str = "prompt", **options) -> TextCondition:
        """
        The states of prompts; `options` are further ones of [`encode_text`].

        Raises:
            ValueError: there is no text encoder to make `name` with, or it is neither a str nor a list of them.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(f"`{name}_embeds` must be given: the pipeline has no text_encoder with a tokenizer.")
        return encode_text(
            self.text_encoder,
            self.tokenizer,
            _texts(prompt, name),
            max_length=self.config.text_max_length,
            lower_case=self.config.text_lower_case,
            normalize=self.config.text_normalize,
            device=self._execution_device,
            **options,
        )

    def text_states(self, name: str, prompt, embeds, mask) -> TextCondition | None:
        """
        What the arguments `name`, `{name}_embeds` and `{name}_attention_mask` of a call stand for; None if none is given.

        Raises:
            ValueError: text and states at once, a mask without states, or states or a mask of the wrong shape.
        """
        if prompt is not None and embeds is not None:
            raise ValueError(f"Only one of `{name}` and `{name}_embeds` can be given.")
        if mask is not None and embeds is None:
            raise ValueError(f"`{name}_attention_mask` needs `{name}_embeds`.")
        if prompt is not None:
            return self.encode_prompt(prompt, name)
        if embeds is None:
            return None
        if not isinstance(embeds, torch.Tensor) or not embeds.is_floating_point() or embeds.ndim != 3:
            raise ValueError(f"`{name}_embeds` must be a float tensor (B, S, D).")
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        if mask.shape != embeds.shape[:2]:
            raise ValueError(
                f"`{name}_attention_mask` must have shape {tuple(embeds.shape[:2])}, got {tuple(mask.shape)}."
            )
        return TextCondition(embeds.to(self._execution_device), mask.to(self._execution_device))


def _texts(prompts, name: str) -> list[str]:
    texts = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`{name}` must be a str or a list of them that is not empty, got {prompts!r}.")
    return texts


def _warn_of_cuts(tokenizer, prompts: list[str], longest: int) -> None:
    kept = max(0, longest - tokenizer.num_special_tokens_to_add())
    for prompt in prompts:
        own = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        cut = own[: max(0, len(own) - kept)] if tokenizer.truncation_side == "left" else own[kept:]
        if cut:
            logger.warning("The text encoder takes %d tokens; it does not see %r.", longest, tokenizer.decode(cut))


__all__ = ["TextCondition", "TextConditionMixin", "encode_text", "text_length"]
