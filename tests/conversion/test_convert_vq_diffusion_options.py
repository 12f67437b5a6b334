"""What configurations of the original VQ-Diffusion can say, against its formulas written out over its own weights."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hf_vq.conversion.convert_vq_diffusion import convert, convert_model, read_model
from hf_vq.conversion.reading import load_checkpoint
from hf_vq.conversion.verification import verify
from hf_vq.models.priors.transformer_vq_diffusion import VQDiffusionTransformer2DModel
from hf_vq.schedulers.scheduling_mask_replace import MaskReplaceScheduler
from tests.conversion.golden import Golden


WIDTH, STEPS = 16, 100


def pieces_of(name: str) -> dict:
    """A model of the original's, its averages left out."""
    folder = Golden(name).folder
    checkpoint = load_checkpoint(folder / "checkpoint.ckpt")
    return {"model": read_model(folder / "config.yaml"), "checkpoint": {"model": dict(checkpoint["model"])}}


def sections(pieces: dict) -> tuple[dict, dict, dict]:
    """`params` of the diffusion, of its denoiser and of its embedding."""
    diffusion = pieces["model"]["params"]["diffusion_config"]["params"]
    return diffusion, diffusion["transformer_config"]["params"], diffusion["content_emb_config"]["params"]


def sinusoid(ids, number):
    half = WIDTH // 2
    angles = ids.double()[:, None] / number * 4000 * (-math.log(10000) / (half - 1) * torch.arange(half)).exp()
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def original_logits(weights, params, content, x, t, label=None, text=None):
    """The denoiser of `transformer_utils.py` under its own names, one line for each of its steps."""

    def linear(name, h):
        return h @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def ada(name, h, ids, number, kind):
        table = weights.get(f"{name}.emb.weight")
        if table is None:
            embedded = sinusoid(ids, number)
        else:
            embedded = torch.stack([table[i] if i < number else table.mean(0) for i in ids.tolist()])
        scale, shift = linear(f"{name}.linear", F.silu(embedded))[:, None].chunk(2, -1)
        over = -1 if "layer" in kind else 1
        centred = h - h.mean(over, keepdim=True)
        return centred / (centred.square().mean(over, keepdim=True) + 1e-5).sqrt() * (1 + scale) + shift

    def attention(name, h, source):
        heads = [
            linear(f"{name}.{part}", of).unflatten(-1, (params["n_head"], -1)).transpose(1, 2)
            for part, of in (("query", h), ("key", source), ("value", source))
        ]
        q, k, v = heads
        mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return linear(f"{name}.proj", mixed.transpose(1, 2).flatten(2))

    def act(h):
        return F.gelu(h) if params["block_activate"] == "GELU" else h * torch.sigmoid(1.702 * h)

    def mlp(name, h):
        if f"{name}.0.weight" in weights:
            return linear(f"{name}.2", act(linear(f"{name}.0", h)))
        grid = h.mT.unflatten(2, (math.isqrt(h.shape[1]), -1))
        grid = act(F.conv2d(grid, weights[f"{name}.conv1.weight"], weights[f"{name}.conv1.bias"], padding=1))
        grid = F.conv2d(grid, weights[f"{name}.conv2.weight"], weights[f"{name}.conv2.bias"], padding=1)
        return grid.flatten(2).mT

    rows, columns = (
        weights[f"content_emb.{side}_emb"][0]
        if content["pos_emb_type"] == "parameter"
        else weights[f"content_emb.{side}_emb.weight"]
        for side in ("height", "width")
    )
    h = weights["content_emb.emb.weight"][x] + (rows[:, None] + columns).flatten(0, 1)[: x.shape[1]]
    for i in range(params["n_layer"]):
        block = f"blocks.{i}"
        time = (t, STEPS, params.get("timestep_type", "adalayernorm"))
        name = "attn1" if text is not None else "attn"
        normed = ada(f"{block}.ln1", h, *time)
        h = h + attention(f"{block}.{name}", normed, normed)
        if text is not None:
            h = h + attention(f"{block}.attn2", ada(f"{block}.ln1_1", h, *time), text)
        if label is None:
            normed = F.layer_norm(h, (h.shape[-1],), weights[f"{block}.ln2.weight"], weights[f"{block}.ln2.bias"])
        else:
            normed = ada(f"{block}.ln2", h, label, params["class_number"], params["class_type"])
        h = h + mlp(f"{block}.mlp", normed)
    h = F.layer_norm(h, (h.shape[-1],), weights["to_logits.0.weight"], weights["to_logits.0.bias"])
    return linear("to_logits.1", h)


