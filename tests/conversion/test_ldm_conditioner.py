"""The conditioning stages of latent diffusion: exact, or refused with the option and the reason."""

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from hf_vq.conversion.convert_latent_diffusion import check_params
from hf_vq.conversion.ldm_conditioner import CONDITIONING_KEYS, convert_clip_embedder, convert_conditioner
from hf_vq.conversion.reading import Options
from hf_vq.pipelines.conditioning import resize_map


MODULES = "ldm.modules.encoders.modules."


def params_of(stage, key, arguments=None, **unet):
    section = {"target": MODULES + stage, "params": arguments or {}}
    return {
        "conditioning_key": key,
        "cond_stage_config": section,
        "unet_config": {"target": "UNetModel", "params": unet},
    }


def convert(params, weights, live=None, null_class_id=None, tokenizer=None):
    return convert_conditioner(params, weights, live or {}, 3, null_class_id, tokenizer)


# ------------------------------------------------------------------------------------------- how it reaches the
# denoiser


@pytest.mark.parametrize("key", ["concat", "crossattn", "hybrid", "adm"])
@pytest.mark.parametrize(
    "stage", [name for name in CONDITIONING_KEYS if not name.startswith("__") and name != "Identity"]
)
def test_every_stage_has_its_key(stage, key):
    if key in CONDITIONING_KEYS[stage]:
        return
    with pytest.raises(
        ValueError, match=f"must have conditioning_key={CONDITIONING_KEYS[stage][0]} for its {stage}, got '{key}'"
    ):
        convert(params_of(stage, key), {})


@pytest.mark.parametrize(
    ("key", "unet", "message"),
    [
        (
            "crossattn",
            {},
            "must have use_spatial_transformer in unet_config, since its condition is 'crossattn', got None",
        ),
        ("concat", {"use_spatial_transformer": True}, "must not have use_spatial_transformer in unet_config"),
        ("adm", {}, "must have num_classes in unet_config, since its condition is 'adm'"),
        ("concat", {"num_classes": 5}, "must not have num_classes in unet_config"),
    ],
)
def test_the_denoiser_takes_the_condition(key, unet, message):
    with pytest.raises(ValueError, match=message):
        convert(params_of("Identity", key, **unet), {})


def test_what_stands_beside_target_and_params():
    """The original reads neither a learning rate there nor anything else, of no part."""
    params = params_of("SpatialRescaler", "concat")
    params["first_stage_config"] = {"target": "ldm.models.autoencoder.VQModelInterface"}
    for name in ("first_stage_config", "cond_stage_config", "unet_config"):
        params[name] = {"base_learning_rate": 1e-6, **params[name]}
    check_params(params)
    assert convert(params, {}) == ({}, {}, {})


def test_classes_of_the_denoiser_itself():
    changes, arguments, dropped = convert(params_of("Identity", "adm", num_classes=5), {}, null_class_id=4)
    assert (changes, arguments, dropped) == ({}, {"null_class_id": 4}, {})


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ("FrozenCLIPTextEmbedder", "since it gives one state for a whole text"),
        ("FrozenClipImageEmbedder", "since its condition is an image"),
        ("Surprise", "no equivalent here: Surprise; known: BERTEmbedder"),
    ],
)
def test_stages_without_equivalent(stage, reason):
    with pytest.raises(ValueError, match=reason):
        convert(params_of(stage, "crossattn"), {})


# ------------------------------------------------------------------------------------------- classes


CROSS = {"use_spatial_transformer": True, "context_dim": 4}


