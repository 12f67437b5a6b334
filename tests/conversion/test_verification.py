"""`hf-vq convert --verify`: every kind of checkpoint, and errors that are seen where something is wrong."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from hf_vq.cli import main
from hf_vq.conversion.convert_llamagen import convert as convert_llamagen
from hf_vq.conversion.convert_llamagen import convert_tokenizer, tokenizer_arguments
from hf_vq.conversion.llamagen_prior import convert_prior
from hf_vq.conversion.reading import load_state_dict
from hf_vq.conversion.verification import verify
from tests.conversion.golden import GOLDEN
from tests.conversion.test_llamagen_prior import ARGUMENTS, CODES_GIVEN, original, original_logits
from tests.pipelines.latent_diffusion_parts import D, latents_of, make_pipeline, seeded


# Of each golden case, what is compared at least, and the largest error that is allowed: of pictures in 0 … 255 and of
# chains that amplify errors it is larger.
CASES = {
    "taming_vqmodel_f4": ({"h_enc", "emb_loss", "xrec_from_code", "disc_logits_x"}, ["--discriminator"]),
    "taming_gumbel": ({"indices", "kl", "xrec"}, []),
    "taming_gpt_segmentation": ({"all_logits", "c_indices", "cond_rec", "greedy_half", "img_greedy"}, []),
    "ldm_vq_uncond": ({"fs.xrec", "eps_ema", "post_mean", "post_logvar", "lvlb_weights", "ddim_eta0_ema"}, []),
    "vqdiff_class": ({"logits.a", "log_x_start.b", "codec_tokens", "gen.content", "tab.log_cumprod_bt"}, []),
    "vqdiff_text_clip": ({"codec_tokens_argmax", "codec_decoded", "log_x_start.a"}, []),
    "rosinality_pixelsnail_bottom": ({"logits", "loss"}, []),
    "rosinality_vqvae": ({"id_t", "id_b", "dec", "train_loss", "codes_dec"}, []),
    "zalando_noema": ({"indices", "x_recon", "vq_loss", "perplexity"}, []),
    "llamagen_vq": ({"indices", "xrec_from_code", "train.vq_loss"}, []),
}
LOOSE = {"x0_from_eps": 4e-4, "ddim_eta0_ema": 2e-4, "ddim_eta0": 2e-4, "ddim_eta0_x_inter": 2e-4}


def printed_errors(text):
    return {
        name: float(error)
        for name, error in (line.split(": largest error ") for line in text.splitlines() if "largest error" in line)
    }


def command(case, tmp_path, *more):
    folder = GOLDEN / case
    files = {"checkpoint": next(folder.glob("checkpoint.*")), "config": next(folder.glob("config.*"))}
    files |= {"verify": folder / "io.safetensors", "output": tmp_path / "out"}
    for name, option in (("codec_config.yaml", "codec_config"), ("codec_mapping.pt", "mapping")):
        if (folder / name).exists():
            files[option] = folder / name
    return main(["convert", *(text for name, path in files.items() for text in (f"--{name}", str(path))), *more])


@pytest.mark.parametrize("case", CASES)
def test_golden_cases(case, tmp_path, capsys):
    names, more = CASES[case]
    assert command(case, tmp_path, *more) == 0
    printed = capsys.readouterr().out
    errors = printed_errors(printed)
    assert names <= errors.keys()
    for name, error in errors.items():
        largest = 2e-3 if name in ("codec_decoded", "gen.content") else LOOSE.get(name, 2e-5)
        assert error <= largest, (name, error)
    others = printed.partition("not compared: ")[2].splitlines()[0].split(", ") if "not compared" in printed else []
    outputs = {
        name
        for name, entry in json.loads((GOLDEN / case / "manifest.json").read_text())["tensors"].items()
        if entry["role"] != "input"
    }
    # nothing is left out without a word, but for what others are computed from
    assert outputs <= errors.keys() | set(others) | {"eps", "gen.tokens", "codec_tokens", "cond_emb"}


def test_live_weights(tmp_path, capsys):
    """Of a model that has averages too: its own outputs, and both terms of the loss."""
    assert command("ldm_vq_uncond", tmp_path, "--live") == 0
    printed = capsys.readouterr().out
    errors = printed_errors(printed)
    assert "averages; --live takes the others" in printed and "eps_ema" not in errors
    assert {"eps", "loss", "loss_simple", "loss_vlb", "ddim_eta0", "ddim_eta0_x_inter"} <= errors.keys()
    assert all(error <= LOOSE.get(name, 2e-5) for name, error in errors.items())


def test_live_weights_beside_averages_are_checked(tmp_path, capsys):
    folder = GOLDEN / "ldm_vq_uncond"
    content = torch.load(folder / "checkpoint.ckpt", weights_only=True)["state_dict"]
    key = "model.diffusion_model.out.2.bias"
    for value, message in ((torch.full((3,), float("nan")), f"NaN in {key}"), (torch.zeros(4), "in two shapes")):
        torch.save({"state_dict": {**content, key: value}}, tmp_path / "bad.ckpt")
        given = ["--checkpoint", str(tmp_path / "bad.ckpt"), "--config", str(folder / "config.yaml")]
        assert main(["convert", *given, "--output", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err


def test_wrong_outputs_are_seen(tmp_path, capsys):
    tensors = load_file(GOLDEN / "zalando_ema" / "io.safetensors")
    tensors["x_recon"][0, 0, 0, 0] += 0.5
    tensors["indices"][:64] += 1
    save_file(tensors, tmp_path / "io.safetensors")
    checkpoint = str(GOLDEN / "zalando_ema" / "checkpoint.pt")
    given = ["convert", "--checkpoint", checkpoint, "--output", str(tmp_path / "out")]
    assert main([*given, "--verify", str(tmp_path / "io.safetensors")]) == 0
    errors = printed_errors(capsys.readouterr().out)
    assert errors["x_recon"] == pytest.approx(0.5, abs=1e-3) and errors["indices"] == 0.5
    assert "| x_recon | 0.5 |" in (tmp_path / "out" / "README.md").read_text()
    for content, message in ((b"", "is empty"), (b"x" * 20, "unknown format")):
        (tmp_path / "bad.bin").write_bytes(content)
        assert main([*given, "--verify", str(tmp_path / "bad.bin")]) == 1
        assert message in capsys.readouterr().err
    save_file({"y": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert main([*given, "--verify", str(tmp_path / "other.safetensors")]) == 1
    assert "holds no output that this model computes" in capsys.readouterr().err


def test_a_chain_of_a_number_of_steps_that_does_not_divide(tmp_path):
    """Of 7 steps the original takes 8."""
    pipe = make_pipeline()
    start, timesteps = torch.randn(1, D, 4, 4, generator=seeded()), torch.arange(1, 1001, 142)
    latents = latents_of(pipe, latents=start, timesteps=timesteps.flip(0))
    save_file(
        {"x_T": start, "ddim_timesteps": timesteps, "ddim_eta0": latents * pipe.vqvae.config.scaling_factor},
        tmp_path / "io.safetensors",
    )
    errors, others = verify(pipe, tmp_path / "io.safetensors")
    assert errors == {"ddim_eta0": 0, "ddim_timesteps": 0} and not others


# ---------------------------------------------------------------------------------------------------------------------
# LlamaGen, whose priors have no golden case
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class", "text"])
@torch.no_grad()
def test_llamagen_prior(kind, tmp_path, capsys):
    """With the arguments as the other sources' files have them; of a text's 5 states the first 3 are used."""
    weights = original(kind)
    arguments = {**ARGUMENTS, **({"cls_token_num": 3, "model_type": "t2i"} if kind == "text" else {})}
    torch.save({"model": weights}, tmp_path / "prior.pt")
    content = {"target": "autoregressive.models.gpt.Transformer", "params": arguments}
    (tmp_path / "arguments.json").write_text(json.dumps(content))
    config = convert_prior(weights, arguments)[0].config
    condition = torch.tensor([2, 0]) if kind == "class" else torch.randn(2, 5, 6)
    expected = original_logits(weights, condition if kind == "class" else condition[:, :3], CODES_GIVEN, config)
    tensors = {"idx": CODES_GIVEN, "cond_idx": condition, "logits": expected.float()}
    save_file(tensors, tmp_path / "io.safetensors")
    files = {"checkpoint": "prior.pt", "config": "arguments.json", "verify": "io.safetensors", "output": "out"}
    assert (
        main(["convert", *(text for name, file in files.items() for text in (f"--{name}", str(tmp_path / file)))]) == 0
    )
    assert printed_errors(capsys.readouterr().out)["logits"] < 2e-5
    if kind == "text":
        null = original_logits(
            {**weights, "cls_embedding.uncond_embedding": weights["cls_embedding.uncond_embedding"][:3]},
            None,
            CODES_GIVEN,
            config,
        )  # noqa: E501
        model = convert_prior(weights, arguments)[0]
        ids = torch.cat([model.prepare_condition(None, batch_size=2), CODES_GIVEN], dim=1)
        torch.testing.assert_close(model(ids).logits.double(), null, atol=2e-5, rtol=1e-4)
        with pytest.raises(ValueError, match="a cls_token_num of at most the 5 rows"):
            convert_prior(weights, {**arguments, "cls_token_num": 6})


@pytest.mark.parametrize("by_angle", [True, False])
def test_llamagen_entropy_loss(by_angle, tmp_path):
    """Its two entropies, by their weight; with codes and latents of length 1, or as they are."""
    folder = GOLDEN / "llamagen_vq"
    content = json.loads((folder / "config.json").read_text())
    content["params"] |= {"entropy_loss_ratio": 0.3, "codebook_l2_norm": by_angle, "commit_loss_beta": 0.5}
    (tmp_path / "arguments.json").write_text(json.dumps(content))
    fields, _ = tokenizer_arguments(tmp_path / "arguments.json")
    tokenizer, _ = convert_tokenizer(load_state_dict(folder / "checkpoint.pt", entries=("model",)), 32, **fields)
    x = load_file(folder / "io.safetensors")["x"]
    z = tokenizer.encode(x).latents.movedim(1, -1).flatten(0, -2).detach()
    e = tokenizer.quantize.embedding.weight
    if by_angle:
        z, e = F.normalize(z, dim=-1), F.normalize(e, dim=-1)
    affinity = -torch.cdist(z, e).square() / 0.01
    p, log_p = affinity.softmax(-1), affinity.log_softmax(-1)
    mean = p.mean(0)
    entropy = -(p * log_p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()
    nearest = e[affinity.argmax(-1)]
    expected = 1.5 * (nearest - z).square().mean() + 0.3 * entropy
    loss = tokenizer.quantize(tokenizer.encode(x).latents).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    save_file({"x": x, "train.entropy_loss": (0.3 * entropy).detach()}, tmp_path / "io.safetensors")
    assert verify(tokenizer, tmp_path / "io.safetensors")[0]["train.entropy_loss"] < 1e-4


def test_arguments_of_rosinality(tmp_path):
    """Those that follow from the weights must agree with them."""
    from hf_vq.conversion.convert_rosinality import convert

    for case, changes, message in (
        ("rosinality_vqvae", {"channel": 64}, "channel=64, but the weights"),
        ("rosinality_vqvae", {"surprise": 1}, r"not known: \['surprise'\]"),
        ("rosinality_pixelsnail_top", {"shape": [8, 4]}, r"shape=\[8, 4\], but the weights .* of \[4, 4\]"),
        ("rosinality_pixelsnail_top", {"n_cond_res_block": 2}, "must have n_cond_res_block=0"),
        ("rosinality_pixelsnail_bottom", {"attention": True}, "attention=True"),
        ("rosinality_pixelsnail_bottom", {"dropout": 2}, "a number of at least 0 and below 1 as dropout"),
    ):
        folder = GOLDEN / case
        content = json.loads((folder / "config.json").read_text())
        content["params"] |= changes
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"`config` {tmp_path}/config.json .*{message}"):
            convert(folder / "checkpoint.pt", tmp_path / "out", config=tmp_path / "config.json")
    with pytest.raises(ValueError, match="`resolution` must be an int of at least 1, got 0"):
        convert_llamagen(GOLDEN / "llamagen_vq/checkpoint.pt", tmp_path / "out", resolution=0)
