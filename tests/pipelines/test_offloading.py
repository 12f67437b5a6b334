"""`enable_model_cpu_offload`: a part is brought to its device by its hook, also where its `forward` is passed by."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from tests.pipelines import autoregressive_parts, latent_diffusion_parts, vq_diffusion_parts
from tests.pipelines.completing import complete


class Recorder(ModelHook):
    def __init__(self, name, seen):
        self.name, self.seen = name, seen

    def pre_forward(self, module, *args, **kwargs):
        self.seen.append(self.name)
        return args, kwargs


def record(pipeline) -> list[str]:
    """A list that fills with the names of the parts that hooks are told of."""
    seen = []
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            add_hook_to_module(part, Recorder(name, seen))
    return seen


def in_order(seen: list[str]) -> str:
    return "->".join(name for name, before in zip(seen, [None, *seen], strict=False) if name != before)


def test_codes():
    pipeline = vq_diffusion_parts.make_pipeline("text")
    seen = record(pipeline)
    pipeline(prompt="cat", num_inference_steps=2)
    assert in_order(seen) == pipeline.model_cpu_offload_seq
    seen.clear()
    pipeline(prompt="cat", image=vq_diffusion_parts.image(), strength=0.1)
    assert in_order(seen) == "vqvae->text_encoder->transformer->vqvae"


def test_latents():
    unet = latent_diffusion_parts.make_text_unet(in_channels=2 * latent_diffusion_parts.D)
    parts = {"unet": unet, "condition_vqvae": latent_diffusion_parts.make_vqvae()}
    pipeline = latent_diffusion_parts.make_pipeline("text", **parts)
    seen = record(pipeline)
    pipeline(prompt="cat", condition_image=latent_diffusion_parts.image(), num_inference_steps=2)
    assert in_order(seen) == pipeline.model_cpu_offload_seq
    pipeline = latent_diffusion_parts.make_pipeline("text")
    seen = record(pipeline)
    pipeline(prompt="cat", image=latent_diffusion_parts.image(), strength=0.5, num_inference_steps=2)
    assert in_order(seen) == "text_encoder->vqvae->unet->vqvae"


def test_sequences():
    pipeline = autoregressive_parts.make_pipeline()
    seen = record(pipeline)
    waiting = []
    for module in pipeline.prior.modules():
        module.register_forward_pre_hook(lambda *_: None if "prior" in seen else waiting.append("prior"))
    pipeline()
    assert not waiting, "a part of the prior computed before the prior was brought to its device"
    assert in_order(seen) == "prior->vqvae" and pipeline.model_cpu_offload_seq.endswith(in_order(seen))
    seen.clear()
    complete(pipeline, image=torch.zeros(1, 3, 8, 8))
    assert in_order(seen) == "vqvae->prior->vqvae"


class OneAtATime(ModelHook):
    """Fails where a part is called by a call that another one has interrupted."""

    def __init__(self, running):
        self.running = running

    def pre_forward(self, module, *args, **kwargs):
        assert len(set(self.running)) < 2, "two calls use the hooks at once"
        return args, kwargs


@pytest.mark.parametrize("parts", [latent_diffusion_parts, vq_diffusion_parts])
def test_threads_take_turns_where_parts_are_moved(parts):
    pipeline, running = parts.make_pipeline(), []
    expected = [pipeline(num_inference_steps=3, generator=parts.seeded(seed)).images[0] for seed in range(4)]
    for part in (pipeline.vqvae, pipeline.denoiser):
        add_hook_to_module(part, OneAtATime(running))

    def call(seed):
        def note(pipe, step, timestep, values):
            running.append(seed)
            if step == 2:
                running[:] = [number for number in running if number != seed]
            return None

        arguments = {"generator": parts.seeded(seed), "callback_on_step_end": note}
        return pipeline(num_inference_steps=3, **arguments).images[0]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, range(4)))
    assert all(one.tobytes() == other.tobytes() for one, other in zip(found, expected, strict=True))
