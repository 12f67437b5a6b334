"""Completion around kept codes by priors that read the grid in other orders, and by a Llama, against a loop by
hand.
"""

import pytest
import torch

from hf_vq.models.priors.configuration_vq_llama import VQLlamaConfig
from hf_vq.models.priors.modeling_vq_llama import VQLlamaForCausalLM
from hf_vq.pipelines.pipeline_vq_autoregressive import VQAutoregressivePipeline
from tests.pipelines.autoregressive_parts import make_pipeline, seeded


def make_llama(order="raster"):
    torch.manual_seed(0)
    config = VQLlamaConfig(
        codebook_size=8,
        grid_size=4,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        condition_type="class",
        num_classes=3,
        initializer_range=0.4,
        order=order,
    )
    pipeline = VQAutoregressivePipeline(make_pipeline().vqvae, VQLlamaForCausalLM(config).eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("order", ["raster", "alternate", "subsample", "z-curve", "spiral-out", "spiral-in", "random"])
@pytest.mark.parametrize("make", [lambda order: make_pipeline(order=order), make_llama], ids=["gpt", "llama"])
def test_kept_codes_are_read_in_the_order_of_the_prior(make, order):
    pipeline = make(order)
    codes = torch.randint(8, (1, 4, 4), generator=seeded(1))
    mask = torch.rand(4, 4, generator=seeded(2)) < 0.6  # of codes
    assert 4 < mask.sum() < 14
    found = pipeline(class_labels=2, indices=codes, mask_image=mask, top_k=1, output_type="indices").indices
    prior, expected = pipeline.prior, codes.clone()
    sequence = prior.prepare_condition(2)
    for place in prior.config.code_order:
        row, column = divmod(place, 4)
        if mask[row, column]:
            with torch.no_grad():
                expected[0, row, column] = prior(input_ids=sequence).logits[0, -1, :8].argmax()
        sequence = torch.cat([sequence, expected[:, row, column, None]], dim=1)
    assert torch.equal(found, expected)
    assert torch.equal(found[0][~mask], codes[0][~mask]) and not torch.equal(found, codes)


def test_a_window_moves_with_a_llama_but_in_no_other_order_than_row_by_row():
    pipeline = make_llama()
    found = pipeline(class_labels=1, height=12, width=10, top_k=1, output_type="indices").indices
    prompt, grid = pipeline.prior.prepare_condition(1), torch.full((1, 6, 5), -1)
    for i in range(6):
        for j in range(5):
            top, left = min(max(i - 2, 0), 2), min(max(j - 2, 0), 1)
            read = grid[:, top : top + 4, left : left + 4].flatten(1)[:, : (i - top) * 4 + j - left]
            with torch.no_grad():
                logits = pipeline.prior(input_ids=torch.cat([prompt, read], dim=1)).logits
            grid[0, i, j] = logits[0, -1, :8].argmax()
    assert torch.equal(found, grid)
    with pytest.raises(ValueError, match="need a prior that reads row by row"):
        make_llama("z-curve")(class_labels=1, height=12, width=10)
