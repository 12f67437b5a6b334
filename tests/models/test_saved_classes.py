"""Image processors, schedulers and pipelines are read from files of their own class alone."""

import json
import shutil

import numpy as np
import pytest
from diffusers import DDIMScheduler
from transformers import CLIPImageProcessor

from hf_vq import (
    MaskReplaceScheduler,
    VQAutoregressivePipeline,
    VQConditionProcessor,
    VQDiffusionImagePipeline,
    VQImageProcessor,
    VQLatentDiffusionPipeline,
    VQVAE2Pipeline,
)
from tests.pipelines import autoregressive_parts, latent_diffusion_parts, vq_diffusion_parts
from tests.pipelines.test_condition_images import make_conditional


PROCESSORS = {
    "image": lambda: VQImageProcessor(size=8),
    "condition": lambda: VQConditionProcessor("depth", size=8),
    "clip": CLIPImageProcessor,
}
PIPELINES = {
    "autoregressive": (VQAutoregressivePipeline, autoregressive_parts.make_pipeline),
    "conditional": (VQAutoregressivePipeline, make_conditional),
    "latent_diffusion": (VQLatentDiffusionPipeline, latent_diffusion_parts.make_pipeline),
    "vq_diffusion": (VQDiffusionImagePipeline, vq_diffusion_parts.make_pipeline),
}
NOT_JSON = {"html": b"<!doctype html>", "list": b"[1]", "empty": b"", "nested": b"[" * 100000}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for name, (_, make) in PIPELINES.items():
        make().save_pretrained(folder / name)
    VQImageProcessor(size=8).save_pretrained(folder / "autoregressive" / "vqvae")
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    def copy(name):
        return shutil.copytree(saved / name, tmp_path / name)

    return copy


@pytest.mark.parametrize("source", PROCESSORS)
@pytest.mark.parametrize("cls", [VQImageProcessor, VQConditionProcessor])
def test_image_processors(tmp_path, cls, source):
    processor = PROCESSORS[source]()
    processor.save_pretrained(tmp_path)
    if isinstance(processor, cls):
        assert cls.from_pretrained(tmp_path).to_dict() == processor.to_dict()
        return
    wanted = rf"(?i)`.*preprocessor_config.json` must be of a {cls.__name__} .*got .*{source}"
    with pytest.raises(ValueError, match=wanted):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", NOT_JSON)
def test_damaged_image_processors(copied, content):
    folder = copied("autoregressive")
    (folder / "vqvae" / "preprocessor_config.json").write_bytes(NOT_JSON[content])
    for load in (VQAutoregressivePipeline.from_pretrained, lambda f: VQImageProcessor.from_pretrained(f / "vqvae")):
        with pytest.raises(OSError, match=r"`.*preprocessor_config.json` must (be|hold) a"):
            load(folder)


def test_a_scheduler_of_another_class(tmp_path):
    DDIMScheduler().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`config` must be of a MaskReplaceScheduler.*DDIMScheduler"):
        MaskReplaceScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "cls", "missing"),
    [
        ("autoregressive", VQVAE2Pipeline, "top_prior, bottom_prior"),
        ("latent_diffusion", VQDiffusionImagePipeline, "transformer"),
        ("vq_diffusion", VQAutoregressivePipeline, "prior"),
        ("conditional", VQLatentDiffusionPipeline, "unet, scheduler"),
    ],
)
def test_the_folder_of_another_pipeline(saved, name, cls, missing):
    with pytest.raises(ValueError, match=rf"`.*model_index.json` must name the parts .* without {missing}\."):
        cls.from_pretrained(saved / name)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("autoregressive", "model_index.json"),
        ("conditional", "condition_processor/preprocessor_config.json"),
        ("latent_diffusion", "scheduler/scheduler_config.json"),
        ("latent_diffusion", "unet/config.json"),
        ("vq_diffusion", "scheduler/scheduler_config.json"),
    ],
)
@pytest.mark.parametrize("content", NOT_JSON)
def test_damaged_files_of_a_pipeline(copied, name, file, content):
    folder = copied(name)
    (folder / file).write_bytes(NOT_JSON[content])
    with pytest.raises(OSError, match=rf"`.*{file}` must (be|hold) a"):
        PIPELINES[name][0].from_pretrained(folder)


@pytest.mark.parametrize("config", [{}, {"_class_name": "MaskReplaceScheduler", "num_embeddings": 8}])
def test_the_scheduler_that_the_index_names(copied, config):
    folder = copied("latent_diffusion")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`.*scheduler_config.json` must be of a DDIMScheduler"):
        VQLatentDiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "options", [{"image_std": [0, 0, 0]}, {"rescale_factor": float("nan")}, {"image_mean": [float("inf")] * 3}]
)
def test_values_of_an_image_processor(options):
    with pytest.raises(ValueError, match="must give finite values"):
        VQImageProcessor(size=8, **options)(np.full((8, 8, 3), 7, np.uint8))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_labels", "3"),
        ("num_labels", 2.5),
        ("threshold", float("nan")),
        ("threshold", "a"),
        ("ignore_index", "a"),
        ("ignore_label", 3),
        ("label_map", "ids"),
        ("label_map", {"sky": 0}),
        ("label_map", [0, 1, 9]),
    ],
)
def test_values_of_a_condition_processor(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        VQConditionProcessor(**{"condition": "segmentation", "num_labels": 3, name: value})
