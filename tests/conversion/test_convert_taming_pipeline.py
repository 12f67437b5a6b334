"""Whole models of the original VQGAN code as pipelines."""

import copy

import pytest
import torch
import yaml

import hf_vq.conversion.convert_taming
import hf_vq.conversion.taming_tokenizer
from hf_vq.conversion.checkpoints import check_keys
from hf_vq.conversion.convert_taming import convert, convert_net2net, main
from hf_vq.conversion.reading import load_state_dict
from hf_vq.models.autoencoders.modeling_vqgan import VQGANModel
from hf_vq.pipelines.pipeline_vq_autoregressive import VQAutoregressivePipeline
from tests.conversion.golden import GOLDEN, Golden, published


@pytest.fixture(scope="module", params=["taming_gpt_uncond", "taming_gpt_class", "taming_gpt_segmentation"])
def case(request, tmp_path_factory):
    """The original's tensors, the pipeline saved and loaded again, its folder, and the keys that were dropped."""
    golden, output = Golden(request.param), tmp_path_factory.mktemp(request.param)
    dropped = convert(golden.folder / "checkpoint.ckpt", golden.folder / "config.yaml", output)
    pipeline = VQAutoregressivePipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    return golden, pipeline, output, dropped


def condition_of(golden):
    """The arguments of the pipeline's call that stand for the case's condition."""
    if golden.name.endswith("uncond"):
        return {"num_images_per_prompt": 2}
    if golden.name.endswith("class"):
        return {"class_labels": golden["c"]}
    return {"condition": golden["c_indices"]}


@torch.no_grad()
def test_tokenizer(case):
    golden, pipeline, *_ = case
    encoded = pipeline.vqvae.encode(golden["x"])
    golden.compare("quant_z", encoded.quantized)
    golden.compare("z_indices", encoded.indices)
    golden.compare("img_rec", pipeline.vqvae.decode_indices(encoded.indices).sample)


@torch.no_grad()
def test_prior(case):
    golden, pipeline, *_ = case
    prior, condition = pipeline.prior, None if golden.name.endswith("uncond") else golden["c_indices"]
    inputs = prior.prepare_inputs(golden["z_indices"], condition)
    assert not prior.training
    golden.compare("all_logits", prior(input_ids=inputs["input_ids"][:, :-1]).logits)
    golden.compare("loss", prior(**inputs).loss)
    golden.compare("shared_step_loss", -prior.log_likelihood(golden["z_indices"], condition).mean() / 16)


