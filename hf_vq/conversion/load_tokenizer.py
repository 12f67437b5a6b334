"""`load_tokenizer`: image tokenizers of the Hub, whatever program saved them, as models of hf_vq."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

import hf_vq

from ..loading import find_file, run_hint
from ..models.autoencoders.modeling_vqgan import VQGANModel
from .checkpoints import drop_keys, load_exactly
from .diffusers_tokenizer import load_vqmodel
from .layouts import (
    LLAMAGEN_NAMES,
    build,
    from_diffusers,
    from_flax,
    from_llamagen,
    network_fields,
    renamed,
    reversed_levels,
)
from .reading import check_finite, file_format, in_float32, load_checkpoint, tensors_of
from .taming_tokenizer import DROPPED_KEYS, EMA_CODEBOOK, choose_averages


# Beginnings of the names of a tokenizer's weights inside a larger model: transformers' Janus, Chameleon and Emu3; the
# first release of Janus.
PREFIXES = ("model.vqmodel.", "vqmodel.", "gen_vision_model.", "first_stage_model.")
ENTRIES = ("state_dict", "model", "ema")
FILES = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "model.ckpt", "last.ckpt", "model.pt")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
LAYOUTS = ("taming", "ibq", "llamagen", "movq", "janus", "chameleon", "diffusers")
UNUSED_KEYS = {
    **DROPPED_KEYS,
    "quantize.codebook_used": "the history of the codes in use",
    "perceptual_loss.": "a loss",
}

# What is known and cannot be loaded: a name, and which keys show it.
REFUSED: tuple[tuple[str, Callable[[dict], bool]], ...] = (
    (
        "a video tokenizer (it has 3-D convolutions)",
        lambda weights: any(value.ndim == 5 for value in weights.values()),
    ),
    (
        "a 1-D tokenizer (of TiTok's kind, with latent tokens)",
        lambda weights: any("latent_tokens" in key for key in weights),
    ),
    ("a multi-scale tokenizer (of VAR)", lambda weights: any("quant_resi" in key for key in weights)),
    (
        "the tokenizer of MaskGIT, whose convolutions have no bias",
        lambda weights: any("upsample_conv" in key for key in weights),
    ),
    ("Open-MAGVIT2, which has other blocks", lambda weights: any("adaptive" in key for key in weights)),
    ("a continuous autoencoder without a codebook", lambda weights: not any("quantize" in key for key in weights)),
)


def load_tokenizer(
    source: str | Path,
    *,
    subfolder: str | None = None,
    layout: str | None = None,
    resolution: int | None = None,
    use_ema: bool = True,
    **options: Any,
):
    """An image tokenizer of hf_vq from a folder, a repository on the Hub, or a file of weights, whatever saved it.

    Known are hf_vq's own; diffusers' `VQModel` (aMUSEd, Kandinsky's MoVQ, latent diffusion); the layout of
    taming-transformers (VQGAN, Gumbel and EMA codebooks; `boris/vqgan_f16_16384`); its port to Flax
    (`dalle-mini/vqgan_imagenet_f16_16384`, needs the package msgpack); LlamaGen; Janus, in transformers' layout and
    its own; Chameleon; MoVQGAN (`ai-forever/MoVQGAN`); IBQ (`TencentARC/IBQ-Tokenizer-*`). Which one it is follows
    from the configuration, or from the names of the weights.

    Args:
        source: a folder, the id of a repository, or a file.
        subfolder: the part of a repository that holds the tokenizer.
        layout: one of "taming", "ibq", "llamagen", "movq", "janus", "chameleon", "diffusers", where it cannot be told:
            IBQ has the names of taming, and is told by the name of the repository or file.
        resolution: side of the images it was trained on, in pixels, where the files do not say; 256 by default.
        use_ema: take averages of the weights, where there are some.
        options: of `huggingface_hub.hf_hub_download`, such as `revision`.

    Returns:
        a model in `eval` mode. One without a decoder, such as Chameleon's in transformers' format, only encodes.

    Raises:
        ValueError: a source that cannot be read, or a tokenizer of another kind, which is named.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {LAYOUTS} or None, got {layout!r}.")
    name = Path(source).name.lower()
    if Path(source).is_file():
        return _convert(_read_file(Path(source)), name, layout, resolution or 256, use_ema)
    config = _read_json(source, "config.json", subfolder, options)
    model_type = str(config.get("model_type", ""))
    if model_type.startswith("hf_vq_"):
        model_class = getattr(hf_vq, config["architectures"][0])
        return model_class.from_pretrained(source, subfolder=subfolder or "", **options).eval()
    if config.get("_class_name") == "VQModel":
        return load_vqmodel(source, subfolder, resolution, **options)
    of_tokenizer = config.get("vq_config", config)
    resolution = resolution or of_tokenizer.get("resolution") or 256
    if layout is None and model_type in ("janus", "chameleon"):
        layout = model_type
    weights = _read_folder(source, subfolder, options)
    return _convert(weights, name, layout, int(resolution), use_ema)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _read_json(source, name: str, subfolder: str | None, options: dict) -> dict:
    path = find_file(source, name, subfolder, **options)
    return {} if path is None else json.loads(path.read_text(encoding="utf-8"))


def _read_folder(source, subfolder: str | None, options: dict) -> dict[str, torch.Tensor]:
    """The tokenizer's weights in a folder or repository: one file, or the shards that hold them."""
    for name in INDICES:
        index = _read_json(source, name, subfolder, options).get("weight_map")
        if index:
            return _read_shards(source, index, subfolder, options)
    for name in FILES:
        path = find_file(source, name, subfolder, **options)
        if path is not None:
            return _read_file(path)
    if Path(source).is_dir():
        known = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".msgpack")
        found = sorted(path for path in Path(source, subfolder or "").iterdir() if path.suffix in known)
        if len(found) == 1:
            return _read_file(found[0])
    if subfolder is None and find_file(source, "model_index.json", **options) is not None:
        raise ValueError(
            f"`{source}` is a pipeline: `subfolder` must name the part that is its tokenizer, such as 'vqvae'."
        )
    raise ValueError(
        f"`{source}` must hold one of {FILES}; give the file of weights itself, if it has another name."
        f"{run_hint(source)}"
    )


