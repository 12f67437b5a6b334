"""What an original configuration can say beyond the golden cases: each option against the original's own formula."""

import copy

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from hf_vq.conversion.reading import load_state_dict
from hf_vq.conversion.taming_tokenizer import convert_discriminator, convert_tokenizer
from tests.conversion.golden import GOLDEN, Golden


def read(case):
    folder = GOLDEN / case
    return yaml.safe_load((folder / "config.yaml").read_text())["model"], load_state_dict(folder / "checkpoint.ckpt")


def test_codebook_of_moving_averages_goes_on_learning():
    """EMAVQ: counts from 0, decay 0.99, m / ((N + ε) / (ΣN + Kε) · ΣN)."""
    model, state_dict = read("taming_vqmodel_f2_plcallback")
    model = {**model, "target": "taming.models.vqgan.EMAVQ"}
    codes = state_dict["quantize.embedding.weight"].clone()
    counts, sums = torch.rand(len(codes)) + 0.5, codes * 1.3
    averages = {"quantize.embedding.cluster_size": counts, "quantize.embedding.embed_avg": sums}
    tokenizer, _ = convert_tokenizer(model, {**state_dict, **averages})
    golden = Golden("taming_vqmodel_f2_plcallback")
    encoded = tokenizer.encode(golden["x"])
    golden.compare("indices", encoded.indices)
    golden.compare("quant", encoded.quantized)
    one_hot = F.one_hot(encoded.indices.flatten(), len(codes)).float()
    flat = encoded.latents.movedim(1, -1).flatten(0, -2)
    counts = 0.99 * counts + 0.01 * one_hot.sum(0)
    sums = 0.99 * sums + 0.01 * one_hot.T @ flat
    smoothed = (counts + 1e-5) / (counts.sum() + len(codes) * 1e-5) * counts.sum()
    output = tokenizer.train()(golden["x"])
    torch.testing.assert_close(tokenizer.quantize.codebook, sums / smoothed[:, None])
    expected = 0.25 * (encoded.latents - codes[encoded.indices].movedim(-1, 1)).square().mean()
    torch.testing.assert_close(output.quantizer_loss, expected)


def test_temperature_is_the_schedules():
    golden = Golden("taming_gumbel")
    model, state_dict = read("taming_gumbel")
    quantizer = convert_tokenizer(model, state_dict)[0].quantize
    for step, expected in zip(golden["scheduler_steps"].tolist(), golden["temperatures"], strict=True):
        quantizer.set_training_step(step, 10**6)
        assert quantizer.temperature == pytest.approx(expected.item(), abs=1e-6)
    schedule = {"warm_up_steps": 10, "lr_start": 0.1}
    model = copy.deepcopy(model)
    model["params"]["temperature_scheduler_config"]["params"] |= schedule
    quantizer = convert_tokenizer(model, state_dict)[0].quantize
    for step in (0, 5, 9):
        quantizer.set_training_step(step, 10**6)
        assert quantizer.temperature == pytest.approx(0.1 + 0.8 * step / 10)


def test_gumbel_draws_among_the_codes_in_use():
    golden = Golden("taming_gumbel")
    model, state_dict = read("taming_gumbel")
    model = copy.deepcopy(model)
    model["params"]["remap"] = "used.npy"
    used = torch.tensor([30, 2, 17, 5, 11])
    tokenizer, _ = convert_tokenizer(model, {**state_dict, "quantize.used": used})
    indices = tokenizer.encode(golden["x"]).indices
    assert torch.equal(indices, golden["logits"][:, used].argmax(1))
    codes = state_dict["quantize.embed.weight"][used[indices]].movedim(-1, 1)
    torch.testing.assert_close(tokenizer.quantize.indices_to_latents(indices), codes)


def test_codes_in_use_are_renumbered():
    golden = Golden("taming_vqmodel_f2_plcallback")
    model, state_dict = read("taming_vqmodel_f2_plcallback")
    model = copy.deepcopy(model)
    model["params"]["remap"] = "used.npy"
    used = golden["indices"].unique().flip(0)
    tokenizer, _ = convert_tokenizer(model, {**state_dict, "quantize.used": used})
    encoded = tokenizer.encode(golden["x"])
    golden.compare("quant", encoded.quantized)
    assert torch.equal(used[encoded.indices].flatten(), golden["indices"].flatten())
    golden.compare("xrec_from_code", tokenizer.decode_indices(encoded.indices).sample)
    assert tokenizer.config.num_embeddings == len(used)