@pytest.mark.parametrize(
    ("arguments", "weights", "message"),
    [
        ({"embed_dim": 4}, {"embedding.weight": (5, 4)}, "n_classes=1000, but the weights in `checkpoint` are of 5"),
        ({"embed_dim": 8, "n_classes": 5}, {"embedding.weight": (5, 4)}, "embed_dim=8, but the weights .* are of 4"),
        ({"embed_dim": 6, "n_classes": 5}, {"embedding.weight": (5, 6)}, "context_dim=4, but the weights .* are of 6"),
        ({"embed_dim": 4, "n_classes": 5, "more": 1}, {"embedding.weight": (5, 4)}, r"not known: \['more'\]"),
        ({"embed_dim": 4, "n_classes": 5}, {}, "lacks the key cond_stage_model.embedding.weight"),
        ({"embed_dim": 4, "n_classes": 5}, {"embedding.weight": (5, 4), "x": (1,)}, "unknown key cond_stage_model.x"),
    ],
)
def test_a_class_table_that_contradicts(arguments, weights, message):
    with pytest.raises(ValueError, match=message):
        convert(
            params_of("ClassEmbedder", "crossattn", arguments, **CROSS),
            {k: torch.zeros(s) for k, s in weights.items()},
        )


@pytest.mark.parametrize(("rows", "more", "given", "null"), [(5, {}, None, None), (5, {"ucg_rate": 0.1}, None, 4), (5, {}, 2, 2),  # noqa: E501
                                                              (1001, {}, None, 1000)])  # fmt: skip
def test_the_null_class(rows, more, given, null):
    arguments = {"embed_dim": 4, "n_classes": rows, "key": "class_label", **more}
    _, pipeline, _ = convert(
        params_of("ClassEmbedder", "crossattn", arguments, **CROSS),
        {"embedding.weight": torch.zeros(rows, 4)},
        null_class_id=given,
    )
    assert pipeline == {"null_class_id": null}


# ------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("arguments", [{"n_stages": 2}, {"n_stages": 1, "method": "area", "multiplier": 0.25}, {"n_stages": 3},  # noqa: E501
                                       {"n_stages": 0, "method": "bicubic"}])  # fmt: skip
def test_maps_are_resized_as_the_original_does(arguments):
    assert convert(params_of("SpatialRescaler", "concat", arguments), {}) == ({}, {}, {})
    options = {"n_stages": 1, "method": "bilinear", "multiplier": 0.5, **arguments}
    maps = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    expected = maps
    for _ in range(options["n_stages"]):
        expected = F.interpolate(expected, scale_factor=options["multiplier"], mode=options["method"])
    torch.testing.assert_close(resize_map(maps, expected.shape[-2:]), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("arguments", [{"method": "nearest"}, {"method": "bicubic", "n_stages": 2}, {"multiplier": 2},
                                       {"method": "area", "multiplier": 0.3}, {"multiplier": 0.25}])  # fmt: skip
def test_other_ways_to_resize_are_the_pipelines_stages(arguments):
    changes, options, _ = convert(params_of("SpatialRescaler", "concat", arguments), {})
    expected = {"method": "bilinear", "multiplier": 0.5, "n_stages": 1, **arguments}
    assert (changes, options) == ({}, {"condition_stages": expected})


MAPPER = {"channel_mapper.weight": torch.zeros(2, 7, 1, 1)}
BIASED = {**MAPPER, "channel_mapper.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    ("arguments", "weights", "message"),
    [
        ({"method": "trilinear"}, {}, "must have method=nearest or bilinear or bicubic or area in .* got 'trilinear'"),
        ({"multiplier": "2"}, {}, "must have a number of at least 0 as multiplier in .*, got '2'"),
        (
            {"in_channels": 7, "out_channels": 2, "bias": True},
            MAPPER,
            "lacks the key cond_stage_model.channel_mapper.b",
        ),
        ({"in_channels": 7, "out_channels": 2}, BIASED, "unknown key cond_stage_model.channel_mapper.bias beside"),
        ({"in_channels": 6, "out_channels": 2}, MAPPER, "in_channels=6, but the weights in `checkpoint` are of 7"),
        ({"in_channels": 7, "out_channels": 3}, MAPPER, "out_channels=3, but the weights in `checkpoint` are of 2"),
        ({"in_channels": 7}, MAPPER, "unknown key cond_stage_model.channel_mapper.weight beside its SpatialRescaler"),
        ({"in_channels": 7, "out_channels": 2}, {}, "lacks the key cond_stage_model.channel_mapper.weight"),
        ({"in_channels": 7, "out_channels": 2}, MAPPER, "denoiser of 6 channels, which must be the 3 of the latents"),
        ({"n_stage": 2}, {}, r"not known: \['n_stage'\]"),
    ],
)
def test_a_rescaler_that_is_refused(arguments, weights, message):
    live = {"input_blocks.0.0.weight": torch.zeros(8, 6, 3, 3)}
    with pytest.raises(ValueError, match=message):
        convert(params_of("SpatialRescaler", "concat", arguments), weights, live)


# ------------------------------------------------------------------------------------------- texts


def clip(activation="quick_gelu"):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=9, hidden_act=activation, bos_token_id=18, eos_token_id=19, pad_token_id=0,
    )  # fmt: skip
    model = CLIPTextModel(config).eval()
    weights = {f"transformer.text_model.{name}": value for name, value in model.state_dict().items()}
    return model, {**weights, "transformer.text_model.embeddings.position_ids": torch.arange(9)[None]}


