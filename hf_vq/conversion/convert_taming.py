"""Checkpoints of the original VQGAN code (CompVis/taming-transformers) to hf_vq.

    hf-vq convert taming --checkpoint last.ckpt --config model.yaml --output folder

A first stage (VQModel, GumbelVQ) becomes a `VQGANModel`, a whole model (Net2NetTransformer) a `VQAutoregressivePipeline`.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..hub import save_with_code
from ..models.autoencoders.modeling_vqgan import VQGANModel
from ..models.priors.configuration_vq_gpt import VQGPTConfig
from ..models.priors.modeling_vq_gpt import VQGPTForCausalLM
from ..pipelines.pipeline_vq_autoregressive import VQAutoregressivePipeline
from .checkpoints import (
    argument_parser,
    load_exactly,
    print_dropped,
    push_folder,
    save_image_processor,
    save_tokenizer,
    split_by_prefix,
)
from .reading import load_state_dict, read_model
from .taming_tokenizer import convert_discriminator, convert_tokenizer


# Original name inside a block → (GPT-2 name, transposed): GPT-2 keeps its projections as (in, out).
GPT_BLOCK_KEYS = {
    "ln1.weight": ("ln_1.weight", False),
    "ln1.bias": ("ln_1.bias", False),
    "ln2.weight": ("ln_2.weight", False),
    "ln2.bias": ("ln_2.bias", False),
    "attn.proj.weight": ("attn.c_proj.weight", True),
    "attn.proj.bias": ("attn.c_proj.bias", False),
    "mlp.0.weight": ("mlp.c_fc.weight", True),
    "mlp.0.bias": ("mlp.c_fc.bias", False),
    "mlp.2.weight": ("mlp.c_proj.weight", True),
    "mlp.2.bias": ("mlp.c_proj.bias", False),
}
GPT_OUTER_KEYS = {
    "tok_emb.weight": "transformer.wte.weight",
    "ln_f.weight": "transformer.ln_f.weight",
    "ln_f.bias": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",
}
# Arguments of a Net2NetTransformer that do not change what a trained model computes, or are read elsewhere here.
NET2NET_PARAMS = {
    "ckpt_path",
    "cond_stage_config",
    "cond_stage_key",
    "downsample_cond_size",
    "first_stage_config",
    "first_stage_key",
    "ignore_keys",
    "permuter_config",
    "pkeep",
    "sos_token",
    "transformer_config",
    "unconditional",
}
NET2NET_PREFIXES = ("first_stage_model.", "cond_stage_model.", "transformer.", "permuter.")


def convert_gpt_state_dict(state_dict, codebook_size=None) -> tuple[dict, dict]:
    """
    The GPT of a `Net2NetTransformer` as a `VQGPTForCausalLM`.

    Args:
        state_dict (`dict`): the checkpoint's `state_dict`; only its `transformer.*` keys are read.
        codebook_size (`int`, *optional*): number of codes of the image tokenizer where the GPT's vocabulary is larger, which
            cuts the head to them; the whole vocabulary by default.

    Returns:
        the arguments of `VQGPTConfig` that follow from the weights (all but the number of heads, the grid and the
        condition), and the new state dict.

    Raises:
        ValueError: a key that is missing or unknown, or more codes than the vocabulary has.
    """
    old = {k.removeprefix("transformer."): v for k, v in state_dict.items() if k.startswith("transformer.")}
    depth = len({key.split(".")[1] for key in old if key.startswith("blocks.")})
    masks = [old.pop(f"blocks.{i}.attn.mask", None) for i in range(depth)]
    try:
        new = {target: old.pop(source) for source, target in GPT_OUTER_KEYS.items()}
        new["transformer.wpe.weight"] = old.pop("pos_emb")[0]
        for i in range(depth):
            new.update(_convert_gpt_block(old, i))
    except KeyError as error:
        raise ValueError(f"`state_dict` lacks the key transformer.{error.args[0]} of an original GPT.") from error
    if old:
        raise ValueError(f"`state_dict` has keys that no original GPT has: {sorted(old)[:5]}.")

    num_ids, n_embd = new["transformer.wte.weight"].shape
    codebook_size = num_ids if codebook_size is None else codebook_size
    if codebook_size > num_ids:
        raise ValueError(f"`codebook_size` must be at most the GPT's vocabulary of {num_ids}, got {codebook_size}.")
    new["lm_head.weight"] = new["lm_head.weight"][:codebook_size]
    kwargs = {
        "codebook_size": codebook_size,
        "input_vocab_size": num_ids,
        "share_condition_embedding": True,
        "n_positions": new["transformer.wpe.weight"].shape[0],
        "n_embd": n_embd,
        "n_layer": depth,
        "n_unmasked": _n_unmasked(masks),
    }
    return kwargs, {key: value.contiguous() for key, value in new.items()}


def _convert_gpt_block(old: dict, i: int) -> dict:
    source, target = f"blocks.{i}.", f"transformer.h.{i}."
    new = {}
    for name, (new_name, transposed) in GPT_BLOCK_KEYS.items():
        tensor = old.pop(source + name)
        new[target + new_name] = tensor.T if transposed else tensor
    for kind in ("weight", "bias"):
        parts = [old.pop(f"{source}attn.{name}.{kind}") for name in ("query", "key", "value")]
        joined = torch.cat(parts)
        new[f"{target}attn.c_attn.{kind}"] = joined.T if kind == "weight" else joined
    return new


def _n_unmasked(masks) -> int:
    """The width of the bidirectional prefix, read from the attention mask that the original keeps as a buffer."""
    if not masks or masks[0] is None:
        return 0
    visible_to_first = int(masks[0][0, 0, 0].sum())
    return visible_to_first if visible_to_first > 1 else 0


def convert_net2net(model: dict, state_dict: dict):
    """
    A whole model: image tokenizer, GPT, and the condition's tokenizer where it has one.

    Args:
        model (`dict`): the `model` section of the original's YAML, with `target` and `params`.
        state_dict (`dict`): the checkpoint's `state_dict`.

    Returns:
        a `VQAutoregressivePipeline`, the condition's tokenizer (`VQGANModel` or `None`), and for each key that is not used,
        why.

    Raises:
        ValueError: for a part that hf_vq has no equivalent of, or a key that is missing or unknown.
    """
    params = model["params"]
    unknown = sorted(set(params) - NET2NET_PARAMS)
    if unknown:
        raise ValueError(f"`config` has parameters of Net2NetTransformer that are not known: {unknown}.")
    parts = split_by_prefix(state_dict, NET2NET_PREFIXES)
    first_stage, cond_stage, _, permuter = parts.values()
    vqvae, dropped = convert_tokenizer(params["first_stage_config"], first_stage)
    dropped = {f"first_stage_model.{key}": why for key, why in dropped.items()}
    side = vqvae.config.resolution // vqvae.config.downsample_factor
    _check_order(params.get("permuter_config"), permuter, side**2)
    dropped |= dict.fromkeys([f"permuter.{key}" for key in permuter], "the order of the codes: row by row, as here")

    condition, condition_tokenizer, dropped_here = _convert_condition(params, cond_stage, first_stage, vqvae)
    dropped |= {f"cond_stage_model.{key}": why for key, why in dropped_here.items()}

    gpt = params["transformer_config"]["params"]
    kwargs, weights = convert_gpt_state_dict(state_dict, vqvae.config.num_embeddings)
    masks = [key for key in state_dict if key.startswith("transformer.") and key.endswith(".attn.mask")]
    dropped |= dict.fromkeys(masks, "the causal mask, which is computed")
    config = VQGPTConfig(
        **kwargs,
        **condition,
        grid_size=side,
        n_head=gpt["n_head"],
        pkeep=params.get("pkeep", 1.0),
        **{name: gpt.get(name, 0.0) for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop")},
    )
    with torch.device("meta"):
        prior = VQGPTForCausalLM(config)
    load_exactly(prior, weights)
    return VQAutoregressivePipeline(vqvae=vqvae, prior=prior.eval()), condition_tokenizer, dropped


def _check_order(permuter_config: dict | None, permuter: dict, length: int) -> None:
    """The priors here read codes row by row: a ValueError for any other order."""
    name = (permuter_config or {}).get("target", "Identity").rpartition(".")[2]
    order = permuter.get("forward_shuffle_idx")
    if order is None and name != "Identity":
        raise ValueError(f"`checkpoint` lacks permuter.forward_shuffle_idx, the order of {name}.")
    if order is not None and not torch.equal(order, torch.arange(length)):
        raise ValueError(f"`config` has the permuter {name}, but the codes of a VQGPT are read row by row.")


def _convert_condition(params: dict, cond_stage: dict, first_stage: dict, vqvae: VQGANModel):
    """The fields of `VQGPTConfig` for the condition, its tokenizer or `None`, and the keys not used, with why."""
    stage = params["cond_stage_config"]
    target = stage if isinstance(stage, str) else stage["target"].rpartition(".")[2]
    image_length = (vqvae.config.resolution // vqvae.config.downsample_factor) ** 2
    tokenizer, dropped = None, {}
    if params.get("unconditional", False) or target == "__is_unconditional__":
        if params.get("sos_token", 0) != 0:
            raise ValueError(f"`config` must have sos_token=0, got {params['sos_token']}.")
        fields = {"condition_type": "unconditional"}
    elif target == "Labelator":
        fields = {"condition_type": "class", "num_classes": stage["params"]["n_classes"]}
    elif target == "CoordStage":
        length = (vqvae.config.resolution // stage["params"]["down_factor"]) ** 2
        fields = _code_condition(stage["params"]["n_embed"], length)
    elif target == "DummyCondStage":
        gpt = params["transformer_config"]["params"]
        fields = _code_condition(gpt["vocab_size"], gpt["block_size"] - image_length)
    elif target == "__is_first_stage__":
        fields = _code_condition(vqvae.config.num_embeddings, image_length)
        if cond_stage.keys() != first_stage.keys() or any(
            not torch.equal(cond_stage[key], first_stage[key]) for key in cond_stage
        ):
            raise ValueError(
                "`checkpoint` has a cond_stage_model that is not the first_stage_model, as `config` says."
            )
        dropped = dict.fromkeys(cond_stage, "the image tokenizer once more")
    elif isinstance(stage, dict):
        tokenizer, dropped = convert_tokenizer(stage, cond_stage)
        side = params.get("downsample_cond_size", -1)
        side = tokenizer.config.resolution if side < 0 else side
        fields = _code_condition(tokenizer.config.num_embeddings, (side // tokenizer.config.downsample_factor) ** 2)
    else:
        raise ValueError(f"`config` has a cond_stage_config that is not known: {stage!r}.")
    left = sorted(set(cond_stage) - set(dropped))
    if left and tokenizer is None:
        raise ValueError(f"`checkpoint` has keys that {target} does not have: cond_stage_model.{left[0]}.")
    return fields, tokenizer, dropped


def _code_condition(vocab_size: int, length: int) -> dict:
    return {"condition_type": "codes", "condition_vocab_size": vocab_size, "condition_length": length}


def convert(checkpoint, config, output, discriminator: bool = False) -> dict[str, str]:
    """
    Writes the folder `output`: a model with its image processor, or a pipeline (and `condition_tokenizer` in it).

    Args:
        checkpoint, config, output (`str` or `Path`): the original's file, its YAML, and the folder.
        discriminator (`bool`): also write the discriminator's weights and arguments to `output/discriminator`.

    Returns:
        for each key that is not used, why.
    """
    output = Path(output)
    model = read_model(config)
    state_dict = load_state_dict(checkpoint)
    if model["target"].rpartition(".")[2] == "Net2NetTransformer":
        if discriminator:
            raise ValueError("`--discriminator` needs the checkpoint of a first stage.")
        pipeline, condition_tokenizer, dropped = convert_net2net(model, state_dict)
        save_with_code(pipeline, output)
        if condition_tokenizer is not None:
            save_tokenizer(condition_tokenizer, output / "condition_tokenizer")
        save_image_processor(pipeline.vqvae, output / "vqvae")
        return dropped
    tokenizer, dropped = convert_tokenizer(model, state_dict)
    save_tokenizer(tokenizer, output)
    if discriminator:
        network, arguments = convert_discriminator(model, state_dict)
        folder = output / "discriminator"
        folder.mkdir(exist_ok=True)
        save_file(network.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(arguments, indent=2) + "\n")
        dropped = {key: why for key, why in dropped.items() if not key.startswith("loss.discriminator.")}
    return dropped


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser("An original VQGAN, or VQGAN with its GPT, to hf_vq.")
    parser.add_argument("--config", required=True, help="the YAML that the checkpoint was trained with")
    parser.add_argument("--discriminator", action="store_true", help="also save the discriminator of a VQGAN")
    options = parser.parse_args(arguments)
    print_dropped(convert(options.checkpoint, options.config, options.output, options.discriminator))
    if options.push_to_hub:
        print(push_folder(options.output, options.push_to_hub))
