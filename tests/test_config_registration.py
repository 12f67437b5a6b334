"""Configurations of models and schedulers of diffusers' kind."""

import pytest

from hf_vq import (
    LatentUNet2DConditionModel,
    LatentUNet2DModel,
    MaskReplaceScheduler,
    VQDiffusionTransformer2DModel,
)


BLOCKS = (("DownBlock2D",), ("UpBlock2D",), (32,), 1)
MADE = {
    MaskReplaceScheduler: (7, 4, "mask_only"),
    VQDiffusionTransformer2DModel: (7, (4, 2), 2, 2, 4),
    LatentUNet2DModel: (4, 2, 2, *BLOCKS),
    LatentUNet2DConditionModel: (4, 2, 2, *BLOCKS),
}


@pytest.mark.parametrize("cls", MADE, ids=lambda cls: cls.__name__)
def test_arguments_by_place_stay_in_copies(cls):
    first = cls(*MADE[cls])
    again = cls.from_config(first.config)
    assert all(again.config[name] == value for name, value in first.config.items() if not name.startswith("_"))


def test_an_argument_twice():
    with pytest.raises(TypeError, match="MaskReplaceScheduler got `num_embeddings` twice"):
        MaskReplaceScheduler(7, num_embeddings=8)


def test_a_missing_and_an_unknown_argument():
    with pytest.raises(TypeError, match="num_embeddings"):
        MaskReplaceScheduler()
    with pytest.raises(TypeError, match="colour"):
        MaskReplaceScheduler(7, colour=3)
