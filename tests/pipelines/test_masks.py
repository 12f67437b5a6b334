"""Masks as people have them."""

import numpy as np
import PIL.Image
import pytest
import torch

from hf_vq.pipelines.conditioning import class_ids, to_mask
from tests.pipelines import latent_diffusion_parts, vq_diffusion_parts, vqvae2_parts
from tests.pipelines.autoregressive_parts import make_pipeline


WANTED = torch.zeros(1, 1, 4, 6)
WANTED[..., 1:3, 2:] = 1
ARRAY = WANTED[0, 0].numpy()


@pytest.mark.parametrize(
    "mask",
    [
        *(
            PIL.Image.fromarray((ARRAY * 255).astype(np.uint8)).convert(mode)
            for mode in ("1", "L", "RGB", "P", "RGBA")
        ),
        PIL.Image.fromarray((ARRAY * 65535).astype(np.uint16)),
        *(ARRAY.astype(kind) for kind in (bool, np.uint8, np.int64, np.float32, np.float64)),
        (ARRAY * 255).astype(np.uint8),
        ARRAY[..., None],
        ARRAY[None],
        [ARRAY],
        WANTED.bool(),
        WANTED.long(),
        WANTED[0],
        WANTED[0, 0],
    ],
)
def test_kinds_of_masks(mask):
    assert torch.equal(to_mask(mask), WANTED)


@pytest.mark.parametrize("mask", ["mask.png", 3, torch.full((4, 4), 2.0), ARRAY * np.nan, [], ARRAY[:0]])
def test_what_is_no_mask(mask):
    with pytest.raises(ValueError, match="`mask_image` must"):
        to_mask(mask)


def make_inpainting():
    return latent_diffusion_parts.make_pipeline(unet=latent_diffusion_parts.make_unet(in_channels=9))


@pytest.mark.parametrize(
    "make", [make_pipeline, vq_diffusion_parts.make_pipeline, vqvae2_parts.make_pipeline, make_inpainting]
)
@pytest.mark.parametrize("painted", ["nothing", "everything"])
def test_masks_that_paint_nothing_or_everything(make, painted):
    half = torch.zeros(8, 8)
    half[:4] = 1
    masks = torch.stack([half, torch.full((8, 8), float(painted == "everything"))])
    with pytest.raises(ValueError, match=f"`mask_image` must paint a part .* paints {painted} in row 1 of 2"):
        make()(image=torch.zeros(2, 3, 8, 8), mask_image=masks)


def test_classes():
    names = {0: "cat", 1: "dog"}
    for one in (
        1,
        "dog",
        np.int32(1),
        np.array(1),
        torch.tensor(1),
        torch.tensor([1]),
        ["dog"],
        [np.int64(1)],
        ("dog",),
    ):
        assert class_ids(one, 3, names, null_class_id=2).tolist() == [1]
    for bad in (2, -1, 1.0, True, "owl", "LABEL_1", None, [], torch.tensor(1.0), np.array([True])):
        with pytest.raises(ValueError, match="`class_labels` must"):
            class_ids(bad, 3, names, null_class_id=2)


def test_placeholders_are_no_names_of_classes():
    pipeline = make_pipeline(id2label=None)
    assert pipeline.prior.config.id2label[1] == "LABEL_1"
    with pytest.raises(ValueError, match="`class_labels` must be ids from 0 to 2, got 'LABEL_1'"):
        pipeline(class_labels="LABEL_1")
    with pytest.raises(ValueError, match="'LABEL_1' is not one name"):
        pipeline.prior.prepare_condition("LABEL_1")