@pytest.mark.parametrize(
    ("version", "activation"),
    [("openai/clip-vit-large-patch14", "quick_gelu"), ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "gelu")],
)
def test_clip(version, activation):
    reference, weights = clip(activation)
    arguments = {"version": version, "max_length": 8, "device": "cpu"}
    unet = {"use_spatial_transformer": True, "context_dim": 128}
    _, pipeline, dropped = convert(params_of("FrozenCLIPEmbedder", "crossattn", arguments, **unet), weights)
    assert list(dropped) == ["transformer.text_model.embeddings.position_ids"]
    ids = torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (model(input_ids=ids).last_hidden_state for model in (pipeline["text_encoder"], reference))
    torch.testing.assert_close(found, expected)
    rest = {name: value for name, value in pipeline.items() if name != "text_encoder"}
    assert rest == {"text_mask": False, "text_max_length": 8, "tokenizer": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "pooled", "max_length": 9}, "must have layer=last .* got 'pooled'"),
        ({"version": "my/clip", "max_length": 9}, "of the version 'my/clip', whose activation is not known"),
        ({}, "must have a max_length of at most 9 positions, got 77"),
    ],
)
def test_clip_that_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert_clip_embedder(Options(arguments, "params"), clip()[1])
    with pytest.raises(ValueError, match="unknown key cond_stage_model.model.visual"):
        convert_clip_embedder(Options({"max_length": 9}, "params"), {**clip()[1], "model.visual": torch.zeros(1)})


def test_tokenizers():
    _, weights = clip()
    unet = {"use_spatial_transformer": True, "context_dim": 128}
    params = params_of("FrozenCLIPEmbedder", "crossattn", {"max_length": 9}, **unet)
    with pytest.raises(ValueError, match="`tokenizer` must have the text encoder's 20 tokens, got 3"):
        convert(params, weights, tokenizer=["a", "b", "c"])
    assert convert(params, weights, tokenizer=["a"] * 20)[1]["tokenizer"] == ["a"] * 20
    with pytest.raises(ValueError, match="`tokenizer` must not be given: SpatialRescaler reads no text"):
        convert(params_of("SpatialRescaler", "concat"), {}, tokenizer=["a"])
    options = {"n_embed": 4, "n_layer": 1, "use_tokenizer": False}
    with pytest.raises(ValueError, match="`tokenizer` must not be given: BERTEmbedder reads no text"):
        convert(params_of("BERTEmbedder", "crossattn", options, **CROSS), {}, tokenizer=["a"])


def test_options_that_are_known():
    check_params({"first_stage_config": {"target": "x"}, "unet_config": {"target": "ldm.UNetModel"}})
