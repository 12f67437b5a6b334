"""Frozen text encoders for priors that are conditioned on captions."""

import torch
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_text_encoder(name: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The text encoder of a folder or Hub id, in float32 and eval mode, without gradients, and its tokenizer. Of a model
    that does more than encode text, such as CLIP or T5, only that part.

    Raises:
        ValueError: transformers knows no text encoder for this kind of model.
    """
    config = AutoConfig.from_pretrained(name).get_text_config()
    encoder = AutoModelForTextEncoding.from_pretrained(name, config=config, dtype=torch.float32)
    return encoder.to(device).eval().requires_grad_(False), AutoTokenizer.from_pretrained(name)


__all__ = ["load_text_encoder"]