def _read_shards(source, index: dict[str, str], subfolder: str | None, options: dict) -> dict[str, torch.Tensor]:
    """The weights of the first of `PREFIXES` that a sharded model has; no other weight is read."""
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in index)), "")
    keys = {key: file for key, file in index.items() if key.startswith(prefix)}
    weights = {}
    for file_name in sorted(set(keys.values())):
        path = find_file(source, file_name, subfolder, **options)
        if path is None:
            raise ValueError(f"`{source}` lacks {file_name}, which its index names.")
        wanted = [key for key, name in keys.items() if name == file_name]
        if file_format(path, "source") == "safetensors":
            with safe_open(path, "pt") as file:
                shard = {key: file.get_tensor(key) for key in wanted}
        else:
            whole = load_checkpoint(path, "source")
            shard = {key: whole[key] for key in wanted}
        weights |= shard
    check_finite(weights, f"`{source}`")
    return in_float32(weights, f"`{source}`")


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    if file_format(path, "source") == "msgpack":
        return in_float32(from_flax(_read_msgpack(path)), f"`source` {path}")
    return tensors_of(load_checkpoint(path, "source"), path, "source", ENTRIES)


def _read_msgpack(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of a Flax checkpoint, by their path joined by dots."""
    try:
        import msgpack
    except ImportError as error:
        raise ValueError(
            f"`source` {path} is a Flax checkpoint; reading it needs `pip install hf_vq[flax]`."
        ) from error

    def array(code: int, data: bytes):
        if code != 1:  # an array; the others are numbers
            return None
        shape, dtype, buffer = msgpack.unpackb(data, raw=True)
        dtype = dtype.decode() if isinstance(dtype, bytes) else dtype
        if dtype == "bfloat16":
            return torch.frombuffer(bytearray(buffer), dtype=torch.bfloat16).reshape(shape).float()
        return torch.from_numpy(np.frombuffer(buffer, dtype=np.dtype(dtype)).reshape(shape).copy())

    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=array, raw=False, strict_map_key=False)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise ValueError(f"`source` {path} is no whole Flax checkpoint; get it again.") from error
    weights = dict(_flattened(tree, ""))
    return {name.removeprefix("params."): value for name, value in weights.items()}


def _flattened(tree: dict, path: str):
    if tree.get("__msgpack_chunked_array__"):  # Flax cuts arrays of more than 2³⁰ bytes
        shape = [tree["shape"][key] for key in sorted(tree["shape"], key=int)]
        chunks = [tree["chunks"][key] for key in sorted(tree["chunks"], key=int)]
        yield path, torch.cat([chunk.flatten() for chunk in chunks]).reshape(shape)
        return
    for name, value in tree.items():
        inner = f"{path}.{name}" if path else name
        if isinstance(value, dict):
            yield from _flattened(value, inner)
        else:
            yield inner, value


# ---------------------------------------------------------------------------------------------------------------------
# Telling layouts apart
# ---------------------------------------------------------------------------------------------------------------------


def _convert(weights: dict, name: str, layout: str | None, resolution: int, use_ema: bool) -> VQGANModel:
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in weights)), "")
    weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    weights, _ = drop_keys(weights, UNUSED_KEYS)
    for kind, is_it in REFUSED:
        if is_it(weights):
            raise ValueError(f"`source` {name} is {kind}; hf_vq has no equivalent.")
    layout = layout or recognise(weights, name)
    weights = _averages_of_parts(weights, use_ema)
    weights, _ = choose_averages(weights, use_ema)
    if layout == "diffusers":
        weights = from_diffusers(weights)
    elif layout == "llamagen" or any("conv_blocks" in key for key in weights):
        weights = from_llamagen(weights)
    elif "decoder.up.0.upsample.conv.weight" in weights:  # the levels are numbered from the lowest resolution
        weights = reversed_levels(renamed(weights, LLAMAGEN_NAMES))
    return _build(weights, layout, resolution)


def recognise(weights: dict, name: str = "") -> str:
    """The layout of a tokenizer's weights, one of `LAYOUTS`.

    Raises:
        ValueError: for none of them, or for names that IBQ and taming share.
    """
    if any(".down_blocks." in key for key in weights):
        return "diffusers"
    if any("conv_blocks" in key for key in weights):
        return "llamagen"
    if any(".conv_y." in key for key in weights):
        return "movq"
    if not any(key.startswith("encoder.down.0.block.0") for key in weights):
        raise ValueError(f"`source` {name} is no tokenizer that is known; its keys begin with {sorted(weights)[:5]}.")
    if "decoder.up.0.upsample.conv.weight" in weights:
        return "janus"
    if re.search(r"\bibq|ibq\b|ibq[-_]", name):
        return "ibq"
    if any(key.startswith("model_ema.") for key in weights) and "encoder.down.0.block.3.conv1.weight" in weights:
        raise ValueError(
            f"`source` {name} may be of IBQ or of taming-transformers, whose names are the same; say which by "
            '`layout="ibq"` or `layout="taming"`.'
        )
    return "taming"


def _averages_of_parts(weights: dict, use_ema: bool) -> dict:
    """MoVQGAN averages each part by itself: `ema_encoder.conv_inweight` for `encoder.conv_in.weight`."""
    averages = {key: value for key, value in weights.items() if key.startswith("ema_")}
    live = {key: value for key, value in weights.items() if key not in averages}
    if not averages or not use_ema:
        return live
    parts = {key: key.partition(".")[::2] for key in live}
    names = {key: f"ema_{part}.{rest.replace('.', '')}" for key, (part, rest) in parts.items()}
    missing = [name for name in names.values() if name not in averages]
    if missing:
        raise ValueError(f"`source` lacks the average {missing[0]}, though it has others; load its own weights.")
    return {key: averages[name] for key, name in names.items()}


class MissingDecoder(nn.Module):
    """Stands where a checkpoint has no decoder."""

    def forward(self, *inputs: torch.Tensor):
        raise ValueError("This checkpoint has no decoder: its tokenizer encodes only.")


def _build(weights: dict, layout: str, resolution: int) -> VQGANModel:
    fields = {"legacy_beta": True}  # that of the original VQGAN, which most are copies of
    if layout in ("janus", "llamagen"):
        fields = {"quantizer": "cosine"}
    elif layout == "ibq":
        fields = {"quantizer": "ibq"}
    if "quantize.proj.weight" in weights:
        fields = {"quantizer": "gumbel"}
        codebook = weights["quantize.embed.weight"]
        inferred = network_fields({**weights, "quantize.embedding.weight": codebook}, resolution)
        return build(weights, **inferred, **fields)
    if "quantize.embedding.cluster_size" in weights:
        inferred = network_fields(weights, resolution)
        weights = {EMA_CODEBOOK.get(key, key): value for key, value in weights.items()}
        weights["quantize.num_updates"] = torch.zeros((), dtype=torch.int64)
        kwargs = {"decay": 0.99, "zero_debias": False, "restart_threshold": 0.0, "count_smoothing": "laplace"}
        return build(weights, **inferred, quantizer="ema", quantizer_kwargs=kwargs)
    if any(".conv_y." in key for key in weights):
        fields |= {"decoder_norm": "spatial", "spatial_norm_conv": "decoder.norm_out.conv.weight" in weights}
    if any(key.startswith("decoder.") for key in weights):
        return build(weights, resolution, **fields)
    return _build_encoder(weights, resolution, fields)


def _build_encoder(weights: dict, resolution: int, fields: dict) -> VQGANModel:
    """A tokenizer whose `decode` is an error."""
    weights = {key: value for key, value in weights.items() if not key.startswith("post_quant_conv.")}
    with torch.device("meta"):
        model = VQGANModel(VQGANModel.config_class(**{**network_fields(weights, resolution), **fields}))
    model.post_quant_conv = model.decoder = MissingDecoder()
    load_exactly(model, weights)
    return model.eval()


__all__ = ["LAYOUTS", "load_tokenizer", "recognise"]
