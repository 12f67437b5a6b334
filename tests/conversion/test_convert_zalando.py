"""The VQ-VAE notebook's model. Its images are half as large: x there is 2x here."""

import json

import pytest
import torch
from transformers import AutoImageProcessor

import hf_vq.conversion.convert_zalando
from hf_vq.conversion.checkpoints import check_keys
from hf_vq.conversion.convert_zalando import convert, convert_model, main
from hf_vq.conversion.reading import load_state_dict
from hf_vq.models.autoencoders.modeling_vqvae import VQVAEModel
from tests.conversion.golden import GOLDEN, Golden, published


def convert_case(name, output):
    golden = Golden(name)
    convert(golden.folder / "checkpoint.pt", output, golden.folder / "config.json", data_variance=0.06)
    return golden, VQVAEModel.from_pretrained(output)


def compare_forward(golden, model):
    pixel_values = 2 * golden["x"]
    encoded, output = model.encode(pixel_values), model(pixel_values)
    golden.compare("h", encoded.latents)
    golden.compare("quantized", encoded.quantized)
    golden.compare("indices", encoded.indices)
    golden.compare("vq_loss", output.quantizer_loss)
    golden.compare("loss", output.quantizer_loss)
    golden.compare("x_recon", output.sample / 2)
    golden.compare("perplexity", output.perplexity)
    golden.compare("perplexity_fwd", output.perplexity)
    golden.compare("train_objective", output.loss)
    output.loss.backward()
    # the weight is half the original's
    golden.compare("grad_enc_conv1", model.encoder.down[0].weight.grad / 2)
    golden.compare("grad_dec_conv1", model.decoder.conv_in.weight.grad)


def test_gradient_codebook_computes_the_same(tmp_path):
    golden, model = convert_case("zalando_noema", tmp_path)
    compare_forward(golden, model)
    golden.compare("grad_embedding", model.quantize.embedding.weight.grad)
    golden.assert_all_compared()


def test_ema_codebook_computes_and_learns_the_same(tmp_path):
    golden, model = convert_case("zalando_ema", tmp_path)
    buffers = {"_ema_cluster_size": "cluster_size", "_ema_w": "embed_avg", "_embedding": "embedding"}
    for name, ours in buffers.items():
        golden.compare(f"before.{name}", getattr(model.quantize, ours))
    compare_forward(golden, model)
    model.train()
    output = model(2 * golden["x"])
    golden.compare("train.loss", output.quantizer_loss)
    golden.compare("train.x_recon", output.sample / 2)
    golden.compare("train.perplexity", output.perplexity)
    for name, ours in buffers.items():
        golden.compare(f"after.{name}", getattr(model.quantize, ours))
    model(2 * golden["x"])
    for name in ("_ema_cluster_size", "_embedding"):
        golden.compare(f"after2.{name}", getattr(model.quantize, buffers[name]))
    golden.assert_all_compared()


def test_every_published_key_has_its_place(monkeypatch):
    monkeypatch.setattr(hf_vq.conversion.convert_zalando, "load_exactly", check_keys)
    _, state_dict = published("zalando__ema")
    config = convert_model(state_dict).config
    assert (config.hidden_size, config.residual_hidden_size, config.num_residual_layers) == (128, 32, 2)
    assert (config.num_embeddings, config.embed_dim, config.quantizer) == (512, 64, "ema")
    assert config.quantizer_kwargs["decay"] == 0.99 and config.commitment_cost == 0.25


def test_folder_and_arguments(tmp_path):
    folder = GOLDEN / "zalando_ema"
    config = json.loads((folder / "config.json").read_text())["params"] | {"decay": 0.5, "commitment_cost": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = tmp_path / "output"
    main(
        ["--checkpoint", f"{folder}/checkpoint.pt", "--output", str(output), "--config", str(tmp_path / "config.json")]
    )
    model = VQVAEModel.from_pretrained(output)
    assert model.quantize.decay == 0.5 and model.config.commitment_cost == 2.0 and model.config.data_variance is None
    assert AutoImageProcessor.from_pretrained(output).size["shortest_edge"] == 32


def test_every_key_counts():
    state_dict = load_state_dict(GOLDEN / "zalando_ema" / "checkpoint.pt")
    with pytest.raises(ValueError, match="the key _encoder._conv_4.weight, which the notebook's model does not have"):
        convert_model({**state_dict, "_encoder._conv_4.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="unknown key encoder.residual_stack.layers.0.conv1.bias"):
        convert_model({**state_dict, "_encoder._residual_stack._layers.0._block.1.bias": torch.zeros(8)})
    for key in ("_pre_vq_conv.bias", "_vq_vae._embedding.weight", "_decoder._conv_trans_2.bias"):
        with pytest.raises(ValueError, match="lacks"):
            convert_model({name: value for name, value in state_dict.items() if name != key})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hiddens": 64}, "num_hiddens=64, but the weights in `checkpoint` are of 32"),
        ({"num_residual_layers": 3}, "num_residual_layers=3, but .* of 2"),
        ({"embedding_dim": 8}, "embedding_dim=8"),
        ({"decay": 0.0}, "decay=0.0, but the weights are of a codebook that is a moving average"),
        ({"learning_rate": 1e-3}, r"not known: \['learning_rate'\]"),
    ],
)
def test_arguments_that_contradict_the_weights(changes, message, tmp_path):
    folder = GOLDEN / "zalando_ema"
    config = json.loads((folder / "config.json").read_text())["params"] | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        convert(folder / "checkpoint.pt", tmp_path / "output", tmp_path / "config.json")


@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_channels(channels, tmp_path):
    """Only grey and colour images have an image processor."""
    state_dict = load_state_dict(GOLDEN / "zalando_noema" / "checkpoint.pt")
    state_dict["_encoder._conv_1.weight"] = torch.randn(16, channels, 4, 4)
    state_dict["_decoder._conv_trans_2.weight"] = torch.randn(16, channels, 4, 4)
    state_dict["_decoder._conv_trans_2.bias"] = torch.randn(channels)
    torch.save(state_dict, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "output")
    model = VQVAEModel.from_pretrained(tmp_path / "output")
    assert model(torch.randn(1, channels, 8, 8)).sample.shape == (1, channels, 8, 8)
    assert (tmp_path / "output" / "preprocessor_config.json").exists() == (channels == 1)
    if channels == 1:
        assert AutoImageProcessor.from_pretrained(tmp_path / "output").num_channels == 1


def test_no_residual_blocks(tmp_path):
    """Nor is there a width of theirs that the arguments could contradict."""
    state_dict = load_state_dict(GOLDEN / "zalando_noema" / "checkpoint.pt")
    state_dict = {key: value for key, value in state_dict.items() if "_layers" not in key}
    assert convert_model(state_dict).config.num_residual_layers == 0
    torch.save(state_dict, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps({"num_residual_layers": 0, "num_residual_hiddens": 8}))
    convert(tmp_path / "model.pt", tmp_path / "output", tmp_path / "config.json")
