"""VQGAN and VQ-VAE with every quantizer."""

import json
import math
import re

import pytest
import torch
from diffusers import DDIMScheduler, KandinskyV22Pipeline, LDMPipeline, UNet2DConditionModel, UNet2DModel, VQModel
from PIL import Image
from torch import nn
from transformers import Trainer, TrainingArguments, pipeline

from hf_vq.models.autoencoders.configuration_vqgan import VQGANConfig
from hf_vq.models.autoencoders.configuration_vqvae import VQVAEConfig
from hf_vq.models.autoencoders.image_processing_vq import VQImageProcessor
from hf_vq.models.autoencoders.modeling_vqgan import AttnBlock, NormLayers, ResnetBlock, SpatialNorm, VQGANModel
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


@pytest.mark.parametrize(("data_variance", "reconstruction"), [(None, 0.5625), (0.25, 2.25)])
@torch.no_grad()
def test_forward_losses(data_variance, reconstruction):
    """Worked out by hand for images of 1 decoded to 0.25, and latents of 0 and 3 whose codes are -1 and 5."""
    model = make_case("vqvae", "vq", data_variance=data_variance, commitment_cost=0.5).make()
    latents = torch.zeros(2, 4, 4, 4)
    latents[1] = 3.0
    model.quant_conv.forward = lambda features: latents
    model.decoder.forward = lambda codes: torch.full((2, 3, 8, 8), 0.25)
    model.quantize.embedding.weight.fill_(100.0)
    model.quantize.embedding.weight[5], model.quantize.embedding.weight[9] = -1.0, 5.0
    output = model(torch.ones(2, 3, 8, 8))
    assert output.indices[0].unique().tolist() == [5] and output.indices[1].unique().tolist() == [9]
    expected = {"reconstruction_loss": reconstruction, "codebook_loss": 2.5, "commitment_loss": 2.5}
    expected |= {"quantizer_loss": 3.75, "loss": reconstruction + 3.75, "perplexity": 2.0}
    assert {name: output[name].item() for name in expected} == pytest.approx(expected, rel=1e-6)


def test_training_updates_statistics_once_and_only_in_training():
    model = make_case("vqgan", "ema").make()
    before = model.quantize.embedding.clone()
    model(pixels())
    assert model.quantize.num_updates == -1 and torch.equal(model.quantize.embedding, before)
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


# ------------------------------------------------------------------------------- options of the original
# configurations


def vqgan(**overrides):
    return make_case("vqgan", "vq", **overrides).make()


def test_resampling_without_convolutions_averages_and_repeats():
    model, features = vqgan(resamp_with_conv=False), torch.randn(2, 8, 4, 6)
    assert not [name for name in model.state_dict() if "sample" in name]
    expected = torch.stack([features[:, :, i::2, j::2] for i in range(2) for j in range(2)]).mean(0)
    torch.testing.assert_close(model.encoder.down[0].downsample(features), expected)
    larger = model.decoder.up[1].upsample(features)
    assert larger.shape == (2, 8, 8, 12)
    assert all(torch.equal(larger[:, :, i::2, j::2], features) for i in range(2) for j in range(2))