@torch.no_grad()
def test_greedy_images(case):
    golden, pipeline, *_ = case
    result = pipeline(**condition_of(golden), top_k=1, output_type="pt")
    golden.compare("greedy", result.indices)
    golden.compare("img_greedy", pipeline.vqvae.decode_indices(result.indices).sample)
    expected = (golden["img_greedy"] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(result.images, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_condition_tokenizer(case):
    golden, pipeline, output, _ = case
    assert (output / "condition_tokenizer").exists() == golden.name.endswith("segmentation")
    if golden.name.endswith("segmentation"):
        tokenizer = VQGANModel.from_pretrained(output / "condition_tokenizer")
        indices = tokenizer.encode(golden["c"]).indices
        golden.compare("c_indices", indices)
        # the pipeline reads the label map itself
        processor = pipeline.condition_processor
        assert processor.num_labels == pipeline.condition_tokenizer.config.in_channels
        found = pipeline(condition_image=list(golden["c"].argmax(dim=1).numpy()), top_k=1, output_type="indices")
        golden.compare("greedy", found.indices)
        golden.compare("cond_rec", tokenizer.decode_indices(indices).sample)


def test_dropped_keys_and_configuration(case):
    golden, pipeline, _, dropped = case
    state_dict = load_state_dict(golden.folder / "checkpoint.ckpt")
    expected = {key for key in state_dict if key.endswith(("attn.mask", "colorize"))}
    assert set(dropped) == expected and all(dropped.values())
    config = pipeline.prior.config
    assert config.grid_size == [4, 4] and config.share_condition_embedding
    # GPT-2's default is 0.1, the original's is none
    assert config.attn_pdrop == config.embd_pdrop == config.resid_pdrop == 0


# ----------------------------------------------------------------------------------------------- published checkpoints


@pytest.mark.parametrize(
    ("name", "length", "vocab_size"),
    [
        ("taming__faceshq_transformer", 256, 1024),
        ("taming__coco_scene_images_transformer", 92, 8192),
        ("taming__open_images_scene_images_transformer", 92, 8192),
    ],
)
def test_every_published_key_has_its_place(name, length, vocab_size, monkeypatch):
    for module in (hf_vq.conversion.convert_taming, hf_vq.conversion.taming_tokenizer):
        monkeypatch.setattr(module, "load_exactly", check_keys)
    model, state_dict = published(name)
    pipeline, condition_tokenizer, dropped = convert_net2net(model, state_dict)
    assert condition_tokenizer is None
    assert set(dropped) == {key for key in state_dict if key.endswith(".attn.mask")}
    config, gpt = pipeline.prior.config, model["params"]["transformer_config"]["params"]
    condition_type = "coordinates" if "faceshq" in name else "codes"
    assert (config.condition_type, config.condition_length) == (condition_type, length)
    assert config.condition_vocab_size == config.codebook_size == vocab_size
    assert config.coordinate_scale == (1024 if "faceshq" in name else None)
    assert config.n_positions == gpt["block_size"] and config.n_layer == gpt["n_layer"]
    assert config.attn_pdrop == gpt.get("attn_pdrop", 0.0)


# -------------------------------------------------------------------------------------------- other parts, and errors


@pytest.fixture
def uncond():
    folder = GOLDEN / "taming_gpt_uncond"
    model = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    return model, load_state_dict(folder / "checkpoint.ckpt")


def test_a_condition_by_the_first_stage(uncond):
    model, state_dict = uncond
    params, first = model["params"], "first_stage_model."
    params["cond_stage_config"] = "__is_first_stage__"
    copies = {
        key.replace(first, "cond_stage_model."): value for key, value in state_dict.items() if key.startswith(first)
    }
    longer = {**state_dict, **copies, "transformer.pos_emb": torch.randn(1, 32, 32)}
    for i in range(2):
        longer[f"transformer.blocks.{i}.attn.mask"] = torch.ones(32, 32).tril()[None, None]
    params["transformer_config"]["params"]["block_size"] = 32
    pipeline, tokenizer, dropped = convert_net2net(model, longer)
    assert tokenizer is None and pipeline.prior.config.condition_length == 16
    assert dropped["cond_stage_model.quant_conv.bias"] == "the image tokenizer once more"
    longer["cond_stage_model.quant_conv.bias"] = torch.zeros(16)
    with pytest.raises(ValueError, match="cond_stage_model that is not the first_stage_model"):
        convert_net2net(model, longer)


@torch.no_grad()
def test_the_order_of_the_codes(uncond):
    golden = Golden("taming_gpt_uncond")
    model, state_dict = copy.deepcopy(uncond[0]), uncond[1]
    model["params"]["permuter_config"] = {
        "target": "taming.modules.transformer.permuter.SpiralIn",
        "params": {"H": 4, "W": 4},
    }
    with pytest.raises(ValueError, match="lacks permuter.forward_shuffle_idx, the order of SpiralIn"):
        convert_net2net(model, state_dict)
    for order in (torch.arange(16).flip(0), torch.randperm(16)):
        shuffled = {
            **state_dict,
            "permuter.forward_shuffle_idx": order,
            "permuter.backward_shuffle_idx": order.argsort(),
        }
        pipeline, _, dropped = convert_net2net(model, shuffled)
        assert "permuter.forward_shuffle_idx" in dropped
        # what the original reads as its sequence is the grid in this order
        grid = golden["z_indices"][:, order.argsort()]
        log_likelihood = pipeline.prior.log_likelihood(grid.view(2, 4, 4))
        golden.compare("loss", -log_likelihood.mean() / 16)
    with pytest.raises(ValueError, match="of 9 positions, which is no order of 4x4 codes"):
        convert_net2net(model, {**state_dict, "permuter.forward_shuffle_idx": torch.arange(9)})


@torch.no_grad()
def test_another_start_token(uncond):
    """The original puts it before the codes; the first code's logits are those after it."""
    model, state_dict = copy.deepcopy(uncond[0]), uncond[1]
    model["params"]["sos_token"] = 3
    prior = convert_net2net(model, state_dict)[0].prior
    assert prior.prepare_condition(batch_size=2).tolist() == [[3], [3]]


def test_coordinates_and_smaller_conditions(uncond):
    """The ends of the coordinates' range are both ids; the size of a condition is that after downsampling."""
    model, state_dict = copy.deepcopy(uncond[0]), uncond[1]
    longer = {**state_dict, "transformer.pos_emb": torch.randn(1, 20, 32)}
    for i in range(2):
        longer[f"transformer.blocks.{i}.attn.mask"] = torch.ones(20, 20).tril()[None, None]
    model["params"]["transformer_config"]["params"]["block_size"] = 20
    coordinates = {"target": "taming.modules.misc.coord.CoordStage", "params": {"n_embed": 31, "down_factor": 8}}
    for stage, size, ids in ((coordinates, -1, 32), ("__is_first_stage__", 8, 32)):
        model["params"] |= {"cond_stage_config": stage, "downsample_cond_size": size, "unconditional": False}
        first = "first_stage_model."
        copies = {k.replace(first, "cond_stage_model."): v for k, v in longer.items() if k.startswith(first)}
        weights = {**longer, **(copies if isinstance(stage, str) else {})}
        config = convert_net2net(model, weights)[0].prior.config
        assert (config.condition_vocab_size, config.condition_length) == (ids, 4)
        assert config.coordinate_scale == (None if isinstance(stage, str) else 31)


@pytest.mark.parametrize(("name", "value"), [("n_layer", 3), ("n_embd", 64), ("vocab_size", 33), ("block_size", 32)])
def test_options_that_contradict_the_weights(name, value, uncond):
    model, state_dict = copy.deepcopy(uncond[0]), uncond[1]
    model["params"]["transformer_config"]["params"][name] = value
    with pytest.raises(ValueError, match=f"transformer_config.{name}={value}, but the weights"):
        convert_net2net(model, state_dict)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"lr": 1}, r"options in model.params that are not known: \['lr'\]"),
        ({"permuter_config": {"target": "a.Other"}}, "a permuter of the class Other; known: Identity"),
        ({"cond_stage_config": "__other__"}, "cond_stage_config that is not known: '__other__'"),
        ({"cond_stage_config": {"target": "a.Other", "params": {}}}, "a first stage of the class a.Other"),
    ],
)
def test_configurations_without_equivalent_are_refused(uncond, params, message):
    model, state_dict = copy.deepcopy(uncond[0]), uncond[1]
    model["params"] |= params
    with pytest.raises(ValueError, match=message):
        convert_net2net(model, state_dict)


def test_keys_without_a_place_are_refused(uncond):
    model, state_dict = uncond
    with pytest.raises(ValueError, match="the key ema.weight, which starts with none of"):
        convert_net2net(model, {**state_dict, "ema.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="__is_unconditional__ does not have: cond_stage_model.extra"):
        convert_net2net(model, {**state_dict, "cond_stage_model.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="the unknown key extra"):
        convert_net2net(model, {**state_dict, "first_stage_model.extra": torch.zeros(1)})


def test_a_whole_model_has_no_discriminator_to_save(tmp_path):
    folder = GOLDEN / "taming_gpt_uncond"
    with pytest.raises(ValueError, match="`--discriminator` needs the checkpoint of a first stage"):
        main(["--checkpoint", f"{folder}/checkpoint.ckpt", "--config", f"{folder}/config.yaml", "--output", str(tmp_path),  # noqa: E501
              "--discriminator"])  # fmt: skip
