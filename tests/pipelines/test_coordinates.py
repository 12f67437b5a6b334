"""The coordinates of whole pictures and of crops, against the original's arithmetic on every pixel."""

import pytest
import torch
import torch.nn.functional as F

from hf_vq import VQGPTConfig
from hf_vq.models.priors.coordinates import coordinate_grid, coordinate_ids
from tests.pipelines.autoregressive_parts import make_pipeline, seeded


def config_of(vocab_size=1024, scale=1024, side=16, length=None):
    return VQGPTConfig(
        codebook_size=1024,
        grid_size=side,
        n_embd=8,
        n_layer=1,
        n_head=1,
        condition_type="coordinates",
        condition_vocab_size=vocab_size,
        condition_length=side**2 if length is None else length,
        coordinate_scale=scale,
    )


def by_pixels(picture, corner, crop, cells, scale):
    """A coordinate for each pixel, cut, averaged, clamped, scaled, rounded."""
    (height, width), (top, left) = picture, corner
    coordinates = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width) / (height * width)
    part = coordinates[..., top : top + crop[0], left : left + crop[1]]
    return (scale * F.interpolate(part, size=cells, mode="area")[0, 0].clamp(0, 1)).round().long()


@pytest.mark.parametrize(
    ("picture", "corner", "crop", "cells"),
    [
        ((256, 256), (0, 0), (256, 256), (16, 16)),
        ((320, 451), (37, 120), (256, 256), (16, 16)),
        ((300, 260), (44, 3), (256, 256), (10, 10)),  # cells that do not divide the crop
        ((96, 160), (0, 0), (96, 160), (6, 10)),
    ],
)
def test_coordinates_of_a_crop(picture, corner, crop, cells):
    found = coordinate_ids(config_of(1025), picture, cells, crop, corner)
    assert torch.equal(found, by_pixels(picture, corner, crop, cells, 1024))


def test_the_last_id_stands_for_those_beyond():
    config = config_of(1024, 4000)
    found = coordinate_ids(config, (64, 64), (64, 64))
    assert torch.equal(found, by_pixels((64, 64), (0, 0), (64, 64), (64, 64), 4000).clamp(max=1023))
    assert found.max() == 1023 and by_pixels((64, 64), (0, 0), (64, 64), (64, 64), 4000).max() == 3999
    assert config_of(9, None).coordinate_scale == 8


def test_the_grid_of_the_coordinates():
    assert coordinate_grid(config_of(length=64)) == (8, 8)
    config = config_of()
    config.grid_size = [4, 16]
    config.condition_length = 16
    assert coordinate_grid(config) == (2, 8)
    config.condition_length = 15
    with pytest.raises(ValueError, match="`condition_length` must be a grid in the proportions of the 4x16 codes"):
        coordinate_grid(config)
    with pytest.raises(ValueError, match="`coordinate_scale` must be positive, and for condition_type='coordinates'"):
        VQGPTConfig(condition_type="class", num_classes=3, coordinate_scale=3)


def test_a_pipeline_makes_them_of_the_whole_picture():
    """At the prior's own size, and cut along with the window; as if given."""
    pipeline = make_pipeline("coordinates")
    for size in ((8, 8), (12, 16)):
        whole = by_pixels(size, (0, 0), size, (size[0] // 2, size[1] // 2), 39)[None]
        assert torch.equal(pipeline.prepare_coordinates(*size), whole)
        arguments = {"height": size[0], "width": size[1], "output_type": "indices"}
        found = pipeline(generator=seeded(), **arguments).indices
        assert torch.equal(found, pipeline(condition=whole, generator=seeded(), **arguments).indices)
        other = pipeline(condition=whole.flip(1), generator=seeded(), **arguments).indices
        assert found.shape == (1, size[0] // 2, size[1] // 2) and not torch.equal(found, other)
    image = torch.rand(2, 3, 8, 8, generator=seeded()) * 2 - 1
    arguments = {"image": image, "outpaint": (0, 4, 0, 0), "output_type": "indices"}
    found = pipeline(generator=seeded(), **arguments).indices
    whole = by_pixels((12, 8), (0, 0), (12, 8), (6, 4), 39)[None]
    assert torch.equal(found, pipeline(condition=whole, generator=seeded(), **arguments).indices)


def test_what_is_no_coordinate():
    pipeline = make_pipeline("coordinates")
    with pytest.raises(ValueError, match=r"`condition` must lie in 0 … 39, got values from 40 to 40"):
        pipeline(condition=torch.full((1, 4, 4), 40))
    with pytest.raises(ValueError, match="`class_labels` needs a prior whose condition_type is 'class', got 'coord"):
        pipeline(class_labels=0)
    with pytest.raises(ValueError, match="`prior` must have the condition_type 'coordinates', got 'class'"):
        make_pipeline("class").prepare_coordinates()
