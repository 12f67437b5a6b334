"""VQGAN and VQ-VAE with every quantizer."""

import math
import re

import pytest
import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel
from torch import nn

from hf_vq.models.autoencoders.configuration_vqgan import VQGANConfig
from hf_vq.models.autoencoders.configuration_vqvae import VQVAEConfig
from hf_vq.models.autoencoders.modeling_vqgan import AttnBlock, NormLayers, ResnetBlock, VQGANModel
from hf_vq.models.autoencoders.modeling_vqvae import VQVAEModel, VQVAEResidualBlock
from tests.models.model_testing import ModelCase, ModelTests


SIZES = {"embed_dim": 4, "num_embeddings": 16, "resolution": 8}
VQGAN = {
    "base_channels": 8,
    "channel_multiplier": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (4,),
    "latent_channels": 6,
    "norm_num_groups": 4,
}
VQVAE = {"hidden_size": 8, "residual_hidden_size": 4, "num_residual_layers": 2, "downsample_factor": 2}
QUANTIZERS = {
    "vq": {},
    "vq-legacy-rotation": {"legacy_beta": True, "quantizer_kwargs": {"gradient_estimator": "rotation"}},
    "ema": {},
    "ema-smoothed": {"quantizer_kwargs": {"zero_debias": False, "count_smoothing": "laplace"}},
    "gumbel": {},
    "gumbel-soft": {"quantizer_kwargs": {"hard": False}},
    "cosine": {},
    "fsq": {"num_embeddings": 36, "quantizer_kwargs": {"levels": [3, 2, 3, 2]}},
    "cosine-entropy": {"quantizer_kwargs": {"entropy_weight": 0.1}},
    "simvq": {},
    "ibq": {"quantizer_kwargs": {"entropy_weight": 0.1}},
    "lfq": {},
    "bsq": {},
    "vq-remapped": {"remapped_from": 16, "unknown_code": "error"},
    "residual": {"quantizer_kwargs": {"depth": 2}},
    "residual-vq": {"quantizer_kwargs": {"depth": 3, "base": "vq"}},
}


def pixels(batch_size=2, height=8, width=8):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(batch_size, 3, height, width, generator=generator) * 2 - 1


def make_config(kind, quantizer, **overrides):
    config_class, sizes = {"vqgan": (VQGANConfig, VQGAN), "vqvae": (VQVAEConfig, VQVAE)}[kind]
    return config_class(
        **{**SIZES, **sizes, "quantizer": quantizer.split("-")[0], **QUANTIZERS[quantizer], **overrides}
    )


class TokenizerCase(ModelCase):
    """The latents of a new tokenizer hardly vary: here they get mean 0 and variance 1, so that codes differ."""

    @torch.no_grad()
    def make(self):
        model = super().make()
        std, mean = torch.std_mean(model.encode(pixels(4)).latents, dim=(0, 2, 3))
        model.quant_conv.weight.div_(std.view(-1, 1, 1, 1))
        model.quant_conv.bias.sub_(mean).div_(std)
        return model


def make_case(kind, quantizer, **overrides):
    pinned = re.compile(r"quantize\.(layers\.\d\.|quantizer\.)?(embed|cluster_size|proj)")
    return TokenizerCase(
        model_class={"vqgan": VQGANModel, "vqvae": VQVAEModel}[kind],
        config=make_config(kind, quantizer, **overrides),
        inputs=lambda: {"pixel_values": pixels()},
        stays_float32=lambda name: pinned.match(name) is not None,
        # adding a constant to all keys does not change the attention
        without_gradient=lambda name: name.endswith(".k.bias"),
        checkpointed={"vqgan": (ResnetBlock, AttnBlock), "vqvae": (VQVAEResidualBlock,)}[kind],
    )


CASES = [("vqgan", quantizer) for quantizer in QUANTIZERS] + [("vqvae", "vq"), ("vqvae", "ema"), ("vqvae", "gumbel")]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request):
    return make_case(*request.param)


class TestTokenizers(ModelTests):
    pass


# ----------------------------------------------------------------------------------------- encode, decode and forward


