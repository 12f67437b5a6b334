"""Random crops of larger pictures, and the ids of their coordinates."""

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hf_vq.training.data.coordinate_crops import CoordinateCrops, CropSettings
from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset


SETTINGS = CropSettings(picture_size=16, crops_per_image=3, coordinate_scale=63, downsample_factor=2)


@pytest.fixture
def images(tmp_path):
    """Pictures of 16×24 pixels whose red and green are the row and the column."""
    rows, columns = np.mgrid[0:16, 0:24].astype(np.uint8)
    picture = Image.fromarray(np.stack([rows, columns, 0 * rows], axis=-1))
    data = datasets.Dataset.from_dict({"image": [picture] * 2, "label": [4, 7]}).cast_column("image", datasets.Image())
    data.to_parquet(tmp_path / "train.parquet")
    return load_image_dataset(DataArguments(str(tmp_path), resolution=8, label_column="label"))


def test_crops_say_where_they_lie(images):
    whole = torch.arange(16 * 24).view(1, 1, 16, 24) / (16 * 24)
    crops = CoordinateCrops(images, SETTINGS, "random", flip=True)
    assert len(crops) == 6 and crops.labels.tolist() == [4, 4, 4, 7, 7, 7]
    corners = set()
    for number in range(6):
        sample = crops.read(number)
        pixels = ((sample["pixel_values"] + 1) * 127.5).round().long()
        top, left = pixels[:2, 0, 0].tolist()
        assert torch.equal(pixels[0, :, 0], torch.arange(top, top + 8)) and sample["label"] == (4, 7)[number // 3]
        corners.add((top, left))
        for name, first in (("condition_codes", left), ("condition_codes_flipped", 24 - left - 8)):
            part = F.interpolate(whole[..., top : top + 8, first : first + 8], scale_factor=1 / 2, mode="area")
            assert torch.equal(sample[name], (63 * part[0, 0].clamp(0, 1)).round().long())
        assert torch.equal(crops.read(number)["condition_codes"], sample["condition_codes"])
    assert len(corners) > 3
    (centre, _) = (CoordinateCrops(images, SETTINGS, "center").read(row) for row in range(2))
    assert ((centre["pixel_values"][:2, 0, 0] + 1) * 127.5).round().tolist() == [4, 8]


def test_pictures_as_large_as_a_crop(images):
    with pytest.raises(ValueError, match="picture_size=4: it must be at least 8, the pixels of a crop"):
        CoordinateCrops(images, CropSettings(4, 1, 63, 2), "random")
