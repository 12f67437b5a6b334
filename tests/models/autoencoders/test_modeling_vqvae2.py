"""The hierarchical tokenizer: what every model passes, and how its levels depend on each other."""

import re

import pytest
import torch
import torch.nn.functional as F

from hf_vq.models.autoencoders.configuration_vqvae2 import VQVAE2Config
from hf_vq.models.autoencoders.modeling_vqvae import VQVAEResidualBlock
from hf_vq.models.autoencoders.modeling_vqvae2 import VQVAE2Model
from tests.models.model_testing import ModelCase, ModelTests


SIZES = {
    "hidden_size": 8,
    "residual_hidden_size": 4,
    "num_residual_layers": 1,
    "downsample_factor": 4,
    "embed_dim": 4,
    "num_embeddings": 16,
    "resolution": 16,
}
CASES = {
    "ema": {},
    "ema-3-levels": {"num_levels": 3, "downsample_factor": 8},
    "vq-f8": {"quantizer": "vq", "downsample_factor": 8},
    "gumbel": {"quantizer": "gumbel"},
    "cosine": {"quantizer": "cosine"},
    "fsq": {"quantizer": "fsq", "num_embeddings": 36, "quantizer_kwargs": {"levels": [3, 2, 3, 2]}},
    "lfq": {"quantizer": "lfq"},
    "level-dropout": {"num_levels": 3, "downsample_factor": 8, "level_dropout": 0.5},
    "residual": {"quantizer": "residual", "quantizer_kwargs": {"depth": 2}},
}


def pixels(batch_size=2, height=16, width=16):
    return torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


class HierarchyCase(ModelCase):
    """The latents of a new tokenizer hardly vary: here they get mean 0 and variance 1, level by level."""

    @torch.no_grad()
    def make(self):
        model = super().make()
        for level, conv in enumerate(model.quant_conv):
            std, mean = torch.std_mean(model.encode(pixels(4)).latents[level], dim=(0, 2, 3))
            conv.weight.div_(std.view(-1, 1, 1, 1))
            conv.bias.sub_(mean).div_(std)
        return model


def make_case(name="ema", **overrides):
    pinned = re.compile(r"quantize\.\d\.(layers\.\d\.)?(embed|cluster_size|proj)")
    return HierarchyCase(
        model_class=VQVAE2Model,
        config=VQVAE2Config(**{**SIZES, **CASES[name], **overrides}),
        inputs=lambda: {"pixel_values": pixels()},
        stays_float32=lambda tensor: pinned.match(tensor) is not None,
        checkpointed=(VQVAEResidualBlock,),
    )


@pytest.fixture(params=CASES)
def case(request):
    return make_case(request.param)


class TestVQVAE2(ModelTests):
    pass


# ----------------------------------------------------------------------------------------- encode, decode and forward