def test_linear_attention_is_its_definition():
    torch.manual_seed(0)
    block, features = vqgan(attention_type="linear").encoder.mid.attn_1, torch.randn(2, 16, 3, 5)
    weight = block.to_qkv.weight[:, :, 0, 0]
    for image, result in zip(features, block(features), strict=True):
        q, k, v = (weight @ image.flatten(1)).split(16)
        k = k.exp() / k.exp().sum(dim=1, keepdim=True)
        attended = torch.zeros(16, 15)
        for position in range(15):
            for n in range(15):
                attended[:, position] += (k[:, n] @ q[:, position]) * v[:, n]
        torch.testing.assert_close(result, block.to_out(attended.reshape(1, 16, 3, 5))[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_replica_without_parameters_is_called():
    """`DataParallel`, by which `Trainer` takes several GPUs, makes replicas whose weights are plain tensors."""
    model = vqgan()
    replica = model._replicate_for_data_parallel()
    replica.__dict__.update(dict(model.named_children()))
    replica._parameters, replica._modules = {}, {}
    torch.testing.assert_close(replica(pixels()).sample, model(pixels()).sample)


@torch.no_grad()
def test_tanh_out_and_give_pre_end():
    plain, bounded, features = vqgan(), vqgan(tanh_out=True), vqgan(give_pre_end=True)
    assert_equal = torch.testing.assert_close
    expected = plain(pixels()).sample
    assert_equal(bounded(pixels()).sample, expected.tanh())
    output = features(pixels())
    before = output.sample
    assert before.shape == (2, 8, 8, 8)
    assert_equal(plain.decoder.conv_out(nn.functional.silu(plain.decoder.norm_out(before))), expected)
    assert output.loss is None and output.quantizer_loss is not None
    with pytest.raises(ValueError, match=r"`target_pixel_values` .* shape of the reconstruction, \(2, 8, 8, 8\)"):
        features.train()(pixels())


@torch.no_grad()
def test_a_decoder_of_other_widths_and_channels():
    model, depth = vqgan(out_channels=1, decoder_channel_multiplier=(2, 3)), pixels()[:, :1]
    assert model.decoder.conv_in.out_channels == 24 and model.encoder.conv_out.in_channels == 16
    assert model(pixels()).loss is None
    with pytest.raises(ValueError, match=r"`target_pixel_values` .* \(2, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        model(pixels(), target_pixel_values=pixels())
    output = model(pixels(), target_pixel_values=depth)
    assert output.sample.shape == depth.shape
    assert output.reconstruction_loss.item() == pytest.approx((output.sample - depth).square().mean().item(), rel=1e-5)


@torch.no_grad()
def test_a_decoder_of_another_depth(tmp_path):
    own = {"decoder_num_res_blocks": 2, "decoder_attn_resolutions": (8,), "decoder_latent_channels": 5}
    model = vqgan(**own)
    assert [len(level.block) for level in model.encoder.down] == [1, 1]
    assert [len(level.block) for level in model.decoder.up] == [3, 3]
    assert [len(level.attn) for level in model.encoder.down] == [0, 1]
    assert [len(level.attn) for level in model.decoder.up] == [3, 0]
    assert model.quant_conv.in_channels == 6 and model.post_quant_conv.out_channels == 5
    model.save_pretrained(tmp_path)
    assert torch.equal(VQGANModel.from_pretrained(tmp_path)(pixels()).sample, model(pixels()).sample)
    with pytest.raises(ValueError, match="`decoder_num_res_blocks` differs has no equivalent in diffusers"):
        model.to_diffusers(tmp_path)


SPATIAL = {
    "base_channels": 32,
    "norm_num_groups": 32,
    "attn_resolutions": (),
    "decoder_norm": "spatial",
    "latent_channels": 4,
}


@torch.no_grad()
def test_spatial_norms_decode_as_diffusers_do():
    """The decoder of MoVQ, with the same weights in diffusers' own class."""
    model = vqgan(**SPATIAL)
    other = VQModel(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, vq_embed_dim=4, num_vq_embeddings=16, norm_type="spatial",  # noqa: E501
    ).eval()  # fmt: skip
    weights = {}
    for name, value in model.state_dict().items():
        if not name.startswith(("decoder", "post_quant_conv", "quantize")):
            continue
        up = re.match(r"decoder\.up\.(\d)\.(block\.(\d)|upsample)\.(.*)", name)
        if up:
            inner = f"resnets.{up[3]}" if up[3] else "upsamplers.0"
            name = f"decoder.up_blocks.{1 - int(up[1])}.{inner}.{up[4]}"
        name = name.replace("mid.block_1", "mid_block.resnets.0").replace("mid.block_2", "mid_block.resnets.1")
        name = name.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
        if "mid.attn_1" in name:
            name = name.replace("mid.attn_1", "mid_block.attentions.0").replace(".norm.", ".spatial_norm.")
            for own, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
                if f".{own}." in name:
                    name, value = (
                        name.replace(f".{own}.", f".{theirs}."),
                        value.flatten(1) if value.ndim == 4 else value,
                    )
        weights[name] = value
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith(("encoder", "quant_conv")) for name in missing)
    latents = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.decode(latents).sample, other.decode(latents).sample, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_spatial_norm_is_its_equation():
    torch.manual_seed(0)
    norm, features, codes = SpatialNorm(8, 3, 2, add_conv=True), torch.randn(2, 8, 4, 6), torch.randn(2, 3, 2, 3)
    resized = norm.conv(codes.repeat_interleave(2, 2).repeat_interleave(2, 3))
    grouped = features.reshape(2, 2, -1)
    normed = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    expected = normed.reshape(features.shape) * norm.conv_y(resized) + norm.conv_b(resized)
    torch.testing.assert_close(norm(features, codes), expected, atol=1e-5, rtol=1e-4)


def test_spatial_norms_train_under_checkpointing_and_tiling():
    model, images = vqgan(**SPATIAL, spatial_norm_conv=True).train(), pixels()
    model.activation_checkpointing_enable()
    model(images).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval().enable_slicing()
    torch.testing.assert_close(model(images).sample, model.decode(model.encode(images).latents).sample)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("kind", ["vqgan", "vqvae"])
@torch.no_grad()
def test_any_number_of_channels(kind, channels):
    config = make_config(kind, "vq", in_channels=channels)
    model = {"vqgan": VQGANModel, "vqvae": VQVAEModel}[kind](config).eval()
    images = torch.randn(2, channels, 8, 8)
    assert model(images).sample.shape == images.shape


@torch.no_grad()
def test_rectangular_resolutions():
    config = make_config("vqgan", "vq", resolution=(8, 16))
    assert config.resolution == [8, 16] and config.image_size == (8, 16)
    assert VQGANConfig(**json.loads(config.to_json_string())).resolution == [8, 16]
    assert VQGANConfig(resolution=[64, 64]).resolution == 64
    model = VQGANModel(config).eval()
    names = {name for name, module in model.named_modules() if isinstance(module, AttnBlock) and "mid" not in name}
    assert names == {"encoder.down.1.attn.0", "decoder.up.1.attn.0", "decoder.up.1.attn.1"}
    assert model(pixels(1, 8, 16)).indices.shape == (1, 4, 8)
    model.enable_tiling()
    assert model.tile_size == 32


# ------------------------------------------------------------------------------------- what the libraries ask of a
# model


@torch.no_grad()
def test_latents_that_are_not_finite_are_not_counted():
    model, images = make_case("vqgan", "vq").make(), pixels()
    latents = model.encode(images).latents
    indices = model.quantize(latents).indices
    expected = model._perplexity(indices[:, 1:], latents[:, :, 1:])
    latents[:, 2, 0] = float("inf")
    assert model._perplexity(indices, latents) == expected


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"pixel_values": pixels(6)[index]}


def test_trainer_trains_and_evaluates(tmp_path):
    model = make_case("vqvae", "ema").make()
    arguments = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=3, use_cpu=True,
                                  per_device_eval_batch_size=2, report_to=[], save_strategy="no", disable_tqdm=True)  # noqa: E501  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    metrics = trainer.evaluate()
    with torch.no_grad():
        losses = [model.eval()(pixels(6)[start : start + 2]).loss.item() for start in (0, 2, 4)]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)