def changed_network(pieces: dict, change) -> dict:
    """Applies `change` to the denoiser's weights, which have no prefix for it."""
    prefix, model = "transformer.transformer.", pieces["checkpoint"]["model"]
    network = {k.removeprefix(prefix): model.pop(k) for k in list(model) if k.startswith(prefix)}
    network = change(network)
    model.update({prefix + key: value for key, value in network.items()})
    return network


def without(*endings):
    return lambda weights: {k: v for k, v in weights.items() if not k.endswith(endings)}


def as_parameters(weights):
    names = ("content_emb.height_emb.weight", "content_emb.width_emb.weight")
    return {k.removesuffix(".weight") if k in names else k: v[None] if k in names else v for k, v in weights.items()}


def smaller_convolutions(weights):
    def cut(key, value):
        if key.endswith(("conv1.weight", "conv1.bias")):
            return value[:40]
        return value[:, :40] if key.endswith("conv2.weight") else value

    return {key: cut(key, value).contiguous() for key, value in weights.items()}


def longer_tables(rows):
    def change(weights):
        generator = torch.Generator().manual_seed(0)
        return {
            k: torch.randn(rows, WIDTH, generator=generator) if k.endswith("ln2.emb.weight") else v
            for k, v in weights.items()
        }

    return change


OPTIONS = {
    "gelu": ({"block_activate": "GELU"}, {}, lambda weights: weights),
    "sinusoidal_time": ({"timestep_type": "adalayernorm_abs"}, {}, without("ln1.emb.weight")),
    "sinusoidal_class": ({"class_type": "adalayernorm_abs"}, {}, without("ln2.emb.weight")),
    "instance": ({"class_type": "adainsnorm"}, {}, lambda weights: weights),
    "sinusoidal_instance": ({"class_type": "adainsnorm_abs"}, {}, without("ln2.emb.weight")),
    "positions": ({}, {"pos_emb_type": "parameter"}, as_parameters),
    "ratio": ({"mlp_hidden_times": 2.5}, {}, smaller_convolutions),
    "many_classes": ({"class_number": 1003}, {}, longer_tables(1003)),
    "null_class_trained": ({"class_number": 1001}, {}, longer_tables(1001)),
}


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_options_of_the_class_model(name):
    pieces = pieces_of("vqdiff_class")
    _, params, content = sections(pieces)
    params |= OPTIONS[name][0]
    content |= OPTIONS[name][1]
    weights = changed_network(pieces, OPTIONS[name][2])
    pipe, _ = convert_model(**pieces)
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randint(17, (3, 16), generator=generator), torch.tensor([0, 40, 99])
    label = torch.tensor([2, 11, 7])
    actual = pipe.transformer(x.view(3, 4, 4), t, class_labels=label).sample.flatten(1, 2)
    expected = original_logits(weights, params, content, x, t, label)
    tolerance = 1e-3 if "sinusoidal" in name else 2e-5  # float32 angles of up to 4000
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=2e-5)
    # the original's null class is number 1000, where it has a row, a mean or a place for it
    null = pipe.transformer.null_class_id
    assert (null is None) == (name in ("sinusoidal_class", "instance"))
    if null is not None:
        actual = pipe.transformer(x.view(3, 4, 4), t, class_labels=torch.full((3,), null)).sample.flatten(1, 2)
        expected = original_logits(weights, params, content, x, t, torch.full((3,), 1000))
        torch.testing.assert_close(actual, expected, atol=10 * tolerance, rtol=2e-5)


