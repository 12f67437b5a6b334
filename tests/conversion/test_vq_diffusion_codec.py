"""The options of VQ-Diffusion's own image codec (PatchVQGAN), against its arithmetic written out; and the command."""

import copy

import pytest
import torch
import torch.nn.functional as F

from hf_vq import VQDiffusionImagePipeline, VQDiffusionTransformer2DModel
from hf_vq.cli import main
from hf_vq.conversion.reading import load_checkpoint, read_model
from hf_vq.conversion.vq_diffusion_codec import convert_codec
from hf_vq.models.autoencoders.configuration_vqgan import VQGANConfig
from hf_vq.models.autoencoders.modeling_vqgan import VQGANModel
from tests.conversion.golden import GOLDEN, Golden
from tests.conversion.original_networks import decode, encode


FOLDER = GOLDEN / "vqdiff_text_ithq"


def read():
    """The codec's configuration, and its weights as the checkpoint has them."""
    model = copy.deepcopy(read_model(FOLDER / "codec_config.yaml", "codec_config"))
    weights = load_checkpoint(FOLDER / "checkpoint.ckpt")["model"]
    prefix = "content_codec."
    return model, {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def networks(model):
    return (model["params"][f"{part}_config"]["params"] for part in ("encoder", "decoder"))


def compare(tokenizer, weights, levels, by_angle=False):
    """Indices and pictures of the golden case's images; the codes of those are returned."""
    own = {key.split(".", 1)[1]: value for key, value in weights.items()}
    pixels = Golden("vqdiff_text_ithq")["img"] / 127.5 - 1
    latents, codes = encode(own, pixels, levels), own["quantize.embedding"]
    flat = latents.movedim(1, -1).flatten(0, -2)
    if by_angle:
        indices = (F.normalize(flat, dim=1) @ codes.T).argmax(1)
    else:
        indices = torch.cdist(flat, codes).argmin(1)
    indices = indices.view(2, *latents.shape[2:])
    assert torch.equal(tokenizer.encode(pixels).indices, indices)
    expected = decode(own, codes[indices].movedim(-1, 1), levels)
    torch.testing.assert_close(tokenizer.decode_indices(indices).sample, expected, atol=1e-5, rtol=1e-5)
    return indices


@torch.no_grad()
def test_by_angle():
    model, weights = read()
    before = compare(convert_codec(model, weights)[0], weights, 2)
    model["params"]["quantizer_dis_type"] = "cosine"
    lengths = torch.linspace(0.5, 2, 16)[:, None]
    for key in ("enc.quantize.embedding", "dec.quantize.embedding"):
        weights[key] = weights[key] * lengths
    assert not torch.equal(compare(convert_codec(model, weights)[0], weights, 2, by_angle=True), before)


@torch.no_grad()
def test_a_decoder_of_other_widths():
    model, weights = read()
    encoder, decoder = networks(model)
    encoder["ch_mult"], decoder["ch"], decoder["ch_mult"] = [1, 1], 64, [1, 2]
    config = convert_codec(model_of_same(model), weights)[0].config
    config.decoder_channel_multiplier = [2, 4]
    torch.manual_seed(0)
    random = VQGANModel(config).state_dict()
    weights = {key: v for key, v in weights.items() if not key.startswith("dec.decoder.")}
    weights |= {f"dec.{key}": v for key, v in random.items() if key.startswith("decoder.")}
    tokenizer, _ = convert_codec(model, weights)
    assert tokenizer.config.decoder_channel_multiplier == [2, 4]
    compare(tokenizer, weights, 2)
    decoder["ch"] = 48
    with pytest.raises(ValueError, match=r"all multiples of 32 \(the encoder's ch\), got \[48, 96\]"):
        convert_codec(model, weights)


@pytest.mark.parametrize(
    ("options", "fields", "attended"),
    [
        ({"num_res_blocks": 3}, {"num_res_blocks": 3}, {1}),
        ({"z_channels": 16}, {"latent_channels": 16}, {1}),
        ({"attn_resolutions": [8]}, {"attn_resolutions": [8]}, {0}),
        ({"attn_resolutions": [[8, 8], 4]}, {"attn_resolutions": [8, 4]}, {0, 1}),
        # its resolution only places attention, from the lowest level on
        ({"resolution": 33, "attn_resolutions": [32]}, {"attn_resolutions": [8]}, {0}),
    ],
)
@torch.no_grad()
def test_a_decoder_of_another_depth_or_attention(options, fields, attended):
    model, weights = read()
    fields = {f"decoder_{name}": value for name, value in fields.items()}
    config = convert_codec(model, weights)[0].config.to_dict()
    torch.manual_seed(0)
    random = VQGANModel(VQGANConfig(**{**config, **fields})).state_dict()
    names = ("dec.decoder.", "dec.post_quant_conv.")
    weights = {key: v for key, v in weights.items() if not key.startswith(names)}
    weights |= {f"dec.{key}": v for key, v in random.items() if f"dec.{key}".startswith(names)}
    assert {key[15] for key in weights if key.startswith("dec.decoder.up") and ".attn." in key} == {
        *map(str, attended)
    }
    list(networks(model))[1].update(options)
    tokenizer, _ = convert_codec(model, weights)
    assert {name: getattr(tokenizer.config, name) for name in fields} == fields
    compare(tokenizer, weights, 2)


@pytest.mark.parametrize("sizes", [[[4, 8]], [[8, 4], [4, 8]]])
@torch.no_grad()
def test_a_rectangle(sizes):
    """Attention is where the height and the width of a level are those of a pair."""
    model, weights = read()
    for network in networks(model):
        network |= {"resolution": [8, 16], "attn_resolutions": sizes}
    tokenizer, _ = convert_codec(model, weights)
    assert tokenizer.config.image_size == (8, 16)
    compare(tokenizer, weights, 2)
    for network in networks(model):
        network["attn_resolutions"] = [4, [8, 4]]
    with pytest.raises(ValueError, match="has the unknown key decoder.up.1.attn"):
        convert_codec(model, weights)


def model_of_same(model):
    same = copy.deepcopy(model)
    encoder, decoder = networks(same)
    decoder |= {"ch": encoder["ch"], "ch_mult": encoder["ch_mult"]}
    return same


@torch.no_grad()
def test_pooling_and_explicit_halving():
    model, weights = read()
    for network, halves in zip(networks(model), ([True, False], [False, True]), strict=True):
        network |= {"resamp_with_conv": False, "scale_by_2": halves}
    weights = {key: value for key, value in weights.items() if "sample.conv" not in key}
    compare(convert_codec(model, weights)[0], weights, 2)


def test_defaults_are_the_originals():
    """Without its type the quantizer would be a class that the original does not have."""
    model, weights = read()
    del model["params"]["quantizer_type"]
    with pytest.raises(ValueError, match="must have quantizer_type=EMAVQ in model.params, got 'VQ'"):
        convert_codec(model, weights)
    model, weights = read()
    for network in networks(model):
        del network["ch_mult"]  # four levels
        network["resolution"] = 64
    with pytest.raises(ValueError, match="lacks encoder.down.2.block.0"):
        convert_codec(model, weights)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_a_flat_file_without_a_codec(tmp_path, capsys):
    """Safetensors, recognised; the pipeline draws indices."""
    from safetensors.torch import save_file

    folder = GOLDEN / "vqdiff_uncond"
    checkpoint = load_checkpoint(folder / "checkpoint.ckpt")
    flat = {f"model.{k}": v.clone() for k, v in checkpoint["model"].items() if "content_codec" not in k}
    save_file(flat | {f"ema.{k}": v.clone() for k, v in checkpoint["ema"].items()}, tmp_path / "flat.safetensors")
    given = ["--checkpoint", str(tmp_path / "flat.safetensors"), "--config", str(folder / "config.yaml")]
    verify = ["--verify", str(folder / "io.safetensors")]
    assert main(["convert", *given, *verify, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "this looks like a vq_diffusion checkpoint" in printed and "logits.a: largest error" in printed
    pipe = VQDiffusionImagePipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    indices = pipe(num_inference_steps=3, output_type="indices", generator=generator).indices
    with pytest.raises(ValueError, match="`output_type` must be 'indices'"):
        pipe()
    assert pipe.vqvae is None and indices.shape == (1, 4, 4) and indices.max() < 16
    assert main(["convert", *given, "--part", "transformer", "--output", str(tmp_path / "part")]) == 0
    assert VQDiffusionTransformer2DModel.from_pretrained(tmp_path / "part").config.num_embeddings == 16
    assert "license" in (tmp_path / "part" / "README.md").read_text()
    assert main(["convert", *given, "--part", "tokenizer", "--output", str(tmp_path / "none")]) == 1
    assert "`part` must be one of transformer, pipeline" in capsys.readouterr().err


def test_a_configuration_of_the_denoiser_alone(tmp_path, capsys):
    folder = GOLDEN / "vqdiff_purity"
    given = ["--checkpoint", str(folder / "checkpoint.ckpt"), "--config", str(folder / "config.yaml")]
    verify = ["--verify", str(folder / "io.safetensors")]
    assert main(["convert", "vq_diffusion", *given, *verify, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    errors = dict(line.split(": largest error ") for line in printed.splitlines() if "largest error" in line)
    assert float(errors["score_log_x_recon"]) < 3e-5 and float(errors["tab.log_cumprod_ct"]) < 1e-5
    assert "not compared: " in printed
