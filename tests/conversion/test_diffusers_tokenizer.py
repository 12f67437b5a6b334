"""diffusers' `VQModel` and back, against diffusers' own class with random weights."""

import json

import pytest
import torch
from diffusers import VQModel
from transformers import set_seed

from hf_vq.conversion.diffusers_tokenizer import vqgan_config, vqmodel_config
from hf_vq.conversion.layouts import from_diffusers
from hf_vq.models.autoencoders.configuration_vqgan import VQGANConfig
from hf_vq.models.autoencoders.modeling_vqgan import VQGANModel


PLAIN = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 2,
    "latent_channels": 6,
    "vq_embed_dim": 5,
    "num_vq_embeddings": 16,
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
THREE_LEVELS = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
SPATIAL = {"norm_type": "spatial", "block_out_channels": (32, 64), "norm_num_groups": 32, "vq_embed_dim": None}
# as published, at a fraction of the width
AMUSED = {
    "block_out_channels": (8, 16, 16, 32, 48),
    "down_block_types": ("DownEncoderBlock2D",) * 5,
    "up_block_types": ("UpDecoderBlock2D",) * 5,
    "mid_block_add_attention": False,
    "lookup_from_codebook": True,
    "sample_size": 256,
}
CASES = {
    "attention": {},
    "no_mid_attention": {"mid_block_add_attention": False, "vq_embed_dim": None},
    "three_levels": THREE_LEVELS,
    "spatial": SPATIAL,
    "amused": AMUSED,
}
# the published configurations: amused/amused-256 and -512; CompVis/ldm-celebahq-256; microsoft/vq-diffusion-ithq;
# kandinsky-community/kandinsky-2-2-decoder
PUBLISHED = {
    "amused": {
        **AMUSED,
        "block_out_channels": (128, 256, 256, 512, 768),
        "latent_channels": 64,
        "num_vq_embeddings": 8192,
    },
    "celebahq": {
        **THREE_LEVELS,
        "block_out_channels": (128, 256, 512),
        "latent_channels": 3,
        "num_vq_embeddings": 8192,
        "sample_size": 256,
    },
    "ithq": {
        "block_out_channels": (128, 128, 256, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "latent_channels": 256,
        "num_vq_embeddings": 2887,
    },
    "movq": {
        "block_out_channels": (128, 256, 256, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "latent_channels": 4,
        "vq_embed_dim": 4,
        "num_vq_embeddings": 16384,
        "norm_type": "spatial",
        "sample_size": 32,
    },
}


def make(**overrides):
    set_seed(1)
    model = VQModel(**{**PLAIN, **overrides}).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_there_and_back(case, tmp_path):
    original = make(**CASES[case])
    original.save_pretrained(tmp_path / "pipeline" / "vqvae")
    model = VQGANModel.from_diffusers(tmp_path / "pipeline", subfolder="vqvae", resolution=32)
    assert model.config.scaling_factor == 1 and model.config.legacy_beta and not model.training
    pixels = torch.randn(2, 3, 32, 32)
    latents = original.encode(pixels).latents
    encoded = model.encode(pixels)
    torch.testing.assert_close(encoded.latents, latents, atol=1e-5, rtol=1e-5)
    codes = original.quantize(latents)[2][2].reshape(encoded.indices.shape)
    assert torch.equal(encoded.indices, codes) and codes.unique().numel() > 2
    expected = original.decode(latents).sample
    torch.testing.assert_close(model.decode_indices(codes).sample, expected, atol=2e-5, rtol=1e-5)

    model.save_pretrained(tmp_path / "ours")
    VQGANModel.from_pretrained(tmp_path / "ours").to_diffusers(tmp_path / "theirs")
    again = VQModel.from_pretrained(tmp_path / "theirs")
    names = dict(original.named_parameters())
    assert names.keys() == dict(again.named_parameters()).keys()
    assert all(torch.equal(value, names[name]) for name, value in again.named_parameters())
    assert torch.equal(again.decode(latents).sample, expected)
    assert again.config.scaling_factor == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_key_has_its_place(name):
    with torch.device("meta"):
        original = VQModel(**PUBLISHED[name])
        config = vqgan_config(original.config)
        model = VQGANModel(config)
    weights = from_diffusers(original.state_dict())
    assert {key: value.shape for key, value in weights.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert config.num_embeddings == PUBLISHED[name]["num_vq_embeddings"] and config.scaling_factor == 1


def test_names_of_attention_before_version_0_13(tmp_path):
    original = make()
    original.save_pretrained(tmp_path, safe_serialization=False)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = tmp_path / "diffusion_pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    for new_name, old_name in old.items():
        weights = {key.replace(f".{new_name}.", f".{old_name}."): value for key, value in weights.items()}
    torch.save(weights, path)
    model = VQGANModel.from_diffusers(tmp_path)
    assert torch.equal(
        model.encoder.mid.attn_1.q.weight[:, :, 0, 0], original.encoder.mid_block.attentions[0].to_q.weight
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "mish"}, "act_fn='mish' has no equivalent"),
        ({"block_out_channels": [8, 12]}, "multiples of the first"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 2}, "attention at the same resolutions"),
        ({"down_block_types": ["DownBlock2D"] * 2}, r"down_block_types \['DownBlock2D'\]; known"),
        ({"surprise": 1}, r"does not know: \['surprise'\]"),
        ({"_class_name": "AutoencoderKL"}, "must hold a VQModel of diffusers, got 'AutoencoderKL'"),
        ({"num_vq_embeddings": 17}, "quantize.embedding.weight of shape"),
    ],
)
def test_what_has_no_equivalent_there(changes, message, tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        VQGANModel.from_diffusers(tmp_path)


def test_missing_parts(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        VQGANModel.from_diffusers(tmp_path)
    make().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="must have one of"):
        VQGANModel.from_diffusers(tmp_path)


@pytest.mark.parametrize(
    "fields", [{"quantizer": "cosine"}, {"attention_type": "linear"}, {"resamp_with_conv": False}, {"tanh_out": True}]
)
def test_what_has_no_equivalent_back(fields):
    name = next(iter(fields))
    with pytest.raises(ValueError, match=f"{name}=.* has no equivalent in diffusers"):
        vqmodel_config(VQGANConfig(**fields))
