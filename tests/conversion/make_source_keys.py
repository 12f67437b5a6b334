"""Makes lists of keys of MoVQGAN's and IBQ's own files: `python -m tests.conversion.make_source_keys`.

Their classes are in no package. What a constructor builds is written out here from the public sources
(ai-forever/MoVQGAN: movqgan/models/vqgan.py, ema.py and configs; TencentARC/SEED-Voken: IBQ/models/ibqgan.py and its
configurations), with names and shapes alone. The losses' own weights are left out.
"""

import gzip
import json

from tests.conversion.golden import GOLDEN


def convolution(name, inputs, outputs, side):
    return {f"{name}.weight": [outputs, inputs, side, side], f"{name}.bias": [outputs]}


def group_norm(name, channels, codes):
    """Of MoVQ's decoder, whose scale and shift are read off `codes` channels."""
    if codes is None:
        return {f"{name}.{kind}": [channels] for kind in ("weight", "bias")}
    scale_and_shift = {}
    for part in ("conv_y", "conv_b"):
        scale_and_shift |= convolution(f"{name}.{part}", codes, channels, 1)
    return group_norm(f"{name}.norm_layer", channels, None) | scale_and_shift


def residual_block(name, inputs, outputs, codes):
    keys = group_norm(f"{name}.norm1", inputs, codes) | convolution(f"{name}.conv1", inputs, outputs, 3)
    keys |= group_norm(f"{name}.norm2", outputs, codes) | convolution(f"{name}.conv2", outputs, outputs, 3)
    return keys | (convolution(f"{name}.nin_shortcut", inputs, outputs, 1) if inputs != outputs else {})


def attention_block(name, channels, codes):
    keys = group_norm(f"{name}.norm", channels, codes)
    for part in ("q", "k", "v", "proj_out"):
        keys |= convolution(f"{name}.{part}", channels, channels, 1)
    return keys


def network(name, widths, blocks, attention, ends, codes=None):
    """An encoder with `blocks` a level, or a decoder, whose levels are built from the last; `ends` are the channels
    before and after, and between the first convolution and the first level.
    """
    inputs, first, outputs = ends
    is_encoder = name == "encoder"
    keys = convolution(f"{name}.conv_in", inputs, first, 3)
    order = range(len(widths)) if is_encoder else reversed(range(len(widths)))
    previous, part, step = first, *(("down", "downsample") if is_encoder else ("up", "upsample"))
    for level in order:
        for i in range(blocks):
            keys |= residual_block(f"{name}.{part}.{level}.block.{i}", previous, widths[level], codes)
            previous = widths[level]
            if level in attention:
                keys |= attention_block(f"{name}.{part}.{level}.attn.{i}", previous, codes)
        if level != (len(widths) - 1 if is_encoder else 0):
            keys |= convolution(f"{name}.{part}.{level}.{step}.conv", previous, previous, 3)
    middle = previous if is_encoder else first
    for i in (1, 2):
        keys |= residual_block(f"{name}.mid.block_{i}", middle, middle, codes)
    keys |= attention_block(f"{name}.mid.attn_1", middle, codes)
    return (
        keys | group_norm(f"{name}.norm_out", previous, codes) | convolution(f"{name}.conv_out", previous, outputs, 3)
    )


def tokenizer(ch, ch_mult, num_res_blocks, attention, z_channels, embed_dim, n_embed, is_movq=False):
    widths = [ch * multiplier for multiplier in ch_mult]
    codes = embed_dim if is_movq else None
    keys = network("encoder", widths, num_res_blocks, attention, (3, ch, z_channels))
    keys |= network("decoder", widths, num_res_blocks + 1, attention, (z_channels, widths[-1], 3), codes)
    keys |= {"quantize.embedding.weight": [n_embed, embed_dim]}
    return (
        keys
        | convolution("quant_conv", z_channels, embed_dim, 1)
        | convolution("post_quant_conv", embed_dim, z_channels, 1)
    )


def movqgan(**options):
    """With the averages of each of its five parts."""
    keys = tokenizer(**options, attention=(3,), z_channels=4, embed_dim=4, n_embed=16384, is_movq=True)
    averages = {}
    for key, shape in keys.items():
        part, _, rest = key.partition(".")
        averages |= {f"ema_{part}.decay": [], f"ema_{part}.num_updates": []}
        averages[f"ema_{part}.{rest.replace('.', '')}"] = shape
    return keys | averages


def ibq(n_embed):
    """With the averages of the whole model."""
    keys = tokenizer(128, (1, 1, 2, 2, 4), 4, (4,), 256, 256, n_embed)
    averages = {f"model_ema.{key.replace('.', '')}": shape for key, shape in keys.items()}
    return {**keys, **averages, "model_ema.decay": [], "model_ema.num_updates": []}


LISTS = {
    "movqgan__67M": lambda: movqgan(ch=128, ch_mult=(1, 2, 2, 4), num_res_blocks=2),
    "movqgan__102M": lambda: movqgan(ch=128, ch_mult=(1, 2, 2, 4), num_res_blocks=4),
    "movqgan__270M": lambda: movqgan(ch=256, ch_mult=(1, 2, 2, 4), num_res_blocks=2),
    **{f"ibq__{n_embed}": lambda n_embed=n_embed: ibq(n_embed) for n_embed in (1024, 8192, 16384, 262144)},
}


def entry(keys: dict[str, list]) -> dict:
    kinds = {key: "int64" if key.endswith("num_updates") else "float32" for key in keys}
    return {"target": None, "params": None, "keys": {key: [shape, kinds[key]] for key, shape in keys.items()}}


def main() -> None:
    for name, make in LISTS.items():
        text = json.dumps(entry(make()), separators=(",", ":"))
        (GOLDEN / "published_keys" / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