@torch.no_grad()
def test_encode_decode_and_forward_agree(case):
    model, config = case.make(), case.config
    images = pixels(3, 16, 32)
    encoded = model.encode(images)
    depth = (config.quantizer_kwargs["depth"],) if config.quantizer == "residual" else ()
    assert len(encoded.latents) == len(encoded.quantized) == len(encoded.indices) == config.num_levels
    for level, factor in enumerate(config.downsample_factors):
        assert factor * 2**level == config.downsample_factor
        grid = (16 // factor, 32 // factor)
        indices, quantized = encoded.indices[level], encoded.quantized[level]
        assert encoded.latents[level].shape == quantized.shape == (3, config.embed_dim, *grid)
        assert indices.dtype == torch.int64 and indices.shape == (3, *grid, *depth)
        assert 0 <= indices.min() and indices.max() < config.num_embeddings and len(indices.unique()) > 1
        assert torch.equal(model.quantize[level].indices_to_latents(indices), quantized)

    sample = model.decode_indices(encoded.indices).sample
    assert sample.shape == images.shape
    assert torch.equal(sample, model.decode(encoded.latents).sample)
    assert torch.equal(sample, model.decode(encoded.quantized, quantize=False).sample)
    assert not torch.equal(sample, model.decode(encoded.latents, quantize=False).sample)
    assert torch.equal(sample, model.decode_indices(encoded.indices, return_dict=False)[0])

    output = model(images)
    assert torch.equal(output.sample, sample)
    assert all(map(torch.equal, output.latents, encoded.latents))
    assert all(map(torch.equal, output.indices, encoded.indices))


@torch.no_grad()
def test_two_levels_as_in_the_paper():
    """The computation written out with the model's weights: figure 2a of the paper."""
    model = make_case("vq-f8").make()

    def residual(stack, x):
        (block,) = stack.layers
        x = x + F.conv2d(
            F.conv2d(x.relu(), block.conv1.weight, block.conv1.bias, padding=1).relu(),
            block.conv2.weight,
            block.conv2.bias,
        )
        return x.relu()

    def down(encoder, x):
        for conv in encoder.down:
            x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1).relu()
        return residual(encoder.residual_stack, F.conv2d(x, encoder.conv_out.weight, encoder.conv_out.bias, padding=1))

    def up(decoder, x):
        x = residual(decoder.residual_stack, F.conv2d(x, decoder.conv_in.weight, decoder.conv_in.bias, padding=1))
        for i, conv in enumerate(decoder.up):
            x = F.conv_transpose2d(x if i == 0 else x.relu(), conv.weight, conv.bias, stride=2, padding=1)
        return x

    def nearest(level, z):
        codes = model.quantize[level].embedding.weight
        return codes[torch.cdist(z.movedim(1, -1).flatten(0, 2), codes).argmin(1)].view(*z.shape[:1], *z.shape[2:], -1)

    image = pixels()
    bottom = down(model.encoder[1], image)  # f4
    top = down(model.encoder[0], bottom)  # f8
    quantized_top = nearest(0, model.quant_conv[0](top)).movedim(-1, 1)
    conditioned = torch.cat([up(model.conditioner[0], quantized_top), bottom], dim=1)
    quantized_bottom = nearest(1, model.quant_conv[1](conditioned)).movedim(-1, 1)
    wide = F.conv_transpose2d(quantized_top, model.upsample[0].weight, model.upsample[0].bias, stride=2, padding=1)
    sample = up(model.decoder, torch.cat([wide, quantized_bottom], dim=1))

    encoded = model.encode(image)
    torch.testing.assert_close(encoded.quantized, (quantized_top, quantized_bottom))
    torch.testing.assert_close(model(image).sample, sample)


@pytest.mark.parametrize("name", ["ema", "ema-3-levels"])
def test_every_level_conditions_those_below_and_reaches_the_image(name):
    case = make_case(name)
    model = case.make()
    encoded = model.encode(pixels())
    codes = [level.detach().requires_grad_() for level in encoded.quantized]
    model.decode(codes, quantize=False).sample.square().sum().backward()
    assert all(level.grad.any() for level in codes)
    for changed in range(case.config.num_levels):
        other = case.make()
        other.quantize[changed].embedding.copy_(torch.randn(16, 4, generator=torch.Generator().manual_seed(5)))
        latents = other.encode(pixels()).latents
        for level in range(case.config.num_levels):
            assert torch.equal(latents[level], encoded.latents[level]) == (level <= changed)


@pytest.mark.parametrize(("data_variance", "reconstruction"), [(None, 0.5625), (0.25, 2.25)])
@torch.no_grad()
def test_forward_losses(data_variance, reconstruction):
    """Worked out by hand for images of 1 decoded to 0.25; latents of 0 have the code -1, those of 3 the code 5."""
    model = make_case("vq-f8", data_variance=data_variance, commitment_cost=0.5).make()
    model.quant_conv[0].forward = lambda features: torch.zeros(2, 4, *features.shape[2:])
    model.quant_conv[1].forward = lambda features: (
        torch.tensor([0.0, 3.0]).view(2, 1, 1, 1).expand(2, 4, *features.shape[2:])
    )
    model.decoder.forward = lambda codes: torch.full((2, 3, 16, 16), 0.25)
    for quantizer in model.quantize:
        quantizer.embedding.weight.fill_(100.0)
        quantizer.embedding.weight[5], quantizer.embedding.weight[9] = -1.0, 5.0
    output = model(torch.ones(2, 3, 16, 16))
    assert output.indices[0].unique().tolist() == [5]
    assert [output.indices[1][row].unique().tolist() for row in (0, 1)] == [[5], [9]]
    expected = {"reconstruction_loss": reconstruction, "codebook_loss": 3.5, "commitment_loss": 3.5}  # 1 + (1 + 4) / 2
    expected |= {"quantizer_loss": 5.25, "loss": reconstruction + 5.25}
    assert {name: output[name].item() for name in expected} == pytest.approx(expected, rel=1e-6)
    assert [value.item() for value in output.perplexity] == pytest.approx([1.0, 2.0], rel=1e-6)


