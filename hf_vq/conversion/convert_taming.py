"""Checkpoints of the original VQGAN code (CompVis/taming-transformers) to hf_vq.

    hf-vq convert taming --checkpoint last.ckpt --config model.yaml --output folder

A first stage (VQModel, GumbelVQ) becomes a `VQGANModel`, a whole model (Net2NetTransformer) a
`VQAutoregressivePipeline`.
"""

from pathlib import Path

import torch

from ..hub import push_folder, save_with_code
from ..models.autoencoders.image_processing_vq_condition import VQConditionProcessor
from ..models.autoencoders.modeling_vqgan import VQGANModel
from ..models.priors.code_orders import CODE_ORDERS, code_order
from ..models.priors.configuration_vq_gpt import VQGPTConfig
from ..models.priors.modeling_vq_gpt import VQGPTForCausalLM
from ..pipelines.pipeline_vq_autoregressive import VQAutoregressivePipeline
from .checkpoints import (
    argument_parser,
    check_agrees,
    check_part,
    errors_name,
    load_exactly,
    print_dropped,
    save_image_processor,
    save_tokenizer,
    split_by_prefix,
    written_folder,
)
from .reading import Options, load_state_dict, read_model
from .taming_tokenizer import convert_tokenizer, save_discriminator


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
PARTS = ("tokenizer", "prior", "pipeline", "condition_tokenizer")
NET2NET_PREFIXES = ("first_stage_model.", "cond_stage_model.", "transformer.", "permuter.")
# Options of the original's GPT that follow from its weights → (field of `VQGPTConfig`, the original's default).
GPT_FIELDS = {
    "vocab_size": ("input_vocab_size", None),
    "block_size": ("n_positions", None),
    "n_layer": ("n_layer", 12),
    "n_embd": ("n_embd", 256),
    "n_unmasked": ("n_unmasked", 0),
}
PERMUTERS = ("Identity", "Subsample", "ZCurve", "SpiralOut", "SpiralIn", "Random", "AlternateParsing")


