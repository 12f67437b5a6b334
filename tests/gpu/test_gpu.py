"""What only a GPU can show. `make gpu` runs these; with HF_VQ_REHEARSE=1 they run on the CPU, to see that they
would.
"""

import copy
import os

import pytest
import torch

import hf_vq


pytestmark = pytest.mark.gpu
DEVICE = "cpu" if os.environ.get("HF_VQ_REHEARSE") else "cuda"
ON_GPU = DEVICE == "cuda"


@pytest.fixture(autouse=True)
def full_precision():
    """Float32 means float32; the tests that measure TF32 switch it on."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def vqgan(**options):
    config = {"base_channels": 32, "channel_multiplier": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [16]}
    config |= {"latent_channels": 64, "embed_dim": 32, "num_embeddings": 1024, "resolution": 64}
    return hf_vq.VQGANModel(hf_vq.VQGANConfig(**config | options)).eval()


def gpt(**options):
    config = {"codebook_size": 64, "grid_size": 8, "n_embd": 64, "n_layer": 2, "n_head": 2}
    config |= {"condition_type": "class", "condition_vocab_size": 3}
    return hf_vq.VQGPTForCausalLM(hf_vq.VQGPTConfig(**config | options)).eval()


def convolutional(name):
    config = {"codebook_size": 64, "grid_size": 8, "hidden_size": 32}
    return getattr(hf_vq, f"{name}ForCausalLM")(getattr(hf_vq, f"{name}Config")(**config)).eval()


def images(count=8, side=64):
    return torch.rand(count, 3, side, side) * 2 - 1


@torch.no_grad()
def test_tokenizer_agrees_with_the_cpu_and_flips_are_counted(record_property):
    model, pixel_values = vqgan(), images()
    expected = model.encode(pixel_values)
    picture = model.decode_indices(expected.indices).sample
    model.to(DEVICE)
    found = model.encode(pixel_values.to(DEVICE))
    torch.testing.assert_close(found.latents.cpu(), expected.latents, atol=2e-4, rtol=1e-3)
    same = (found.indices.cpu() == expected.indices).double().mean().item()
    assert same >= 0.999
    torch.testing.assert_close(
        model.decode_indices(expected.indices.to(DEVICE)).sample.cpu(), picture, atol=2e-4, rtol=1e-3
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    tf32 = model.encode(pixel_values.to(DEVICE)).indices.cpu()
    with torch.autocast(DEVICE, torch.bfloat16):
        bf16 = model.encode(pixel_values.to(DEVICE)).indices.cpu()
    flips = {
        name: (codes != expected.indices).double().mean().item() for name, codes in (("tf32", tf32), ("bf16", bf16))
    }
    print(
        f"\nindices that differ from the CPU's: float32 {1 - same:.4%}, TF32 {flips['tf32']:.3%}, "
        f"bf16 {flips['bf16']:.3%}"
    )
    assert flips["tf32"] < 0.1 and flips["bf16"] < 0.3


@pytest.mark.parametrize("name", ["VQGPT", "PixelCNN", "PixelSNAIL"])
@torch.no_grad()
def test_priors_agree_with_the_cpu(name):
    model = gpt() if name == "VQGPT" else convolutional(name)
    indices = torch.randint(0, 64, (4, 8, 8))
    condition = torch.tensor([0, 1, 2, 0]) if name == "VQGPT" else None
    expected = model.log_likelihood(indices, condition)
    model.to(DEVICE)
    condition = None if condition is None else condition.to(DEVICE)
    torch.testing.assert_close(
        model.log_likelihood(indices.to(DEVICE), condition).cpu(), expected, atol=2e-2, rtol=1e-4
    )


@torch.no_grad()
def test_caches_give_the_same_codes():
    model = gpt().to(DEVICE)
    prompt = model.prepare_condition(torch.tensor([0, 1, 2], device=DEVICE)).to(DEVICE)
    options = {"do_sample": False, "max_new_tokens": 64}
    expected = model.generate(prompt, use_cache=False, **options)
    for implementation in ("dynamic", "static"):
        assert torch.equal(model.generate(prompt, cache_implementation=implementation, **options), expected)


@torch.no_grad()
def test_denoiser_and_scheduler():
    transformer = hf_vq.VQDiffusionTransformer2DModel(
        num_embeddings=64, sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=16
    ).eval()
    scheduler = hf_vq.MaskReplaceScheduler(num_embeddings=64)
    codes = torch.randint(0, 65, (4, 8, 8))
    timesteps = torch.tensor([3, 20, 60, 99])
    expected = transformer(codes, timesteps).sample
    transformer.to(DEVICE)
    found = transformer(codes.to(DEVICE), timesteps.to(DEVICE)).sample
    torch.testing.assert_close(found.cpu(), expected, atol=2e-4, rtol=1e-3)
    scheduler.set_timesteps(10)
    sample = torch.full((4, 8, 8), scheduler.mask_index, device=DEVICE)
    for timestep in scheduler.timesteps:
        logits = transformer(sample, timestep.to(DEVICE).expand(4)).sample
        sample = scheduler.step(logits, timestep, sample).prev_sample
    assert sample.device.type == DEVICE and int(sample.max()) < 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_training_of_the_tokenizer(dtype):
    small = {} if ON_GPU else {"channel_multiplier": [1, 1], "attn_resolutions": [], "num_embeddings": 64}
    model = vqgan(quantizer="ema", **small).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16 and ON_GPU)
    # half precision is slow on a CPU
    pixel_values, losses = (images(16) if ON_GPU else images(2, 16)).to(DEVICE), []
    for _ in range(8):
        with torch.autocast(DEVICE, dtype):
            loss = model(pixel_values).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < losses[0]
    assert model.quantize.codebook.dtype == torch.float32 and model.quantize.codebook.isfinite().all()


def test_the_codebook_learns_as_on_the_cpu():
    quantizer = hf_vq.EMAVectorQuantizer(num_embeddings=64, embed_dim=8).train()
    other = copy.deepcopy(quantizer).to(DEVICE)
    for _ in range(3):
        latents = torch.randn(8, 8, 16, 16)
        expected, found = quantizer(latents), other(latents.to(DEVICE))
    assert (found.indices.cpu() == expected.indices).double().mean() >= 0.999
    torch.testing.assert_close(other.codebook.cpu(), quantizer.codebook, atol=1e-3, rtol=1e-3)


def test_gradient_checkpointing_changes_no_gradient():
    model = gpt().to(DEVICE).train()
    codes = torch.randint(0, 64, (4, 65), device=DEVICE)
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.manual_seed(1)
        model(codes, labels=codes, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_flash_attention():
    model = gpt().to(DEVICE, torch.bfloat16)
    codes = torch.randint(0, 64, (4, 64), device=DEVICE)
    backend = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = model(codes).logits
    with torch.nn.attention.sdpa_kernel(backend):
        torch.testing.assert_close(model(codes).logits, expected, atol=5e-2, rtol=5e-2)


@pytest.mark.skipif(not ON_GPU, reason="compiling on a CPU is tested elsewhere")
@torch.no_grad()
def test_compiled_encoder():
    model, pixel_values = vqgan().to(DEVICE), images().to(DEVICE)
    expected = model.encode(pixel_values).latents
    model.encoder = torch.compile(model.encoder)
    torch.testing.assert_close(model.encode(pixel_values).latents, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.skipif(not ON_GPU, reason="there is nothing to offload from")
def test_offloading():
    pipeline = hf_vq.VQAutoregressivePipeline(
        vqvae=vqgan(num_embeddings=64, channel_multiplier=[1, 1, 1, 2], attn_resolutions=[]), prior=gpt()
    )
    pipeline.set_progress_bar_config(disable=True)
    options = {"class_labels": [0, 1], "top_k": 1, "output_type": "indices"}
    expected = pipeline.to(DEVICE)(**options).images
    pipeline.to("cpu")
    pipeline.enable_model_cpu_offload()
    assert torch.equal(pipeline(**options).images.cpu(), expected.cpu())