@torch.no_grad()
def test_fewer_levels_are_decoded_with_zeros_for_the_others():
    model = make_case("ema-3-levels").make()
    top, middle, bottom = model.encode(pixels()).quantized
    for parts, full in (
        ((top,), (top, torch.zeros_like(middle), torch.zeros_like(bottom))),
        ((top, middle), (top, middle, torch.zeros_like(bottom))),
    ):
        sample = model.decode(parts, quantize=False).sample
        torch.testing.assert_close(sample, model.decode(full, quantize=False).sample)
        indices = [quantizer(codes).indices for quantizer, codes in zip(model.quantize, parts, strict=False)]
        assert torch.equal(model.decode_indices(indices).sample, sample)


@torch.no_grad()
def test_level_dropout_leaves_each_image_one_to_all_of_its_levels():
    model = make_case("level-dropout", level_dropout=0.6).make().train()
    images = pixels(1).expand(400, -1, -1, -1)
    levels = [level[:1] for level in model.eval().encode(images).quantized]
    parts = [model.decode(levels[:count], quantize=False).sample for count in (1, 2, 3)]
    model.train()
    sample = model.decode([level.expand(400, -1, -1, -1) for level in levels], quantize=False).sample
    distances = torch.stack([(sample - part).abs().amax(dim=(1, 2, 3)) for part in parts])
    assert distances.min(dim=0).values.max() < 1e-5
    counts = torch.bincount(distances.argmin(0), minlength=3) / 400
    # 400 draws: a standard deviation of at most 0.025
    torch.testing.assert_close(counts, torch.tensor([0.3, 0.3, 0.4]), atol=0.08, rtol=0)


def test_training_updates_each_codebook_once_and_only_in_training():
    model = make_case("ema-3-levels").make()
    before = [level.embedding.clone() for level in model.quantize]
    model(pixels())
    assert [int(level.num_updates) for level in model.quantize] == [-1, -1, -1]
    model.train()
    model(pixels())
    assert [int(level.num_updates) for level in model.quantize] == [1, 1, 1]
    assert not any(torch.equal(level.embedding, old) for level, old in zip(model.quantize, before, strict=True))


def test_half_precision_keeps_the_choice_of_codes_in_float32():
    model = make_case().make().to(torch.bfloat16)
    for level in model.quantize:
        level.float()
    with torch.no_grad():
        encoded = model.encode(pixels().bfloat16())
        sample = model.decode_indices(encoded.indices).sample
    assert sample.dtype == torch.bfloat16
    for level in range(2):
        assert encoded.latents[level].dtype == encoded.quantized[level].dtype == torch.bfloat16
        vectors = encoded.latents[level].double().permute(0, 2, 3, 1).reshape(-1, 4)
        distances = torch.cdist(vectors, model.quantize[level].embedding.double())
        assert torch.equal(distances.argmin(1), encoded.indices[level].flatten())


def test_autocast_trains():
    model = make_case("level-dropout").make().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pixels())
    assert output.sample.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    output.loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------- tiles and
# slices


@torch.no_grad()
def test_tiles_are_close_to_the_whole_and_no_larger_than_asked():
    torch.manual_seed(0)
    config = VQVAE2Config(hidden_size=16, residual_hidden_size=8, embed_dim=4, num_embeddings=32, resolution=32)
    model = VQVAE2Model(config).eval()
    images = torch.rand(2, 3, 160, 96) * 2 - 1
    whole = model.encode(images)
    decoded = model.decode_indices(whole.indices).sample
    seen = {}
    for name in ("encoder.0", "encoder.1", "conditioner.0", "decoder"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, set()).add(tuple(args[0].shape[2:]))
        )
    model.enable_tiling(tile_size=64, overlap=32)
    tiled = model.encode(images)
    tiled_image = model.decode_indices(whole.indices).sample
    # in pixels, features and codes: f1, f4, f8, f4
    assert seen == {
        "encoder.1": {(64, 64)},
        "encoder.0": {(16, 16)},
        "conditioner.0": {(8, 8)},
        "decoder": {(16, 16)},
    }
    for level in range(2):
        assert (tiled.indices[level] == whole.indices[level]).float().mean() > 0.97
    error = (tiled_image - decoded).abs().max()
    assert 0 < error < 0.1 * decoded.std()
    model.disable_tiling()
    assert torch.equal(model.decode_indices(whole.indices).sample, decoded)


