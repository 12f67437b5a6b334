"""What the tests of training scripts train on."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast

from hf_vq import VQImageProcessor, VQVAEConfig, VQVAEModel


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tokenizer, images with labels and captions, and a text encoder."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    config = VQVAEConfig(
        resolution=8, hidden_size=8, residual_hidden_size=4, num_residual_layers=1, embed_dim=4, num_embeddings=8
    )
    VQVAEModel(config).save_pretrained(folder / "tokenizer")
    VQImageProcessor(size=16).save_pretrained(folder / "tokenizer")
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8)
    columns = {"image": [Image.fromarray(image) for image in pixels], "number": [0, 1, 2, 1] * 2}
    columns["caption"] = [f"a picture of {number}" for number in columns["number"]]
    features = datasets.Features(
        {"image": datasets.Image(), "number": datasets.Value("int32"), "caption": datasets.Value("string")}
    )
    images = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": images, "validation": images.select([1, 2, 3])}).save_to_disk(folder / "images")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "0", "1", "2"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=8).save_pretrained(folder / "text")
    bert = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    BertModel(bert).save_pretrained(folder / "text")
    return folder
