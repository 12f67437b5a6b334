"""`load_tokenizer` against the classes of transformers and diffusers, with random weights, and on files of each
layout.
"""

import json

import pytest
import torch
from diffusers import VQModel
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, JanusVQVAE, JanusVQVAEConfig, set_seed

from hf_vq import VQGANConfig, VQGANModel, load_tokenizer
from hf_vq.conversion.layouts import from_llamagen
from hf_vq.conversion.reading import load_state_dict
from tests.conversion.golden import GOLDEN, Golden


SMALL = {
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "latent_channels": 16,
    "embed_dim": 8,
    "num_embeddings": 32,
}


def randomised(model):
    set_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def sharded(folder, weights, config):
    """As transformers saves a large model, with weights of its other parts."""
    folder.mkdir()
    weights = {key: value.clone() for key, value in weights.items()}
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": [*names[1::2], "lm_head.weight"]}
    weights["lm_head.weight"] = torch.zeros(2)
    for file, keys in files.items():
        save_file({key: weights[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def small(**fields):
    """One of ours."""
    set_seed(0)
    fields = {"resolution": 16, "attn_resolutions": [8], **SMALL, **fields}
    return randomised(VQGANModel(VQGANConfig(**fields)))


@torch.no_grad()
def assert_same(model, other, pixels):
    ours, theirs = model.encode(pixels), other.encode(pixels)
    torch.testing.assert_close(ours.latents, theirs.latents, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.indices, theirs.indices) and ours.indices.unique().numel() > 1
    torch.testing.assert_close(
        model.decode_indices(ours.indices).sample, other.decode_indices(ours.indices).sample, atol=1e-5, rtol=1e-5
    )


# ------------------------------------------------------------------------------------------ models of other packages


@torch.no_grad()
def test_janus(tmp_path):
    original = randomised(JanusVQVAE(JanusVQVAEConfig(**SMALL, num_patches=8)))
    # the original looks codes up by angle, which transformers forgets: with unit vectors there is no difference
    codes = original.quantize.embedding.weight
    codes.data = torch.nn.functional.normalize(codes.data, dim=-1)
    weights = {f"model.vqmodel.{key}": value for key, value in original.state_dict().items()}
    model = load_tokenizer(sharded(tmp_path / "janus", weights, {"model_type": "janus", "vq_config": SMALL}))
    assert model.config.quantizer == "cosine" and model.config.resolution == 256
    pixels = torch.randn(2, 3, 16, 16)
    expected = original.quant_conv(original.encoder(pixels))
    encoded = model.encode(pixels)
    torch.testing.assert_close(encoded.latents, expected, atol=1e-5, rtol=1e-5)
    unit = torch.nn.functional.normalize(expected, dim=1)
    assert torch.equal(encoded.indices.flatten(), original.quantize(unit)[2].flatten())
    expected = original.decode(encoded.indices.flatten(1))
    torch.testing.assert_close(model.decode_indices(encoded.indices).sample, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_chameleon_encodes_only(tmp_path):
    fields = {**SMALL, "resolution": 32, "attn_resolutions": [16]}
    original = randomised(ChameleonVQVAE(ChameleonVQVAEConfig(**fields)))
    weights = {f"model.vqmodel.{key}": value for key, value in original.state_dict().items()}
    model = load_tokenizer(sharded(tmp_path / "chameleon", weights, {"model_type": "chameleon", "vq_config": fields}))
    assert model.config.resolution == 32 and model.config.attn_resolutions == [16]
    pixels = torch.randn(2, 3, 32, 32)
    output = original.encode(pixels)
    encoded = model.encode(pixels)
    assert torch.equal(encoded.indices.flatten(), output.image_tokens.flatten())
    with pytest.raises(ValueError, match="has no decoder: its tokenizer encodes only"):
        model.decode_indices(encoded.indices)


@torch.no_grad()
def test_diffusers(tmp_path):
    blocks = ("AttnDownEncoderBlock2D", "DownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
    for norm in ("group", "spatial"):
        config = {"block_out_channels": (32, 64), "latent_channels": 4, "num_vq_embeddings": 32, "norm_type": norm}
        original = randomised(VQModel(**config, down_block_types=blocks[0], up_block_types=blocks[1]))
        original.save_pretrained(tmp_path / norm / "movq")
        pixels = torch.randn(1, 3, 16, 16)
        expected = original.decode(original.encode(pixels).latents).sample
        file = tmp_path / norm / "movq" / "diffusion_pytorch_model.safetensors"
        for model in (load_tokenizer(tmp_path / norm, subfolder="movq"), load_tokenizer(file)):
            torch.testing.assert_close(model(pixels).sample, expected, atol=2e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------- files of a layout


@pytest.mark.parametrize("case", ["taming_vqmodel_f4", "taming_gumbel", "ldm_vq_f4_firststage", "llamagen_vq"])
@torch.no_grad()
def test_original_files(case):
    golden = Golden(case)
    file = next(golden.folder.glob("checkpoint.*"))
    model = load_tokenizer(file, resolution=32 if "f4" in case or "llama" in case else 16)
    golden.compare("h", model.encode(golden["x"]).latents)
    golden.compare("indices_argmax" if case == "taming_gumbel" else "indices", model.encode(golden["x"]).indices)
    indices = golden["indices"].reshape(2, *golden["h"].shape[2:])
    golden.compare("xrec_from_code", model.decode_indices(indices).sample)


def test_first_release_of_janus(tmp_path):
    """LlamaGen's names inside a larger model."""
    state_dict = load_state_dict(GOLDEN / "llamagen_vq" / "checkpoint.pt", entries=("model",))
    weights = {f"gen_vision_model.{key}": value for key, value in state_dict.items()}
    torch.save({**weights, "language_model.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    model = load_tokenizer(tmp_path)
    expected = from_llamagen({key: value for key, value in state_dict.items() if "used" not in key})
    assert model.config.quantizer == "cosine"
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_our_own(tmp_path):
    original = small()
    original.save_pretrained(tmp_path)
    assert_same(load_tokenizer(tmp_path), original, torch.randn(2, 3, 16, 16))


def test_flax(tmp_path):
    msgpack = pytest.importorskip("msgpack")
    original, tree = small(legacy_beta=True), {}
    for key, value in original.state_dict().items():
        *path, leaf = key.replace("down.", "down_").replace("up.", "up_").replace("block.", "block_").split(".")
        path = ".".join(path).replace("attn.", "attn_").split(".")
        if leaf == "weight":
            leaf = {4: "kernel", 2: "embedding", 1: "scale"}[value.ndim]
        array = (value.permute(2, 3, 1, 0) if value.ndim == 4 else value).contiguous().numpy()
        packed = msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True)
        inner = tree
        for name in path:
            inner = inner.setdefault(name, {})
        inner[leaf] = msgpack.ExtType(1, packed)
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack.packb(tree, strict_types=True))
    assert "down_0" in tree["encoder"] and "block_0" in tree["encoder"]["down_0"]
    assert_same(load_tokenizer(tmp_path, resolution=16), original, torch.randn(2, 3, 16, 16))
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack.packb(tree, strict_types=True)[:1000])
    with pytest.raises(ValueError, match="no whole Flax checkpoint"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("add_conv", [False, True])
def test_movq_with_averages(add_conv, tmp_path):
    original = small(decoder_norm="spatial", spatial_norm_conv=add_conv)
    averages = {}
    for key, value in original.state_dict().items():
        part, _, rest = key.partition(".")
        averages[f"ema_{part}.{rest.replace('.', '')}"] = value
    live = {key: value + 1 for key, value in original.state_dict().items()}
    counts = {"ema_encoder.decay": torch.tensor(0.99), "ema_encoder.num_updates": torch.tensor(4)}
    torch.save({"state_dict": {**live, **averages, **counts}}, tmp_path / "movqgan_67M.ckpt")
    assert_same(load_tokenizer(tmp_path / "movqgan_67M.ckpt", resolution=16), original, torch.randn(2, 3, 16, 16))
    model = load_tokenizer(tmp_path / "movqgan_67M.ckpt", use_ema=False)
    assert torch.equal(model.quant_conv.bias, original.quant_conv.bias + 1)


def test_ibq_takes_the_averages(tmp_path):
    """The names are taming's: the name of the file, or `layout`, tells them apart. The code is that of the inner
    product.
    """
    original = small(quantizer="ibq", num_res_blocks=4)
    weights = original.state_dict()
    averages = {f"model_ema.{key.replace('.', '')}": value for key, value in weights.items()}
    live = {key: value + 1 for key, value in weights.items()}
    loss = {"loss.discriminator.main.0.weight": torch.zeros(1), "model_ema.decay": torch.tensor(0.9)}
    for name, options in (("IBQ-Tokenizer-32.ckpt", {}), ("last.ckpt", {"layout": "ibq"})):
        torch.save({"state_dict": {**live, **averages, **loss}}, tmp_path / name)
        model = load_tokenizer(tmp_path / name, resolution=16, **options)
        assert_same(model, original, torch.randn(2, 3, 16, 16))
    latents = model.encode(torch.randn(2, 3, 16, 16)).latents
    scores = torch.einsum("bdhw,kd->bkhw", latents, weights["quantize.embedding.weight"])
    assert torch.equal(model.quantize(latents).indices, scores.argmax(1))
    with pytest.raises(ValueError, match='`layout="ibq"` or `layout="taming"`'):
        load_tokenizer(tmp_path / "last.ckpt")


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"encoder.conv_in.weight": torch.zeros(1, 1, 1, 1, 1)}, "is a video tokenizer"),
        ({"latent_tokens": torch.zeros(1)}, "is a 1-D tokenizer"),
        ({"quantize.quant_resi.qresi_ls.0.weight": torch.zeros(1)}, "is a multi-scale tokenizer"),
        ({"decoder.up.0.upsample_conv.weight": torch.zeros(1)}, "is the tokenizer of MaskGIT"),
        ({"decoder.weight": torch.zeros(1)}, "is a continuous autoencoder"),
        ({"quantize.weight": torch.zeros(1)}, "is no tokenizer that is known"),
    ],
)
def test_others_are_refused_by_name(weights, message, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_sources_that_hold_nothing(tmp_path):
    with pytest.raises(ValueError, match="must hold one of"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="does not exist, and it is not the name of a repository"):
        load_tokenizer(tmp_path / "no" / "where")
    with pytest.raises(ValueError, match="`layout` must be one of"):
        load_tokenizer(tmp_path, layout="other")
    (tmp_path / "model_index.json").touch()
    with pytest.raises(ValueError, match="is a pipeline: `subfolder` must name the part that is its tokenizer"):
        load_tokenizer(tmp_path)


def test_a_repository_that_cannot_be_had(tmp_path, monkeypatch):
    """Of a Hub that is out of reach, no file after the first is asked for."""
    asked = []

    def unreachable(source, name, **options):
        asked.append(name)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(ValueError, match="folder `user/name` does not exist, and the Hub could not be reached"):
        load_tokenizer("user/name", cache_dir=str(tmp_path))
    assert asked == ["config.json"]
    snapshot = tmp_path / "models--user--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--user--name" / "refs").mkdir()
    (tmp_path / "models--user--name" / "refs" / "main").write_text("0" * 40)
    with pytest.raises(ValueError, match="`user/name` must hold one of"):  # of what the cache has
        load_tokenizer("user/name", cache_dir=str(tmp_path))


class Refusal(RepositoryNotFoundError):
    def __init__(self):
        OSError.__init__(self, "401 Client Error")


def test_a_repository_that_does_not_exist(monkeypatch):
    def refuse(source, name, **options):
        raise Refusal

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(
        ValueError, match="`user/mistyped` .* the Hub has no repository of this name that you may read"
    ):
        load_tokenizer("user/mistyped")
