"""A prior's embeddings begun with codebooks: alike where the codes' vectors are."""

import torch

from hf_vq import VQGANConfig, VQGANModel
from hf_vq.training.codebook_embeddings import begin_with_codebooks
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
