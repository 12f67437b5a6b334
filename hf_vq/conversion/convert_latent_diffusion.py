"""Checkpoints of the original latent diffusion code with a VQ first stage (CompVis/latent-diffusion) to hf_vq.

    hf-vq convert latent_diffusion --checkpoint last.ckpt --config model.yaml --output folder

A whole model (LatentDiffusion) becomes a `VQLatentDiffusionPipeline`, a first stage (VQModel) a `VQGANModel`.
"""

import math
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from transformers import PreTrainedTokenizerBase

from ..argument_checks import check_integer, check_real
from ..hub import push_folder, save_with_code
from ..pipelines.pipeline_vq_latent_diffusion import VQLatentDiffusionPipeline
from .checkpoints import (
    argument_parser,
    check_agrees,
    check_part,
    drop_keys,
    errors_name,
    print_dropped,
    read_tokenizer,
    save_image_processor,
    save_tokenizer,
    split_by_prefix,
    written_folder,
)
from .ldm_conditioner import convert_conditioner
from .ldm_unet import convert_unet
from .reading import Options, load_state_dict, read_model
from .taming_tokenizer import convert_tokenizer, save_discriminator


PARTS = ("tokenizer", "unet", "pipeline")
PREFIXES = ("model.diffusion_model.", "model_ema.", "first_stage_model.", "cond_stage_model.")
SCHEDULE_KEYS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
)
WHOLE_MODELS = ("LatentDiffusion", "Layout2ImgDiffusion")
# Arguments of `LatentDiffusion` that are read here, or change nothing of what a trained model predicts.
KNOWN_PARAMS = set(
    "beta_schedule channels ckpt_path clip_denoised concat_mode cond_stage_config cond_stage_key cond_stage_trainable "
    "conditioning_key cosine_s first_stage_config first_stage_key given_betas ignore_keys image_size l_simple_weight "
    "learn_logvar linear_end linear_start load_only_unet log_every_t logvar_init loss_type monitor "
    "original_elbo_weight "
    "parameterization scale_by_std scale_factor scheduler_config timesteps unet_config use_ema v_posterior".split()
)
# Those of which one value has an equivalent here, as in every published model; the first is the default.
FIXED_PARAMS = {
    "cond_stage_forward": (None,),
    "num_timesteps_cond": (None, 1),
    "use_positional_encodings": (False, None),
}
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample"}


def convert_schedule(params: dict, state_dict: dict) -> DDIMScheduler:
    """The noise schedule, with the steps of the original's DDIM sampler where their number divides the timesteps; for
    any other, see `timesteps` of the pipeline.

    Raises:
        ValueError: if the checkpoint's betas are not those of the configuration, or its parameterization is unknown.
    """
    parameterization = params.get("parameterization", "eps")
    if parameterization not in [*PREDICTION_TYPES]:
        raise ValueError(f"`config` has the parameterization {parameterization!r}; known: {sorted(PREDICTION_TYPES)}.")
    scheduler = DDIMScheduler(
        **schedule_arguments(params),
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=PREDICTION_TYPES[parameterization],
    )
    for name, computed in (("betas", scheduler.betas), ("alphas_cumprod", scheduler.alphas_cumprod)):
        found = state_dict.get(name)
        if found is None or found.is_meta:
            continue
        # values that half precision holds to the last digit were saved in it
        kinds = (torch.bfloat16, torch.float16, torch.float32)
        kind = next((kind for kind in kinds if torch.equal(found.to(kind).to(found.dtype), found)), torch.float32)
        rtol = max(1e-4, 2 * torch.finfo(kind).eps)
        if found.shape != computed.shape or not torch.allclose(found.float(), computed, atol=1e-6, rtol=rtol):
            raise ValueError(
                f"`checkpoint` has other {name} than `config` says (timesteps, beta_schedule, "
                f"linear_start, linear_end)."
            )
    return scheduler


def schedule_arguments(params: dict) -> dict:
    """The arguments of diffusers' schedulers for the betas of the original.

    Raises:
        ValueError: for a schedule that the original does not have.
    """
    kind, count = params.get("beta_schedule", "linear"), params.get("timesteps", 1000)
    start, end = params.get("linear_start", 1e-4), params.get("linear_end", 2e-2)
    if params.get("given_betas") is not None:
        if not isinstance(params["given_betas"], (list, tuple)):
            raise ValueError(f"`config` must have a list of numbers as given_betas, got {params['given_betas']!r}.")
        betas = [check_real("given_betas", beta, above=0, below=1) for beta in params["given_betas"]]
        return {"num_train_timesteps": len(betas), "trained_betas": betas}
    count = check_integer("timesteps", count, minimum=1)
    start, end = (
        check_real(name, value, above=0, below=1) for name, value in (("linear_start", start), ("linear_end", end))
    )
    if kind == "linear":  # in the square root
        return {"num_train_timesteps": count, "beta_start": start, "beta_end": end, "beta_schedule": "scaled_linear"}
    if kind == "cosine":  # Nichol & Dhariwal 2021, equation 17
        offset = params.get("cosine_s", 8e-3)
        angles = (torch.arange(count + 1, dtype=torch.float64) / count + offset) / (1 + offset) * math.pi / 2
        levels = angles.cos().square()
        betas = (1 - levels[1:] / levels[:-1]).clamp(0, 0.999)
    elif kind in ("sqrt_linear", "sqrt"):
        betas = torch.linspace(start, end, count, dtype=torch.float64)
        betas = betas.sqrt() if kind == "sqrt" else betas
    else:
        raise ValueError(f"`config` has the beta_schedule {kind!r}; known: cosine, linear, sqrt, sqrt_linear.")
    return {"num_train_timesteps": count, "trained_betas": betas.tolist()}


