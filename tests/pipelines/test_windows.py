"""Images larger than a prior's grid, completion in any direction, and variations, against loops written by hand."""

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from hf_vq.models.priors.configuration_pixelcnn import PixelCNNConfig
from hf_vq.models.priors.configuration_vq_gpt import VQGPTConfig
from hf_vq.models.priors.modeling_pixelcnn import PixelCNNForCausalLM
from hf_vq.models.priors.modeling_vq_gpt import VQGPTForCausalLM
from hf_vq.pipelines.code_sampling import LevelSampling, sample_level, window_runs
from hf_vq.pipelines.completion import random_mask
from hf_vq.pipelines.pipeline_vq_autoregressive import VQAutoregressivePipeline
from tests.pipelines.autoregressive_parts import make_pipeline, seeded


def local(position: int, length: int, side: int) -> int:
    """Where a code lies in its window: in the middle, but at the ends (taming-transformers' `sample_conditional`)."""
    if position <= side // 2:
        return position
    return side - (length - position) if length - position < side // 2 else side // 2


def by_hand(prior, prompt_at, size, known=None, side=4):
    """The likeliest code at each position, each in a forward pass over its own window."""
    height, width = size
    grid = torch.full((1, height, width), -1) if known is None else known.clone()
    for i in range(height):
        for j in range(width):
            if grid[0, i, j] >= 0:
                continue
            row, column = local(i, height, side), local(j, width, side)
            window = grid[:, i - row : i - row + side, j - column : j - column + side]
            prompt = prompt_at(i - row, j - column)
            ids = torch.cat([prompt, window.flatten(1)[:, : row * side + column]], dim=1)
            with torch.no_grad():
                grid[0, i, j] = prior(input_ids=ids).logits[0, -1].argmax()
    return grid


@pytest.mark.parametrize("kind", ["unconditional", "class"])
@pytest.mark.parametrize("size", [(4, 7), (6, 4), (7, 9)])
def test_a_window_moves_over_the_grid(kind, size):
    pipeline = make_pipeline(kind)
    label = {"class_labels": 2} if kind == "class" else {}
    found = pipeline(**label, height=2 * size[0], width=2 * size[1], top_k=1, output_type="pt")
    prompt = pipeline.prior.prepare_condition(label.get("class_labels"))
    expected = by_hand(pipeline.prior, lambda *origin: prompt, size)
    assert torch.equal(found.indices, expected)
    assert found.images.shape == (1, 3, 2 * size[0], 2 * size[1])
    assert expected.unique().numel() > 2


