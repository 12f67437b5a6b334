"""Repositories of diffusers' deprecated VQ-Diffusion, tiny and random, against diffusers' own classes."""

import json

import pytest
import torch
from diffusers import Transformer2DModel, VQDiffusionScheduler, VQModel
from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import (
    LearnedClassifierFreeSamplingEmbeddings,
    VQDiffusionPipeline,
)
from transformers import set_seed

from hf_vq import VQDiffusionImagePipeline
from hf_vq.pipelines.vq_diffusion_from_diffusers import convert_scheduler, convert_transformer
from tests.pipelines.latent_diffusion_parts import make_text_parts
from tests.pipelines.vq_diffusion_parts import CODES, MASK, STEPS, seeded


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def make_transformer(**overrides):
    set_seed(0)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "num_layers": 2,
        "cross_attention_dim": 8,
        "attention_bias": True,
        "sample_size": 4,
        "num_vector_embeds": CODES + 1,
        "activation_fn": "geglu-approximate",
        "num_embeds_ada_norm": STEPS,
        "norm_type": "ada_norm",
    }
    model = Transformer2DModel(**{**config, **overrides}).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def make_vqvae(**overrides):
    set_seed(1)
    config = {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 2,
        "latent_channels": 6,
        "vq_embed_dim": 5,
        "num_vq_embeddings": CODES,
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    }
    model = VQModel(**{**config, **overrides}).eval()
    model.quantize.embedding.weight.data.normal_(std=0.1)
    return model