def averaged_weights(live: dict, averages: dict) -> dict:
    """The averages under the names of the live weights: the original's names lack the dots.

    Raises:
        ValueError: if a weight has no average.
    """
    names = {key: "diffusion_model" + key.replace(".", "") for key in live}
    missing = [key for key, name in names.items() if name not in averages]
    if missing:
        raise ValueError(f"`checkpoint` lacks the average model_ema.{names[missing[0]]}; convert its own weights.")
    surplus = sorted(set(averages) - set(names.values()) - {"decay", "num_updates"})
    if surplus:
        raise ValueError(f"`checkpoint` has the average model_ema.{surplus[0]} of a weight that it does not have.")
    other = [key for key, name in names.items() if averages[name].shape != live[key].shape]
    if other:
        raise ValueError(f"`checkpoint` has model.diffusion_model.{other[0]} and its average in two shapes.")
    return {key: averages[name] for key, name in names.items()}


def scale_factor(params: dict, state_dict: dict) -> float:
    """What latents are multiplied by: in the checkpoint only where it was measured (scale_by_std)."""
    configured, measured = check_real("scale_factor", params.get("scale_factor", 1.0)), state_dict.get("scale_factor")
    if measured is not None and measured.numel() != 1:
        raise ValueError(f"`checkpoint` must have one number as scale_factor, got shape {tuple(measured.shape)}.")
    if params.get("scale_by_std", False):
        if measured is None:
            raise ValueError("`checkpoint` lacks scale_factor, which `config` says was measured (scale_by_std).")
        configured = float(measured)
    elif measured is not None and not math.isclose(float(measured), configured, rel_tol=1e-6):
        raise ValueError(
            f"`checkpoint` has scale_factor={float(measured)}, a measured one, but `config` says "
            f"scale_factor={configured} "
            "without scale_by_std."
        )
    if not (math.isfinite(configured) and configured > 0):
        raise ValueError(f"`checkpoint` or `config` must have a positive scale_factor, got {configured}.")
    return configured


def check_params(params: dict) -> None:
    """A `ValueError` for an argument of `LatentDiffusion` that is missing, not known, or has no equivalent here."""
    unknown = sorted(set(params) - KNOWN_PARAMS - set(FIXED_PARAMS))
    if unknown:
        raise ValueError(f"`config` has names in the model's params that are not known: {unknown}.")
    for name, known in FIXED_PARAMS.items():
        if params.get(name, known[0]) not in known:
            raise ValueError(f"`config` must have {name}={known[0]}, got {params[name]!r}: hf_vq has no equivalent.")
    options = Options(params, "model.params")
    options.section("first_stage_config").take("target")
    denoiser, _ = options.node("unet_config")
    if denoiser != "UNetModel":
        raise ValueError(f"`config` has a unet_config of the class {denoiser}; known: UNetModel.")


def convert_model(
    model: dict,
    state_dict: dict,
    use_ema: bool = True,
    null_class_id: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
):
    """
    A whole model.

    Args:
        model: the `model` section of the original's YAML, with `target` and `params`.
        state_dict: the checkpoint's `state_dict`.
        use_ema: take the averages of the denoiser's weights, where the checkpoint has them.
        null_class_id: the class that stands for none; by default the last of 1001.
        tokenizer (*optional*): of a text encoder; without it the pipeline takes `prompt_embeds`.

    Returns:
        a `VQLatentDiffusionPipeline`, and for each key that is not used, why.

    Raises:
        ValueError: for a part that has no equivalent here, or a key that is missing or unknown.
    """
    params = model["params"]
    check_params(params)
    schedule = {key: state_dict[key] for key in SCHEDULE_KEYS if key in state_dict}
    rest = {key: value for key, value in state_dict.items() if key not in (*schedule, "scale_factor")}
    live, averages, first_stage, cond_stage = split_by_prefix(rest, PREFIXES).values()
    dropped = dict.fromkeys(schedule, "the noise schedule, which is computed")

    first_config = params["first_stage_config"]
    # the denoiser is trained on, and decoded by, the first stage's own weights
    first_stage, reasons = drop_keys(first_stage, {"model_ema.": "averages that the denoiser was not trained with"})
    dropped |= {f"first_stage_model.{key}": why for key, why in reasons.items()}
    vqvae, reasons = convert_tokenizer(first_config, first_stage)
    vqvae.config.scaling_factor = scale_factor(params, state_dict)
    dropped |= {f"first_stage_model.{key}": why for key, why in reasons.items()}

    weights = averaged_weights(live, averages) if use_ema and averages else live
    latents = vqvae.config.embed_dim
    check_agrees("channels", params.get("channels", 3), latents)
    changes, arguments, reasons = convert_conditioner(params, cond_stage, weights, latents, null_class_id, tokenizer)
    dropped |= {f"cond_stage_model.{key}": why for key, why in reasons.items()}
    unet = convert_unet(params["unet_config"].get("params") or {}, weights, **changes)
    if weights is live:
        dropped |= dict.fromkeys([f"model_ema.{key}" for key in averages], "averages; --live takes the others")
    else:
        why = "weights before averaging; --live takes them"
        dropped |= dict.fromkeys([f"model.diffusion_model.{key}" for key in live], why)
        dropped |= dict.fromkeys(["model_ema.decay", "model_ema.num_updates"], "how the averages are updated")
    scheduler = convert_schedule(params, state_dict)
    return VQLatentDiffusionPipeline(vqvae=vqvae, unet=unet, scheduler=scheduler, **arguments), dropped


