"""Options of the original VQGAN code that no golden case has, against its own arithmetic written out over its weights
(`original_networks.py`).
"""

import copy

import pytest
import torch
import torch.nn.functional as F
import yaml

from hf_vq.conversion.convert_taming import convert, convert_net2net
from hf_vq.conversion.reading import load_state_dict
from hf_vq.conversion.taming_tokenizer import convert_tokenizer
from hf_vq.models.autoencoders.modeling_vqgan import VQGANModel
from hf_vq.models.priors.code_orders import CODE_ORDERS, code_order
from hf_vq.models.priors.modeling_vq_gpt import VQGPTForCausalLM
from hf_vq.pipelines.pipeline_vq_autoregressive import VQAutoregressivePipeline
from tests.conversion.golden import GOLDEN, Golden
from tests.conversion.original_networks import decode, encode, gpt, greedy


HEADS = 4


def read(case):
    folder = GOLDEN / case
    return yaml.safe_load((folder / "config.yaml").read_text())["model"], load_state_dict(folder / "checkpoint.ckpt")


def of_part(state_dict, prefix):
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def with_sequence(model, state_dict, length, n_unmasked=0):
    """The same GPT with `length` positions, which are all new, and another mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(length, length).tril()
    mask[:n_unmasked, :n_unmasked] = 1
    changed = {**state_dict, "transformer.pos_emb": 0.3 * torch.randn(1, length, 32, generator=generator)}
    changed |= {f"transformer.blocks.{i}.attn.mask": mask[None, None] for i in range(2)}
    model["params"]["transformer_config"]["params"] |= {"block_size": length, "n_unmasked": n_unmasked}
    return changed


def same(actual, expected):
    assert expected.std() > 0.01
    atol = 1e-5 * max(1, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# First stages
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("ldm.models.autoencoder", {"tanh_out": True}),
        ("ldm.models.autoencoder", {"give_pre_end": True, "tanh_out": True}),
        ("taming.models.vqgan", {"give_pre_end": True}),
        ("taming.models.vqgan", {"resamp_with_conv": False}),
        # that code of taming's has no such option, and ignores it as every other name
        ("taming.models.vqgan", {"tanh_out": True}),
        ("image_synthesis.taming.models.vqgan", {"tanh_out": True, "attn_type": "none"}),
    ],
)
@torch.no_grad()
def test_networks(module, options):
    model, state_dict = read("taming_vqmodel_f2_plcallback")
    model = copy.deepcopy(model)
    model["target"] = f"{module}.VQModel"
    model["params"]["ddconfig"] |= options
    has_conv = options.get("resamp_with_conv", True)
    weights = {key: value for key, value in state_dict.items() if has_conv or "sample.conv" not in key}
    tokenizer, _ = convert_tokenizer(model, weights)
    x = Golden("taming_vqmodel_f2_plcallback")["x"]
    latents = encode(weights, x, levels=2)
    same(tokenizer.encode(x).latents, latents)
    codes = weights["quantize.embedding.weight"]
    indices = torch.cdist(latents.movedim(1, -1).flatten(0, -2), codes).argmin(1).view(-1, 8, 8)
    assert torch.equal(tokenizer.encode(x).indices, indices)
    last = {name: options.get(name, False) for name in ("give_pre_end", "tanh_out")}
    last["tanh_out"] &= module.startswith("ldm")
    expected = decode(weights, codes[indices].movedim(-1, 1), 2, **last)
    assert expected.shape[1] == (32 if last["give_pre_end"] else 3)
    same(tokenizer.decode_indices(indices).sample, expected)


@torch.no_grad()
def test_the_prior_of_a_gumbel_codebook_that_was_cut_down():
    """The divergence is that from all codes, of which the weights in use are a part."""
    golden = Golden("taming_gumbel")
    model, state_dict = read("taming_gumbel")
    model = copy.deepcopy(model)
    model["params"]["remap"] = "used.npy"
    used = torch.tensor([30, 2, 17, 5, 11])
    tokenizer, _ = convert_tokenizer(model, {**state_dict, "quantize.used": used})
    q = golden["logits"][:, used].softmax(1)
    expected = 5e-4 * (q * (q * 32 + 1e-10).log()).sum(1).mean()
    torch.testing.assert_close(tokenizer.quantize(golden["h"]).loss, expected, atol=1e-7, rtol=1e-4)


@torch.no_grad()
def test_moving_averages_that_are_renumbered():
    golden = Golden("taming_vqmodel_f2_plcallback")
    model, state_dict = read("taming_vqmodel_f2_plcallback")
    model = copy.deepcopy({**model, "target": "taming.models.vqgan.EMAVQ"})
    model["params"]["remap"] = "used.npy"
    codes, used = state_dict["quantize.embedding.weight"], golden["indices"].unique().flip(0)
    more = {"quantize.embedding.cluster_size": torch.ones(len(codes)), "quantize.embedding.embed_avg": codes.clone()}
    tokenizer, _ = convert_tokenizer(model, {**state_dict, **more, "quantize.used": used})
    assert torch.equal(used[tokenizer.encode(golden["x"]).indices].flatten(), golden["indices"])


# ---------------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_unmasked", [0, 5, 16])
@pytest.mark.parametrize("sos_token", [0, 7])
@torch.no_grad()
def test_start_token_and_open_positions(sos_token, n_unmasked):
    """Positions that see each other beyond the prefix: each code changes what was computed before it."""
    golden = Golden("taming_gpt_uncond")
    model, state_dict = read("taming_gpt_uncond")
    model = copy.deepcopy(model)
    model["params"]["sos_token"] = sos_token
    state_dict = with_sequence(model, state_dict, 16, n_unmasked)
    prior, weights = convert_net2net(model, state_dict)[0].prior, of_part(state_dict, "transformer.")
    prefix = torch.full((2, 1), sos_token)
    inputs = prior.prepare_inputs(golden["z_indices"])["input_ids"][:, :-1]
    assert torch.equal(inputs[:, :1], prefix)
    same(prior(input_ids=inputs).logits, gpt(weights, inputs, HEADS, n_unmasked))
    found = prior.extract_indices(prior.generate(prior.prepare_condition(batch_size=2), do_sample=False)).flatten(1)
    assert torch.equal(found, greedy(weights, prefix, 16, HEADS, n_unmasked))


PERMUTERS = {"raster": "Identity", "alternate": "AlternateParsing", "subsample": "Subsample", "z-curve": "ZCurve"}
PERMUTERS |= {"spiral-out": "SpiralOut", "spiral-in": "SpiralIn", "random": "Random"}


@pytest.mark.parametrize("order", CODE_ORDERS)
@torch.no_grad()
def test_permuters(order, tmp_path):
    """Codes are permuted before the GPT, and back before they are decoded."""
    golden = Golden("taming_gpt_uncond")
    model, state_dict = read("taming_gpt_uncond")
    model["params"]["permuter_config"] = {"target": f"taming.modules.transformer.permuter.{PERMUTERS[order]}"}
    forward = torch.tensor(code_order(order, 4, 4))
    if order != "raster":
        model["params"]["permuter_config"]["params"] = {"H": 4, "W": 4}
        state_dict |= {"permuter.forward_shuffle_idx": forward, "permuter.backward_shuffle_idx": forward.argsort()}
    torch.save({"state_dict": state_dict}, tmp_path / "last.ckpt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    convert(tmp_path / "last.ckpt", tmp_path / "config.yaml", tmp_path / "out")
    pipeline = VQAutoregressivePipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.prior.config.order == order
    weights, prefix = of_part(state_dict, "transformer."), torch.zeros(2, 1, dtype=torch.int64)
    z = pipeline.vqvae.encode(golden["x"]).indices
    expected = gpt(weights, torch.cat([prefix, z.flatten(1)[:, forward]], dim=1)[:, :-1], HEADS)
    same(pipeline.prior(input_ids=pipeline.prior.prepare_inputs(z)["input_ids"][:, :-1]).logits, expected)
    drawn = greedy(weights, prefix, 16, HEADS)[:, forward.argsort()].view(2, 4, 4)
    assert torch.equal(pipeline(num_images_per_prompt=2, top_k=1, output_type="pt").indices, drawn)


@pytest.mark.parametrize("part", [None, "tokenizer", "prior", "condition_tokenizer"])
@torch.no_grad()
def test_a_condition_with_its_own_table_and_size(part, tmp_path):
    """Maps are resized by nearest neighbours, encoded, and their codes renumbered by the condition's own table."""
    golden = Golden("taming_gpt_segmentation")
    model, state_dict = read("taming_gpt_segmentation")
    model["params"]["downsample_cond_size"] = 8
    model["params"]["cond_stage_config"]["params"]["remap"] = "used.npy"
    state_dict = with_sequence(model, state_dict, 20)
    small = F.interpolate(golden["c"], size=(8, 8))
    stage = of_part(state_dict, "cond_stage_model.")
    latents = encode(stage, small, levels=3).movedim(1, -1).flatten(0, -2)
    full = torch.cdist(latents, stage["quantize.embedding.weight"]).argmin(1)
    used = full.unique().flip(0)
    c_indices = (full[:, None] == used).long().argmax(1).view(2, 4)
    state_dict["cond_stage_model.quantize.used"] = used
    torch.save({"state_dict": state_dict}, tmp_path / "last.ckpt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    out = tmp_path / "out"
    convert(tmp_path / "last.ckpt", tmp_path / "config.yaml", out, part=part)
    if part in (None, "condition_tokenizer"):
        tokenizer = VQGANModel.from_pretrained(out / "condition_tokenizer" if part is None else out)
        assert torch.equal(tokenizer.encode(small).indices.flatten(1), c_indices)
    if part == "tokenizer":
        assert torch.equal(VQGANModel.from_pretrained(out).encode(golden["x"]).indices.flatten(1), golden["z_indices"])
    if part in (None, "prior"):
        prior = VQGPTForCausalLM.from_pretrained(out, **({"subfolder": "prior"} if part is None else {}))
        assert (prior.config.condition_vocab_size, prior.config.condition_length) == (len(used), 4)
        inputs = prior.prepare_inputs(golden["z_indices"], c_indices)["input_ids"][:, :-1]
        assert torch.equal(inputs, torch.cat([c_indices, golden["z_indices"]], dim=1)[:, :-1])
        same(prior(input_ids=inputs).logits, gpt(of_part(state_dict, "transformer."), inputs, HEADS))


@torch.no_grad()
def test_coordinates():
    """Their mean over squares, times `n_embed`, rounded: both ends are ids."""
    model, state_dict = read("taming_gpt_uncond")
    model = copy.deepcopy(model)
    state_dict = with_sequence(model, state_dict, 20)
    model["params"]["cond_stage_config"] = {
        "target": "taming.modules.misc.coord.CoordStage",
        "params": {"n_embed": 31, "down_factor": 8},
    }
    prior = convert_net2net(model, state_dict)[0].prior
    coordinates = torch.linspace(0, 1, 256).view(1, 1, 16, 16).repeat(2, 1, 1, 1)
    coordinates[1] = 1.0
    ids = (31 * F.interpolate(coordinates, scale_factor=1 / 8, mode="area").clamp(0, 1)).round().long().flatten(1)
    assert ids.max() == 31
    codes = Golden("taming_gpt_uncond")["z_indices"]
    inputs = prior.prepare_inputs(codes, ids)["input_ids"][:, :-1]
    same(prior(input_ids=inputs).logits, gpt(of_part(state_dict, "transformer."), inputs, HEADS))


@torch.no_grad()
def test_a_vocabulary_beyond_the_codebook():
    """Its columns count in a likelihood, and are not drawn."""
    golden = Golden("taming_gpt_uncond")
    model, state_dict = read("taming_gpt_uncond")
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    model["params"]["transformer_config"]["params"]["vocab_size"] = 40
    for name in ("tok_emb", "head"):
        rows = torch.randn(8, 32, generator=generator)
        key = f"transformer.{name}.weight"
        state_dict[key] = torch.cat([state_dict[key], rows])
    prior, weights = convert_net2net(model, state_dict)[0].prior, of_part(state_dict, "transformer.")
    inputs = torch.cat([torch.zeros(2, 1, dtype=torch.int64), golden["z_indices"]], dim=1)
    logits = gpt(weights, inputs[:, :-1], HEADS)
    assert logits.shape[-1] == 40
    expected = logits.log_softmax(-1).gather(-1, golden["z_indices"][..., None]).sum((1, 2))
    torch.testing.assert_close(prior.log_likelihood(golden["z_indices"]), expected, atol=1e-4, rtol=1e-5)
    assert prior.generate(prior.prepare_condition(batch_size=64), do_sample=True)[:, 1:].max() < 32


def test_who_asks_first():
    """`unconditional` with the first stage as the condition's is conditional in the original."""
    model, state_dict = read("taming_gpt_uncond")
    model = copy.deepcopy(model)
    state_dict = with_sequence(model, state_dict, 32)
    state_dict |= {f"cond_stage_model.{key}": v for key, v in of_part(state_dict, "first_stage_model.").items()}
    model["params"] |= {"cond_stage_config": "__is_first_stage__", "unconditional": True}
    assert convert_net2net(model, state_dict)[0].prior.config.condition_type == "codes"
    for name, value, message in (
        ("pkeep", 0.0, r"must have a pkeep in \(0, 1\], got 0.0"),
        ("sos_token", 32, "a sos_token below the GPT's vocabulary of 32, got 32"),
        ("downsample_cond_size", -2, "an int of at least -1 as downsample_cond_size"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_net2net({**model, "params": {**model["params"], name: value}}, state_dict)


def test_parts_that_are_not_there(tmp_path):
    folder = GOLDEN / "taming_gpt_uncond"
    with pytest.raises(ValueError, match="`part` must be one of tokenizer, prior, pipeline: the files make no other"):
        convert(folder / "checkpoint.ckpt", folder / "config.yaml", tmp_path / "out", part="condition_tokenizer")
    folder = GOLDEN / "taming_vqmodel_f4"
    with pytest.raises(ValueError, match="`part` must be one of tokenizer: .* got 'prior'"):
        convert(folder / "checkpoint.ckpt", folder / "config.yaml", tmp_path / "out", part="prior")
    assert not list(tmp_path.iterdir())
