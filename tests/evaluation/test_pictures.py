import numpy as np
import pytest
import torch
from PIL import Image

from hf_vq.evaluation.pictures import (
    labelled_rows,
    plot_codebook_usage,
    reconstruction_grid,
    samples_by_class,
)
from hf_vq.images import to_pil


def solid(*values, size=(6, 8)):
    """One single-coloured image for each value in [-1, 1]."""
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, *size)


def tiles(grid, left, top, width, height, columns, padding=4):
    pixels = np.asarray(grid)
    for j in range(columns):
        x = left + j * (width + padding)
        yield pixels[top : top + height, x : x + width]


def test_to_pil_maps_and_clamps():
    ramp = torch.arange(256).float() / 127.5 - 1
    image = to_pil(ramp.view(1, 1, 16, 16))[0]
    assert image.mode == "RGB" and image.size == (16, 16)
    np.testing.assert_array_equal(np.asarray(image)[..., 2].ravel(), np.arange(256))
    outside = np.asarray(to_pil(solid(-3, 3, size=(1, 2))[0:2])[1])
    assert (outside == 255).all()
    # height and width are not swapped, and channels stay in order
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 2, 5)
    assert to_pil(red)[0].size == (5, 2)
    assert np.asarray(to_pil(red)[0])[0, 0].tolist() == [255, 0, 0]
    with pytest.raises(ValueError, match=r"`images` must have shape \(B, C, H, W\), got \(4, 2, 2\)"):
        to_pil(torch.zeros(4, 2, 2))


def test_rows_without_labels_lie_where_they_should():
    grid = labelled_rows([("", solid(-1, -0.5)), ("", solid(0.0))], padding=4)
    assert grid.size == (4 + 2 * (8 + 4), 4 + 2 * (6 + 4))
    first = list(tiles(grid, 4, 4, 8, 6, 2))
    assert (first[0] == 0).all() and (first[1] == 64).all()
    second = list(tiles(grid, 4, 14, 8, 6, 2))
    assert (second[0] == 128).all() and (second[1] == 255).all()  # the missing image is background


def test_labels_and_title_are_drawn_beside_the_images():
    plain = labelled_rows([("", solid(-1))])
    labelled = labelled_rows([("cats", solid(-1))], title="samples")
    assert labelled.width > plain.width and labelled.height > plain.height
    pixels = np.asarray(labelled).astype(int)
    assert (pixels[:14].sum() < 255 * pixels[:14].size) and (pixels[22:, :20] < 200).any()


def test_scale_repeats_pixels():
    picture = torch.linspace(-1, 1, 48).view(1, 1, 6, 8)
    small, large = labelled_rows([("", picture)]), labelled_rows([("", picture)], scale=3)
    inner = np.asarray(small)[4:10, 4:12]
    np.testing.assert_array_equal(np.asarray(large)[4:22, 4:28], inner.repeat(3, 0).repeat(3, 1))


def test_reconstructions_are_below_their_originals():
    originals = solid(-1, -0.6, -0.2, 0.2, 0.6)
    grid = reconstruction_grid(originals, originals + 0.1, columns=3)
    row_height = max(6, 14) + 4
    left = grid.width - 3 * 12
    for row, values in enumerate([(-1, -0.6, -0.2), (-0.9, -0.5, -0.1), (0.2, 0.6), (0.3, 0.7)]):
        for tile, value in zip(tiles(grid, left, 4 + row * row_height, 8, 6, 3), values, strict=False):
            assert (tile == round((value + 1) * 127.5)).all()
    with pytest.raises(ValueError, match="shape of `originals`"):
        reconstruction_grid(originals, originals[:2])


def test_samples_are_sorted_into_classes():
    images = solid(-1, 0.0, -0.5)
    grid = samples_by_class(images, [2, 0, 2], class_names=["zero", "one", "two"])
    left = grid.width - 2 * 12
    top_row = list(tiles(grid, left, 4, 8, 6, 2))
    bottom_row = list(tiles(grid, left, 4 + 18, 8, 6, 2))
    assert (top_row[0] == 128).all() and (top_row[1] == 255).all()
    assert (bottom_row[0] == 0).all() and (bottom_row[1] == 64).all()
    same = samples_by_class([Image.new("RGB", (8, 6))] * 3, torch.tensor([2, 0, 2]))
    assert same.height == grid.height
    with pytest.raises(ValueError, match="as many"):
        samples_by_class(images, [0, 1])
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        samples_by_class(images, [2, 0, 2], class_names=["zero", "one"])


def test_wrong_rows_are_refused():
    with pytest.raises(ValueError, match="one size"):
        labelled_rows([("", solid(0.0)), ("", solid(0.0, size=(4, 4)))])
    with pytest.raises(ValueError, match="one size"):
        labelled_rows([])
    with pytest.raises(ValueError, match="scale"):
        labelled_rows([("", solid(0.0))], scale=0)


def test_usage_plot_is_written(tmp_path):
    counts = torch.tensor([8, 4, 4, 0])
    plot_codebook_usage(counts, tmp_path / "usage.png")
    assert np.asarray(Image.open(tmp_path / "usage.png").convert("L")).std() > 1
    plot_codebook_usage(counts, tmp_path / "usage.svg", title="Top level")
    # The frequencies 1/2, 1/4, 1/4 have an entropy of 1.5 bits: perplexity 2^1.5 = 2.8.
    assert "Top level: 3 of 4 codes used (75.0%), perplexity 2.8" in (tmp_path / "usage.svg").read_text()
    with pytest.raises(ValueError, match="no code"):
        plot_codebook_usage(torch.zeros(4), tmp_path / "none.png")
