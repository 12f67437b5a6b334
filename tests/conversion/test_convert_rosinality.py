"""The tokenizer and the priors of rosinality's VQ-VAE-2."""

import argparse
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor

import hf_vq.conversion.convert_rosinality
from hf_vq.conversion.checkpoints import check_keys
from hf_vq.conversion.convert_rosinality import convert, convert_pixelsnail, convert_vqvae, load, main
from hf_vq.models.autoencoders.modeling_vqvae2 import VQVAE2Model
from hf_vq.models.priors.modeling_pixelsnail import PixelSNAILForCausalLM
from hf_vq.pipelines.pipeline_vqvae2 import VQVAE2Pipeline
from tests.conversion.golden import GOLDEN, Golden, published


CHECKPOINTS = {
    name: GOLDEN / f"rosinality_{name}" / "checkpoint.pt" for name in ("vqvae", "pixelsnail_top", "pixelsnail_bottom")
}
STATISTICS = {"embed": "embedding", "embed_avg": "embed_avg", "cluster_size": "cluster_size"}


def compare_codebooks(golden, model, moment):
    for quantizer, level in zip(model.quantize, "tb", strict=True):
        for name, ours in STATISTICS.items():
            value = getattr(quantizer, ours)
            golden.compare(f"{moment}.{level}.{name}", value.t() if value.ndim == 2 else value)


# ---------------------------------------------------------------------------------------------------- the tokenizer


def test_vqvae_computes_and_learns_the_same(tmp_path):
    golden = Golden("rosinality_vqvae")
    convert(golden.folder / "checkpoint.pt", tmp_path, resolution=32)
    model, x = VQVAE2Model.from_pretrained(tmp_path), golden["x"]
    compare_codebooks(golden, model, "before")

    bottom = model.encoder[1](x)
    golden.compare("enc_b", bottom)
    golden.compare("enc_t", model.encoder[0](bottom))
    encoded, output = model.encode(x), model(x)
    for level, name in enumerate("tb"):
        golden.compare(f"h_{name}", encoded.latents[level])
        golden.compare(f"quant_{name}", encoded.quantized[level])
        golden.compare(f"id_{name}", encoded.indices[level])
    for name in ("diff", "latent_loss"):  # without β
        golden.compare(name, output.commitment_loss.view(1))
    golden.compare("dec", output.sample)
    golden.compare("dec_from_quant", model.decode(encoded.quantized, quantize=False).sample)
    golden.compare("dec_from_code", model.decode_indices(encoded.indices).sample)
    golden.compare("codes_dec", model.decode_indices((golden["codes_t"], golden["codes_b"])).sample)
    golden.compare("train_loss", output.loss)
    output.loss.backward()
    golden.compare("grad_enc_b", model.encoder[1].down[0].weight.grad)
    golden.compare("grad_dec", model.decoder.conv_in.weight.grad)

    quantized = []
    for quantizer in model.quantize:
        quantizer.register_forward_hook(lambda _, inputs, output: quantized.append(output.quantized))
    output = model.train()(x)
    assert len(quantized) == 2
    for level, name in enumerate("tb"):
        golden.compare(f"train.quant_{name}", quantized[level])
        golden.compare(f"train.id_{name}", output.indices[level])
    golden.compare("train.diff", output.commitment_loss.view(1))
    golden.compare("train.dec", output.sample)
    compare_codebooks(golden, model, "after")
    golden.assert_all_compared()


def test_a_code_with_no_count_keeps_its_vector():
    """Where counts began at 0, the original divides the codes that are not used by almost 0."""
    state_dict, _ = load(CHECKPOINTS["vqvae"])
    for level in "tb":
        state_dict[f"quantize_{level}.cluster_size"] = torch.zeros(64)
    model = convert_vqvae(state_dict, resolution=32).train()
    before = [quantizer.codebook.clone() for quantizer in model.quantize]
    indices = model(Golden("rosinality_vqvae")["x"]).indices
    for quantizer, codes, used in zip(model.quantize, before, indices, strict=True):
        unused = torch.bincount(used.flatten(), minlength=64) == 0
        assert unused.any() and torch.equal(quantizer.codebook[unused], codes[unused])


# ---------------------------------------------------------------------------------------------------- the priors


