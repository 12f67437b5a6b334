"""Every weight of published tokenizers of other packages has its place (lists of keys: `make_package_keys.py`)."""

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
