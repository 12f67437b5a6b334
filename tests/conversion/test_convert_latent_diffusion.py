"""Original latent diffusion models with a VQ first stage as pipelines."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from PIL import Image

import hf_vq.conversion.ldm_conditioner
import hf_vq.conversion.ldm_unet
import hf_vq.conversion.taming_tokenizer
from hf_vq.conversion.checkpoints import check_keys
from hf_vq.conversion.convert_latent_diffusion import convert, convert_model, convert_schedule, main
from hf_vq.conversion.ldm_conditioner import convert_bert_embedder
from hf_vq.conversion.ldm_unet import unet_config
from hf_vq.conversion.reading import Options, load_state_dict
from hf_vq.conversion.taming_tokenizer import convert_tokenizer
from hf_vq.models.autoencoders.image_processing_vq import VQImageProcessor
from hf_vq.models.autoencoders.modeling_vqgan import VQGANModel
from hf_vq.pipelines.pipeline_vq_latent_diffusion import VQLatentDiffusionPipeline
from hf_vq.training.objectives.diffusion_objective import DiffusionObjective
from hf_vq.training.objectives.discriminator import PatchDiscriminator
from hf_vq.training.objectives.gaussian_bound import GaussianBound
from tests.conversion.golden import GOLDEN, Golden, published


MODELS = ["bsr_sr", "celeba256", "cin256", "ffhq256", "layout2img-openimages256", "lsun_beds256"]
MODELS = [f"ldm__models_ldm_{name}" for name in (*MODELS, "semantic_synthesis256")]
MODELS += [f"ldm__configs_latent-diffusion_{name}-vq-4" for name in ("celebahq-ldm", "ffhq-ldm", "lsun_bedrooms-ldm")]
MODELS += ["ldm__configs_latent-diffusion_cin-ldm-vq-f8"]
FIRST_STAGES = [
    f"ldm__models_first_stage_models_{name}" for name in ("vq-f16", "vq-f4-noattn", "vq-f4", "vq-f8-n256", "vq-f8")
]


@pytest.fixture(scope="module")
def golden():
    return Golden("ldm_vq_uncond")


@pytest.fixture(scope="module")
def pipelines(golden, tmp_path_factory):
    """The pipeline with the averages and the one with the live weights, both saved and loaded again."""
    found = {}
    for name, use_ema in (("ema", True), ("live", False)):
        output = tmp_path_factory.mktemp(name)
        convert(golden.folder / "checkpoint.ckpt", golden.folder / "config.yaml", output, use_ema)
        found[name] = VQLatentDiffusionPipeline.from_pretrained(output)
        found[name].set_progress_bar_config(disable=True)
    return found


@torch.no_grad()
def test_first_stage(golden, pipelines):
    pipe = pipelines["live"]
    vqvae, scale = pipe.vqvae, pipe.vqvae.config.scaling_factor
    assert scale == 0.8
    encoded = vqvae.encode(golden["x"])
    golden.compare("fs.h", encoded.latents)
    golden.compare("fs.quant", encoded.quantized)
    golden.compare("fs.indices", encoded.indices)
    golden.compare("fs.emb_loss", vqvae.quantize(encoded.latents).loss)
    golden.compare("fs.xrec", vqvae.decode(encoded.latents).sample)
    golden.compare("fs.xrec_noquant", vqvae.decode(encoded.latents, quantize=False).sample)
    golden.compare("z", pipe.encode_image(golden["x"]) * scale)
    golden.compare("dec_z", vqvae.decode(golden["z"] / scale).sample)
    vectors = vqvae.quantize.indices_to_latents(golden["codes"])
    golden.compare("dec_codes", vqvae.decode(vectors / scale, quantize=False).sample)


@torch.no_grad()
def test_denoiser_and_noise(golden, pipelines):
    for name, tensor in (("live", "eps"), ("ema", "eps_ema")):
        golden.compare(tensor, pipelines[name].unet(golden["x_t"], golden["t"]).sample)
    scheduler = pipelines["live"].scheduler
    golden.compare("q_sample", scheduler.add_noise(golden["z"], golden["noise"], golden["t"]))
    alphas = scheduler.alphas_cumprod[golden["t"]].view(-1, 1, 1, 1)
    golden.compare("x0_from_eps", (golden["x_t"] - (1 - alphas).sqrt() * golden["eps"]) / alphas.sqrt())
    predicted = pipelines["live"].unet(golden["q_sample"], golden["t"]).sample
    golden.compare("loss", F.mse_loss(predicted, golden["noise"]))
    golden.compare("loss_simple", F.mse_loss(predicted, golden["noise"]))
    bound = GaussianBound(scheduler.betas)
    mean, _, log_variance = bound.posterior(golden["z"], golden["x_t"], golden["t"])
    golden.compare("post_mean", mean)
    golden.compare("post_logvar", log_variance)
    golden.compare("lvlb_weights", bound.weights("epsilon"))
    only_bound = DiffusionObjective("epsilon", simple_weight=0, elbo_weight=1)
    golden.compare("loss_vlb", only_bound.loss(predicted, golden["z"], golden["noise"], golden["t"]))


def chain(pipe, golden, **arguments):
    """The final latents, scaled, and those before each step and after the last."""
    seen = [golden["x_T"]]

    def callback(pipe, i, t, tensors):
        seen.append(tensors["latents"])

    output = pipe(
        num_images_per_prompt=2,
        latents=golden["x_T"],
        num_inference_steps=5,
        output_type="pt",
        callback_on_step_end=callback,
        **arguments,
    )
    return output, torch.stack(seen)


def test_ddim(golden, pipelines):
    pipe = pipelines["live"]
    output, steps = chain(pipe, golden)
    golden.compare("ddim_eta0", output.latents * 0.8)
    golden.compare("ddim_eta0_x_inter", steps)
    clipped = golden["ddim_eta0_img"].clamp(-1, 1)
    torch.testing.assert_close(output.images * 2 - 1, clipped, atol=5.4e-5, rtol=0)
    golden.compare("ddim_timesteps", pipe.set_timesteps(pipe.own_scheduler(), 5).flip(0))
    alphas = pipe.scheduler.alphas_cumprod
    golden.compare("ddim_alphas", alphas[golden["ddim_timesteps"]])
    previous = golden["ddim_timesteps"] - 200
    golden.compare("ddim_alphas_prev", torch.where(previous < 0, pipe.scheduler.final_alpha_cumprod, alphas[previous]))
    averaged, _ = chain(pipelines["ema"], golden)
    golden.compare("ddim_eta0_ema", averaged.latents * 0.8)


def test_ddim_predictions(golden, pipelines, monkeypatch):
    found, step = [], DDIMScheduler.step

    def spy(self, *args, **kwargs):
        output = step(self, *args, **kwargs)
        found.append(output.pred_original_sample)
        return output

    monkeypatch.setattr(DDIMScheduler, "step", spy)
    chain(pipelines["live"], golden)
    golden.compare("ddim_eta0_pred_x0", torch.stack(found))


def test_ddim_with_noise(golden, pipelines, monkeypatch):
    noise, found, step = list(golden["ddim_eta1_noise"]), [], DDIMScheduler.step

    def given_noise(self, *args, generator=None, **kwargs):
        output = step(self, *args, variance_noise=noise.pop(0), **kwargs)
        found.append(output.pred_original_sample)
        return output

    monkeypatch.setattr(DDIMScheduler, "step", given_noise)
    pipe = pipelines["live"]
    monkeypatch.setattr(pipe, "step_arguments", lambda scheduler, generator, eta: {"eta": eta})
    output, steps = chain(pipe, golden, eta=1.0)
    golden.compare("ddim_eta1", output.latents * 0.8)
    golden.compare("ddim_eta1_x_inter", steps)
    golden.compare("ddim_eta1_pred_x0", torch.stack(found))


def test_ddim_with_quantized_predictions(golden, pipelines, monkeypatch):
    """The original quantizes scaled latents as they are; with a factor of 1 the two agree."""
    pipe, scheduler = pipelines["live"], pipelines["live"].own_scheduler()
    pipe.set_timesteps(scheduler, 5)
    monkeypatch.setattr(pipe.vqvae.config, "scaling_factor", 1.0)
    output, steps = chain(pipe, golden, quantize_denoised=True)
    golden.compare("ddim_eta0_quant", output.latents)
    golden.compare("ddim_eta0_quant_x_inter", steps)
    with torch.no_grad():
        found = []
        for x, t in zip(steps, scheduler.timesteps, strict=False):
            clean = scheduler.step(pipe.unet(x, t).sample, t, x).pred_original_sample
            found.append(pipe.vqvae.quantize(clean).quantized)
    golden.compare("ddim_eta0_quant_pred_x0", torch.stack(found))


def test_nothing_is_left_out(golden):
    """The tests above together leave out the image alone, which is clamped."""
    if "ddim_eta0_quant" not in golden.compared:
        pytest.skip("the tests above have not run")
    golden.assert_all_compared({"ddim_eta0_img"})


def test_first_stage_alone(tmp_path, capsys):
    golden = Golden("ldm_vq_f4_firststage")
    arguments = {"checkpoint": "checkpoint.ckpt", "config": "config.yaml"}
    main([
        *(f"--{name}={golden.folder / file}" for name, file in arguments.items()), f"--output={tmp_path}", "--discriminator"  # noqa: E501
    ])  # fmt: skip
    model = VQGANModel.from_pretrained(tmp_path)
    with torch.no_grad():
        encoded = model.encode(golden["x"])
        golden.compare("h", encoded.latents)
        golden.compare("quant", encoded.quantized)
        golden.compare("indices", encoded.indices)
        golden.compare("emb_loss", model.quantize(encoded.latents).loss)
        golden.compare("xrec", model.decode(encoded.latents).sample)
        vectors = model.quantize.indices_to_latents(encoded.indices)
        golden.compare("quant_from_code", vectors)
        golden.compare("xrec_from_code", model.decode(vectors, quantize=False).sample)
        discriminator = PatchDiscriminator.from_folder(tmp_path / "discriminator").eval()
        golden.compare("disc_logits_x", discriminator(golden["x"]))
    golden.assert_all_compared()
    assert "dropped" not in capsys.readouterr().out


def test_options_without_use(tmp_path):
    files = [GOLDEN / "ldm_vq_uncond" / name for name in ("checkpoint.ckpt", "config.yaml")]
    with pytest.raises(ValueError, match="`--discriminator` needs the checkpoint of a first stage"):
        convert(*files, tmp_path, discriminator=True)
    files = [GOLDEN / "ldm_vq_f4_firststage" / name for name in ("checkpoint.ckpt", "config.yaml")]
    with pytest.raises(ValueError, match="`null_class_id` needs a whole model, got a first stage"):
        convert(*files, tmp_path, null_class_id=3)


def test_averages_of_the_first_stage(tmp_path):
    """A first stage alone is its averages, or with `--live` its weights, which a denoiser was trained with."""
    folder = GOLDEN / "ldm_vq_f4_firststage"
    state_dict = load_state_dict(folder / "checkpoint.ckpt")
    kept = {name: value for name, value in state_dict.items() if not name.startswith("loss.")}
    averages = {f"model_ema.{name.replace('.', '')}": value + 1 for name, value in kept.items()}
    torch.save({"state_dict": {**kept, **averages}}, tmp_path / "both.ckpt")
    name = "quantize.embedding.weight"
    for use_ema in (True, False):
        convert(tmp_path / "both.ckpt", folder / "config.yaml", tmp_path / "out", use_ema=use_ema)
        found = VQGANModel.from_pretrained(tmp_path / "out").state_dict()[name]
        assert torch.equal(found, kept[name] + use_ema)
    model, state_dict = read()
    kept = {name: value for name, value in state_dict.items() if name.startswith("first_stage_model.")}
    averages = {
        f"first_stage_model.model_ema.{name.removeprefix('first_stage_model.').replace('.', '')}": value + 1
        for name, value in kept.items()
    }
    pipe, dropped = convert_model(model, state_dict | averages)
    assert torch.equal(pipe.vqvae.state_dict()[name], kept[f"first_stage_model.{name}"])
    assert set(averages) <= set(dropped)


def test_a_first_stage_of_grey_images(tmp_path):
    model, state_dict = read()
    first_stage = copy.deepcopy(model["params"]["first_stage_config"])
    first_stage["params"]["ddconfig"] |= {"in_channels": 1, "out_ch": 1}
    names = {
        "encoder.conv_in.weight": (slice(None), slice(1)),
        "decoder.conv_out.weight": slice(1),
        "decoder.conv_out.bias": slice(1),
    }
    weights = {
        name.removeprefix("first_stage_model."): value
        for name, value in state_dict.items()
        if name.startswith("first_stage_model.")
    }
    for name, part in names.items():
        weights[name] = weights[name][part].clone()
    torch.save({"state_dict": weights}, tmp_path / "grey.ckpt")
    (tmp_path / "grey.yaml").write_text(yaml.safe_dump({"model": first_stage}))
    convert(tmp_path / "grey.ckpt", tmp_path / "grey.yaml", tmp_path / "out")
    pixels = VQImageProcessor.from_pretrained(tmp_path / "out")(Image.new("RGB", (40, 32)), return_tensors="pt")[
        "pixel_values"
    ]
    assert VQGANModel.from_pretrained(tmp_path / "out")(pixels).sample.shape == (1, 1, 32, 32)


# ------------------------------------------------------------------------------------------- published models


@pytest.fixture
def only_keys(monkeypatch):
    for module in (hf_vq.conversion.ldm_unet, hf_vq.conversion.taming_tokenizer, hf_vq.conversion.ldm_conditioner):
        monkeypatch.setattr(module, "load_exactly", check_keys)


@pytest.mark.parametrize("use_ema", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_key_of_a_published_model(name, use_ema, only_keys):
    model, state_dict = published(name)
    pipe, dropped = convert_model(model, state_dict, use_ema=use_ema)
    unet = model["params"]["unet_config"]["params"]
    assert pipe.unet.config.block_out_channels == [unet["model_channels"] * m for m in unet["channel_mult"]]
    assert pipe.vqvae.config.scaling_factor == 1.0
    assert {key.split(".")[0] for key in dropped} <= {"model", "model_ema", "loss", *state_dict}
    assert pipe.condition_kind == {"cin": "class_token", "layout": "text"}.get(
        name.split("_")[-1].split("-")[0].removesuffix("256").removesuffix("2img"), None
    )
    assert pipe.unet.config.in_channels == (3 + 182 if "semantic" in name else unet["in_channels"])


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_every_key_of_a_published_first_stage(name, only_keys):
    model, state_dict = published(name)
    tokenizer, dropped = convert_tokenizer(model, state_dict)
    assert {key.split(".")[0] for key in dropped} == {"loss"}
    assert tokenizer.config.mid_attention == ("noattn" not in name)


# ------------------------------------------------------------------------------------------- conditions


def read():
    folder = GOLDEN / "ldm_vq_uncond"
    return yaml.safe_load((folder / "config.yaml").read_text())["model"], load_state_dict(folder / "checkpoint.ckpt")


@pytest.mark.parametrize(
    ("options", "bias"),
    [
        ({"n_stages": 2}, False),
        ({"n_stages": 2}, True),
        ({"n_stages": 2, "method": "nearest"}, False),
        ({"n_stages": 2, "method": "bicubic"}, True),
        ({"multiplier": 0.25}, False),
        ({"method": "area", "multiplier": 0.26}, False),
    ],
)
def test_a_semantic_map_goes_into_the_first_convolution(options, bias, tmp_path):
    """Against torch's own resizing, the 1×1 convolution, and the concatenation; up to the borders, and of any map."""
    model, state_dict = read()
    params, generator = model["params"], torch.Generator().manual_seed(0)
    mapper, offset = torch.randn(3, 7, 1, 1, generator=generator), torch.randn(3, generator=generator) * bias
    wide = torch.randn(32, 6, 3, 3, generator=generator) / 7
    state_dict |= {
        "model.diffusion_model.input_blocks.0.0.weight": wide,
        "cond_stage_model.channel_mapper.weight": mapper,
        **({"cond_stage_model.channel_mapper.bias": offset} if bias else {}),
    }
    params["unet_config"]["params"]["in_channels"] = 6
    params["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.SpatialRescaler",
        "params": {"in_channels": 7, "out_channels": 3, "bias": bias, **options},
    }
    convert_model(model, state_dict, use_ema=False)[0].save_pretrained(tmp_path)
    pipe = VQLatentDiffusionPipeline.from_pretrained(tmp_path)
    small = segmentation = torch.randn(2, 7, 32, 32, generator=generator)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    for _ in range(options.get("n_stages", 1)):
        small = F.interpolate(
            small, scale_factor=options.get("multiplier", 0.5), mode=options.get("method", "bilinear")
        )
    expected = F.conv2d(torch.cat([x, F.conv2d(small, mapper, offset)], 1), wide, pipe.unet.conv_in.bias, padding=1)
    maps = pipe.prepare_concatenated((8, 8), segmentation)
    found = pipe.unet.conv_in(torch.cat([x, maps], 1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", ["__is_first_stage__", "VQModelInterface"])
def test_a_condition_is_encoded(stage, golden, tmp_path):
    """By the first stage, or by another tokenizer, here one with the first stage's weights beside a changed one."""
    model, state_dict = read()
    params, start = model["params"], "first_stage_model."
    tokenizer = {name.removeprefix(start): value for name, value in state_dict.items() if name.startswith(start)}
    if stage == "VQModelInterface":
        state_dict |= {start + name: value * 1.5 for name, value in tokenizer.items() if value.is_floating_point()}
        stage = {**params["first_stage_config"], "target": "ldm.models.autoencoder.VQModelInterface", "lr": 1e-4}
    state_dict |= {f"cond_stage_model.{name}": value for name, value in tokenizer.items()}
    state_dict["model.diffusion_model.input_blocks.0.0.weight"] = torch.randn(32, 6, 3, 3)
    params["unet_config"]["params"]["in_channels"] = 6
    params |= {"cond_stage_config": stage, "concat_mode": True}
    convert_model(model, state_dict, use_ema=False)[0].save_pretrained(tmp_path)
    pipe = VQLatentDiffusionPipeline.from_pretrained(tmp_path)
    with torch.no_grad():
        golden.compare("fs.h", pipe.prepare_concatenated(golden["fs.h"].shape[-2:], golden["x"]))
    assert (pipe.condition_vqvae is None) == (stage == "__is_first_stage__")


def test_a_table_of_classes():
    """A class reaches cross-attention as its row of the table."""
    torch.manual_seed(0)
    model, state_dict = read()
    params, table = model["params"], torch.randn(5, 12)
    arguments = {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 12}
    unet_params = params["unet_config"]["params"] | arguments
    params["unet_config"]["params"] = unet_params
    params["conditioning_key"] = "crossattn"
    params["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 12, "n_classes": 5},
    }
    kind, config = unet_config(unet_params)
    assert kind is UNet2DConditionModel
    reference = kind(**config).eval()
    weights = {"model.diffusion_model." + original_name(k): v for k, v in reference.state_dict().items()}
    others = {k: v for k, v in state_dict.items() if not k.startswith(("model.", "model_ema."))}
    pipe, dropped = convert_model(
        model, {**others, **weights, "cond_stage_model.embedding.weight": table}, null_class_id=4
    )
    x = torch.randn(2, 3, 8, 8)
    inputs, null = pipe.prepare_condition(2, class_labels=[1, 3], guided=True)
    with torch.no_grad():
        for given, rows in ((inputs, [1, 3]), (null, [4, 4])):
            torch.testing.assert_close(pipe.unet(x, 7, **given).sample, reference(x, 7, table[rows][:, None]).sample)
        assert not torch.allclose(pipe.unet(x, 7, **inputs).sample, pipe.unet(x, 7, **null).sample)
    assert not any(key.startswith("cond_stage") for key in dropped)


def original_name(key):
    """The original's name of a weight of the small denoiser above, written out."""
    outer = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    outer |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    blocks = {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
    }
    parts = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    parts |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    for table in (outer, blocks):
        for new, old in table.items():
            if key.startswith(new + "."):
                rest = key[len(new) + 1 :]
                first, _, last = rest.partition(".")
                renamed = f"{parts[first]}.{last}" if "resnets" in new else rest
                return f"{old}.{renamed}"
    raise AssertionError(key)


def test_a_transformer_over_tokens():
    """Against the original's layers written out: pre-norm, heads of 64, no biases before the output."""
    torch.manual_seed(0)
    width, inner, ids = 16, 512, torch.tensor([[1, 4, 0, 2]])
    new = lambda *shape: torch.randn(*shape) / math.sqrt(shape[-1])  # noqa: E731
    weights = {"token_emb.weight": new(5, width), "pos_emb.emb.weight": new(6, width)}
    for i in range(2):
        own = {"0.weight": new(width), "0.bias": new(width)}
        if i % 2 == 0:
            own |= {f"1.to_{n}.weight": new(inner, width) for n in "qkv"}
            own |= {"1.to_out.weight": new(width, inner), "1.to_out.bias": new(width)}
        else:
            own |= {"1.net.0.0.weight": new(4 * width, width), "1.net.0.0.bias": new(4 * width)}
            own |= {"1.net.2.weight": new(width, 4 * width), "1.net.2.bias": new(width)}
        weights |= {f"attn_layers.layers.{i}.{name}": value for name, value in own.items()}
    weights |= {"norm.weight": new(width), "norm.bias": new(width)}
    weights |= {"to_logits.weight": new(5, width), "to_logits.bias": new(5)}
    state_dict = {f"transformer.{name}": value for name, value in weights.items()}
    params = {"n_embed": width, "n_layer": 1, "vocab_size": 5, "max_seq_len": 6}
    encoder, arguments = convert_bert_embedder(Options(params, "params"), state_dict)
    assert arguments["text_max_length"] == 6 and not arguments["text_mask"]

    x = weights["token_emb.weight"][ids] + weights["pos_emb.emb.weight"][:4]
    get = lambda i, name: weights[f"attn_layers.layers.{i}.{name}"]  # noqa: E731
    h = F.layer_norm(x, (width,), get(0, "0.weight"), get(0, "0.bias"))
    q, k, v = (F.linear(h, get(0, f"1.to_{n}.weight")).view(1, 4, 8, 64).transpose(1, 2) for n in "qkv")
    attended = (q @ k.transpose(2, 3) / 8).softmax(-1) @ v
    x = x + F.linear(attended.transpose(1, 2).flatten(2), get(0, "1.to_out.weight"), get(0, "1.to_out.bias"))
    h = F.layer_norm(x, (width,), get(1, "0.weight"), get(1, "0.bias"))
    h = F.gelu(F.linear(h, get(1, "1.net.0.0.weight"), get(1, "1.net.0.0.bias")))
    x = x + F.linear(h, get(1, "1.net.2.weight"), get(1, "1.net.2.bias"))
    expected = F.layer_norm(x, (width,), weights["norm.weight"], weights["norm.bias"])
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="unknown key cond_stage_model.transformer.more"):
        convert_bert_embedder(Options(params, "params"), {**state_dict, "transformer.more": torch.zeros(1)})


# ------------------------------------------------------------------------------------------- what is refused


def changed(model, path, value):
    model = copy.deepcopy(model)
    *parents, last = path.split(".")
    entry = model["params"]
    for name in parents:
        entry = entry[name]
    entry[last] = value
    return model


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "unet_config.params.num_head_channels",
            "16",
            "-1 or an int of at least 1 as num_head_channels in unet_config, got '16'",
        ),
        ("unet_config.params.num_head_channels", 0, "-1 or an int of at least 1 as num_head_channels"),
        (
            "unet_config.params.channel_mult",
            [],
            r"a list of ints of at least 1 as channel_mult in unet_config, got \[\]",
        ),
        ("unet_config.params.channel_mult", [1, 1.5], "a list of ints of at least 1 as channel_mult"),
        ("unet_config.params.attention_resolutions", 2, "a list of ints of at least 1 as attention_resolutions"),
        ("unet_config.params.model_channels", None, "an int of at least 1 as model_channels"),
        ("unet_config.params.dropout", 2, r"a number in \[0, 1\) as dropout"),
        ("timesteps", 0, "`timesteps` must be an int of at least 1, got 0"),
        ("linear_start", "1e-3", "`linear_start` must be"),
        ("given_betas", 5, "a list of numbers as given_betas, got 5"),
        ("parameterization", ["eps"], r"the parameterization \['eps'\]"),
        ("linear_end", 0.02, "other betas than `config` says"),
        ("parameterization", "v", "parameterization 'v'"),
        ("scale_by_std", True, "lacks scale_factor"),
        ("unet_config.params.resblock_updown", True, "does not fit UNet2DModel: it lacks down_blocks.0.downsamplers"),
        ("surprise", 1, r"names in the model's params that are not known: \['surprise'\]"),
        ("given_betas", [0.1, 0.2], "other betas than `config` says"),
        ("timesteps", 500, "other betas than `config` says"),
        ("beta_schedule", "cosine", "other betas than `config` says"),
        ("beta_schedule", "sigmoid", "the beta_schedule 'sigmoid'; known: cosine, linear, sqrt, sqrt_linear"),
        ("num_timesteps_cond", 2, "must have num_timesteps_cond=None, got 2"),
        ("use_positional_encodings", True, "must have use_positional_encodings=False, got True"),
        ("channels", 4, "channels=4, but the weights in `checkpoint` are of 3"),
        ("scale_factor", 0, "must have a positive scale_factor, got 0"),
        (
            "unet_config.target",
            "ldm.modules.EncoderUNetModel",
            "unet_config of the class EncoderUNetModel; known: UNetModel",
        ),
        ("unet_config", {"target": "ldm.UNetModel"}, "lacks image_size in unet_config"),
        ("first_stage_config", None, "lacks target in model.params.first_stage_config"),
        ("unet_config.params.surprise", 1, r"not known: \['surprise'\]"),
        ("unet_config.params.num_res_blocks", 2, "does not fit UNet2DModel"),
        ("first_stage_config.params.ddconfig.attn_type", "axial", "must have attn_type=vanilla or none or linear"),
    ],
)
def test_what_is_refused(path, value, message):
    model, state_dict = read()
    with pytest.raises(ValueError, match=message):
        convert_model(changed(model, path, value), state_dict)