@pytest.fixture(scope="module", params=["top", "bottom"])
def prior_case(request, tmp_path_factory):
    """The original's tensors, the prior saved and loaded again, and the arguments that condition it."""
    golden, output = Golden(f"rosinality_pixelsnail_{request.param}"), tmp_path_factory.mktemp(request.param)
    dropped = convert(golden.folder / "checkpoint.pt", output)
    assert dropped == {"checkpoint: background": "the positions on the grid, which are computed"}
    prior = PixelSNAILForCausalLM.from_pretrained(output)
    above = {"condition_indices": golden["condition"]} if request.param == "bottom" else {}
    return golden, prior, above


@torch.no_grad()
def test_prior_computes_the_same(prior_case):
    golden, prior, above = prior_case
    height, width = prior.config.grid_size

    def as_map(logits):
        return logits.unflatten(1, (-1, width)).movedim(-1, 1)

    for name, codes in (("logits", "codes"), ("greedy_logits", "greedy")):
        golden.compare(name, as_map(prior(**prior.prepare_inputs(golden[codes]), **above).logits))
    ids = prior.prepare_inputs(golden["codes"])["input_ids"]
    golden.compare("logits_first_rows", as_map(prior(ids[:, : height // 2 * width], **above).logits))
    golden.compare("loss", prior(**prior.prepare_inputs(golden["codes"]), **above).loss)
    golden.compare("loss", -prior.log_likelihood(golden["codes"], **above).mean() / (height * width))
    for use_cache in (True, False):
        prompt = prior.prepare_condition(batch_size=2)
        sequences = prior.generate(prompt, do_sample=False, use_cache=use_cache, **above)
        golden.compare("greedy", prior.extract_indices(sequences))
    if above:
        features = prior.encode_condition(prompt[:, 0], golden["condition"])
        golden.compare("cond_features", features.repeat_interleave(2, 1).repeat_interleave(2, 2).movedim(-1, 1))
    golden.assert_all_compared()


def test_prior_goes_on_training(prior_case):
    """The weights stay length and direction, with the original's dropout."""
    golden, prior, above = prior_case
    state_dict, arguments = load(golden.folder / "checkpoint.pt")
    assert prior.config.dropout == arguments["dropout"] == 0.1
    weight_v = state_dict["blocks.0.resblocks.0.conv1.conv.conv.weight_v"]
    assert weight_v[:, :, -1, 2:].any(), "the original zeroes these taps only when it uses them"
    conv = prior.blocks[0].residual_blocks[0].conv1
    assert torch.equal(conv.above.parametrizations.weight.original1, weight_v[:, :, :-1])
    assert torch.equal(conv.left.parametrizations.weight.original1, weight_v[:, :, -1:, :2])
    prior(**prior.prepare_inputs(golden["codes"]), **above).loss.backward()
    assert all(parameter.grad is not None for parameter in prior.parameters())
    prior.zero_grad()


# ---------------------------------------------------------------------------------------------------- all together


def fitting_vqvae(folder):
    """The tokenizer with the 32 codes that the priors' case has, from a distributed run."""
    state_dict, _ = load(CHECKPOINTS["vqvae"])
    state_dict = {
        f"module.{key}": value[..., :32].clone()
        if key.startswith("quantize_") and "embed" in key or "cluster" in key
        else value
        for key, value in state_dict.items()
    }
    torch.save(state_dict, folder / "vqvae.pt")
    return folder / "vqvae.pt"


def test_pipeline_folder(tmp_path, capsys):
    checkpoint, output = fitting_vqvae(tmp_path), tmp_path / "pipeline"
    top, bottom = CHECKPOINTS["pixelsnail_top"], CHECKPOINTS["pixelsnail_bottom"]
    main(["--checkpoint", str(checkpoint), "--top", str(top), "--bottom", str(bottom), "--output", str(output)])
    assert "background" in capsys.readouterr().out
    pipeline = VQVAE2Pipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    assert AutoImageProcessor.from_pretrained(output / "vqvae").size["shortest_edge"] == 32
    result = pipeline(num_images_per_prompt=2, top_k=1, output_type="pt")
    assert torch.equal(result.indices[0], Golden("rosinality_pixelsnail_top")["greedy"])
    golden = Golden("rosinality_pixelsnail_bottom")
    result = pipeline(top_indices=golden["condition"], top_k=1, output_type="pt")
    assert torch.equal(result.indices[1], golden["greedy"]) and result.images.shape == (2, 3, 32, 32)


def test_what_does_not_belong_together(tmp_path):
    vqvae, top, bottom = CHECKPOINTS.values()
    for arguments, message in (
        ({"checkpoint": vqvae, "top": top}, "given together"),
        ({"checkpoint": top, "top": top, "bottom": bottom}, "must hold a VQVAE"),
        ({"checkpoint": top, "resolution": 32}, "must hold a VQVAE"),
        ({"checkpoint": vqvae, "resolution": 0}, "`resolution` must be positive, got 0"),
        ({"checkpoint": vqvae, "top": vqvae, "bottom": bottom}, "`top`.*holds no PixelSNAIL"),
        ({"checkpoint": vqvae, "top": top, "bottom": bottom}, "as many codes"),
        ({"checkpoint": fitting_vqvae(tmp_path), "top": bottom, "bottom": top}, "conditioning_grid_size|grid"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(output=tmp_path / "output", **arguments)


def test_every_published_key_has_its_place(monkeypatch):
    monkeypatch.setattr(hf_vq.conversion.convert_rosinality, "load_exactly", check_keys)
    config = convert_vqvae(published("rosinality__vqvae")[1]).config
    assert (config.hidden_size, config.residual_hidden_size, config.num_residual_layers) == (128, 32, 2)
    assert (config.num_embeddings, config.embed_dim, config.resolution) == (512, 64, 256)
    assert config.quantizer_kwargs["decay"] == 0.99 and config.commitment_cost == 0.25

    top, bottom = (
        convert_pixelsnail(published(f"rosinality__pixelsnail_{name}")[1])[0].config for name in ("top", "bottom")
    )
    for config in (top, bottom):
        assert (config.codebook_size, config.hidden_size, config.res_channels, config.kernel_size) == (
            512,
            256,
            256,
            5,
        )
        assert (config.num_blocks, config.num_res_blocks, config.num_output_res_blocks) == (4, 4, 0)
        assert config.num_attention_heads == 8 and config.condition_type == "unconditional"
    assert top.grid_size == [32, 32] and top.attention and top.conditioning_grid_size is None
    assert bottom.grid_size == [64, 64] and not bottom.attention and bottom.conditioning_grid_size == [32, 32]
    assert (bottom.num_conditioning_res_blocks, bottom.conditioning_channels) == (3, 256)


def test_every_key_counts():
    vqvae, _ = load(CHECKPOINTS["vqvae"])
    prior, _ = load(CHECKPOINTS["pixelsnail_bottom"])
    for call, state_dict, unknown, needed in (
        (
            convert_vqvae,
            vqvae,
            "enc_b.blocks.9.weight",
            ("dec.blocks.6.bias", "quantize_b.embed_avg"),
        ),
        (
            convert_pixelsnail,
            prior,
            "blocks.0.gate.weight_v",
            ("out.1.conv.bias", "horizontal.conv.conv.weight_v", "blocks.1.out.conv.weight_g"),
        ),
    ):
        with pytest.raises(ValueError, match=f"the key {unknown}"):
            call({**state_dict, unknown: torch.zeros(1)})
        for key in needed:
            with pytest.raises(ValueError, match="lacks"):
                call({name: value for name, value in state_dict.items() if name != key})


def test_containers(tmp_path):
    weights = {"module.background": torch.zeros(1)}
    for number, args in enumerate((argparse.Namespace(dropout=0.2), {"dropout": 0.2})):
        torch.save({"model": weights, "args": args}, tmp_path / f"{number}.pt")
        assert load(tmp_path / f"{number}.pt") == ({"background": weights["module.background"]}, {"dropout": 0.2})
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must hold a dict of weights, got a list"):
        load(tmp_path / "list.pt")


def test_greyscale(tmp_path):
    """Grey images have an image processor of their own."""
    state_dict, _ = load(CHECKPOINTS["vqvae"])
    first, last = "enc_b.blocks.0.weight", "dec.blocks.6"
    state_dict[first] = state_dict[first][:, :1].clone()
    state_dict[f"{last}.weight"] = state_dict[f"{last}.weight"][:, :1].clone()
    state_dict[f"{last}.bias"] = state_dict[f"{last}.bias"][:1].clone()
    torch.save(state_dict, tmp_path / "vqvae.pt")
    convert(tmp_path / "vqvae.pt", tmp_path / "output", resolution=32)
    model = VQVAE2Model.from_pretrained(tmp_path / "output")
    assert model(torch.randn(1, 1, 32, 32)).sample.shape == (1, 1, 32, 32)
    assert AutoImageProcessor.from_pretrained(tmp_path / "output").num_channels == 1


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 5])
def test_size_of_the_conditioning_kernels(size):
    """With the golden kernels in the middle of larger ones nothing changes; those of 1×1 see no neighbours."""
    golden = Golden("rosinality_pixelsnail_bottom")
    state_dict, _ = load(CHECKPOINTS["pixelsnail_bottom"])
    keys = [
        key for key in state_dict if key.startswith("cond_resnet.") and state_dict[key].ndim == 4 and "weight_v" in key
    ]
    keys = [key for key in keys if state_dict[key].shape[-1] == 3]
    for key in keys:
        weight = state_dict[key]
        state_dict[key] = F.pad(weight, [1] * 4) if size == 5 else weight[:, :, 1:2, 1:2].clone()
    model, _ = convert_pixelsnail(state_dict)
    assert model.config.conditioning_kernel_size == size
    above = golden["condition"]
    features = model.encode_condition(torch.zeros(2, dtype=torch.int64) + model.config.codebook_size, above)
    if size == 5:
        golden.compare("cond_features", features.repeat_interleave(2, 1).repeat_interleave(2, 2).movedim(-1, 1))
    else:
        changed = above.clone()
        changed[:, 0, 0] = (changed[:, 0, 0] + 1) % 32
        others = model.encode_condition(torch.zeros(2, dtype=torch.int64) + model.config.codebook_size, changed)
        assert (features != others).any(-1).sum() == 2


def test_arguments_of_blocks_that_are_not_there(tmp_path):
    """A width of no blocks is nothing that the weights could show."""
    vqvae, _ = load(CHECKPOINTS["vqvae"])
    vqvae = {key: value for key, value in vqvae.items() if ".conv." not in key}
    for level, old, new in (("dec_t", 4, 2), ("dec", 4, 2), ("dec", 6, 4)):
        for name in ("weight", "bias"):
            vqvae[f"{level}.blocks.{new}.{name}"] = vqvae.pop(f"{level}.blocks.{old}.{name}")
    prior, _ = load(CHECKPOINTS["pixelsnail_top"])
    prior = {key: value for key, value in prior.items() if ".resblocks." not in key and not key.startswith("out.0.")}
    prior = {key.replace("out.2.", "out.1."): value for key, value in prior.items()}
    cases = {"n_res_block": 0, "n_res_channel": 64}, {"n_res_block": 0, "n_out_res_block": 0, "res_channel": 64}
    for weights, arguments in zip((vqvae, prior), cases, strict=True):
        torch.save(weights, tmp_path / "weights.pt")
        (tmp_path / "config.json").write_text(json.dumps(arguments))
        convert(tmp_path / "weights.pt", tmp_path / "output", config=tmp_path / "config.json")
        shutil.rmtree(tmp_path / "output")


@torch.no_grad()
def test_a_prior_that_could_be_conditioned_but_is_not():
    """The original makes these weights for `cond_res_channel`, and uses them where a level above is given."""
    prior, _ = load(CHECKPOINTS["pixelsnail_bottom"])
    prior = {key: value for key, value in prior.items() if not key.startswith("cond_resnet.")}
    model, dropped = convert_pixelsnail(prior)
    of_condition = {key for key in prior if ".condition." in key}
    assert of_condition and dropped.keys() == {"background", *of_condition}
    plain, _ = convert_pixelsnail({key: value for key, value in prior.items() if key not in of_condition})
    ids = model.prepare_inputs(torch.randint(32, (1, *model.config.grid_size)))["input_ids"]
    assert torch.equal(model(ids).logits, plain(ids).logits)


class Other:
    """What no checkpoint of the original holds."""


def test_only_what_is_safe_is_read(tmp_path):
    for number, extra in enumerate((Other(), argparse.ArgumentParser)):
        torch.save({"model": {}, "args": argparse.Namespace(extra=extra)}, tmp_path / f"{number}.pt")
        with pytest.raises(ValueError, match="not on the list that is safe to read"):
            load(tmp_path / f"{number}.pt")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
