"""Every weight of published tokenizers of other packages and programs has its place (lists of keys:
`make_package_keys.py`, `make_source_keys.py`).
"""

import pytest

import hf_vq.conversion.diffusers_tokenizer
import hf_vq.conversion.layouts
import hf_vq.conversion.load_tokenizer
from hf_vq.conversion.checkpoints import check_keys
from hf_vq.conversion.diffusers_tokenizer import convert_vqmodel
from hf_vq.conversion.load_tokenizer import _convert
from tests.conversion.golden import published


@pytest.fixture(autouse=True)
def only_names_and_shapes(monkeypatch):
    for module in ("diffusers_tokenizer", "layouts", "load_tokenizer"):
        monkeypatch.setattr(getattr(hf_vq.conversion, module), "load_exactly", check_keys)


@pytest.mark.parametrize(
    ("name", "multipliers", "codes", "factor", "norm"),
    [
        ("amused-256", [1, 2, 2, 4, 6], (8192, 64), 16, "group"),
        ("ldm-celebahq-256", [1, 2, 4], (8192, 3), 4, "group"),
        ("kandinsky-2-2-decoder", [1, 2, 2, 4], (16384, 4), 8, "spatial"),
        ("vq-diffusion-ithq", [1, 2, 4, 8], (4096, 128), 8, "group"),
    ],
)
def test_vqmodels_of_diffusers(name, multipliers, codes, factor, norm):
    entry, weights = published(f"diffusers__{name}")
    config = convert_vqmodel(entry["params"], weights).config
    assert (config.channel_multiplier, config.downsample_factor, config.decoder_norm) == (multipliers, factor, norm)
    assert (config.num_embeddings, config.embed_dim) == codes


def test_janus():
    config = _convert(published("transformers__janus-pro")[1], "janus-pro-1b", "janus", 384, True).config
    assert (config.num_embeddings, config.embed_dim, config.quantizer) == (16384, 8, "cosine")
    assert (config.channel_multiplier, config.downsample_factor) == ([1, 1, 2, 2, 4], 16)


def test_chameleon_encodes():
    model = _convert(published("transformers__chameleon-7b")[1], "chameleon-7b", "chameleon", 512, True)
    assert (model.config.num_embeddings, model.config.embed_dim) == (8192, 256)
    assert not any(name.startswith("decoder.") for name in model.state_dict())


@pytest.mark.parametrize(
    ("name", "base", "blocks", "millions"),
    [("67M", 128, 2, (66, 68)), ("102M", 128, 4, (100, 103)), ("270M", 256, 2, (264, 271))],
)
@pytest.mark.parametrize("use_ema", [True, False])
def test_movqgan(name, base, blocks, millions, use_ema):
    """The number of weights is the one that the file is named for."""
    model = _convert(published(f"movqgan__{name}")[1], f"movqgan_{name}.ckpt", None, 256, use_ema)
    config = model.config
    assert (config.base_channels, config.num_res_blocks, config.decoder_norm) == (base, blocks, "spatial")
    assert (config.num_embeddings, config.embed_dim, config.downsample_factor) == (16384, 4, 8)
    assert config.attn_resolutions == [32] and config.channel_multiplier == [1, 2, 2, 4]
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions[0] < count < millions[1]


@pytest.mark.parametrize("codes", [1024, 8192, 16384, 262144])
@pytest.mark.parametrize("use_ema", [True, False])
def test_ibq(codes, use_ema):
    name = f"ibq-tokenizer-{codes}"
    config = _convert(published(f"ibq__{codes}")[1], name, None, 256, use_ema).config
    assert (config.num_embeddings, config.embed_dim, config.quantizer) == (codes, 256, "ibq")
    assert (config.num_res_blocks, config.attn_resolutions, config.downsample_factor) == (4, [16], 16)


def test_a_key_that_has_no_place():
    weights = published("movqgan__67M")[1]
    del weights["decoder.up.0.block.0.norm1.conv_y.weight"]
    with pytest.raises(ValueError, match="lacks decoder.up.0.block.0.norm1.conv_y.weight"):
        _convert(weights, "movqgan_67M.ckpt", None, 256, False)
    weights = published("movqgan__67M")[1]
    del weights["ema_quant_conv.bias"]
    with pytest.raises(ValueError, match="lacks the average ema_quant_conv.bias, though it has others"):
        _convert(weights, "movqgan_67M.ckpt", None, 256, True)
