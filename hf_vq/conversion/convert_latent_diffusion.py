"""Checkpoints of the original latent diffusion code with a VQ first stage (CompVis/latent-diffusion) to hf_vq.

    hf-vq convert latent_diffusion --checkpoint last.ckpt --config model.yaml --output folder

A whole model (LatentDiffusion) becomes a `VQLatentDiffusionPipeline`, a first stage (VQModel) a `VQGANModel`.
"""

from pathlib import Path

import torch
from diffusers import DDIMScheduler

from ..hub import save_with_code
from ..pipelines.pipeline_vq_latent_diffusion import VQLatentDiffusionPipeline
from .checkpoints import (
    argument_parser,
    drop_keys,
    print_dropped,
    push_folder,
    save_image_processor,
    save_tokenizer,
    split_by_prefix,
)
from .ldm_conditioner import convert_conditioner
from .ldm_unet import convert_unet
from .reading import load_state_dict, read_model
from .taming_tokenizer import convert_tokenizer, save_discriminator


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
# Arguments of `LatentDiffusion` that are read here, or change nothing of what a trained model predicts.
KNOWN_PARAMS = set(
    "beta_schedule channels ckpt_path clip_denoised concat_mode cond_stage_config cond_stage_key cond_stage_trainable "
    "conditioning_key cosine_s first_stage_config first_stage_key ignore_keys image_size l_simple_weight learn_logvar "
    "linear_end linear_start load_only_unet log_every_t logvar_init loss_type monitor num_timesteps_cond "
    "original_elbo_weight parameterization scale_by_std scale_factor scheduler_config timesteps unet_config use_ema "
    "use_positional_encodings v_posterior".split()
)
FIXED_PARAMS = ("cond_stage_forward", "given_betas")  # None in every published model
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample"}


def convert_schedule(params: dict, state_dict: dict) -> DDIMScheduler:
    """The noise schedule, with the steps of the original's DDIM sampler.

    Raises:
        ValueError: if the checkpoint's betas are not those of the configuration, or its parameterization is unknown.
    """
    kind, count = params.get("beta_schedule", "linear"), params.get("timesteps", 1000)
    start, end = params.get("linear_start", 1e-4), params.get("linear_end", 2e-2)
    parameterization = params.get("parameterization", "eps")
    if parameterization not in PREDICTION_TYPES:
        raise ValueError(f"`config` has the parameterization {parameterization!r}; known: {sorted(PREDICTION_TYPES)}.")
    betas = state_dict.get("betas")
    if kind == "linear":  # linear in the square root
        schedule = {"beta_start": start, "beta_end": end, "beta_schedule": "scaled_linear"}
    elif betas is not None:
        schedule = {"trained_betas": betas.tolist()}
    else:
        raise ValueError(f"`checkpoint` lacks betas, which `config` only names: beta_schedule={kind!r}.")
    scheduler = DDIMScheduler(
        num_train_timesteps=count,
        **schedule,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=PREDICTION_TYPES[parameterization],
    )
    if betas is not None and not betas.is_meta:
        if betas.shape != scheduler.betas.shape or not torch.allclose(betas.float(), scheduler.betas, atol=1e-7):
            raise ValueError("`checkpoint` has other betas than `config` says (timesteps, linear_start, linear_end).")
    return scheduler


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
    if "scale_factor" in state_dict:
        return float(state_dict["scale_factor"])
    if params.get("scale_by_std", False):
        raise ValueError("`checkpoint` lacks scale_factor, which `config` says was measured (scale_by_std).")
    return float(params.get("scale_factor", 1.0))


def convert_model(model: dict, state_dict: dict, use_ema: bool = True, null_class_id: int | None = None):
    """
    A whole model.

    Args:
        model: the `model` section of the original's YAML, with `target` and `params`.
        state_dict: the checkpoint's `state_dict`.
        use_ema: take the averages of the denoiser's weights, where the checkpoint has them.
        null_class_id: the class that stands for none; by default the last of 1001.

    Returns:
        a `VQLatentDiffusionPipeline`, and for each key that is not used, why.

    Raises:
        ValueError: for a part that has no equivalent here, or a key that is missing or unknown.
    """
    params = model["params"]
    unknown = sorted(set(params) - KNOWN_PARAMS - set(FIXED_PARAMS))
    if unknown:
        raise ValueError(f"`config` has names in the model's params that are not known: {unknown}.")
    for name in FIXED_PARAMS:
        if params.get(name) is not None:
            raise ValueError(f"`config` must have {name}=None, got {params[name]!r}: hf_vq has no equivalent.")
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
    changes, arguments, reasons = convert_conditioner(params, cond_stage, weights, null_class_id)
    dropped |= {f"cond_stage_model.{key}": why for key, why in reasons.items()}
    unet = convert_unet(params["unet_config"]["params"], weights, **changes)
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
) -> dict[str, str]:
    """
    Writes the folder `output`: a pipeline, or a first stage with its image processor.

    Args:
        checkpoint, config, output (`str` or `Path`): the original's file, its YAML, and the folder.
        use_ema (`bool`): take the averages, of the denoiser's weights or of a first stage's, where there are any.
        null_class_id (`int`, *optional*): see `convert_model`.
        discriminator (`bool`): also write a first stage's discriminator to `output/discriminator`.

    Returns:
        for each key that is not used, why.

    Raises:
        ValueError: as `convert_model`, or for an argument that the checkpoint has no use for.
    """
    output = Path(output)
    model = read_model(config)
    state_dict = load_state_dict(checkpoint)
    if model["target"].rpartition(".")[2] == "LatentDiffusion":
        if discriminator:
            raise ValueError("`--discriminator` needs the checkpoint of a first stage.")
        pipeline, dropped = convert_model(model, state_dict, use_ema, null_class_id)
        save_with_code(pipeline, output)
        save_image_processor(pipeline.vqvae, output / "vqvae")
        return dropped
    if null_class_id is not None:
        raise ValueError(f"`null_class_id` needs a whole model, got a first stage ({model['target']}).")
    tokenizer, dropped = convert_tokenizer(model, state_dict, use_ema)
    save_tokenizer(tokenizer, output)
    return save_discriminator(model, state_dict, output, dropped) if discriminator else dropped


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser("An original latent diffusion model with a VQ first stage, or that stage, to hf_vq.")
    parser.add_argument("--config", required=True, help="the YAML that the checkpoint was trained with")
    parser.add_argument("--live", action="store_true", help="take the weights themselves, not their averages")
    parser.add_argument("--discriminator", action="store_true", help="also save the discriminator of a first stage")
    parser.add_argument(
        "--null_class_id", type=int, help="the class that stands for none; by default the last of 1001"
    )
    options = parser.parse_args(arguments)
    dropped = convert(
        options.checkpoint,
        options.config,
        options.output,
        not options.live,
        options.null_class_id,
        options.discriminator,
    )
    print_dropped(dropped)
    if options.push_to_hub:
        print(push_folder(options.output, options.push_to_hub))