@torch.no_grad()
def test_the_image_feature_extraction_pipeline_gives_latents():
    model, processor = make_case("vqgan", "vq").make(), VQImageProcessor(size=8)
    image = Image.fromarray((torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy())
    features = pipeline("image-feature-extraction", model=model, image_processor=processor, device="cpu")
    expected = model.encode(processor(image, return_tensors="pt").pixel_values).latents
    torch.testing.assert_close(torch.tensor(features(image)), expected)


@torch.no_grad()
def test_decode_takes_what_pipelines_of_diffusers_give(case):
    model = case.make()
    encoded = model.encode(pixels())
    unquantized = model.decode(encoded.latents, quantize=False).sample
    assert torch.equal(model.decode(encoded.latents, force_not_quantize=True).sample, unquantized)
    if case.config.quantizer != "residual":
        # aMUSEd gives codes and their grid
        shape = (*encoded.indices.shape, model.config.latent_channels)
        sample = model.decode(encoded.indices.flatten(1), force_not_quantize=True, shape=shape).sample
        assert torch.equal(sample, model.decode_indices(encoded.indices).sample)


def test_stock_kandinsky_pipeline_decodes_with_it():
    """It reads `config.block_out_channels`, and decodes with `force_not_quantize=True`."""
    torch.manual_seed(0)
    movq = make_case("vqgan", "vq").make()
    assert movq.config.block_out_channels == (8, 16)
    assert len(make_config("vqvae", "vq").block_out_channels) == 2
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=8, sample_size=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), encoder_hid_dim=8,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), encoder_hid_dim_type="image_proj",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=8, attention_head_dim=4,
        addition_embed_type="image", resnet_time_scale_shift="scale_shift",
    ).eval()  # fmt: skip
    pipe = KandinskyV22Pipeline(unet, DDIMScheduler(num_train_timesteps=10, prediction_type="epsilon"), movq)
    pipe.set_progress_bar_config(disable=True)
    embeds, seen = torch.randn(1, 8), []
    movq.post_quant_conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = pipe(
        embeds, -embeds, height=8, width=8, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images  # fmt: skip
    assert images.shape == (1, 8, 8, 3)
    # latents as they came from the UNet, not the nearest codes
    codes = movq.quantize.embedding.weight
    assert not any((vector == codes).all(dim=1).any() for vector in seen[0].permute(0, 2, 3, 1).reshape(-1, 4))


# ------------------------------------------------------------------------------------------------------------- errors


def test_autocast_takes_any_floating_point_pixels():
    model = make_case("vqgan", "vq").make().eval()
    pixels = torch.rand(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            model.encode(pixels.bfloat16().float()).latents, model.encode(pixels.bfloat16()).latents
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model: model(torch.zeros(2, 1, 8, 8)),
            r"`pixel_values` must have shape \(B, 3, H, W\), got \(2, 1, 8, 8\)",
        ),
        (lambda model: model.encode(torch.zeros(3, 8, 8)), r"`pixel_values` must have shape"),
        (
            lambda model: model.encode(torch.zeros(2, 3, 8, 8, dtype=torch.float64)),
            "`pixel_values` must be torch.float32 as the tokenizer is, got torch.float64",
        ),
        (
            lambda model: model.half()(torch.zeros(2, 3, 8, 8)),
            "`pixel_values` must be torch.float16 as the tokenizer is, got torch.float32",
        ),
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
        ("vqvae", {"quantizer_kwargs": {"embed_dim": 4}}, "must leave 'embed_dim' out, which is given as `embed_dim`"),
        ("vqvae", {"quantizer": "ema", "quantizer_kwargs": {"decay_rate": 0.5}}, "decay_rate"),
        ("vqvae", {"quantizer": "residual", "quantizer_kwargs": {"decay_rate": 0.5}}, "decay_rate"),
        ("vqvae", {"quantizer": "ema", "legacy_beta": True}, "legacy_beta"),
        ("vqvae", {"quantizer": "gumbel", "legacy_beta": True}, "legacy_beta"),
        ("vqvae", {"num_embeddings": 0}, "num_embeddings"),
        ("vqvae", {"commitment_cost": math.nan}, "`commitment_cost` must be .* got nan"),
        ("vqvae", {"data_variance": math.inf}, "`data_variance` must be .* got inf"),
        ("vqvae", {"scaling_factor": 0}, "`scaling_factor` must be .* above 0, got 0"),
        ("vqvae", {"in_channels": 0}, "`in_channels` must be an int of at least 1, got 0"),
        ("vqvae", {"resolution": 30}, r"`resolution` must be a multiple of 4 \(the downsample factor\), got 30"),
        ("vqgan", {"resolution": (256, 250)}, r"`resolution` must be a multiple of 16 .* got \[256, 250\]"),
        ("vqgan", {"resolution": (256, 256, 3)}, "`resolution` must be an int or .height, width., got"),
        ("vqgan", {"resolution": "256"}, "`resolution` must be an int of at least 1, got '256'"),
        ("vqgan", {"attention_type": "none"}, "`attention_type` must be 'vanilla' or 'linear', got 'none'"),
        ("vqgan", {"decoder_norm": "layer"}, "`decoder_norm` must be 'group' or 'spatial', got 'layer'"),
        ("vqgan", {"decoder_channel_multiplier": (1, 2)}, "must be as many numbers"),
        ("vqgan", {"decoder_num_res_blocks": 0}, "`decoder_num_res_blocks` must be an int of at least 1, got 0"),
        ("vqgan", {"num_res_blocks": 0}, "`num_res_blocks` must be an int of at least 1, got 0"),
        ("vqgan", {"dropout": math.nan}, "`dropout` must be .* got nan"),
        ("vqgan", {"quantizer": "ema", "quantizer_kwargs": {"decay": math.nan}}, "`decay` must be .* got nan"),
        ("vqgan", {"quantizer": "residual", "remapped_from": 2048}, "`remapped_from` must be None"),
        ("vqgan", {"remapped_from": 512}, "`remapped_from` must be an int of at least 1024, got 512"),
        ("vqvae", {"embed_dim": 0}, "embed_dim"),
    ],
)
def test_wrong_configurations_are_refused(kind, overrides, message):
    with pytest.raises(ValueError, match=message):
        config_class, model_class = {"vqgan": (VQGANConfig, VQGANModel), "vqvae": (VQVAEConfig, VQVAEModel)}[kind]
        model_class(config_class(**overrides))


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("pixel_values", lambda model, pixels: model.encode((pixels * 100).to(torch.uint8))),
        ("pixel_values", lambda model, pixels: model(pixels.numpy())),
        ("pixel_values", lambda model, pixels: model(pixels[:, :, :0])),
        ("indices", lambda model, pixels: model.decode_indices([[0]])),
        ("latents", lambda model, pixels: model.decode(torch.zeros(1, 4, 4, 4, dtype=torch.long))),
        ("latents", lambda model, pixels: model.decode(None)),
        ("tile_size", lambda model, pixels: model.enable_tiling(16.0)),
        ("overlap", lambda model, pixels: model.enable_tiling(16, "4")),
        ("step", lambda model, pixels: model.set_training_step(-1, 10)),
        ("total_steps", lambda model, pixels: model.set_training_step(0, float("nan"))),
    ],
)
def test_arguments_of_another_kind_are_named(name, use):
    model = VQGANModel(
        VQGANConfig(
            base_channels=32, channel_multiplier=(1, 1), num_res_blocks=1, attn_resolutions=(), embed_dim=4,
            latent_channels=4, num_embeddings=8, resolution=8,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"`{name}` must"):
        use(model.eval(), torch.rand(1, 3, 8, 8) * 2 - 1)
