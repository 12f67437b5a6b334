"""VQ-Diffusion pipelines that carry their code, in a folder and on the Hub, and their cards."""

import json

import pytest
import torch
from safetensors.torch import save_file

import hf_vq
from hf_vq.hub import save_with_code
from hf_vq.hub_cards import facts, model_card
from hf_vq.models.autoencoders.image_processing_vq import VQImageProcessor
from tests.pipelines.vq_diffusion_parts import CONDITIONS, indices_of, make_pipeline


LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
pipeline = DiffusionPipeline.from_pretrained({source!r}, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
assert "hf_vq" not in sys.modules
for part in (pipeline, pipeline.transformer, pipeline.scheduler):
    assert type(part).__module__.startswith("diffusers_modules."), type(part)
output = pipeline(**{condition!r}, generator=torch.Generator().manual_seed(0), output_type="pt")
expected = load_file({expected!r})
assert torch.equal(output.indices, expected["indices"])
assert torch.equal(output.images, expected["images"])
"""
PUSH = """
from hf_vq import VQDiffusionImagePipeline
from hf_vq import model_card, push_to_hub
pipeline = VQDiffusionImagePipeline.from_pretrained({folder!r})
assert type(pipeline.transformer).__module__ == "hf_vq.models.priors.transformer_vq_diffusion"
card = model_card(pipeline, "tester/text", "apache-2.0", "emoji-64")
push_to_hub(pipeline, "tester/text", card=card)
VQDiffusionImagePipeline.from_pretrained("tester/text").save_pretrained({again!r})
"""


@pytest.mark.hub
@pytest.mark.slow
def test_without_hf_vq(hub, tmp_path):
    pipeline, condition = make_pipeline("text_learned"), CONDITIONS["text_learned"]
    folder, again = str(tmp_path / "shared"), str(tmp_path / "again")
    save_with_code(pipeline, folder)
    output = pipeline(**condition, generator=torch.Generator().manual_seed(0), output_type="pt")
    expected = str(tmp_path / "expected.safetensors")
    save_file({"indices": output.indices, "images": output.images.contiguous()}, expected)
    hub.run(LOAD.format(source=folder, condition=condition, expected=expected), installed=False)
    hub.run(PUSH.format(folder=folder, again=again))
    files = hub.files("tester/text").keys()
    assert {"README.md", "pipeline_vq_diffusion.py", "scheduler/scheduling_mask_replace.py"} <= files
    hub.run(LOAD.format(source="tester/text", condition=condition, expected=expected), installed=False)
    assert not list((tmp_path / "again").rglob("*.py")) and "auto_map" not in read(tmp_path / "again/transformer")


def read(folder):
    return (folder / "config.json").read_text()


def test_installed_classes_win_over_the_code_of_a_folder(tmp_path):
    pipeline = make_pipeline("class")
    save_with_code(pipeline, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["scheduling_mask_replace", "MaskReplaceScheduler"]
    assert index["transformer"] == ["transformer_vq_diffusion", "VQDiffusionTransformer2DModel"]
    loaded = hf_vq.VQDiffusionImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is hf_vq.VQDiffusionTransformer2DModel
    assert type(loaded.scheduler) is hf_vq.MaskReplaceScheduler
    assert torch.equal(indices_of(loaded, **CONDITIONS["class"]), indices_of(pipeline, **CONDITIONS["class"]))


@pytest.mark.parametrize(
    ("kind", "task", "call"),
    [
        ("unconditional", "unconditional-image-generation", "pipeline()"),
        ("class", "unconditional-image-generation", "pipeline(class_labels=0)"),
        ("text", "text-to-image", 'pipeline(prompt="…")'),
    ],
)
def test_cards(kind, task, call):
    pipeline = make_pipeline(kind)
    card = model_card(pipeline, "user/name", license="mit", dataset="a folder", metrics={"bits_per_index": 3.5})
    assert card.data.pipeline_tag == task and f"{call}.images" in card.content
    assert f"| `transformer` parameters | {pipeline.transformer.num_parameters():,} |" in card.content
    assert f"| `transformer` condition | {kind} |" in card.content and "| `scheduler` steps | 10 |" in card.content
    assert "VQDiffusionImagePipeline" in card.content and "3.5" in card.content


def test_facts():
    pipeline = make_pipeline("class")
    assert dict(facts(pipeline.transformer))["codes"] == "4×4 of 16"
    assert dict(facts(pipeline.scheduler)) == {"class": "MaskReplaceScheduler", "steps": "10", "schedule": "linear"}


def test_the_image_processor_stays_beside_the_tokenizer(tmp_path):
    make_pipeline().vqvae.save_pretrained(tmp_path / "vqvae")
    VQImageProcessor(size=8).save_pretrained(tmp_path / "vqvae")
    vqvae = hf_vq.VQGANModel.from_pretrained(tmp_path / "vqvae")
    make_pipeline(vqvae=vqvae).save_pretrained(tmp_path / "pipeline")
    assert json.loads((tmp_path / "pipeline/vqvae/preprocessor_config.json").read_text())["size"]