def test_averages_of_a_first_stage():
    model, state_dict = read("ldm_vq_f4_firststage")
    averages = {
        f"model_ema.{key.replace('.', '')}": value + 1
        for key, value in state_dict.items()
        if value.is_floating_point() and "running" not in key
    }
    both = {**state_dict, **averages, "model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(3)}
    for use_ema, shift in ((True, 1), (False, 0)):
        tokenizer, dropped = convert_tokenizer(model, both, use_ema)
        assert torch.equal(tokenizer.quant_conv.bias, state_dict["quant_conv.bias"] + shift)
        assert set(both) >= set(dropped) and all(
            key in dropped for key in ("model_ema.decay", "model_ema.num_updates")
        )
    del both["model_ema.quant_convbias"]
    with pytest.raises(ValueError, match="lacks the average of quant_conv.bias"):
        convert_tokenizer(model, both)


def test_discriminator_with_actnorm():
    """An offset and a scale of each channel in place of the batch's statistics."""
    torch.manual_seed(0)
    model, state_dict = read("taming_vqmodel_f4")
    model = copy.deepcopy(model)
    model["params"]["lossconfig"]["params"]["use_actnorm"] = True
    widths, weights, layers = [3, 8, 16, 32, 1], {}, []
    for depth, (c_in, c_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        number = [0, 2, 5, 8][depth]
        conv = nn.Conv2d(c_in, c_out, 4, stride=2 if depth < 2 else 1, padding=1)
        weights |= {f"main.{number}.{name}": value.data for name, value in conv.named_parameters()}
        layers.append(conv)
        if depth in (1, 2):
            offset, scale = torch.randn(1, c_out, 1, 1), torch.rand(1, c_out, 1, 1) + 0.5
            layers.append(lambda x, offset=offset, scale=scale: scale * (x + offset))
            weights |= {f"main.{number + 1}.loc": offset, f"main.{number + 1}.scale": scale}
            weights[f"main.{number + 1}.initialized"] = torch.tensor(1, dtype=torch.uint8)
        if depth < 3:
            layers.append(nn.LeakyReLU(0.2))
    rest = {key: value for key, value in state_dict.items() if not key.startswith("loss.discriminator.")}
    both = {**rest, **{f"loss.discriminator.{key}": value for key, value in weights.items()}}
    discriminator = convert_discriminator(model, both)
    assert discriminator.arguments["norm"] == "none"
    expected = images = torch.randn(2, 3, 32, 32)
    for layer in layers:
        expected = layer(expected)
    torch.testing.assert_close(discriminator(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("with_conv", "attention"), [(False, "vanilla"), (True, "linear")])
def test_networks_without_convolutions_between_and_with_linear_attention(with_conv, attention):
    model, state_dict = read("taming_vqmodel_f2_plcallback")
    model = copy.deepcopy(model)
    model["target"] = "ldm.models.autoencoder.VQModel"
    model["params"]["ddconfig"] |= {"resamp_with_conv": with_conv, "attn_type": attention}
    weights = {key: value for key, value in state_dict.items() if with_conv or "sample.conv" not in key}
    if attention == "linear":
        weights = {key: v for key, v in weights.items() if ".attn" not in key}
        names = [key.removesuffix("q.weight") for key in state_dict if key.endswith(".q.weight")]
        for name in names:
            width = len(state_dict[f"{name}q.bias"])
            weights[f"{name}to_qkv.weight"] = torch.randn(3 * width, width, 1, 1)
            weights[f"{name}to_out.weight"] = torch.randn(width, width, 1, 1)
            weights[f"{name}to_out.bias"] = torch.randn(width)
    tokenizer, _ = convert_tokenizer(model, weights)
    assert tokenizer.config.resamp_with_conv == with_conv and tokenizer.config.attention_type == attention
    assert tokenizer(torch.randn(1, 3, 16, 16)).sample.shape == (1, 3, 16, 16)
