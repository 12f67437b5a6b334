"""LlamaGen's tokenizers against what the original computed (tests/fixtures/golden), and the published keys."""

import json
import re

import pytest
import torch

import hf_vq.conversion.layouts
from hf_vq.conversion.checkpoints import check_keys
from hf_vq.conversion.convert_llamagen import convert, convert_tokenizer, main
from hf_vq.conversion.reading import load_state_dict
from hf_vq.models.autoencoders.configuration_vqgan import VQGANConfig
from hf_vq.models.autoencoders.modeling_vqgan import VQGANModel
from tests.conversion.golden import GOLDEN, Golden, published


FOLDER = GOLDEN / "llamagen_vq"


def test_computes_the_same(tmp_path):
    golden = Golden("llamagen_vq")
    dropped = convert(FOLDER / "checkpoint.pt", tmp_path, FOLDER / "config.json", resolution=32)
    assert list(dropped) == ["quantize.codebook_used"]
    model = VQGANModel.from_pretrained(tmp_path)
    encoded = model.encode(golden["x"])
    golden.compare("h", encoded.latents)
    golden.compare("quant", encoded.quantized)
    golden.compare("indices", encoded.indices)
    golden.compare("xrec", model(golden["x"]).sample)
    codes = model.quantize.indices_to_latents(encoded.indices)
    golden.compare("quant_from_code", codes)
    # the original's other order of axes has the same values in the same memory order, which is no transposition
    golden.compare(
        "quant_from_code_channels_last", codes.movedim(1, -1).reshape(golden["quant_from_code_channels_last"].shape)
    )
    golden.compare("xrec_from_code", model.decode_indices(encoded.indices).sample)

    model.train()
    output = model(golden["x"])
    golden.compare("train.xrec", output.sample)
    golden.compare("train.vq_loss", output.codebook_loss)
    golden.compare("train.commit_loss", model.config.commitment_cost * output.commitment_loss)
    golden.compare("train.entropy_loss", torch.zeros(()))
    output.loss.backward()
    golden.compare("train.grad_embedding", model.quantize.embedding.weight.grad)
    golden.compare("train.grad_quant_conv", model.quant_conv.weight.grad)
    golden.assert_all_compared(besides={"train.codebook_usage", "train.codebook_used_tail"})  # what the original logs


def test_every_published_key_has_its_place(monkeypatch):
    monkeypatch.setattr(hf_vq.conversion.layouts, "load_exactly", check_keys)
    model, dropped = convert_tokenizer(published("llamagen__VQ-16")[1])
    config = model.config
    assert list(dropped) == ["quantize.codebook_used"]
    assert (config.num_embeddings, config.embed_dim, config.quantizer) == (16384, 8, "cosine")
    assert (config.base_channels, config.channel_multiplier, config.num_res_blocks) == (128, [1, 1, 2, 2, 4], 2)
    assert (config.attn_resolutions, config.latent_channels, config.downsample_factor) == ([16], 256, 16)


LLAMAGEN_NAMES = (  # of ours in the original's, whose decoder's levels begin at the lowest resolution
    (r"^encoder\.down\.(\d+)\.", r"encoder.conv_blocks.\1."),
    (r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.conv_blocks.{1 - int(match[1])}."),
    (r"\.block\.(\d+)\.", r".res.\1."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
)


def test_a_decoder_of_other_widths_than_the_encoder(tmp_path):
    torch.manual_seed(0)
    widths = {"channel_multiplier": [1, 2], "decoder_channel_multiplier": [2, 3], "norm_num_groups": 32}
    model = VQGANModel(
        VQGANConfig(
            base_channels=32,
            num_res_blocks=1,
            attn_resolutions=[4],
            latent_channels=8,
            embed_dim=4,
            num_embeddings=16,
            resolution=8,
            quantizer="cosine",
            **widths,
        )
    ).eval()
    weights = model.state_dict()
    for pattern, name in LLAMAGEN_NAMES:
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    # the original's decoder begins as wide as its own last multiplier says
    assert weights["decoder.conv_in.weight"].shape[0] == 96 and weights["encoder.conv_in.weight"].shape[0] == 32
    torch.save({"model": weights}, tmp_path / "wide.pt")
    arguments = {"encoder_ch_mult": [1, 2], "decoder_ch_mult": [2, 3], "codebook_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(arguments))
    convert(tmp_path / "wide.pt", tmp_path / "output", tmp_path / "config.json", resolution=8)
    loaded = VQGANModel.from_pretrained(tmp_path / "output")
    assert (loaded.config.channel_multiplier, loaded.config.decoder_channel_multiplier) == ([1, 2], [2, 3])
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        assert torch.equal(loaded(pixels).sample, model(pixels).sample)


def test_averages_come_first(tmp_path):
    weights = load_state_dict(FOLDER / "checkpoint.pt", entries=("model",))
    averages = {**weights, "quant_conv.bias": weights["quant_conv.bias"] + 1}
    torch.save({"model": weights, "ema": averages}, tmp_path / "both.pt")
    for options, expected in (([], averages), (["--live"], weights)):
        main(["--checkpoint", str(tmp_path / "both.pt"), "--output", str(tmp_path / "output"), *options])
        model = VQGANModel.from_pretrained(tmp_path / "output")
        assert torch.equal(model.quant_conv.bias, expected["quant_conv.bias"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 128}, "codebook_size=128, but the weights in `checkpoint` are of 64"),
        ({"encoder_ch_mult": [1, 2, 4]}, r"encoder_ch_mult=\[1, 2, 4\], but .* \[1, 1, 1\]"),
        ({"surprise": 1}, r"not known: \['surprise'\]"),
    ],
)
def test_arguments_that_contradict_the_weights(changes, message, tmp_path):
    config = json.loads((FOLDER / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"params": config["params"] | changes}))
    with pytest.raises(ValueError, match=message):
        convert(FOLDER / "checkpoint.pt", tmp_path / "output", tmp_path / "config.json")


def test_every_key_counts():
    weights = load_state_dict(FOLDER / "checkpoint.pt", entries=("model",))
    with pytest.raises(ValueError, match="unknown key encoder.surprise"):
        convert_tokenizer({**weights, "encoder.surprise": torch.zeros(1)})
    with pytest.raises(ValueError, match="lacks decoder.mid.attn_1.q.weight"):
        convert_tokenizer({name: value for name, value in weights.items() if name != "decoder.mid.1.q.weight"})
