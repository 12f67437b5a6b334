"""First stages of the original VQGAN code: what they compute, their published keys, and the command."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoImageProcessor

import hf_vq.conversion.taming_tokenizer
from hf_vq.conversion.checkpoints import check_keys
from hf_vq.conversion.convert_taming import convert, main
from hf_vq.conversion.reading import load_state_dict
from hf_vq.conversion.taming_tokenizer import convert_discriminator, convert_tokenizer, tokenizer_config
from hf_vq.models.autoencoders.modeling_vqgan import VQGANModel
from hf_vq.training.objectives.discriminator import PatchDiscriminator
from tests.conversion.golden import GOLDEN, Golden, published


SCRIPTS = Path(__file__).parents[2] / "conversion"


def read(case):
    """The `model` section of a case's YAML, and its weights."""
    folder = GOLDEN / case
    return yaml.safe_load((folder / "config.yaml").read_text())["model"], load_state_dict(folder / "checkpoint.ckpt")


def convert_case(golden, output, **options):
    """Converted, saved and loaded again."""
    dropped = convert(golden.folder / "checkpoint.ckpt", golden.folder / "config.yaml", output, **options)
    return VQGANModel.from_pretrained(output), dropped


# ------------------------------------------------------------------------------------------ what the original computed


def gradients(model, golden, loss_of):
    model.zero_grad()
    pixel_values = golden["x"].clone().requires_grad_()
    latents = model.quant_conv(model.encoder(pixel_values))
    quantized = model.quantize(latents)
    sample = model.decode(quantized.quantized, quantize=False).sample
    loss = loss_of(sample, quantized)
    loss.backward()
    return {
        "loss": loss,
        "x": pixel_values.grad,
        "enc_conv_in": model.encoder.conv_in.weight.grad,
        "quant_conv": model.quant_conv.weight.grad,
        "embedding": model.quantize.embedding.weight.grad,
        "dec_conv_out": model.decoder.conv_out.weight.grad,
    }


@pytest.mark.parametrize("case", ["taming_vqmodel_f4", "taming_vqmodel_f2_plcallback"])
def test_vqmodel_computes_the_same(case, tmp_path):
    golden = Golden(case)
    has_discriminator = "disc_logits_x" in golden.tensors
    model, _ = convert_case(golden, tmp_path, discriminator=has_discriminator)
    encoded, output = model.encode(golden["x"]), model(golden["x"])
    golden.compare("h_enc", model.encoder(golden["x"]))
    golden.compare("h", encoded.latents)
    golden.compare("quant", encoded.quantized)
    golden.compare("indices", encoded.indices)
    golden.compare("emb_loss", output.quantizer_loss)
    golden.compare("xrec", output.sample)
    golden.compare("quant_from_code", model.quantize.indices_to_latents(encoded.indices))
    golden.compare("xrec_from_code", model.decode_indices(encoded.indices).sample)

    def loss_of(sample, quantized):
        return (sample - golden["x"]).square().mean() + quantized.loss

    for name, value in gradients(model, golden, loss_of).items():
        golden.compare(f"grad_{name}", value)
    model.quantize.legacy_beta = False
    golden.compare("emb_loss_legacy_false", model(golden["x"]).quantizer_loss)
    swapped = gradients(model, golden, loss_of)
    for name in ("quant_conv", "embedding", "enc_conv_in"):
        golden.compare(f"grad_legacy_false_{name}", swapped[name])

    if has_discriminator:
        folder = tmp_path / "discriminator"
        discriminator = PatchDiscriminator(**json.loads((folder / "config.json").read_text())).eval()
        discriminator.load_state_dict(load_file(folder / "model.safetensors"))
        golden.compare("disc_logits_x", discriminator(golden["x"]))
    golden.assert_all_compared()


def test_gumbel_computes_the_same(tmp_path):
    golden = Golden("taming_gumbel")
    model, _ = convert_case(golden, tmp_path)
    encoded = model.encode(golden["x"])
    golden.compare("h", encoded.latents)
    golden.compare("logits", model.quantize.proj(encoded.latents))
    golden.compare("indices_argmax", encoded.indices)
    golden.compare("xrec_from_argmax", model.decode_indices(encoded.indices).sample)
    drawn = model.quantize(encoded.latents, noise=golden["gumbel_noise"])
    golden.compare("indices", drawn.indices)
    golden.compare("z_q", drawn.quantized)
    golden.compare("kl", drawn.loss)
    golden.compare("xrec", model.decode(drawn.quantized, quantize=False).sample)
    golden.compare("z_q_from_code", model.quantize.indices_to_latents(drawn.indices))
    golden.compare("xrec_from_code", model.decode_indices(drawn.indices).sample)
    model.quantize.train()
    model.quantize.temperature = 0.7
    golden.compare("z_q_train_hard", model.quantize(encoded.latents, noise=golden["gumbel_noise"]).quantized)
    model.quantize.hard = False
    golden.compare("z_q_train_soft", model.quantize(encoded.latents, noise=golden["gumbel_noise"]).quantized)
    # the schedule is not part of the model
    golden.assert_all_compared(besides={"temperatures"})


