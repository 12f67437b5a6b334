"""The trained tokenizers that a prior is trained on, by the arguments of the training scripts."""

import torch
from transformers import BaseImageProcessor

from hf_vq.loading import image_processor_of, load_part, read_json
from hf_vq.models.autoencoders.image_processing_vq_condition import VQConditionProcessor
from hf_vq.models.autoencoders.modeling_tokenizer import VQTokenizerModel

from .data.conditions import load_condition_processor


TOKENIZER_HELP = "Folder or Hub id of the trained tokenizer, or of a pipeline that has it."


def load_tokenizer(source: str) -> tuple[VQTokenizerModel, BaseImageProcessor]:
    """`--tokenizer`, in float32 and evaluation mode, and the processor that is saved beside it.

    Args:
        source: a folder or Hub repository, of the tokenizer or of a pipeline that has it.

    Raises:
        ValueError: nothing can be loaded, or no tokenizer is there.
    """
    tokenizer, _ = load_part("tokenizer", source, "vqvae", (VQTokenizerModel,))
    return tokenizer.float().eval(), image_processor_of(source, tokenizer.config)


def load_condition_tokenizer(source: str) -> tuple[VQTokenizerModel, VQConditionProcessor]:
    """`--condition_tokenizer`, and the processor of the conditioning images; as `load_tokenizer`."""
    part = "condition_tokenizer"
    tokenizer, pipeline = load_part(part, source, part, (VQTokenizerModel,))
    processor = load_condition_processor(source) if pipeline is None else pipeline.condition_processor
    return tokenizer.float().eval(), processor


def load_starting_tokenizer(source: str, kind: type[VQTokenizerModel]) -> VQTokenizerModel:
    """`--model_name_or_path` of a tokenizer's training: one of the class `kind`, in float32; as `load_tokenizer`."""
    if read_json(source, "model_index.json") is None and read_json(source, "config.json") is not None:
        return kind.from_pretrained(source, dtype=torch.float32)
    tokenizer, _ = load_part("model_name_or_path", source, "vqvae", (kind,))
    return tokenizer.float()


__all__ = ["TOKENIZER_HELP", "load_condition_tokenizer", "load_starting_tokenizer", "load_tokenizer"]
