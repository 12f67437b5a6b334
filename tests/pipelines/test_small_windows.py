"""Windows smaller than the grid that a prior was trained on: fewer codes are read, each in its place."""

import pytest
import torch

from hf_vq import PixelCNNConfig, PixelCNNForCausalLM, VQAutoregressivePipeline, VQLlamaConfig, VQLlamaForCausalLM
from tests.pipelines.autoregressive_parts import make_pipeline, seeded


def make_llama():
    torch.manual_seed(0)
    config = VQLlamaConfig(
        codebook_size=8,
        grid_size=4,
        condition_type="class",
        condition_vocab_size=3,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
    )
    pipeline = VQAutoregressivePipeline(make_pipeline().vqvae, VQLlamaForCausalLM(config).eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def first_of(place, length, side):
    return min(max(place - side // 2, 0), length - side)


def by_hand(prior, size, window, prompt_at, scale=1.0):
    """The likeliest code at each position, read with the codes of its window alone, in their places on a frame."""
    grid = torch.full((1, *size), -1)
    null = prior.config.null_class_token_id
    for i in range(size[0]):
        for j in range(size[1]):
            first = [first_of(p, length, side) for p, length, side in zip((i, j), size, window, strict=True)]
            frame = [
                min(max(start + side // 2 - 2, 0), length - 4)
                for start, side, length in zip(first, window, size, strict=True)
            ]
            prompt = prompt_at(*frame)
            codes, places = [], []
            for row in range(first[0], i + 1):
                for column in range(first[1], j if row == i else first[1] + window[1]):
                    codes.append(int(grid[0, row, column]))
                    places.append((row - frame[0]) * 4 + column - frame[1])
            length = prompt.shape[1]
            positions = torch.cat([torch.arange(length), length + torch.tensor(places, dtype=torch.long)])[None]
            codes = torch.tensor(codes, dtype=torch.long)[None]
            with torch.no_grad():
                seen = torch.ones_like(positions)  # or a gap begins another sequence, to transformers
                logits = [
                    prior(input_ids=torch.cat([ids, codes], dim=1), position_ids=positions, attention_mask=seen)
                    .logits[0, -1]
                    .log_softmax(-1)
                    for ids in (prompt, torch.full_like(prompt, null))
                ]
            grid[0, i, j] = (logits[1] + scale * (logits[0] - logits[1])).argmax()
    return grid


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("make", [lambda: make_pipeline("class"), make_llama], ids=["gpt", "llama"])
@pytest.mark.parametrize(("size", "window"), [((4, 4), (2, 3)), ((5, 7), (3, 3)), ((6, 4), (2, 4))])
def test_a_small_window_by_hand(make, size, window, scale):
    pipeline = make()
    prompt = pipeline.prior.prepare_condition(2)
    arguments = {"height": 2 * size[0], "width": 2 * size[1], "top_k": 1, "output_type": "indices"}
    found = pipeline(class_labels=2, window=window, guidance_scale=scale, **arguments).indices
    assert torch.equal(found, by_hand(pipeline.prior, size, window, lambda *frame: prompt, scale))
    plain = pipeline(class_labels=2, guidance_scale=scale, **arguments).indices
    assert torch.equal(pipeline(class_labels=2, guidance_scale=scale, window=4, **arguments).indices, plain)


def test_a_condition_stays_as_large_as_the_grid():
    pipeline = make_pipeline("codes")  # 2 x 2 codes of a condition for 4 x 4, which see each other
    condition = torch.randint(7, (1, 2, 2), generator=seeded())
    prompt = pipeline.prior.prepare_condition(condition)
    found = pipeline(condition=condition, window=2, top_k=1, output_type="indices").indices
    assert torch.equal(found, by_hand(pipeline.prior, (4, 4), (2, 2), lambda *frame: prompt))


def test_windows_that_are_refused():
    pipeline = make_pipeline()
    for window, message in (
        (5, "`window` must be an int in 1…4, got 5"),
        ((4, 0), "`window` must be an int in 1…4, got 0"),
        ((2, 2, 2), "`window` must be an int, or rows and columns"),
        (2.5, "`window` must be an int in 1…4, got 2.5"),
        ("all", "`window` must be an int in 1…4, got 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(window=window)
    with pytest.raises(ValueError, match="`stride` must be an int in 1…1, got 2"):
        pipeline(window=2, stride=2)
    config = PixelCNNConfig(codebook_size=8, grid_size=4, hidden_size=8, num_hidden_layers=1)
    convolutional = VQAutoregressivePipeline(pipeline.vqvae, PixelCNNForCausalLM(config).eval())
    with pytest.raises(ValueError, match="`window` must be the prior's grid .* PixelCNNForCausalLM reads whole grids"):
        convolutional(window=2)
    with pytest.raises(ValueError, match="`window` smaller than the prior's grid needs `use_cache`"):
        pipeline(class_labels=1, window=2, guidance_scale=2.0, cache_implementation="static")
