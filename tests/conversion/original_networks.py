"""The original VQGAN code's networks and GPT as plain functions of their own weights, one line for each step."""

import math

import torch
import torch.nn.functional as F


def conv(weights: dict, name: str, x: torch.Tensor, **options) -> torch.Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)


def norm(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def residual(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    h = conv(weights, f"{name}.conv1", swish(norm(weights, f"{name}.norm1", x)), padding=1)
    h = conv(weights, f"{name}.conv2", swish(norm(weights, f"{name}.norm2", h)), padding=1)
    shortcut = f"{name}.nin_shortcut"
    return (conv(weights, shortcut, x) if f"{shortcut}.weight" in weights else x) + h


def attention(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    h = norm(weights, f"{name}.norm", x)
    q, k, v = (conv(weights, f"{name}.{letter}", h).flatten(2) for letter in "qkv")
    mixed = (q.mT @ k * x.shape[1] ** -0.5).softmax(dim=2)
    return x + conv(weights, f"{name}.proj_out", (v @ mixed.mT).reshape(x.shape))


def level(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    i = 0
    while f"{name}.block.{i}.conv1.weight" in weights:
        x = residual(weights, f"{name}.block.{i}", x)
        if f"{name}.attn.{i}.q.weight" in weights:
            x = attention(weights, f"{name}.attn.{i}", x)
        i += 1
    return x


def middle(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    x = attention(weights, f"{name}.attn_1", residual(weights, f"{name}.block_1", x))
    return residual(weights, f"{name}.block_2", x)


def encode(weights: dict, x: torch.Tensor, levels: int) -> torch.Tensor:
    """Up to `quant_conv`."""
    h = conv(weights, "encoder.conv_in", x, padding=1)
    for i in range(levels):
        h = level(weights, f"encoder.down.{i}", h)
        if i == levels - 1:
            continue
        down = f"encoder.down.{i}.downsample.conv"
        h = (
            conv(weights, down, F.pad(h, (0, 1, 0, 1)), stride=2)
            if f"{down}.weight" in weights
            else F.avg_pool2d(h, 2)
        )
    h = middle(weights, "encoder.mid", h)
    h = conv(weights, "encoder.conv_out", swish(norm(weights, "encoder.norm_out", h)), padding=1)
    return conv(weights, "quant_conv", h)


def decode(weights: dict, codes: torch.Tensor, levels: int, give_pre_end=False, tanh_out=False) -> torch.Tensor:
    """From `post_quant_conv` on."""
    h = conv(weights, "decoder.conv_in", conv(weights, "post_quant_conv", codes), padding=1)
    h = middle(weights, "decoder.mid", h)
    for i in reversed(range(levels)):
        h = level(weights, f"decoder.up.{i}", h)
        if i:
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            up = f"decoder.up.{i}.upsample.conv"
            h = conv(weights, up, h, padding=1) if f"{up}.weight" in weights else h
    if give_pre_end:
        return h
    h = conv(weights, "decoder.conv_out", swish(norm(weights, "decoder.norm_out", h)), padding=1)
    return torch.tanh(h) if tanh_out else h


def gpt(weights: dict, ids: torch.Tensor, heads: int, n_unmasked: int = 0) -> torch.Tensor:
    """Logits of every position; the first `n_unmasked` see each other."""

    def linear(name, h):
        return F.linear(h, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def layer_norm(name, h):
        return F.layer_norm(h, h.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    length = ids.shape[1]
    mask = torch.ones(length, length).tril()
    mask[:n_unmasked, :n_unmasked] = 1
    h = weights["tok_emb.weight"][ids] + weights["pos_emb"][:, :length]
    i = 0
    while f"blocks.{i}.ln1.weight" in weights:
        inner = layer_norm(f"blocks.{i}.ln1", h)
        q, k, v = (
            linear(f"blocks.{i}.attn.{name}", inner).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(mask == 0, -torch.inf)
        h = h + linear(f"blocks.{i}.attn.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"blocks.{i}.mlp.0", layer_norm(f"blocks.{i}.ln2", h)))
        h = h + linear(f"blocks.{i}.mlp.2", inner)
        i += 1
    return linear("head", layer_norm("ln_f", h))


def greedy(weights: dict, prefix: torch.Tensor, steps: int, heads: int, n_unmasked: int = 0) -> torch.Tensor:
    """The most likely codes, the whole sequence computed anew for each."""
    ids = prefix
    for _ in range(steps):
        ids = torch.cat([ids, gpt(weights, ids, heads, n_unmasked)[:, -1:].argmax(-1)], dim=1)
    return ids[:, prefix.shape[1] :]
