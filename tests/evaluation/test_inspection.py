import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from hf_vq.evaluation.inspection import (
    codebook_atlas,
    copied_share,
    heat_map,
    index_map,
    interpolate,
    loss_curves,
    nearest_images,
    usage_map,
)
from hf_vq.images import to_pil
from tests.pipelines.autoregressive_parts import make_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return make_tiny_tokenizer()


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_an_atlas_shows_each_code_where_it_occurs_first(tokenizer, images):
    picture = codebook_atlas(tokenizer, [{"pixel_values": images}], context=0, columns=16, progress=False)
    with torch.no_grad():
        indices = tokenizer.encode(images).indices
        sample = tokenizer.decode_indices(indices).sample.clamp(-1, 1)
    used = sorted(set(indices.unique().tolist()))
    pixels = np.asarray(picture)[-3:-1]  # the one row of tiles, two pixels high
    for code in range(16):
        tile = pixels[:, 1 + 3 * code : 3 + 3 * code]
        if code in used:
            image, row, column = (indices == code).nonzero()[0].tolist()
            part = sample[image, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(tile, np.asarray(to_pil(part[None])[0]))
        else:
            assert (tile == 128).all()


def test_use_of_the_codebook_at_each_position(tokenizer, images):
    found = usage_map(tokenizer, [{"pixel_values": images[:3]}, {"pixel_values": images[3:]}], progress=False)
    with torch.no_grad():
        indices = tokenizer.encode(images).indices
    for row in range(4):
        for column in range(4):
            counts = Counter(indices[:, row, column].tolist()).values()
            entropy = -sum(n / 6 * math.log(n / 6) for n in counts)
            assert found[row, column] == pytest.approx(math.exp(entropy))
    picture = np.asarray(heat_map(found, scale=2)).astype(int)
    assert picture.shape == (8, 8, 3)
    brightest, darkest = (divmod(int(one), 4) for one in (found.argmax(), found.argmin()))
    assert picture[2 * brightest[0], 2 * brightest[1]].sum() > picture[2 * darkest[0], 2 * darkest[1]].sum()


def test_equal_codes_have_equal_colours():
    indices = torch.tensor([[[0, 1], [1, 3]]])
    pixels = np.asarray(index_map(indices, 4, scale=3)[0])
    assert pixels.shape == (6, 6, 3) and (pixels[0, 3] == pixels[3, 0]).all() and (pixels[0, 0] != pixels[5, 5]).any()


def test_interpolations_begin_and_end_at_the_reconstructions(tokenizer, images):
    with torch.no_grad():
        encoded = tokenizer.encode(images[:2])
        ends = tokenizer.decode_indices(encoded.indices).sample.clamp(-1, 1)
        middle = tokenizer.decode(encoded.latents.mean(dim=0, keepdim=True)).sample.clamp(-1, 1)
    for space in ("latent", "index"):
        between = interpolate(tokenizer, images[0], images[1], steps=3, space=space)
        torch.testing.assert_close(between[[0, 2]], ends, atol=1e-5, rtol=0)
    torch.testing.assert_close(interpolate(tokenizer, *images[:2], steps=3)[1:2], middle, atol=1e-5, rtol=0)
    with torch.no_grad():
        mixed = tokenizer.encode(interpolate(tokenizer, *images[:2], steps=5, space="index")).indices
    assert mixed.shape == (5, 4, 4)
    with pytest.raises(ValueError, match='`space` must be "latent" or "index"'):
        interpolate(tokenizer, *images[:2], space="pixel")


class Means:
    name = "means"

    def pooled(self, images):
        return images.mean((2, 3))


def test_nearest_images(images):
    dataset = [{"pixel_values": image} for image in images]
    numbers, distances = nearest_images(images[[4, 1]] + 0.0, dataset, Means(), count=2, progress=False)
    assert numbers[:, 0].tolist() == [4, 1] and distances[:, 0].abs().max() < 1e-5
    features = images.mean((2, 3)).double()
    expected = torch.cdist(features[[4, 1]], features).sort(dim=1)
    assert torch.equal(numbers, expected.indices[:, :2])


def test_the_share_of_copies():
    generator = torch.Generator().manual_seed(0)
    training, held_out, fresh = (torch.randn(400, 3, generator=generator) for _ in range(3))
    assert copied_share(training[:50], training, held_out) == 1.0
    assert 0.4 < copied_share(fresh, training, held_out) < 0.6
    assert copied_share(fresh + 100, training, held_out) == 0.0


def test_loss_curves(tmp_path):
    rows = [{"step": step, "loss": 1 / (step + 1), "seconds": 2.0, "validation/psnr": 20 + step} for step in range(5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    figure = loss_curves(tmp_path)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "validation/psnr"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [row["loss"] for row in rows])
    with pytest.raises(ValueError, match="`names` must be among"):
        loss_curves(tmp_path, ["fid"])
    with pytest.raises(ValueError, match="`metrics` must be a run's folder"):
        loss_curves(tmp_path / "missing")
    with pytest.raises(ValueError, match="`names` must be among .*, got none"):
        loss_curves(tmp_path, [])
    for text, message in (
        ('{"step": 1, "loss": 2}', "at least two rows of a metric for a curve, got only one so far"),
        ('{"step": 1, "loss": 2}\n{"step": 2, "loss": 2}', "a metric that changes, got the same values in every row"),
    ):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            loss_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"ste')
    with pytest.raises(ValueError, match="line 2 must be a JSON object"):
        loss_curves(tmp_path)