def write_repository(folder, learnable=True, **overrides):
    """The parts as the deprecated pipeline saves them; returns that pipeline."""
    text_encoder, tokenizer = make_text_parts()
    null = LearnedClassifierFreeSamplingEmbeddings(learnable, hidden_size=8, length=6)
    if learnable:
        null.embeddings.data.normal_(generator=seeded())
    parts = {
        "vqvae": make_vqvae(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": make_transformer(),
        "scheduler": VQDiffusionScheduler(CODES + 1, STEPS),
        "learned_classifier_free_sampling_embeddings": null,
        **overrides,
    }
    libraries = {"text_encoder": "transformers", "tokenizer": "transformers"}
    index = {"_class_name": "VQDiffusionPipeline", "_diffusers_version": "0.9.0"}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = [libraries.get(name, "diffusers"), type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return VQDiffusionPipeline(**parts)


# --------------------------------------------------------------------------------------------- each part


@pytest.mark.parametrize("bias", [True, False])
def test_logits(bias):
    model = make_transformer(attention_bias=bias)
    converted = convert_transformer(model)
    indices = torch.randint(CODES + 1, (2, 4, 4), generator=seeded())
    states = torch.randn(2, 5, 8, generator=seeded(1))
    with torch.no_grad():
        for t in (0, 4, STEPS - 1):
            expected = model(indices.flatten(1), encoder_hidden_states=states, timestep=torch.tensor(t)).sample
            logits = converted(indices, t, encoder_hidden_states=states).sample
            found = logits.log_softmax(-1).flatten(1, 2).mT  # (B, K, N), as diffusers has it
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1


def test_tables():
    """diffusers keeps an entry of timestep -1 at the end, and all in float32."""
    for config in ({}, {"alpha_cum_start": 0.99, "gamma_cum_end": 0.9, "alpha_cum_end": 0.01}):
        scheduler = VQDiffusionScheduler(CODES + 1, STEPS, **config)
        converted = convert_scheduler(scheduler.config)
        assert converted.mask_index == scheduler.mask_class
        for theirs, ours in (("at", "alphas"), ("bt", "betas"), ("ct", "gammas")):
            expected = getattr(scheduler, f"log_cumprod_{theirs}")[:-1].double().exp()
            torch.testing.assert_close(getattr(converted, f"{ours}_cumprod"), expected, atol=1e-6, rtol=1e-5)
    old = convert_scheduler({"num_vec_classes": CODES + 1})  # a file that leaves the defaults out
    assert old.config.num_train_timesteps == 100 and old.config.num_embeddings == CODES


def test_the_posterior_of_one_step():
    scheduler = VQDiffusionScheduler(CODES + 1, STEPS)
    converted = convert_scheduler(scheduler.config)
    sample = torch.randint(CODES + 1, (2, 16), generator=seeded())
    probs = torch.randn(2, 16, CODES, generator=seeded(1)).softmax(-1)
    for t in (1, 5, STEPS - 1):
        expected = scheduler.q_posterior(probs.log().mT, sample, torch.tensor(t)).exp()
        found = converted.q_posterior(probs, sample, t, t - 1).mT
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------- whole repositories


@pytest.mark.parametrize("learnable", [True, False])
def test_a_repository(tmp_path, learnable):
    """Guided predictions and decoded images are those of the deprecated pipeline's parts."""
    original = write_repository(tmp_path, learnable)
    pipeline = VQDiffusionImagePipeline.from_diffusers(str(tmp_path))
    assert (pipeline.transformer.null_embedding is not None) == learnable
    sample = torch.randint(CODES + 1, (2, 4, 4), generator=seeded())
    prompts = ["a red cat", "dog"]
    with torch.no_grad():
        embeds = original._encode_prompt(prompts, 1, do_classifier_free_guidance=True)
        double = torch.cat([sample, sample]).flatten(1)
        output = original.transformer(double, encoder_hidden_states=embeds, timestep=torch.tensor(7)).sample
        null, conditional = output.chunk(2)
        expected = (null + 3.0 * (conditional - null)).log_softmax(dim=1)
        inputs = pipeline.prepare_condition(2, prompt=prompts, guided=True)
        logits = pipeline.predict(sample, torch.tensor(7), *inputs, 3.0)
    torch.testing.assert_close(logits.log_softmax(-1).flatten(1, 2).mT, expected, atol=1e-4, rtol=1e-4)

    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(prompt=prompts, guidance_scale=3.0, num_inference_steps=5, generator=seeded(), output_type="pt")
    with torch.no_grad():
        entries = original.vqvae.quantize.get_codebook_entry(found.indices, (2, 4, 4, 5))
        pixels = original.vqvae.decode(entries, force_not_quantize=True).sample
    torch.testing.assert_close(found.images, (pixels / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)
    assert found.indices.max() < MASK

    pipeline.save_pretrained(tmp_path / "ours")
    again = VQDiffusionImagePipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    arguments = {"prompt": prompts, "guidance_scale": 3.0, "num_inference_steps": 5, "output_type": "indices"}
    assert torch.equal(again(**arguments, generator=seeded()).indices, found.indices)


def test_an_old_repository(tmp_path):
    """Pickled weights, attention under its old names, and configurations without what came later."""
    write_repository(tmp_path)
    expected = VQDiffusionImagePipeline.from_diffusers(tmp_path)
    from safetensors.torch import load_file

    for name in ("vqvae", "transformer", "learned_classifier_free_sampling_embeddings"):
        file = tmp_path / name / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        if name == "vqvae":
            old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
            for key in list(weights):
                new = key
                for now, before in old.items():
                    new = new.replace(now, before)
                weights[new] = weights.pop(key)
        torch.save(weights, file.with_suffix(".bin"))
        file.unlink()
    for name, later in (
        ("vqvae", ["mid_block_add_attention", "norm_type"]),
        ("transformer", ["norm_type", "norm_eps"]),
    ):
        file = tmp_path / name / "config.json"
        config = {key: value for key, value in json.loads(file.read_text()).items() if key not in later}
        file.write_text(json.dumps(config))
    found = VQDiffusionImagePipeline.from_diffusers(tmp_path)
    for name in ("vqvae", "transformer"):
        weights = getattr(found, name).state_dict()
        for key, value in getattr(expected, name).state_dict().items():
            assert torch.equal(weights[key], value), key


# --------------------------------------------------------------------------------------------- what has no equivalent


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: convert_transformer(make_transformer(activation_fn="geglu")), "activation_fn='geglu' has no equiv"),
        (lambda: convert_transformer(make_transformer(double_self_attention=True)), "double_self_attention=True"),
        (lambda: convert_transformer(make_transformer(norm_eps=1e-3)), "norm_eps=0.001 has no equivalent"),
        (
            lambda: convert_transformer(make_transformer(cross_attention_dim=None)),
            "with cross_attention_dim, got None",
        ),
    ],
)
def test_what_has_no_equivalent(model, message):
    with pytest.raises(ValueError, match=message):
        model()


def test_folders_that_are_no_such_repository(tmp_path):
    with pytest.raises(ValueError, match=r"model_index.json` does not exist"):
        VQDiffusionImagePipeline.from_diffusers(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "LDMPipeline"}')
    with pytest.raises(ValueError, match="must hold a VQDiffusionPipeline of diffusers, got a LDMPipeline"):
        VQDiffusionImagePipeline.from_diffusers(tmp_path)