def convert_gpt_state_dict(state_dict: dict[str, torch.Tensor], codebook_size: int | None = None) -> tuple[dict, dict]:
    """
    The GPT of a `Net2NetTransformer` as a `VQGPTForCausalLM`.

    Args:
        state_dict (`dict`): the checkpoint's `state_dict`; only its `transformer.*` keys are read.
        codebook_size (`int`, *optional*): number of codes of the image tokenizer where the GPT's vocabulary is larger;
            the whole vocabulary by default. The head keeps its other columns, which count in a likelihood.

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
    kwargs = {
        "codebook_size": codebook_size,
        "vocab_size": new["lm_head.weight"].shape[0],
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


def _n_unmasked(masks: list) -> int:
    """The width of the bidirectional prefix, read from the attention masks that the original keeps as buffers.

    Raises:
        ValueError: if a mask is missing, or is not causal but for such a prefix.
    """
    for i, mask in enumerate(masks):
        if mask is None:
            raise ValueError(f"`state_dict` lacks the key transformer.blocks.{i}.attn.mask of an original GPT.")
    if not masks or masks[0].is_meta or masks[0].stride(-1) == 0:
        return 0  # only its shape is known
    length = masks[0].shape[-1]
    visible_to_first = int(masks[0][0, 0, 0].sum())
    expected = torch.ones(length, length).tril()
    expected[:visible_to_first, :visible_to_first] = 1
    for i, mask in enumerate(masks):
        if not torch.equal(mask[0, 0].float(), expected):
            raise ValueError(
                f"`state_dict` has a mask in transformer.blocks.{i}.attn.mask that is not causal after the first "
                f"{visible_to_first} positions."
            )
    return visible_to_first if visible_to_first > 1 else 0


def convert_net2net(model: dict, state_dict: dict):
    """
    A whole model: image tokenizer, GPT, and the condition's tokenizer where it has one.

    Args:
        model (`dict`): the `model` section of the original's YAML, with `target` and `params`.
        state_dict (`dict`): the checkpoint's `state_dict`.

    Returns:
        a `VQAutoregressivePipeline`, the condition's tokenizer (`VQGANModel` or `None`), and for each key that is not
        used, why.

    Raises:
        ValueError: for a part that hf_vq has no equivalent of, or a key that is missing or unknown.
    """
    params = Options(model["params"], "model.params")
    params.training_only("ckpt_path", "cond_stage_key", "first_stage_key", "ignore_keys")
    first_stage, cond_stage, _, permuter = split_by_prefix(state_dict, NET2NET_PREFIXES).values()
    vqvae, dropped = convert_tokenizer(params.take("first_stage_config"), first_stage)
    dropped = {f"first_stage_model.{key}": why for key, why in dropped.items()}
    order = _code_order(params, permuter, vqvae.config.resolution // vqvae.config.downsample_factor)
    dropped |= dict.fromkeys(
        [f"permuter.{key}" for key in permuter], "the order of the codes, which the prior computes"
    )

    gpt_class, gpt = params.node("transformer_config")
    if gpt_class != "GPT":
        raise ValueError(f"`config` has a transformer of the class {gpt_class}; known: GPT.")
    kwargs, weights = convert_gpt_state_dict(state_dict, vqvae.config.num_embeddings)
    for name, (field, default) in GPT_FIELDS.items():
        configured = gpt.count(name) if default is None else gpt.count(name, default, minimum=0)
        if name != "n_unmasked" or configured > 1:  # one position sees itself anyway
            check_agrees(f"transformer_config.{name}", configured, kwargs[field])
    masks = [key for key in state_dict if key.startswith("transformer.") and key.endswith(".attn.mask")]
    dropped |= dict.fromkeys(masks, "the causal mask, which is computed")

    condition, condition_tokenizer, reasons = _convert_condition(
        params, cond_stage, first_stage, vqvae, kwargs["input_vocab_size"], kwargs["n_positions"], order["grid_size"]
    )
    dropped |= {f"cond_stage_model.{key}": why for key, why in reasons.items()}
    heads = gpt.count("n_head", 8)
    if kwargs["n_embd"] % heads:
        raise ValueError(f"`config` must have n_head divide the width {kwargs['n_embd']} of the GPT, got {heads}.")
    config = VQGPTConfig(
        **kwargs,
        **condition,
        **order,
        n_head=heads,
        pkeep=_kept_codes(params),
        **{name: gpt.number(name, 0.0, below=1) for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop")},
    )
    gpt.finish()
    params.finish()
    with torch.device("meta"):
        prior = VQGPTForCausalLM(config)
    load_exactly(prior, weights)
    pipeline = VQAutoregressivePipeline(
        vqvae=vqvae,
        prior=prior.eval(),
        condition_tokenizer=condition_tokenizer,
        condition_processor=_condition_processor(condition_tokenizer),
    )
    return pipeline, condition_tokenizer, dropped


def _code_order(params: Options, permuter: dict, side: int) -> dict:
    """The fields of `VQGPTConfig` for the grid and the order in which its codes are read."""
    if params.take("permuter_config", None) is None:
        name, grid = "Identity", (side, side)
    else:
        name, sizes = params.node("permuter_config")
        grid = (sizes.count("H", side), sizes.count("W", side))
        sizes.finish()
    if name not in PERMUTERS:
        raise ValueError(f"`config` has a permuter of the class {name}; known: {', '.join(PERMUTERS)}.")
    order = permuter.get("forward_shuffle_idx")
    if order is None:
        if name != "Identity":
            raise ValueError(f"`checkpoint` lacks permuter.forward_shuffle_idx, the order of {name}.")
        return {"grid_size": grid}
    positions = order.tolist()
    if sorted(positions) != list(range(grid[0] * grid[1])):
        raise ValueError(
            f"`checkpoint` has a permuter.forward_shuffle_idx of {len(positions)} positions, which is no order of "
            f"{grid[0]}x{grid[1]} codes."
        )
    known = (known for known in CODE_ORDERS if known != "random" and code_order(known, *grid) == positions)
    found = next(known, "random")
    return {"grid_size": grid, "order": found, **({"permutation": positions} if found == "random" else {})}


def _convert_condition(
    params: Options,
    cond_stage: dict,
    first_stage: dict,
    vqvae: VQGANModel,
    num_ids: int,
    block_size: int,
    grid_size: tuple[int, int],
):
    """The fields of `VQGPTConfig` for the condition, its tokenizer or `None`, and the keys not used, with why."""
    stage = params.take("cond_stage_config")
    options = Options(None, "model.params.cond_stage_config.params")
    if isinstance(stage, dict):
        target, options = params.node("cond_stage_config")
    else:
        target = str(stage)
    sos_token = _start_token(params.count("sos_token", 0, minimum=0), num_ids)
    size = params.count("downsample_cond_size", -1, minimum=-1)
    tokenizer, dropped = None, {}
    # as in the original, which asks for the first stage before it asks whether there is a condition at all
    is_unconditional = params.flag("unconditional", False) and target != "__is_first_stage__"
    if is_unconditional or target == "__is_unconditional__":
        fields, options = {"condition_type": "unconditional", "bos_token_id": sos_token}, None
    elif target == "SOSProvider":
        options.training_only("quantize_interface")
        fields = {
            "condition_type": "unconditional",
            "bos_token_id": _start_token(options.count("sos_token", minimum=0), num_ids),
        }
    elif target == "Labelator":
        options.training_only("quantize_interface")
        fields = {"condition_type": "class", "num_classes": options.count("n_classes")}
    elif target == "CoordStage":
        # its coordinates are rounded to 0 … n_embed, the ends included; the published models cannot embed the last one
        side = (vqvae.config.resolution if size < 0 else size) // options.count("down_factor")
        scale = options.count("n_embed")
        fields = _code_condition(min(scale + 1, num_ids), side**2)
        fields |= {"condition_type": "coordinates", "coordinate_scale": scale}
    elif target == "DummyCondStage":
        options.training_only("conditional_key")
        fields = _code_condition(num_ids, block_size - grid_size[0] * grid_size[1])
    elif target == "__is_first_stage__":
        side = (vqvae.config.resolution if size < 0 else size) // vqvae.config.downsample_factor
        fields = _code_condition(vqvae.config.num_embeddings, side**2)
        if cond_stage.keys() != first_stage.keys() or any(
            not torch.equal(cond_stage[key], first_stage[key]) for key in cond_stage
        ):
            raise ValueError(
                "`checkpoint` has a cond_stage_model that is not the first_stage_model, as `config` says."
            )
        dropped = dict.fromkeys(cond_stage, "the image tokenizer once more")
    elif isinstance(stage, dict):
        tokenizer, dropped = convert_tokenizer(stage, cond_stage)
        side = (tokenizer.config.resolution if size < 0 else size) // tokenizer.config.downsample_factor
        fields, options = _code_condition(tokenizer.config.num_embeddings, side**2), None
    else:
        raise ValueError(f"`config` has a cond_stage_config that is not known: {stage!r}.")
    if options is not None:
        options.finish()
    left = sorted(set(cond_stage) - set(dropped))
    if left and tokenizer is None:
        raise ValueError(f"`checkpoint` has keys that {target} does not have: cond_stage_model.{left[0]}.")
    return fields, tokenizer, dropped


def _start_token(token: int, num_ids: int) -> int:
    if token >= num_ids:
        raise ValueError(f"`config` must have a sos_token below the GPT's vocabulary of {num_ids}, got {token}.")
    return token


def _kept_codes(params: Options) -> float:
    """The probability with which training keeps an input code. With none kept the original draws all codes at once."""
    pkeep = params.number("pkeep", 1.0)
    if not 0 < pkeep <= 1:
        raise ValueError(f"`config` must have a pkeep in (0, 1], got {pkeep}: a prior here reads the codes before.")
    return pkeep


def _condition_processor(tokenizer: VQGANModel | None) -> VQConditionProcessor | None:
    """What reads label maps for a tokenizer of them; of one or three channels the file does not say what they mean."""
    if tokenizer is None or tokenizer.config.in_channels in (1, 3):
        return None
    return VQConditionProcessor(
        "segmentation", num_labels=tokenizer.config.in_channels, size=tokenizer.config.resolution
    )


def _code_condition(vocab_size: int, length: int) -> dict:
    return {"condition_type": "codes", "condition_vocab_size": vocab_size, "condition_length": length}


def convert(
    checkpoint: str | Path,
    config: str | Path,
    output: str | Path,
    discriminator: bool = False,
    use_ema: bool = True,
    part: str | None = None,
) -> dict[str, str]:
    """
    Writes the folder `output`: a model with its image processor, or a pipeline (and `condition_tokenizer` in it).

    Args:
        checkpoint, config, output (`str` or `Path`): the original's file, its YAML, and the folder.
        discriminator (`bool`): also write the discriminator's weights and arguments to `output/discriminator`.
        use_ema (`bool`): take the averages of a first stage's weights, where the checkpoint has them.
        part (`str`, *optional*): one of `PARTS`; by default all that the files make.

    Returns:
        for each key that is not used, why.

    Raises:
        ValueError: a file that cannot be read, or that has no equivalent here, or a part that the files do not make.
    """
    with written_folder(output) as folder, errors_name(checkpoint=checkpoint, config=config):
        return _convert(checkpoint, config, folder, discriminator, use_ema, part)


def _convert(checkpoint, config, output: Path, discriminator: bool, use_ema: bool, part: str | None) -> dict[str, str]:
    model = read_model(config)
    state_dict = load_state_dict(checkpoint)
    if model["target"].rpartition(".")[2] == "Net2NetTransformer":
        if discriminator:
            raise ValueError("`--discriminator` needs the checkpoint of a first stage.")
        pipeline, condition_tokenizer, dropped = convert_net2net(model, state_dict)
        check_part(part, PARTS if condition_tokenizer is not None else PARTS[:-1])
        if part == "prior":
            save_with_code(pipeline.prior, output)
        elif part in ("tokenizer", "condition_tokenizer"):
            save_tokenizer(pipeline.vqvae if part == "tokenizer" else condition_tokenizer, output)
        else:
            save_with_code(pipeline, output)
            if condition_tokenizer is not None:
                save_tokenizer(condition_tokenizer, output / "condition_tokenizer")
            save_image_processor(pipeline.vqvae, output / "vqvae")
        return dropped
    check_part(part, PARTS[:1])
    tokenizer, dropped = convert_tokenizer(model, state_dict, use_ema)
    save_tokenizer(tokenizer, output)
    if discriminator:
        dropped = save_discriminator(model, state_dict, output, dropped)
    return dropped


def main(arguments: list[str] | None = None) -> None:
    """Runs the converter by its command line arguments."""
    parser = argument_parser("An original VQGAN, or VQGAN with its GPT, to hf_vq.")
    parser.add_argument("--config", required=True, help="the YAML that the checkpoint was trained with")
    parser.add_argument("--discriminator", action="store_true", help="also save the discriminator of a VQGAN")
    parser.add_argument("--live", action="store_true", help="take the weights themselves, not their averages")
    parser.add_argument("--part", choices=PARTS, help="(default: all that the files make)")
    options = parser.parse_args(arguments)
    dropped = convert(
        options.checkpoint, options.config, options.output, options.discriminator, not options.live, options.part
    )
    print_dropped(dropped)
    if options.push_to_hub:
        print(push_folder(options.output, options.push_to_hub, "Upload converted weights"))
