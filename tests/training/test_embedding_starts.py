"""A prior's embeddings begun with codebooks, alike where the codes' vectors are, and with places in the picture."""

import pytest
import torch

from hf_vq import VQGANConfig, VQGANModel, VQGPTConfig, VQGPTForCausalLM
from hf_vq.models.priors.code_orders import code_order
from hf_vq.training.embedding_starts import begin_with_codebooks, begin_with_grid_positions
from tests.pipelines.autoregressive_parts import make_pipeline


def make_tokenizer(num_embeddings):
    sizes = {"base_channels": 32, "channel_multiplier": (1, 1), "num_res_blocks": 1, "attn_resolutions": ()}
    config = VQGANConfig(**sizes, resolution=8, latent_channels=4, embed_dim=4, num_embeddings=num_embeddings)
    return VQGANModel(config).eval()


def angles(rows):
    rows = torch.nn.functional.normalize(rows, dim=1)
    return (rows @ rows.T).flatten()


def test_the_angles_between_codes_stay():
    prior = make_pipeline("codes", initializer_range=0.02, n_embd=32).prior
    tokenizer, condition_tokenizer = make_tokenizer(8), make_tokenizer(7)
    null = prior.get_input_embeddings().weight[-1].clone()
    begin_with_codebooks(prior, tokenizer, condition_tokenizer)
    embedding, head = prior.get_input_embeddings().weight, prior.get_output_embeddings().weight
    for rows, one in ((embedding[:8], tokenizer), (head, tokenizer), (embedding[8:15], condition_tokenizer)):
        codebook = one.quantize.embedding.weight
        codebook = (codebook - codebook.mean(0)) / codebook.std(0)
        assert torch.corrcoef(torch.stack([angles(rows), angles(codebook)]))[0, 1] > 0.95
        assert 0.04 < rows.std() < 0.07
    assert torch.equal(embedding[15], null)


@pytest.mark.parametrize("order", ["raster", "spiral-out"])
def test_a_condition_and_the_code_at_its_place_begin_alike(order):
    options = {"codebook_size": 8, "condition_type": "codes", "condition_vocab_size": 4, "condition_length": 6}
    config = VQGPTConfig(**options, grid_size=(4, 6), n_layer=1, n_head=2, n_embd=64, order=order)
    prior = VQGPTForCausalLM(config)
    begin_with_grid_positions(prior, (2, 3))  # each condition code lies over 2×2 codes
    positions = torch.nn.functional.normalize(prior.transformer.wpe.weight, dim=1)
    conditions, codes = positions[:6], positions[6:]
    places = code_order(order, 4, 6)[1:]  # of the codes that are predicted where the first, the second, ... is read
    for similarity, place in zip(codes @ conditions.T, places, strict=True):
        row, column = divmod(place, 6)
        assert int(similarity.argmax()) == row // 2 * 3 + column // 2


def test_positions_of_a_width_that_does_not_fit():
    config = VQGPTConfig(codebook_size=8, grid_size=(2, 2), n_layer=1, n_head=1, n_embd=6)
    with pytest.raises(ValueError, match="`prior` must have a width that 4 divides, got 6"):
        begin_with_grid_positions(VQGPTForCausalLM(config))
