"""The tokenizers that the scripts of priors are given."""

import json

import pytest
import torch

from hf_vq import (
    VQConditionProcessor,
    VQGANModel,
    VQGPTConfig,
    VQGPTForCausalLM,
    VQImageProcessor,
    VQVAEConfig,
    VQVAEModel,
)
from hf_vq.training.trained_tokenizers import load_condition_tokenizer, load_starting_tokenizer, load_tokenizer


SHIPPED = "examples/checkpoints/emoji-32-segmentation"


def small_tokenizer():
    config = VQVAEConfig(in_channels=1, resolution=16, hidden_size=8, embed_dim=4, num_embeddings=8)
    return VQVAEModel(config)


def test_tokenizer_without_and_with_a_processor(tmp_path):
    """Without one, priors are given the one of the tokenizer's pictures, and not an error after their training."""
    small_tokenizer().half().save_pretrained(tmp_path)
    tokenizer, processor = load_tokenizer(str(tmp_path))
    assert tokenizer.dtype == torch.float32 and not tokenizer.training
    assert processor.num_channels == 1 and processor.crop_size.height == processor.crop_size.width == 16
    VQImageProcessor(size=24, num_channels=1).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))[1].crop_size.width == 24
    VQConditionProcessor("depth", size=24).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))[1].condition == "depth"
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    with pytest.raises(ValueError, match="of `.*` must be that of a VQImageProcessor or .*, got 'ViTImageProcessor'"):
        load_tokenizer(str(tmp_path))


def test_the_tokenizers_of_a_pipeline():
    tokenizer, processor = load_tokenizer(SHIPPED)
    alone, own = load_tokenizer(f"{SHIPPED}/vqvae")
    assert processor.to_dict() == own.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(tokenizer.parameters(), alone.parameters(), strict=True))
    for source in (SHIPPED, f"{SHIPPED}/condition_tokenizer"):
        tokenizer, processor = load_condition_tokenizer(source)
        assert tokenizer.config.in_channels == processor.num_labels == 10


def test_the_tokenizer_that_a_training_begins_with(tmp_path):
    of_pipeline, alone = (load_starting_tokenizer(f"{SHIPPED}{part}", VQGANModel) for part in ("", "/vqvae"))
    assert all(torch.equal(a, b) for a, b in zip(of_pipeline.parameters(), alone.parameters(), strict=True))
    with pytest.raises(
        ValueError, match="model_name_or_path='.*': it must be a VQVAEModel, or a pipeline that has one"
    ):
        load_starting_tokenizer(SHIPPED, VQVAEModel)
    small_tokenizer().half().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "metrics.jsonl").touch()
    assert load_starting_tokenizer(str(tmp_path / "tokenizer"), VQVAEModel).dtype == torch.float32
    config = tmp_path / "tokenizer" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in fields.items() if name != "architectures"}))
    assert type(load_starting_tokenizer(str(tmp_path / "tokenizer"), VQVAEModel)) is VQVAEModel
    with pytest.raises(ValueError, match="It is the folder of a run: give `.*/tokenizer`"):
        load_starting_tokenizer(str(tmp_path), VQVAEModel)


def test_what_is_no_tokenizer(tmp_path):
    VQGPTForCausalLM(VQGPTConfig(codebook_size=8, grid_size=[2, 2], n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        tmp_path
    )
    kind = "it must be a VQTokenizerModel, or a pipeline that has one as its"
    with pytest.raises(ValueError, match=f"tokenizer='.*': {kind} `vqvae`, got a VQGPTForCausalLM"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="tokenizer='no/such/one' cannot be loaded: .* does not exist"):
        load_tokenizer("no/such/one")
    with pytest.raises(ValueError, match=f"condition_tokenizer='.*': {kind} `condition_tokenizer`, got a VQAuto"):
        load_condition_tokenizer("examples/checkpoints/emoji-64")