def test_keys_that_are_refused():
    model, state_dict = read()
    with pytest.raises(ValueError, match="lacks the average model_ema.diffusion_modeltime_embed0weight"):
        convert_model(model, {k: v for k, v in state_dict.items() if not k.endswith("time_embed0weight")})
    with pytest.raises(ValueError, match=r"has scale_factor=0.25, a measured one, but `config` says scale_factor=0.8"):
        convert_model(model, {**state_dict, "scale_factor": torch.tensor(0.25)})
    with pytest.raises(ValueError, match="other alphas_cumprod than `config` says"):
        convert_model(model, {**state_dict, "alphas_cumprod": state_dict["alphas_cumprod"] * 0.99})
    for key, value, message in (
        ("model_ema.surprise", torch.zeros(1), "the average model_ema.surprise of a weight that it does not have"),
        ("model.diffusion_model.time_embed.0.weight", torch.zeros(1), "time_embed.0.weight and its average in two"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_model(model, {**state_dict, key: value})
    with pytest.raises(ValueError, match="it has the unknown key class_embedding.weight"):
        convert_model(model, {**state_dict, "model.diffusion_model.label_emb.weight": torch.zeros(1)}, use_ema=False)
    middle = "model.diffusion_model.middle_block."
    for key, value, message in (
        (f"{middle}7.x", torch.zeros(1), "the unknown key model.diffusion_model.middle_block.7.x"),
        (f"{middle}1.qkv.weight", torch.zeros(5, 1, 1), "has 5 rows for mid_block.attentions.0.qkv.weight"),
        (f"{middle}1.qkv.weight", torch.tensor(1.0), "middle_block.1.qkv.weight as a single number"),
        ("scale_factor", torch.ones(2), r"one number as scale_factor, got shape \(2,\)"),
        (
            "first_stage_model.quantize.embedding.weight",
            torch.zeros(64, 3).int(),
            "in torch.int32 in place of torch.float32",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            convert_model(model, {**state_dict, key: value}, use_ema=False)
    with pytest.raises(ValueError, match="`null_class_id` needs a model with a table of classes"):
        convert_model(model, state_dict, null_class_id=3)


@pytest.mark.parametrize(
    ("params", "reference"),
    [
        ({"beta_schedule": "cosine", "timesteps": 50}, DDIMScheduler(50, beta_schedule="squaredcos_cap_v2")),
        ({"beta_schedule": "sqrt_linear", "timesteps": 50, "linear_start": 0.1}, DDIMScheduler(50, 0.1, 0.02)),
        ({"beta_schedule": "sqrt", "timesteps": 3, "linear_start": 0.01, "linear_end": 0.25},
         DDIMScheduler(3, trained_betas=[0.1, math.sqrt(0.13), 0.5])),
        ({"given_betas": [0.1, 0.3], "timesteps": 1000}, DDIMScheduler(2, trained_betas=[0.1, 0.3])),
    ],
)  # fmt: skip
def test_schedules_with_and_without_buffers(params, reference):
    for state_dict in ({}, {"betas": reference.betas, "alphas_cumprod": reference.alphas_cumprod}):
        scheduler = convert_schedule(params, state_dict)
        torch.testing.assert_close(scheduler.betas, reference.betas, atol=1e-6, rtol=1e-4)
        assert scheduler.config.num_train_timesteps == len(reference.betas)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_in_another_precision(kind, tmp_path):
    """Its weights become float32, as in the original; its tables are rounded too."""
    model, state_dict = read()
    other = {name: value.to(kind) if value.is_floating_point() else value for name, value in state_dict.items()}
    torch.save({"state_dict": other}, tmp_path / "last.ckpt")
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    convert(tmp_path / "last.ckpt", tmp_path / "model.yaml", tmp_path / "out", use_ema=False)
    pipe = VQLatentDiffusionPipeline.from_pretrained(tmp_path / "out")
    bias = other["model.diffusion_model.out.2.bias"].float()
    assert pipe.unet.dtype == pipe.vqvae.dtype == torch.float32 and torch.equal(pipe.unet.conv_out.bias, bias)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": changed(model, "linear_end", 0.0200)}))
    with pytest.raises(ValueError, match="other betas than"):
        convert(tmp_path / "last.ckpt", tmp_path / "model.yaml", tmp_path / "out")


def test_tokenizers_that_cannot_be_read(tmp_path):
    files = [GOLDEN / "ldm_vq_uncond" / name for name in ("checkpoint.ckpt", "config.yaml")]
    with pytest.raises(ValueError, match="`tokenizer` must be a folder with a vocabulary"):
        convert(*files, tmp_path / "out", tokenizer="/nonexistent")
    with pytest.raises(ValueError, match="holds no tokenizer of transformers that can be read"):
        convert(*files, tmp_path / "out", tokenizer=tmp_path)


def test_another_model_with_a_denoiser(tmp_path):
    folder = GOLDEN / "ldm_vq_uncond"
    model, _ = read()
    for name, message in (
        ("DDPM", "a model of the class DDPM, and `checkpoint` a denoiser"),
        ("Layout2ImgDiffusion", None),
    ):
        (tmp_path / "config.yaml").write_text(
            yaml.safe_dump({"model": {**model, "target": f"ldm.models.diffusion.ddpm.{name}"}})
        )
        arguments = (folder / "checkpoint.ckpt", tmp_path / "config.yaml", tmp_path / "out")
        if message is None:
            convert(*arguments)
        else:
            with pytest.raises(ValueError, match=message):
                convert(*arguments)


def test_a_measured_factor_is_read_from_the_checkpoint():
    model, state_dict = read()
    pipe, _ = convert_model(changed(model, "scale_by_std", True), {**state_dict, "scale_factor": torch.tensor(0.25)})
    assert pipe.vqvae.config.scaling_factor == 0.25 and type(pipe.unet) is UNet2DModel