def position_tables(height, width):
    def change(weights):
        generator = torch.Generator().manual_seed(0)
        sides = {"content_emb.height_emb.weight": height, "content_emb.width_emb.weight": width}
        return weights | {key: torch.randn(side, WIDTH, generator=generator) for key, side in sides.items()}

    return change


# content_seq_len, content_spatial_size, spatial_size, mlp_type, and the grid
GRIDS = [
    (16, [2, 8], (6, 8), "fc", (2, 8)),
    (16, None, (2, 8), "fc", (2, 8)),
    (16, [32, 32], (2, 8), "fc", (2, 8)),  # an old size
    (16, [32, 32], (6, 8), "fc", (4, 4)),
    (12, [3, 4], (6, 8), "conv_mlp", (3, 4)),
    (12, "its default", (6, 8), "conv_mlp", (3, 4)),
    (256, "its default", (8, 32), "fc", (8, 32)),  # which is (16, 16)
]


@pytest.mark.parametrize(("length", "size", "table", "mlp_type", "grid"), GRIDS)
@torch.no_grad()
def test_the_grid(length, size, table, mlp_type, grid):
    """The original's denoiser is over a sequence, whatever it is told of the grid; convolutions see isqrt(L) rows."""
    pieces = pieces_of("vqdiff_uncond")
    model, checkpoint = pieces["model"]["params"], pieces["checkpoint"]["model"]
    del model["content_codec_config"]
    for key in [key for key in checkpoint if key.startswith("content_codec.")]:
        del checkpoint[key]
    _, params, content = sections(pieces)
    content["spatial_size"] = table
    params |= {"content_seq_len": length, "content_spatial_size": size, "mlp_type": mlp_type}
    if size == "its default":
        del params["content_spatial_size"]

    def change(weights):
        if mlp_type == "fc":  # the middle taps
            names = {f"mlp.conv{i}": f"mlp.{2 * i - 2}" for i in (1, 2)}
            for old, new in names.items():
                weights = {key.replace(old, new): value for key, value in weights.items()}
            weights = {k: v[:, :, 1, 1].contiguous() if v.ndim == 4 else v for k, v in weights.items()}
        return position_tables(*table)(weights)

    weights = changed_network(pieces, change)
    pipe, _ = convert_model(**pieces)
    assert pipe.transformer.sample_size == grid
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randint(17, (2, length), generator=generator), torch.tensor([0, 99])
    actual = pipe.transformer(x.view(2, *grid), t).sample.flatten(1, 2)
    torch.testing.assert_close(actual, original_logits(weights, params, content, x, t), atol=2e-5, rtol=2e-5)


def text_pieces(embed_dim, projected, times, normalize=True):
    """A text model whose denoiser reads states of 64 channels `times` times, and its denoiser's weights."""
    pieces = pieces_of("vqdiff_text_clip")
    diffusion, params, _ = sections(pieces)
    diffusion["condition_emb_config"]["params"] |= {"embed_dim": embed_dim, "normalize": normalize}
    params["condition_dim"] = 64 * times
    generator = torch.Generator().manual_seed(3)
    pieces["checkpoint"]["model"]["transformer.condition_emb.text_projection"] = torch.zeros(64, projected)

    names, scale = ("attn2.key.weight", "attn2.value.weight"), 1 if normalize else 0.125

    def change(weights):
        return {
            key: scale * torch.randn(32, 64 * times, generator=generator) if key.endswith(names) else value
            for key, value in weights.items()
        }

    return pieces, changed_network(pieces, change)


