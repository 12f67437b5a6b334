"""Denoisers of the original latent diffusion code, against its blocks written out under its own names."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from hf_vq.conversion.ldm_unet import convert_unet
from hf_vq.models.priors.unet_2d_latent import LatentUNet2DConditionModel, LatentUNet2DModel


BASE = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 2,
    "num_res_blocks": 1,
    "attention_resolutions": [2, 4],
    "channel_mult": [1, 2, 3],
    "num_head_channels": 16,
}


class Residual(nn.Module):
    def __init__(self, inner, outer, scale_shift, way=None):
        super().__init__()
        self.way, self.scale_shift = way, scale_shift
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(128, outer * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outer), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outer, outer, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def resampled(self, x):
        return resize(x, self.way) if self.way else x

    def forward(self, x, emb, context):
        h = self.in_layers[2](self.resampled(F.silu(self.in_layers[0](x))))
        shift = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, 1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + shift)
        return self.skip_connection(self.resampled(x)) + self.out_layers[3](F.silu(h))


def resize(x, way):
    return F.avg_pool2d(x, 2) if way == "down" else x.repeat_interleave(2, 2).repeat_interleave(2, 3)


class Attention(nn.Module):
    """`legacy`: head after head, in each its queries, keys and values; else the queries of all heads first."""

    def __init__(self, width, heads, legacy):
        super().__init__()
        self.heads, self.legacy = heads, legacy
        self.norm, self.qkv, self.proj_out = (
            nn.GroupNorm(32, width),
            nn.Conv1d(width, 3 * width, 1),
            nn.Conv1d(width, width, 1),
        )

    def forward(self, x, emb, context):
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        order = (self.heads, 3) if self.legacy else (3, self.heads)
        parts = qkv.unflatten(1, (*order, -1))
        q, k, v = parts.unbind(2 if self.legacy else 1)  # (B, heads, c, N)
        weights = (q.mT @ k / math.sqrt(q.shape[2])).softmax(-1)
        mixed = (v @ weights.mT).flatten(1, 2)
        return (flat + self.proj_out(mixed)).view_as(x)


class CrossAttention(nn.Module):
    def __init__(self, width, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_dim, width, bias=False) for _ in "kv")
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x, context):
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class GatedGelu(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, width, context_dim, heads):
        super().__init__()
        self.attn1, self.attn2 = (CrossAttention(width, dim, heads) for dim in (width, context_dim))
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(GatedGelu(width), nn.Dropout(0.0), nn.Linear(4 * width, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, context):
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width, context_dim, heads, depth):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context_dim, heads) for _ in range(depth)])

    def forward(self, x, emb, context):
        h = self.proj_in(self.norm(x)).flatten(2).mT
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.mT.reshape(x.shape))


class Resample(nn.Module):
    def __init__(self, width, way, conv):
        super().__init__()
        self.way, self.with_conv = way, conv
        if conv:
            layer = nn.Conv2d(width, width, 3, stride=2 if way == "down" else 1, padding=1)
            setattr(self, "op" if way == "down" else "conv", layer)

    def forward(self, x, emb, context):
        if self.way == "down":
            return self.op(x) if self.with_conv else resize(x, "down")
        x = resize(x, "up")
        return self.conv(x) if self.with_conv else x


class Original(nn.Module):
    def __init__(self, params):
        super().__init__()
        p = {"conv_resample": True, "num_heads": -1, "num_head_channels": -1, "legacy": True, **params}
        self.params = p
        base, layers, shift = p["model_channels"], p["num_res_blocks"], p.get("use_scale_shift_norm", False)

        def attention(width, up=False):
            heads = p["num_heads"] if p["num_head_channels"] == -1 else width // p["num_head_channels"]
            if p.get("use_spatial_transformer"):
                return SpatialTransformer(width, p["context_dim"], heads, p.get("transformer_depth", 1))
            if up and p["num_head_channels"] == -1 and p["legacy"]:
                heads = p.get("num_heads_upsample", heads)
            return Attention(width, heads, not p.get("use_new_attention_order", False))

        def resample(width, way):
            if p.get("resblock_updown"):
                return Residual(width, width, shift, way)
            return Resample(width, way, p["conv_resample"])

        self.time_embed = nn.Sequential(nn.Linear(base, 4 * base), nn.SiLU(), nn.Linear(4 * base, 4 * base))
        if p.get("num_classes"):
            self.label_emb = nn.Embedding(p["num_classes"], 4 * base)
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(p["in_channels"], base, 3, padding=1)])])
        widths, width, last = [base], base, len(p["channel_mult"]) - 1
        for level, times in enumerate(p["channel_mult"]):
            for _ in range(layers):
                block = [Residual(width, base * times, shift)]
                width = base * times
                if 2**level in p["attention_resolutions"]:
                    block.append(attention(width))
                self.input_blocks.append(nn.ModuleList(block))
                widths.append(width)
            if level < last:
                self.input_blocks.append(nn.ModuleList([resample(width, "down")]))
                widths.append(width)
        self.middle_block = nn.ModuleList(
            [Residual(width, width, shift), attention(width), Residual(width, width, shift)]
        )
        self.output_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            for i in range(layers + 1):
                block = [Residual(width + widths.pop(), base * p["channel_mult"][level], shift)]
                width = base * p["channel_mult"][level]
                if 2**level in p["attention_resolutions"]:
                    block.append(attention(width, up=True))
                if level and i == layers:
                    block.append(resample(width, "up"))
                self.output_blocks.append(nn.ModuleList(block))
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, p["out_channels"], 3, padding=1))

    def forward(self, x, t, y=None, context=None):
        half = self.params["model_channels"] // 2
        angles = t[:, None] * (-math.log(10000) * torch.arange(half) / half).exp()
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))
        if y is not None:
            emb = emb + self.label_emb(y)
        kept, h = [], x
        for block in self.input_blocks:
            for layer in block:
                h = layer(h) if isinstance(layer, nn.Conv2d) else layer(h, emb, context)
            kept.append(h)
        for layer in self.middle_block:
            h = layer(h, emb, context)
        for block in self.output_blocks:
            h = torch.cat([h, kept.pop()], 1)
            for layer in block:
                h = layer(h, emb, context)
        return self.out(h)


HEADS = {"num_head_channels": -1, "num_heads": 8}
OPTIONS = {
    "plain": ({}, UNet2DModel),
    "scale_shift": ({"use_scale_shift_norm": True}, UNet2DModel),
    "residual_resampling": ({"resblock_updown": True, "num_res_blocks": 2}, UNet2DModel),
    "both": ({"resblock_updown": True, "use_scale_shift_norm": True, "attention_resolutions": [1]}, UNet2DModel),
    "heads": (HEADS, LatentUNet2DModel),
    "heads_of_one_width": ({**HEADS, "num_heads": 2, "channel_mult": [1, 1]}, UNet2DModel),
    "heads_on_the_way_up": ({**HEADS, "num_heads_upsample": 4, "num_res_blocks": 2}, LatentUNet2DModel),
    "heads_not_legacy": ({**HEADS, "num_heads_upsample": 4, "legacy": False}, LatentUNet2DModel),
    "new_attention_order": ({**HEADS, "use_new_attention_order": True}, LatentUNet2DModel),
    "pooled": ({"conv_resample": False}, LatentUNet2DModel),
    "pooled_with_residual_resampling": ({"conv_resample": False, "resblock_updown": True}, UNet2DModel),
    "classes": ({"num_classes": 5}, UNet2DModel),
    "scale_shift_and_heads": ({**HEADS, "use_scale_shift_norm": True}, LatentUNet2DModel),
    "everywhere": ({"attention_resolutions": [1, 2, 4], "resblock_updown": True, **HEADS}, LatentUNet2DModel),
    "nowhere": ({"attention_resolutions": [], "resblock_updown": True}, UNet2DModel),
}


CROSS = {"use_spatial_transformer": True, "context_dim": 6, "transformer_depth": 2}
OPTIONS |= {
    "cross": (CROSS, UNet2DConditionModel),
    "cross_scale_shift": ({**CROSS, **HEADS, "use_scale_shift_norm": True}, UNet2DConditionModel),
    "cross_pooled": ({**CROSS, "conv_resample": False}, LatentUNet2DConditionModel),
    "cross_residual_resampling": ({**CROSS, "resblock_updown": True}, LatentUNet2DConditionModel),
    "cross_residual_resampling_everywhere": (
        {
            **CROSS,
            **HEADS,
            "attention_resolutions": [1, 2, 4],
            "resblock_updown": True,
            "conv_resample": False,
            "use_scale_shift_norm": True,
            "num_res_blocks": 2,
        },
        LatentUNet2DConditionModel,
    ),
}


def make(changes):
    torch.manual_seed(0)
    params = {**BASE, **changes}
    return params, Original(params).eval()


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_options(name, tmp_path):
    params, original = make(OPTIONS[name][0])
    unet = convert_unet(params, original.state_dict())
    assert type(unet) is OPTIONS[name][1]
    unet.save_pretrained(tmp_path)
    unet = type(unet).from_pretrained(tmp_path)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    y = {} if "num_classes" not in params else {"class_labels": torch.tensor([4, 1])}
    context = {} if "context_dim" not in params else {"encoder_hidden_states": torch.randn(2, 5, 6)}
    wanted = original(x, t, y.get("class_labels"), context.get("encoder_hidden_states"))
    torch.testing.assert_close(unet(x, t, **y, **context).sample, wanted, atol=2e-5, rtol=2e-5)


def test_gradients_of_residual_resampling_with_checkpointing():
    params, original = make(OPTIONS["cross_residual_resampling"][0])
    x, t, context = torch.randn(1, 3, 8, 8), torch.tensor([3]), torch.randn(1, 5, 6)
    gradients = []
    for checkpointed in (False, True):
        unet = convert_unet(params, original.state_dict())
        if checkpointed:
            unet.enable_gradient_checkpointing()
        unet.train()(x, t, context).sample.square().sum().backward()
        assert all(parameter.grad is not None for parameter in unet.parameters())
        gradients.append(unet.conv_in.weight.grad)
    torch.testing.assert_close(*gradients)


def test_another_kind_of_resampling():
    with pytest.raises(ValueError, match="`resample_type` must be 'resnet' or 'pool', got 'conv'"):
        LatentUNet2DConditionModel(resample_type="conv")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, r"names in unet_config that are not known: \['surprise'\]"),
        ({"channel_mult": [2, 2]}, r"must have a channel_mult in unet_config that begins with 1, got \[2, 2\]"),
        ({"dims": 3}, "must have dims=2 in unet_config, got 3"),
        ({"n_embed": 16}, "must have n_embed=None in unet_config, got 16: a denoiser that predicts codes"),
        ({"num_head_channels": 20}, "must have num_head_channels divide the width 64 in unet_config, got 20"),
        ({"num_head_channels": -1}, "must have num_heads or num_head_channels"),
        ({"context_dim": 8}, "must have context_dim in unet_config if and only if use_spatial_transformer"),
        ({"num_res_blocks": [1, 2]}, r"an int from 1 to 1000 as num_res_blocks in unet_config, got \[1, 2\]"),
        ({"num_classes": 3}, "does not fit UNet2DModel: it lacks class_embedding.weight"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        convert_unet({**BASE, **changes}, make({})[1].state_dict())