def test_a_spatial_condition_is_cropped_along():
    pipeline = make_pipeline("codes")  # a condition of 2x2 codes for a window of 4x4
    condition = torch.randint(7, (1, 3, 4), generator=seeded())
    found = pipeline(condition=condition, height=12, width=16, top_k=1, stride=2, output_type="indices").indices
    assert found.shape == (1, 6, 8)
    for run in window_runs((6, 8), (4, 4), 2):
        (top, left), prior = run.origin, pipeline.prior
        prompt = prior.prepare_condition(condition[:, top // 2 : top // 2 + 2, left // 2 : left // 2 + 2].flatten(1))
        window = found[:, top : top + 4, left : left + 4].flatten(1)
        for place in range(run.start, run.start + run.length):
            with torch.no_grad():
                logits = prior(input_ids=torch.cat([prompt, window[:, :place]], dim=1)).logits
            assert window[0, place] == logits[0, -1].argmax()
    with pytest.raises(ValueError, match="whole codes of the condition"):
        pipeline(condition=condition, height=12, width=16)
    with pytest.raises(ValueError, match="`condition` must have as many codes for each window"):
        pipeline(condition=condition, height=16, width=16, stride=2)
    with pytest.raises(ValueError, match="`condition` must be a grid"):
        pipeline(condition=condition[:, :2, :2], height=12, width=16, stride=2)


def test_a_convolutional_prior_has_windows_too():
    torch.manual_seed(0)
    config = PixelCNNConfig(codebook_size=8, grid_size=4, hidden_size=8, num_hidden_layers=2)
    prior = PixelCNNForCausalLM(config).eval()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    pipeline = VQAutoregressivePipeline(make_pipeline().vqvae, prior)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(height=12, width=10, top_k=1, output_type="indices").indices
    assert torch.equal(found, by_hand(prior, lambda *origin: prior.prepare_condition(), (6, 5)))


def test_every_code_is_sampled_once_and_a_stride_saves_prompts():
    for size in ((4, 4), (4, 11), (9, 5)):
        for stride in (1, 2):
            runs = window_runs(size, (4, 4), stride)
            places = []
            for run in runs:
                for place in range(run.start, run.start + run.length):
                    places.append((run.origin[0] + place // 4) * size[1] + run.origin[1] + place % 4)
            assert places == list(range(size[0] * size[1]))
    assert len(window_runs((4, 4), (4, 4))) == 1
    assert len(window_runs((16, 16), (4, 4), 2)) < 0.6 * len(window_runs((16, 16), (4, 4)))
    with pytest.raises(ValueError, match="`stride` must be an int in 1…2, got 3"):
        window_runs((8, 8), (4, 4), 3)
    with pytest.raises(ValueError, match="`height` must be at least the 4 codes"):
        make_pipeline()(height=6, width=8)
    with pytest.raises(ValueError, match="`width` must be a multiple of 2"):
        make_pipeline()(height=8, width=9)


@pytest.mark.parametrize("side", ["top", "bottom", "left", "right"])
def test_outpainting(side):
    pipeline = make_pipeline()
    image = torch.rand(1, 3, 8, 8, generator=seeded()) * 2 - 1
    margins = [4 if name == side else 0 for name in ("top", "bottom", "left", "right")]
    found = pipeline(class_labels=1, image=image, outpaint=margins, top_k=1, output_type="pt")
    size = (6, 4) if side in ("top", "bottom") else (4, 6)
    known = torch.full((1, *size), -1)
    rows, columns = (slice(margins[0] // 2, margins[0] // 2 + 4), slice(margins[2] // 2, margins[2] // 2 + 4))
    known[:, rows, columns] = pipeline.vqvae.encode(image).indices
    prompt = pipeline.prior.prepare_condition(1)
    assert torch.equal(found.indices, by_hand(pipeline.prior, lambda *origin: prompt, size, known))
    pixels = found.images[:, :, margins[0] : margins[0] + 8, margins[2] : margins[2] + 8]
    torch.testing.assert_close(pixels, image / 2 + 0.5)
    for bad in ([1, 0, 0, 0], [0, 0, 0, 0], [2, 2], 4):
        with pytest.raises(ValueError, match="`outpaint` must be"):
            pipeline(class_labels=1, image=image, outpaint=bad)


def test_variations_keep_a_random_share():
    pipeline = make_pipeline()
    codes = torch.randint(8, (1, 4, 4), generator=seeded(3))
    arguments = {"indices": codes, "num_images_per_prompt": 64, "output_type": "indices"}
    kept = []
    for fraction in (0.0, 0.5, 1.0):
        found = pipeline(class_labels=0, **arguments, keep_fraction=fraction, generator=seeded()).indices
        kept.append((found == codes).double().mean().item())
    assert kept[0] < 0.3 < kept[1] and kept[1] >= 0.5 and kept[2] == 1
    generators = [seeded(i) for i in range(3)]
    mask = random_mask((3, 4, 4), 0.25, generators)
    assert mask.flatten(1).sum(1).tolist() == [12, 12, 12] and not torch.equal(mask[0], mask[1])
    assert torch.equal(mask[1], random_mask((1, 4, 4), 0.25, [seeded(1)])[0])
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="`keep_fraction` must be a number in"):
            pipeline(class_labels=0, **arguments, keep_fraction=bad)


def test_pixels_that_are_kept_are_those_of_the_image():
    pipeline = make_pipeline()
    image, mask = torch.rand(2, 3, 8, 8, generator=seeded()) * 2 - 1, torch.zeros(8, 8)
    mask[3:5, 2:7] = 1
    found = pipeline(class_labels=[0, 1], image=image, mask_image=mask, generator=seeded(), output_type="pt")
    torch.testing.assert_close(found.images[..., mask == 0], (image / 2 + 0.5)[..., mask == 0])
    decoded = (pipeline.vqvae.decode_indices(found.indices).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found.images[..., mask == 1], decoded[..., mask == 1])


class SmoothPrior(VQGPTForCausalLM):
    """Each code is near the mean of those above and to the left of it, as far as the window shows them."""

    def forward(self, input_ids, **kwargs):
        count, (_, width) = self.config.codebook_size, self.config.grid_size
        codes = input_ids[:, self.config.condition_length :]
        row, column = divmod(codes.shape[1], width)
        near = [codes[:, -1]] if column else []
        near += [codes[:, -width]] if row else []
        logits = torch.zeros(len(codes), 1, count)
        if near:
            mean = torch.stack(near).float().mean(dim=0)
            logits = -((torch.arange(count) - mean[:, None, None]) ** 2) / 4
        return CausalLMOutput(logits=logits)


def seam_ratio(grids, rows, columns):
    """The mean step between neighbouring codes across borders before `rows` and `columns`, over that elsewhere."""
    across, elsewhere = [], []
    for axis, borders in ((1, rows), (2, columns)):
        steps = grids.double().diff(dim=axis).abs()
        is_border = torch.zeros(steps.shape[axis], dtype=torch.bool)
        is_border[[border - 1 for border in borders]] = True
        across.append(steps.index_select(axis, is_border.nonzero().flatten()).flatten())
        elsewhere.append(steps.index_select(axis, (~is_border).nonzero().flatten()).flatten())
    return torch.cat(across).mean() / torch.cat(elsewhere).mean()


def test_windows_leave_no_seams():
    torch.manual_seed(0)
    config = VQGPTConfig(codebook_size=64, grid_size=4, n_embd=4, n_layer=1, n_head=1)
    prior = SmoothPrior(config).eval()
    prompt = prior.prepare_condition(batch_size=96)
    setting = LevelSampling(guidance_scale=1.0, temperature=1.0, top_k=None, top_p=None)
    options = {"generator": seeded(), "use_cache": False}
    grids = sample_level(prior, prompt, None, setting, grid_size=(8, 12), stride=2, **options)
    origins = {run.origin for run in window_runs((8, 12), (4, 4), 2)}
    # a new window begins to sample in its third row or column, as long as it moves
    rows, columns = (sorted({origin[axis] + 2 for origin in origins if origin[axis]}) for axis in (0, 1))
    assert (rows, columns) == ([4, 6], [4, 6, 8, 10])
    assert seam_ratio(grids, rows, columns) <= 1.1
    tiles = [[sample_level(prior, prompt, None, setting, **options) for _ in range(3)] for _ in range(2)]
    apart = torch.cat([torch.cat(line, dim=2) for line in tiles], dim=1)
    assert seam_ratio(apart, [4], [4, 8]) > 2