@pytest.mark.parametrize(
    ("embed_dim", "projected", "times", "normalize"),
    [(1024, 512, 2, True), (1024, 512, 2, False), (512, 1024, 2, True), (1024, 640, 1, True), (512, 512, 1, True)],
)
@torch.no_grad()
def test_states_of_1024_channels_are_given_twice(embed_dim, projected, times, normalize, tmp_path):
    """The original puts a state beside itself where that, or the projection's other width, makes 1024 channels."""
    pieces, weights = text_pieces(embed_dim, projected, times, normalize)
    _, params, content = sections(pieces)
    pipe, _ = convert_model(**pieces)
    golden = Golden("vqdiff_text_clip")
    states = pipe.text_encoder(golden["condition_token"]).last_hidden_state
    doubled = torch.cat([states] * times, dim=-1)
    if normalize:
        states, doubled = states / states.norm(dim=-1, keepdim=True), doubled / doubled.norm(dim=-1, keepdim=True)
    assert pipe.config.text_normalize == normalize and pipe.transformer.config.cross_attention_dim == 64
    x, t = golden["x_t.a"], golden["t.a"]
    actual = pipe.transformer(x.view(2, 4, 4), t, encoder_hidden_states=states).sample.flatten(1, 2)
    expected = original_logits(weights, params, content, x, t, text=doubled)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    save_file({"x_t.a": x, "t.a": t, "cond_emb": doubled, "logits.a": expected.mT.contiguous()}, tmp_path / "io")
    assert verify(pipe, tmp_path / "io")[0]["logits.a"] < 2e-5


@pytest.mark.parametrize(("projected", "times"), [(48, 1), (512, 2)])
@torch.no_grad()
def test_a_text_as_one_state(projected, times):
    """pick_last_embedding: the projected state of the end of the text, which has the highest id."""
    pieces, _ = text_pieces(1024, projected, 1)
    diffusion, params, content = sections(pieces)
    diffusion["condition_emb_config"]["params"] |= {"pick_last_embedding": True, "keep_seq_len_dim": True}
    params["condition_dim"] = projected * times
    generator = torch.Generator().manual_seed(3)
    projection = torch.randn(64, projected, generator=generator)
    pieces["checkpoint"]["model"]["transformer.condition_emb.text_projection"] = projection
    weights = changed_network(
        pieces,
        lambda weights: {
            key: torch.randn(32, projected * times, generator=generator) if value.shape == (32, 64) else value
            for key, value in weights.items()
        },
    )
    pipe, dropped = convert_model(**pieces)
    assert "transformer.condition_emb.text_projection" not in dropped
    golden = Golden("vqdiff_text_clip")
    tokens = golden["condition_token"]
    output = pipe.text_encoder(tokens)
    one = output.last_hidden_state[torch.arange(2), tokens.argmax(1)] @ projection
    torch.testing.assert_close(output.text_embeds, one, atol=1e-5, rtol=1e-5)
    assert pipe.config.text_pooled and pipe.config.text_normalize
    state, given = one[:, None], torch.cat([one] * times, dim=-1)[:, None]
    state, given = (states / states.norm(dim=-1, keepdim=True) for states in (state, given))
    x, t = golden["x_t.a"], golden["t.a"]
    expected = original_logits(weights, params, content, x, t, text=given)
    actual = pipe.transformer(x.view(2, 4, 4), t, encoder_hidden_states=state).sample.flatten(1, 2)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def test_states_that_the_denoiser_does_not_read():
    pieces, _ = text_pieces(1024, 512, 1)
    with pytest.raises(ValueError, match="condition_dim=128 .* as the text encoder's states twice, got 64"):
        convert_model(**pieces)
    pieces, _ = text_pieces(1024, 640, 2)
    with pytest.raises(ValueError, match="condition_dim=64 .* as the text encoder's states, got 128"):
        convert_model(**pieces)
    pieces, _ = text_pieces(1024, 512, 2)
    sections(pieces)[0]["learnable_cf"] = True
    with pytest.raises(ValueError, match="must have learnable_cf=False with .* states of 1024 channels"):
        convert_model(**pieces)
    del pieces["checkpoint"]["model"]["transformer.condition_emb.text_projection"]
    with pytest.raises(ValueError, match="lacks the key transformer.condition_emb.text_projection"):
        convert_model(**pieces)


def test_grids_that_the_convolutions_do_not_have():
    pieces = pieces_of("vqdiff_uncond")
    params = sections(pieces)[1]
    params["content_spatial_size"] = [2, 8]
    with pytest.raises(ValueError, match=r"a grid of 4 rows with mlp_type=conv_mlp, .* got \(2, 8\)"):
        convert_model(**pieces)