@torch.no_grad()
def test_encode_decode_and_forward_agree(case):
    model, config = case.make(), case.config
    images = pixels(3, 8, 16)
    encoded = model.encode(images)
    grid = (8 // config.downsample_factor, 16 // config.downsample_factor)
    depth = (config.quantizer_kwargs["depth"],) if config.quantizer == "residual" else ()
    assert encoded.latents.shape == encoded.quantized.shape == (3, config.embed_dim, *grid)
    assert encoded.indices.dtype == torch.int64
    assert encoded.indices.shape == (3, *grid, *depth)
    assert 0 <= encoded.indices.min() and encoded.indices.max() < config.num_embeddings
    assert len(encoded.indices.unique()) > 1

    assert torch.equal(model.quantize.indices_to_latents(encoded.indices), encoded.quantized)
    sample = model.decode_indices(encoded.indices).sample
    assert sample.shape == images.shape
    assert torch.equal(sample, model.decode(encoded.latents).sample)
    assert torch.equal(sample, model.decode(encoded.quantized, quantize=False).sample)
    assert not torch.equal(sample, model.decode(encoded.latents, quantize=False).sample)

    output = model(images)
    assert torch.equal(output.sample, sample)
    assert torch.equal(output.latents, encoded.latents)
    assert torch.equal(output.indices, encoded.indices)


@torch.no_grad()
def test_tuples_hold_the_same(case):
    model, images = case.make(), pixels()
    encoded, output = model.encode(images), model(images)
    latents, quantized, indices = model.encode(images, return_dict=False)
    assert torch.equal(latents, encoded.latents) and torch.equal(quantized, encoded.quantized)
    assert torch.equal(indices, encoded.indices)
    assert torch.equal(model.decode(latents, return_dict=False)[0], output.sample)
    assert torch.equal(model.decode_indices(indices, return_dict=False)[0], output.sample)
    for value, expected in zip(model(images, return_dict=False), output.to_tuple(), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("data_variance", [None, 0.25])
@torch.no_grad()
def test_forward_losses(data_variance):
    model = make_case("vqvae", "vq", data_variance=data_variance, commitment_cost=0.5).make()
    images = pixels(4)
    output = model(images)
    squared_error = (output.sample - images).square().sum().item() / images.numel()
    assert output.reconstruction_loss.item() == pytest.approx(squared_error / (data_variance or 1), rel=1e-5)
    codes = model.quantize.embedding.weight[output.indices].permute(0, 3, 1, 2)
    distance = (codes - output.latents).square().mean().item()
    assert output.codebook_loss.item() == pytest.approx(distance, rel=1e-5)
    assert output.commitment_loss.item() == pytest.approx(distance, rel=1e-5)
    assert output.quantizer_loss.item() == pytest.approx(1.5 * distance, rel=1e-5)
    assert output.loss.item() == pytest.approx((output.reconstruction_loss + output.quantizer_loss).item(), rel=1e-6)
    frequencies = [(output.indices == code).double().mean().item() for code in range(16)]
    entropy = -sum(p * math.log(p) for p in frequencies if p)
    assert output.perplexity.item() == pytest.approx(math.exp(entropy), rel=1e-5)


def test_training_updates_statistics_once_and_only_in_training():
    model = make_case("vqgan", "ema").make()
    before = model.quantize.embedding.clone()
    model(pixels())
    assert model.quantize.num_updates == 0 and torch.equal(model.quantize.embedding, before)
    model.train()
    model(pixels())
    assert model.quantize.num_updates == 1 and not torch.equal(model.quantize.embedding, before)
    model.eval()
    model.decode(model.encode(pixels()).latents)
    assert model.quantize.num_updates == 1


def test_gradient_of_the_reconstruction_passes_the_quantizer():
    """With the straight-through estimator, latents get exactly the gradient of the quantized vectors."""
    model = make_case("vqgan", "vq").make()
    latents = model.encode(pixels()).latents.detach()
    quantized = model.quantize(latents).quantized.detach().requires_grad_()
    model.decode(quantized, quantize=False).sample.square().sum().backward()
    latents.requires_grad_()
    model.decode(latents).sample.square().sum().backward()
    torch.testing.assert_close(latents.grad, quantized.grad, atol=0, rtol=0)


def test_half_precision_indices_are_those_of_float32_latents(tmp_path):
    """The codebook of a bfloat16 model is not rounded, and distances are in float32."""
    model = make_case("vqgan", "vq", num_embeddings=512).make()
    model.save_pretrained(tmp_path)
    model = VQGANModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        encoded = model.encode(pixels(8).bfloat16())
        vectors = encoded.latents.double().permute(0, 2, 3, 1).reshape(-1, 4)
        distances = torch.cdist(vectors, model.quantize.embedding.weight.double())
        sample = model.decode_indices(encoded.indices).sample
    assert encoded.latents.dtype == encoded.quantized.dtype == sample.dtype == torch.bfloat16
    assert torch.equal(distances.argmin(1), encoded.indices.flatten())


def test_autocast_trains():
    model = make_case("vqgan", "ema").make().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pixels())
    assert output.sample.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    output.loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert model.quantize.embedding.dtype == torch.float32


# ------------------------------------------------------------------------------------------------ parts and structure


def test_weights_start_as_torch_draws_them():
    """transformers' own default would draw every convolution from N(0, 0.02²)."""
    model = make_case("vqgan", "vq", num_embeddings=512).make()
    conv = model.decoder.conv_in
    bound = 1 / math.sqrt(conv.in_channels * 9)
    for tensor in (conv.weight, conv.bias):
        assert tensor.abs().max() <= bound
    assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert torch.equal(model.encoder.norm_out.weight, torch.ones(16))
    assert not model.encoder.norm_out.bias.any()
    codebook = model.quantize.embedding.weight
    assert 0.95 / 512 < codebook.abs().max() <= 1 / 512


def test_a_codebook_of_another_size_is_initialised_whole(tmp_path, load_reports):
    """The averages of an EMA codebook start at its vectors, where a caller lets shapes differ."""
    make_case("vqvae", "ema").make().save_pretrained(tmp_path)
    loaded = VQVAEModel.from_pretrained(tmp_path, num_embeddings=32, ignore_mismatched_sizes=True)
    assert len(load_reports.messages) == 1
    load_reports.messages.clear()
    assert torch.equal(loaded.quantize.embed_avg, loaded.quantize.embedding)
    assert torch.equal(loaded.quantize.cluster_size, torch.ones(32))
    assert 0.5 < loaded.quantize.embedding.std() < 1.5


@pytest.mark.parametrize(("kind", "last"), [("vqgan", "decoder.conv_out"), ("vqvae", "decoder.up.0")])
def test_last_layer(kind, last):
    model = make_case(kind, "vq").make()
    assert model.get_last_layer() is model.get_submodule(last).weight
    assert isinstance(model.get_last_layer(), nn.Parameter)


def test_config_names():
    config = VQGANConfig(codebook_size=512, channel_multiplier=(1, 1, 2, 4))
    assert config.num_embeddings == config.codebook_size == 512
    assert config.downsample_factor == 8
    assert VQVAEConfig(downsample_factor=8).downsample_factor == 8


@pytest.mark.parametrize("factor", [2, 4, 8])
@torch.no_grad()
def test_vqvae_downsample_factors(factor):
    model = make_case("vqvae", "vq", downsample_factor=factor).make()
    output = model(pixels(1, 16, 32))
    assert output.indices.shape == (1, 16 // factor, 32 // factor)
    assert output.sample.shape == (1, 3, 16, 32)
    widths = [conv.out_channels for conv in model.encoder.down]
    assert widths == {2: [8], 4: [4, 8], 8: [4, 8, 8]}[factor]
    assert [conv.in_channels for conv in model.decoder.up] == widths[::-1]


def test_attention_is_where_the_config_says():
    model = make_case("vqgan", "vq", attn_resolutions=(8,), mid_attention=False).make()
    names = {name for name, module in model.named_modules() if isinstance(module, AttnBlock)}
    assert names == {"encoder.down.0.attn.0", "decoder.up.0.attn.0", "decoder.up.0.attn.1"}


def test_attention_is_softmax_attention():
    torch.manual_seed(0)
    norms = NormLayers(VQGANConfig(**VQGAN, resolution=8))
    block, features = AttnBlock(8, norms), torch.randn(2, 8, 3, 5)
    normed = block.norm(features)
    expected = torch.empty_like(features)
    for b in range(2):
        q, k, v = (conv(normed)[b].reshape(8, 15) for conv in (block.q, block.k, block.v))
        weights = ((q.T @ k) / math.sqrt(8)).softmax(dim=1)
        expected[b] = (v @ weights.T).reshape(8, 3, 5)
    torch.testing.assert_close(block(features), features + block.proj_out(expected))


def test_stock_latent_diffusion_pipeline_decodes_with_it():
    """`scaling_factor` and `sample` are the names that diffusers' own pipeline reads."""
    torch.manual_seed(0)
    vqvae = make_case("vqgan", "vq", scaling_factor=2.0).make()
    unet = UNet2DModel(4, 4, 4, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2, layers_per_block=1)  # fmt: skip
    pipeline = LDMPipeline(vqvae, unet.eval(), DDIMScheduler(num_train_timesteps=10))
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    vqvae.post_quant_conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = pipeline(2, generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    codes = vqvae.quantize.embedding.weight
    vectors = seen[0].permute(0, 2, 3, 1).reshape(-1, 4)
    assert all((vector == codes).all(dim=1).any() for vector in vectors)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model: model(torch.zeros(2, 1, 8, 8)),
            r"`pixel_values` must have shape \(B, 3, H, W\), got \(2, 1, 8, 8\)",
        ),
        (lambda model: model.encode(torch.zeros(3, 8, 8)), r"`pixel_values` must have shape"),
        (lambda model: model(torch.zeros(2, 3, 8, 9)), r"multiples of 2 .* got 8x9"),
        (lambda model: model.decode(torch.zeros(2, 3, 4, 4)), r"`latents` must have shape \(B, 4, h, w\)"),
        (lambda model: model.decode_indices(torch.zeros(2, 16, dtype=torch.int64)), r"`indices` must have shape"),
        (lambda model: model.decode_indices(torch.full((1, 4, 4), 16)), r"`indices` must lie in \[0, 16\)"),
        (lambda model: model.decode_indices(torch.full((1, 4, 4), -1)), r"`indices` must lie in \[0, 16\)"),
        (lambda model: model.decode_indices(torch.zeros(1, 4, 4)), r"`indices` must be an integer tensor"),
    ],
)
def test_wrong_inputs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_case("vqgan", "vq").make())


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("vqgan", {"norm_num_groups": 3}, "norm_num_groups"),
        ("vqgan", {"channel_multiplier": ()}, "channel_multiplier"),
        ("vqvae", {"downsample_factor": 3}, "downsample_factor"),
        ("vqvae", {"downsample_factor": 1}, "downsample_factor"),
        ("vqvae", {"hidden_size": 1}, "`hidden_size` must be an int of at least 2, got 1"),
        ("vqvae", {"commitment_cost": -1.0}, "commitment_cost"),
        ("vqvae", {"data_variance": 0.0}, "data_variance"),
        ("vqvae", {"quantizer": "vqq"}, "`quantizer` must be one of"),
        ("vqvae", {"quantizer_kwargs": {"decay_rate": 0.5}}, "decay_rate"),
        ("vqvae", {"quantizer": "ema", "quantizer_kwargs": {"decay_rate": 0.5}}, "decay_rate"),
        ("vqvae", {"quantizer": "residual", "quantizer_kwargs": {"decay_rate": 0.5}}, "decay_rate"),
        ("vqvae", {"quantizer": "ema", "legacy_beta": True}, "legacy_beta"),
        ("vqvae", {"quantizer": "gumbel", "legacy_beta": True}, "legacy_beta"),
        ("vqvae", {"num_embeddings": 0}, "num_embeddings"),
        ("vqvae", {"embed_dim": 0}, "embed_dim"),
    ],
)
def test_wrong_configurations_are_refused(kind, overrides, message):
    with pytest.raises(ValueError, match=message):
        config_class, model_class = {"vqgan": (VQGANConfig, VQGANModel), "vqvae": (VQVAEConfig, VQVAEModel)}[kind]
        model_class(config_class(**overrides))