# ----------------------------------------------------------------------------------------------- published checkpoints


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("taming__faceshq_vqgan", ["loss.discriminator."]),
        ("taming__imagenet_vqgan", ["loss.discriminator."]),
        ("taming__custom_vqgan", ["loss.discriminator."]),
        ("taming__imagenetdepth_vqgan", ["loss.discriminator."]),
        ("taming__coco_cond_stage", ["colorize"]),
        ("taming__sflckr_cond_stage", ["colorize"]),
    ],
)
def test_every_published_key_has_its_place(name, dropped, monkeypatch):
    monkeypatch.setattr(hf_vq.conversion.taming_tokenizer, "load_exactly", check_keys)
    model, state_dict = published(name)
    # published checkpoints hold LPIPS also, under this name
    state_dict["loss.perceptual_loss.lin0.model.1.weight"] = torch.empty(1, 64, 1, 1, device="meta")
    tokenizer, reasons = convert_tokenizer(model, state_dict)
    assert len(reasons) + len(tokenizer.state_dict()) == len(state_dict)
    assert {key for key in reasons if not key.startswith("loss.perceptual_loss.")} == {
        key for key in state_dict if key.startswith(tuple(dropped))
    }
    assert tokenizer.config.num_embeddings == 1024 and tokenizer.config.downsample_factor == 16
    if "loss.discriminator." in dropped:
        convert_discriminator(model, state_dict)


# ------------------------------------------------------------------------------------------------- folder and command


def test_folder_and_printed_reasons(tmp_path, capsys):
    folder = GOLDEN / "taming_vqmodel_f4"
    arguments = ["--checkpoint", f"{folder}/checkpoint.ckpt", "--config", f"{folder}/config.yaml"]
    main([*arguments, "--output", str(tmp_path)])
    assert "dropped loss.discriminator.main.0.weight and 15 more: the discriminator" in capsys.readouterr().out
    config = VQGANModel.from_pretrained(tmp_path).config
    assert config.legacy_beta and config.commitment_cost == 0.25
    assert AutoImageProcessor.from_pretrained(tmp_path).size["shortest_edge"] == 32
    main([*arguments, "--output", str(tmp_path), "--discriminator"])
    assert "discriminator" not in capsys.readouterr().out
    assert (tmp_path / "discriminator" / "model.safetensors").exists()


def test_trainer_classes_in_the_pickle_are_not_needed():
    state_dict = load_state_dict(GOLDEN / "taming_vqmodel_f2_plcallback" / "checkpoint.ckpt")
    assert "pytorch_lightning" not in sys.modules
    assert all(isinstance(value, torch.Tensor) for value in state_dict.values()) and len(state_dict) > 100


@pytest.mark.hub
@pytest.mark.slow
def test_push(hub, tmp_path):
    folder = GOLDEN / "taming_vqmodel_f2_plcallback"
    script, output = SCRIPTS / "convert_taming.py", tmp_path / "output"
    arguments = [str(script), "--checkpoint", f"{folder}/checkpoint.ckpt", "--config", f"{folder}/config.yaml"]
    arguments += ["--output", str(output), "--push_to_hub", "tester/f2"]
    hub.run(f"import runpy, sys\nsys.argv = {arguments}\nrunpy.run_path({str(script)!r}, run_name='__main__')")
    files = hub.files("tester/f2")
    assert files.keys() - {".gitattributes"} == {path.name for path in output.iterdir()}
    assert files["model.safetensors"] == (output / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("converter", ["convert_taming", "convert_zalando"])
def test_runs_as_a_script_from_anywhere(converter, tmp_path):
    script = SCRIPTS / f"{converter}.py"
    result = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "--checkpoint" in result.stdout, result.stderr


# ------------------------------------------------------------------------------------------------------------- errors


def changed(model, path, value):
    model = copy.deepcopy(model)
    *parents, last = path.split(".")
    inner = model
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return model


@pytest.mark.parametrize(
    ("case", "path", "value", "message"),
    [
        (
            "taming_vqmodel_f4",
            "target",
            "taming.models.vqgan.Other",
            "class taming.models.vqgan.Other; known: VQModel",
        ),
        ("taming_vqmodel_f4", "params.use_ema", True, r"not known: \['use_ema'\]"),
        ("taming_vqmodel_f4", "params.ddconfig.double_z", True, "must have double_z=False"),
        (
            "ldm_vq_f4_firststage",
            "params.ddconfig.attn_type",
            "axial",
            "must have attn_type=vanilla or none or linear",
        ),
        ("taming_vqmodel_f4", "params.remap", "used.npy", "lacks quantize.used, the table .* remap='used.npy'"),
        ("taming_gumbel", "params.temperature_scheduler_config.target", "a.Other", "the schedule Other"),
        ("taming_gumbel", "params.embed_dim", 8, "embed_dim = z_channels .* got 8 and 16"),
    ],
)
def test_configurations_without_equivalent_are_refused(case, path, value, message):
    model, _ = read(case)
    with pytest.raises(ValueError, match=message):
        tokenizer_config(changed(model, path, value))


def test_every_key_counts():
    model, state_dict = read("taming_vqmodel_f2_plcallback")
    key = "decoder.mid.attn_1.q.weight"
    with pytest.raises(ValueError, match=f"it lacks {key}"):
        convert_tokenizer(model, {name: value for name, value in state_dict.items() if name != key})
    with pytest.raises(ValueError, match="it has the unknown key loss.logvar"):
        convert_tokenizer(model, {**state_dict, "loss.logvar": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"has quant_conv.bias of shape \(5,\) in place of \(4,\)"):
        convert_tokenizer(model, {**state_dict, "quant_conv.bias": torch.zeros(5)})
    with pytest.raises(ValueError, match="holds no discriminator"):
        convert_discriminator(model, state_dict)


class Payload:
    """Unpickled the unsafe way, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_in_a_checkpoint_runs(tmp_path):
    torch.save({"state_dict": {}, "callbacks": Payload(tmp_path / "run")}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="an object of the class .*open, which is not on the list"):
        load_state_dict(tmp_path / "bad.ckpt")
    assert not (tmp_path / "run").exists()