@torch.no_grad()
def test_defaults_of_each_class_of_denoiser():
    """Neither says its mlp_type; both have convolutions, and a text model would have none."""
    for name in ("vqdiff_uncond", "vqdiff_class"):
        pieces = pieces_of(name)
        _, params, content = sections(pieces)
        for option in (
            "mlp_type",
            "attn_type",
            "timestep_type",
            "class_type",
            "attn_pdrop",
            "resid_pdrop",
            "content_spatial_size",
        ):
            params.pop(option, None)
        pipe, _ = convert_model(**copy.deepcopy(pieces))
        assert pipe.transformer.config.mlp_type == "conv" and pipe.transformer.sample_size == (4, 4)
    pieces = pieces_of("vqdiff_text_ithq")
    sections(pieces)[1].pop("mlp_type", None)
    assert convert_model(**pieces)[0].transformer.config.mlp_type == "fc"


def test_the_training_loss_is_kept():
    pieces = pieces_of("vqdiff_uncond")
    diffusion, params, _ = sections(pieces)
    diffusion |= {"mask_weight": [1, 0.5], "adaptive_auxiliary_loss": False, "auxiliary_loss_weight": 0.25}
    params["attn_pdrop"] = 0.1
    pipe, _ = convert_model(**pieces)
    config = pipe.scheduler.config
    assert tuple(config.mask_loss_weights) == (1.0, 0.5)
    assert (config.adaptive_auxiliary_loss, config.auxiliary_loss_weight) == (False, 0.25)
    assert pipe.transformer.config.attention_dropout == 0.1
    for name in ("mask_weight", "adaptive_auxiliary_loss", "auxiliary_loss_weight"):
        del diffusion[name]  # the original's defaults: no auxiliary loss
    config = convert_model(**pieces)[0].scheduler.config
    assert (config.adaptive_auxiliary_loss, config.auxiliary_loss_weight) == (False, 0)


def test_without_a_codec_from_a_safetensors_file(tmp_path):
    folder = Golden("vqdiff_class").folder
    checkpoint = load_checkpoint(folder / "checkpoint.ckpt")
    flat = {f"model.{k}": v.clone() for k, v in checkpoint["model"].items() if "content_codec" not in k}
    flat |= {f"ema.{k}": v.clone() for k, v in checkpoint["ema"].items()}
    save_file(flat, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", folder / "config.yaml", output=tmp_path / "out")
    transformer = VQDiffusionTransformer2DModel.from_pretrained(tmp_path / "out/transformer")
    assert MaskReplaceScheduler.from_pretrained(tmp_path / "out/scheduler").config.num_embeddings == 16
    golden = Golden("vqdiff_class")
    with torch.no_grad():
        logits = transformer(golden["x_t.a"].view(2, 4, 4), golden["t.a"], class_labels=golden["label"]).sample
    golden.compare("logits.a", logits.flatten(1, 2).mT)


def test_both_sets_of_weights_are_checked():
    for entry, value, message in (
        ("model", torch.full((16, 16), math.nan), "entry model, has NaN in transformer.transformer.to_logits.1"),
        ("model", torch.zeros(3, 16), "has transformer.to_logits.1.weight in two shapes"),
    ):
        checkpoint = load_checkpoint(Golden("vqdiff_class").folder / "checkpoint.ckpt")
        checkpoint = {name: dict(checkpoint[name]) for name in ("model", "ema")}
        checkpoint[entry]["transformer.transformer.to_logits.1.weight"] = value
        with pytest.raises(ValueError, match=message):
            convert_model(pieces_of("vqdiff_class")["model"], checkpoint)


def test_missing_masks_and_guidance():
    pieces = pieces_of("vqdiff_text_ithq")
    key = next(k for k in pieces["checkpoint"]["model"] if k.endswith("attn2.mask"))
    del pieces["checkpoint"]["model"][key]
    with pytest.raises(ValueError, match=f"lacks {key}"):
        convert_model(**pieces)
    pieces = pieces_of("vqdiff_class")
    pieces["model"]["params"]["guidance_scale"] = 3.0
    assert "guidance_scale=3.0" in convert_model(**pieces)[1]["config.guidance_scale"]
