"""What holds for every pipeline: threads share it, `from_pipe` copies it, callbacks, LoRA, and wrong parts."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from peft import LoraConfig

from hf_vq import MaskReplaceScheduler
from tests.pipelines import (
    autoregressive_parts,
    latent_diffusion_parts,
    vq_diffusion_parts,
    vqvae2_parts,
)


MAKERS = {
    "autoregressive": autoregressive_parts.make_pipeline,
    "vqvae2": vqvae2_parts.make_pipeline,
    "latent_diffusion": lambda: latent_diffusion_parts.make_pipeline("class"),
    "vq_diffusion": lambda: vq_diffusion_parts.make_pipeline("class"),
    "vq_diffusion_text": lambda: vq_diffusion_parts.make_pipeline("text"),
}
DIFFUSION = ("latent_diffusion", "vq_diffusion", "vq_diffusion_text")


@pytest.fixture(params=MAKERS)
def kind(request):
    return request.param


def call(pipeline, kind, seed, **others):
    condition = (
        {"prompt": ["a red cat", "dog", "a blue dog"][seed % 3]} if "text" in kind else {"class_labels": seed % 2}
    )
    steps = {"num_inference_steps": 2 + seed} if kind in DIFFUSION else {"temperature": 1.0 + seed / 4}
    generator = torch.Generator().manual_seed(seed)
    return pipeline(**{**condition, **steps, "generator": generator, "output_type": "pt", **others})


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_threads_share_a_pipeline(kind, guidance_scale):
    pipeline = MAKERS[kind]()
    one_by_one = [call(pipeline, kind, seed, guidance_scale=guidance_scale).images for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(call, pipeline, kind, seed, guidance_scale=guidance_scale) for seed in range(4)]
        together = [job.result().images for job in jobs]
    for alone, found in zip(one_by_one, together, strict=True):
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)
    assert not torch.allclose(one_by_one[0], one_by_one[2])


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler])
def test_threads_share_a_scheduler_with_a_state(scheduler):
    pipeline = latent_diffusion_parts.make_pipeline("class")
    pipeline.scheduler = scheduler(**({"skip_prk_steps": True} if scheduler is PNDMScheduler else {}))
    one_by_one = [call(pipeline, "latent_diffusion", seed).images for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: call(pipeline, "latent_diffusion", seed).images, range(4)))
    assert all(torch.allclose(*pair, rtol=0, atol=1e-6) for pair in zip(one_by_one, together, strict=True))
    assert pipeline.scheduler.num_inference_steps is None


def test_from_pipe(kind):
    pipeline = MAKERS[kind]()
    copy = type(pipeline).from_pipe(pipeline)
    copy.set_progress_bar_config(disable=True)
    for name, part in pipeline.components.items():
        assert getattr(copy, name) is part
    assert torch.equal(call(copy, kind, 1).images, call(pipeline, kind, 1).images)
    half = MAKERS[kind]().to(torch.bfloat16)
    assert type(half).from_pipe(half).dtype == torch.bfloat16


def test_callbacks(kind):
    pipeline, seen = MAKERS[kind](), []
    names = pipeline._callback_tensor_inputs

    def callback(pipe, step, timestep, tensors):
        seen.append((pipe, sorted(tensors)))
        return tensors

    same = call(pipeline, kind, 1, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names).images
    assert torch.equal(same, call(pipeline, kind, 1).images)
    assert seen and all(entry == (pipeline, sorted(names)) for entry in seen)
    call(
        pipeline, kind, 1, callback_on_step_end=lambda *args: seen.append(args), callback_on_step_end_tensor_inputs=[]
    )
    assert seen[-1][3] == {}
    with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs` must be among"):
        call(pipeline, kind, 1, callback_on_step_end_tensor_inputs=["latent_model_input"])


def test_a_callback_changes_the_last_code():
    pipeline = MAKERS["autoregressive"]()

    def callback(pipe, step, position, tensors):
        changed = tensors["indices"].clone()
        changed[:, -1] = 5
        return {"indices": changed} if position == 2 else {}

    found = call(pipeline, "autoregressive", 1, top_k=1, callback_on_step_end=callback).indices
    assert found[0, 0, 2] == 5
    prompt = torch.cat([pipeline.prior.prepare_condition(1), found.flatten(1)[:, :3]], dim=1)
    expected = pipeline.prior.extract_indices(pipeline.prior.generate(prompt, do_sample=False))
    assert torch.equal(found, expected)
    for changed, message in (
        (lambda x: x + 8, "leave all"),
        (lambda x: torch.cat([x[:, :-1], x[:, -1:] + 8], 1), "0 … 7"),
    ):
        back = lambda pipe, i, t, tensors, changed=changed: {"indices": changed(tensors["indices"])} if i else None  # noqa: E731
        with pytest.raises(ValueError, match=message):
            call(pipeline, "autoregressive", 1, callback_on_step_end=back)


def test_latents_as_images(kind):
    pipeline = MAKERS[kind]()
    pictures = call(pipeline, kind, 1).images
    latents = call(pipeline, kind, 1, output_type="latent").images
    with torch.no_grad():
        quantize = {"quantize": False} if kind != "latent_diffusion" else {}
        decoded = pipeline.vqvae.decode(latents, **quantize).sample
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), pictures, rtol=0, atol=1e-5)


def test_numbers_of_numpy_and_torch(kind):
    pipeline = MAKERS[kind]()
    scale = {"guidance_scale": 2.0, "num_images_per_prompt": 2, "decode_batch_size": 3}
    expected = call(pipeline, kind, 1, **scale).images
    for real, integer in ((np.float32, np.int64), (torch.tensor, torch.tensor)):
        arguments = {name: (real if name == "guidance_scale" else integer)(value) for name, value in scale.items()}
        if kind in DIFFUSION:
            arguments["num_inference_steps"] = integer(3)
        if "text" not in kind:
            arguments["class_labels"] = integer(1)
        assert torch.equal(call(pipeline, kind, 1, **arguments).images, expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_scale", float("inf")),
        ("guidance_scale", 1e30),
        ("guidance_scale", float("nan")),
        ("guidance_scale", True),
        ("num_images_per_prompt", 1.5),
        ("num_images_per_prompt", True),
        ("decode_batch_size", 0),
        ("batch_size", 0),
        ("batch_size", -1),
    ],
)
def test_numbers_out_of_range(kind, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        call(MAKERS[kind](), kind, 1, **{name: value})


def test_batch_size():
    for pipeline in (
        autoregressive_parts.make_pipeline("unconditional"),
        vq_diffusion_parts.make_pipeline(),
        latent_diffusion_parts.make_pipeline(),
    ):
        by_batch, by_count = (
            pipeline(**count, generator=torch.Generator().manual_seed(0), output_type="pt").images
            for count in ({"batch_size": 3}, {"num_images_per_prompt": 3})
        )
        assert len(by_batch) == 3 and torch.equal(by_batch, by_count)
    with pytest.raises(ValueError, match="`batch_size` must be the number of inputs, 2, or left out, got 3"):
        MAKERS["vq_diffusion"]()(class_labels=[0, 1], batch_size=3)


def test_parts_of_the_wrong_class_are_refused_when_the_pipeline_is_built(kind):
    pipeline = MAKERS[kind]()
    wrong = {"vqvae": MAKERS["autoregressive"]().prior, "scheduler": MaskReplaceScheduler(16, 10)}
    wrong["scheduler"] = DDIMScheduler() if "vq_diffusion" in kind else wrong["scheduler"]
    for name, part in pipeline.components.items():
        bad = wrong.get(name, pipeline.vqvae)
        if part is None or name == "id2label":
            continue
        with pytest.raises(ValueError, match=f"`{name}` must be .*, got a {type(bad).__name__}"):
            type(pipeline)(**{**pipeline.components, name: bad})


# --------------------------------------------------------------------------------------------- LoRA


def fill(network):
    """Weights that matter, where a new LoRA has zeros."""
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)


def test_lora_of_a_prior(tmp_path):
    pipeline, other = MAKERS["autoregressive"](), MAKERS["autoregressive"]()
    other.prior.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True))
    fill(other.prior)
    other.prior.save_pretrained(tmp_path)
    ids = pipeline.prior.prepare_condition([0, 1])
    plain = pipeline.prior(input_ids=ids).logits
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(pipeline.prior(input_ids=ids).logits, other.prior(input_ids=ids).logits)
    assert not torch.allclose(pipeline.prior(input_ids=ids).logits, plain)
    assert call(pipeline, "autoregressive", 1).images.shape == (1, 3, 8, 8)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(pipeline.prior(input_ids=ids).logits, plain)
    with pytest.raises(ValueError, match="`component` must be one of"):
        MAKERS["vqvae2"]().load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="adapter_config.json"):
        pipeline.load_lora_weights({"a": torch.zeros(1)})


def test_lora_of_a_denoiser(tmp_path):
    pipeline, other = MAKERS["vq_diffusion"](), MAKERS["vq_diffusion"]()
    other.transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"]))
    fill(other.transformer)
    other.transformer.save_lora_adapter(tmp_path)
    plain, expected = call(pipeline, "vq_diffusion", 1).images, call(other, "vq_diffusion", 1).images
    pipeline.load_lora_weights(tmp_path)
    assert torch.equal(call(pipeline, "vq_diffusion", 1).images, expected) and not torch.equal(plain, expected)
    pipeline.unload_lora_weights()
    assert torch.equal(call(pipeline, "vq_diffusion", 1).images, plain)
    with pytest.raises(ValueError, match="must hold LoRA weights of `transformer`"):
        pipeline.load_lora_weights({"unet.mid.to_q.lora_A.weight": torch.zeros(2, 2)})