def convert(
    checkpoint: str | Path,
    config: str | Path,
    output: str | Path,
    use_ema: bool = True,
    null_class_id: int | None = None,
    discriminator: bool = False,
    tokenizer: str | Path | None = None,
    part: str | None = None,
) -> dict[str, str]:
    """
    Writes the folder `output`: a pipeline, or a first stage with its image processor.

    Args:
        checkpoint, config, output (`str` or `Path`): the original's file, its YAML, and the folder.
        use_ema (`bool`): take the averages, of the denoiser's weights or of a first stage's, where there are any.
        null_class_id (`int`, *optional*): see `convert_model`.
        discriminator (`bool`): also write a first stage's discriminator to `output/discriminator`.
        tokenizer (`str` or `Path`, *optional*): the folder of a text encoder's tokenizer.
        part (`str`, *optional*): one of `PARTS`; by default all that the files make.

    Returns:
        for each key that is not used, why.

    Raises:
        ValueError: as `convert_model`, or for an argument that the checkpoint has no use for.
    """
    with written_folder(output) as folder, errors_name(checkpoint=checkpoint, config=config, tokenizer=tokenizer):
        return _convert(checkpoint, config, folder, use_ema, null_class_id, discriminator, tokenizer, part)


def _convert(
    checkpoint,
    config,
    output: Path,
    use_ema: bool,
    null_class_id: int | None,
    discriminator: bool,
    tokenizer,
    part: str | None,
) -> dict[str, str]:
    model = read_model(config)
    state_dict = load_state_dict(checkpoint)
    target = model["target"].rpartition(".")[2]
    if target not in WHOLE_MODELS and any(key.startswith(PREFIXES[0]) for key in state_dict):
        raise ValueError(
            f"`config` has a model of the class {target}, and `checkpoint` a denoiser; known: "
            f"{', '.join(WHOLE_MODELS)}."
        )
    if target in WHOLE_MODELS:
        if discriminator:
            raise ValueError("`--discriminator` needs the checkpoint of a first stage.")
        check_part(part, PARTS)
        words = None if tokenizer is None else read_tokenizer(tokenizer)
        pipeline, dropped = convert_model(model, state_dict, use_ema, null_class_id, words)
        if part == "tokenizer":
            save_tokenizer(pipeline.vqvae, output)
        elif part == "unet":
            pipeline.unet.save_pretrained(output)
        else:
            save_with_code(pipeline, output)
            save_image_processor(pipeline.vqvae, output / "vqvae")
        return dropped
    check_part(part, PARTS[:1])
    for name, value in (("null_class_id", null_class_id), ("tokenizer", tokenizer)):
        if value is not None:
            raise ValueError(f"`{name}` needs a whole model, got a first stage ({model['target']}).")
    first_stage, dropped = convert_tokenizer(model, state_dict, use_ema)
    save_tokenizer(first_stage, output)
    return save_discriminator(model, state_dict, output, dropped) if discriminator else dropped


def main(arguments: list[str] | None = None) -> None:
    """Runs the converter by its command line arguments."""
    parser = argument_parser("An original latent diffusion model with a VQ first stage, or that stage, to hf_vq.")
    parser.add_argument("--config", required=True, help="the YAML that the checkpoint was trained with")
    parser.add_argument("--live", action="store_true", help="take the weights themselves, not their averages")
    parser.add_argument("--discriminator", action="store_true", help="also save the discriminator of a first stage")
    parser.add_argument(
        "--null_class_id", type=int, help="the class that stands for none; by default the last of 1001"
    )
    parser.add_argument("--tokenizer", help="a folder with the vocabulary of the text encoder")
    parser.add_argument("--part", choices=PARTS, help="(default: all that the files make)")
    options = parser.parse_args(arguments)
    dropped = convert(
        options.checkpoint,
        options.config,
        options.output,
        not options.live,
        options.null_class_id,
        options.discriminator,
        options.tokenizer,
        options.part,
    )
    print_dropped(dropped)
    if options.push_to_hub:
        print(push_folder(options.output, options.push_to_hub, "Upload converted weights"))