@torch.no_grad()
def test_slices_are_equal():
    model, images = make_case("ema-3-levels").make(), pixels(3)
    whole = model.encode(images)
    decoded = model.decode_indices(whole.indices).sample
    sizes = set()
    model.decoder.register_forward_pre_hook(lambda module, args: sizes.add(len(args[0])))
    model.enable_slicing()
    assert all(map(torch.equal, model.encode(images).indices, whole.indices))
    torch.testing.assert_close(model.decode_indices(whole.indices).sample, decoded)
    assert sizes == {1}


# --------------------------------------------------------------------------------------------------- structure and
# errors


def test_sizes():
    config = VQVAE2Config()
    assert (config.hidden_size, config.residual_hidden_size, config.num_residual_layers) == (128, 64, 2)
    assert (config.num_embeddings, config.codebook_size, config.embed_dim, config.quantizer) == (512, 512, 64, "ema")
    assert [256 // factor for factor in config.downsample_factors] == [32, 64]
    large = VQVAE2Config(num_levels=3, downsample_factor=32, resolution=1024)
    assert [1024 // factor for factor in large.downsample_factors] == [32, 64, 128]
    model = make_case("ema-3-levels").make()
    assert [conv.in_channels for conv in model.quant_conv] == [8, 12, 12]
    assert [decoder.conv_in.in_channels for decoder in (*model.conditioner, model.decoder)] == [4, 8, 12]
    assert model.get_last_layer() is model.decoder.up[-1].weight


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_widths_of_the_bottom_level(factor):
    model = make_case(downsample_factor=2 * factor).make()
    assert [conv.out_channels for conv in model.encoder[1].down] == {2: [4], 4: [4, 8], 8: [4, 8, 8]}[factor]
    assert [conv.out_channels for conv in model.encoder[0].down] == [4]
    assert [conv.out_channels for conv in model.decoder.up] == {2: [3], 4: [4, 3], 8: [8, 4, 3]}[factor]


def codes(*sides):
    return tuple(torch.zeros(1, side, side, dtype=torch.int64) for side in sides)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(torch.zeros(2, 1, 16, 16)), r"`pixel_values` must have shape \(B, 3, H, W\)"),
        (lambda model: model.encode(torch.zeros(2, 3, 16, 18)), "multiples of 4 .* got 16x18"),
        (
            lambda model: model.decode_indices(codes(4)[0]),
            "`indices` must be a tuple of up to 2 levels.*got one tensor",
        ),
        (lambda model: model.decode_indices(codes(4, 8, 16)), "`indices` must be a tuple of up to 2 levels.*got 3"),
        (lambda model: model.decode_indices(()), "`indices` must be a tuple of up to 2 levels.*got 0"),
        (lambda model: model.decode_indices(codes(8, 4)), "`indices` must double their height and width"),
        (
            lambda model: model.decode_indices((codes(4)[0].expand(2, -1, -1), codes(8)[0])),
            "`indices` must have the same batch at each level",
        ),
        (lambda model: model.decode_indices(codes(4, 7)), "`indices` must double their height and width"),
        (lambda model: model.decode_indices((codes(4)[0], codes(8)[0] + 16)), r"`indices` must lie in \[0, 16\)"),
        (lambda model: model.decode((torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 8))), "`latents` must double"),
        (lambda model: model.decode((torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8))), r"shape \(B, 4, h, w\)"),
    ],
)
def test_wrong_inputs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_case().make())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_levels": 1}, "`num_levels` must be an int of at least 2, got 1"),
        ({"num_levels": 2.5}, "`num_levels` must be an int of at least 2, got 2.5"),
        ({"hidden_size": 1}, "`hidden_size` must be an int of at least 2, got 1"),
        ({"residual_hidden_size": 0}, "`residual_hidden_size` must be an int of at least 1, got 0"),
        ({"num_residual_layers": -1}, "`num_residual_layers` must be an int of at least 0, got -1"),
        ({"downsample_factor": 2}, "`downsample_factor` must be at least 4 for 2 levels, got 2"),
        ({"num_levels": 3, "downsample_factor": 4}, "`downsample_factor` must be at least 8 for 3 levels, got 4"),
        ({"level_dropout": 1.5}, r"`level_dropout` must be a number in \[0, 1\], got 1.5"),
        ({"level_dropout": "a"}, r"`level_dropout` must be a number in \[0, 1\], got 'a'"),
        ({"downsample_factor": 12}, "`downsample_factor` must be a power of 2"),
        ({"quantizer": "vqq"}, "`quantizer` must be one of"),
        ({"quantizer_kwargs": {"decay_rate": 0.5}}, "decay_rate"),
    ],
)
def test_wrong_configurations_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        VQVAE2Model(VQVAE2Config(**{**SIZES, **overrides}))
