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

    Raises:
        ValueError: `prompts` or `max_length` is not of the right kind, or the tokenizer cannot pad.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"`prompts` must be a str or a list of them that is not empty, got {prompts!r}.")
    longest = text_length(text_encoder, tokenizer) if max_length is None else max_length
    if longest < 1:
        raise ValueError(f"`max_length` must be positive, got {max_length}.")
    if tokenizer.pad_token is None:
        raise ValueError("`tokenizer` must have a padding token, since prompts are padded to one length.")
    if lower_case:
        prompts = [prompt.lower() for prompt in prompts]
    tokens = tokenizer(prompts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
    _warn_of_cuts(tokenizer, prompts, longest)
    device = text_encoder.device if device is None else device
    mask = tokens["attention_mask"].to(device)
    hidden = text_encoder(input_ids=tokens["input_ids"].to(device), attention_mask=mask).last_hidden_state
    if normalize:
        hidden = hidden / hidden.norm(dim=-1, keepdim=True)
    return TextCondition(hidden, mask.bool())


def _warn_of_cuts(tokenizer, prompts: list[str], longest: int) -> None:
    special = tokenizer.num_special_tokens_to_add()
    for prompt in prompts:
        own = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        cut = own[max(0, longest - special) :]
        if cut:
            logger.warning("The text encoder takes %d tokens; it does not see %r.", longest, tokenizer.decode(cut))


__all__ = ["TextCondition", "encode_text", "text_length"]
