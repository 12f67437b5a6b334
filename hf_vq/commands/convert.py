"""`hf-vq convert`: an original checkpoint as a folder of hf_vq, checked and described."""

import argparse
import contextlib
import gc
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from ..loading import load
from .sources import announce


# Source → what it is, and the licence of its code; weights have their own.
SOURCES = {
    "taming": ("CompVis/taming-transformers", "MIT"),
    "latent_diffusion": ("CompVis/latent-diffusion", "MIT"),
    "vq_diffusion": ("microsoft/VQ-Diffusion", "MIT"),
    "rosinality": ("rosinality/vq-vae-2-pytorch", "MIT"),
    "zalando": ("zalandoresearch/pytorch-vq-vae", "MIT"),
    "llamagen": ("FoundationVision/LlamaGen", "MIT"),
    "diffusers": ("diffusers, or another layout that `load_tokenizer` knows", "of the repository"),
}
# Beginnings of keys that show a source, the most particular first.
SIGNS = (
    ("latent_diffusion", ("model.diffusion_model.",)),
    ("vq_diffusion", ("content_codec.", "transformer.transformer.")),
    ("taming", ("transformer.blocks.", "first_stage_model.")),
    ("rosinality", ("enc_b.", "background")),
    ("zalando", ("_vq_vae.",)),
    ("llamagen", ("encoder.conv_blocks.", "tok_embeddings.", "cls_embedding.")),
    ("diffusers", ("encoder.down_blocks.", "model.vqmodel.", "gen_vision_model.", "ema_encoder.")),
    ("taming", ("encoder.down.",)),
)
# Of files, where a name without one may be a repository's.
CHECKPOINT_ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".msgpack")
# Sources whose first stages are saved alike.
ALIKE = {"taming", "latent_diffusion"}
# The options of each source's converter.
OPTIONS = {
    "taming": ("config", "part", "discriminator", "live"),
    "latent_diffusion": ("config", "part", "discriminator", "live", "null_class_id", "tokenizer"),
    "vq_diffusion": ("config", "part", "codec_config", "mapping", "tokenizer", "live"),
    "rosinality": ("config", "top", "bottom", "resolution"),
    "zalando": ("config", "data_variance"),
    "llamagen": ("config", "part", "tokenizer", "codec_config", "resolution", "live"),
    "diffusers": ("part", "layout", "resolution"),
}
NEED_CONFIG = ("taming", "latent_diffusion", "vq_diffusion")
FLAGS = ("discriminator", "live")


def convert(options: argparse.Namespace) -> None:
    """Converts, verifies, and writes a model card; an output folder of another kind is left as it is."""
    # converters tell what they drop on standard output, which JSON has for itself
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        found = converted(options)
    lines = [f"{name}: largest error {error:.2g}" for name, error in found["largest_errors"].items()]
    lines += [f"not compared: {', '.join(found['not_compared'])}"] if found["not_compared"] else []
    announce(options, found, [*lines, found["output"], *filter(None, [found["address"]])])


def converted(options: argparse.Namespace) -> dict[str, Any]:
    """Writes the folder, and uploads it if that is asked for; what was made, and how close to the original it is."""
    from ..conversion.checkpoints import written_folder

    output, address = options.output, None
    with written_folder(output) as folder:
        source = chosen_source(options)
        module = importlib.import_module(f"hf_vq.conversion.convert_{source}")
        module.main([*converter_arguments(options, source), "--output", str(folder)])
        check_output(output, folder)
        gc.collect()  # the converted weights, before they are loaded again
        model = load(str(folder), stock=True)  # a part of a pipeline may be diffusers' own
        errors, others = {}, []
        if options.verify is not None:
            from ..conversion.verification import verify

            errors, others = verify(model, options.verify, folder, options.live)
        write_card(model, options, source, errors, folder)
    if options.push_to_hub:
        from ..hub import push_folder

        address = push_folder(output, options.push_to_hub, "Upload converted weights")
    return {
        "source": source,
        "class": type(model).__name__,
        "output": str(output),
        "largest_errors": {name: float(error) for name, error in errors.items()},
        "not_compared": list(others),
        "address": address,
    }


def write_card(model: Any, options: argparse.Namespace, source: str, errors: dict[str, float], folder: Path) -> None:
    """The folder's README.md: source, licence and figures."""
    from huggingface_hub import ModelCard, ModelCardData
    from transformers import PreTrainedModel

    from ..hub_cards import model_card

    repository, licence = SOURCES[source]
    repo_id = options.push_to_hub or options.output.name
    description = (
        f"Converted from `{Path(options.checkpoint).name}` of {repository} (code: {licence}). The weights keep the "
        f"licence of that checkpoint.{error_table(errors)}"
    )
    if (folder / "model_index.json").is_file() or isinstance(model, PreTrainedModel) and is_ours(model):
        card = model_card(
            model,
            repo_id=repo_id,
            license=options.license,
            dataset="that of the original checkpoint",
            description=description,
        )
    else:  # a part of a pipeline
        data = ModelCardData(license=options.license, library_name="hf_vq" if is_ours(model) else "diffusers")
        name = repo_id.split("/")[-1]
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n\nA `{type(model).__name__}`. {description}\n")
    card.save(folder / "README.md")


def is_ours(model: Any) -> bool:
    """Whether the class of a model is hf_vq's."""
    return type(model).__module__.startswith("hf_vq.")


def error_table(errors: dict[str, float]) -> str:
    """The largest errors as a table of Markdown; nothing without any."""
    if not errors:
        return ""
    rows = "\n".join(f"| {name} | {error:.2g} |" for name, error in errors.items())
    return f"\n\nAgainst the original program:\n\n| output | largest error |\n|---|---|\n{rows}"


def converter_arguments(options: argparse.Namespace, source: str) -> list[str]:
    """The options of the command that are given, as the converter of the source reads them.

    Raises:
        ValueError: one that this source has no use for, or a configuration that is needed and not given.
    """
    every = dict.fromkeys(name for names in OPTIONS.values() for name in names)
    given = {name: getattr(options, name) for name in every if getattr(options, name) not in (None, False)}
    for name in given:
        if name not in OPTIONS[source]:
            known = ", ".join(f"--{name}" for name in OPTIONS[source])
            raise ValueError(f"`{name}` must not be given: a {source} checkpoint has no use for it; it has {known}.")
    if source in NEED_CONFIG and "config" not in given:
        raise ValueError(f"`config` must be given: a {source} checkpoint needs the YAML that it was trained with.")
    arguments = ["--checkpoint", str(options.checkpoint)]
    for name, value in given.items():
        arguments += [f"--{name}"] if name in FLAGS else [f"--{name}", str(value)]
    return arguments


def chosen_source(options: argparse.Namespace) -> str:
    """The source that is named, or the one that the checkpoint looks like.

    Raises:
        ValueError: if it does not exist, looks like another one, or like none.
    """
    path, named = Path(options.checkpoint), options.source
    if not path.exists() and (named not in (None, "diffusers") or path.suffix in CHECKPOINT_ENDINGS):
        raise ValueError(f"`--checkpoint` must be a file, got {options.checkpoint!r}, which does not exist.")
    found = recognise(options.checkpoint)
    if found == "taming" and options.config is not None and _is_of_latent_diffusion(options.config):
        found = "latent_diffusion"
    if found is None and named is None:
        raise ValueError(
            f"`--checkpoint` {options.checkpoint} looks like none of {', '.join(SOURCES)}; name its source."
        )
    if named is None:
        print(f"this looks like a {found} checkpoint")
        return found
    if named != "diffusers" and found not in (None, named) and not {found, named} <= ALIKE:
        raise ValueError(f"`--checkpoint` {options.checkpoint} looks like a {found} checkpoint, not like {named}.")
    return named


def recognise(checkpoint: str) -> str | None:
    """The source of a checkpoint by the names of its weights; None if they are not known."""
    from ..conversion.reading import load_checkpoint

    if not Path(checkpoint).is_file():
        return "diffusers"
    content = load_checkpoint(checkpoint)
    keys = []
    while isinstance(content, dict):
        keys += [key for key in content if isinstance(key, str)]
        content = next((content[name] for name in ("state_dict", "model", "module", "ema") if name in content), None)
    keys = [key.removeprefix("module.") for key in keys]  # of DistributedDataParallel
    # a flat file of VQ-Diffusion says of each key which entry it is from
    keys += [key.removeprefix(entry) for key in keys for entry in ("model.", "ema.") if key.startswith(entry)]
    return next((name for name, signs in SIGNS if any(key.startswith(signs) for key in keys)), None)


def _is_of_latent_diffusion(config: str) -> bool:
    from ..conversion.reading import read_config

    model = read_config(config).get("model")
    return isinstance(model, dict) and str(model.get("target")).startswith("ldm.")


def check_output(output: Path, folder: Path) -> None:
    """A `ValueError` if `output` exists and holds another kind of thing than `folder`."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"`--output` {output} must be a folder, but it is a file.")
    if output.is_dir() and any(output.iterdir()) and kind_of(output) != kind_of(folder):
        raise ValueError(
            f"`--output` {output} exists and holds {kind_of(output)}, not {kind_of(folder)}; name another."
        )


def kind_of(folder: Path) -> str:
    """What a folder holds: the class of a pipeline or model, or other files."""
    for name, entry in (("model_index.json", "_class_name"), ("config.json", "architectures")):
        if (folder / name).is_file():
            value = json.loads((folder / name).read_text(encoding="utf-8")).get(entry)
            return f"a {value[-1] if isinstance(value, list) else value}"
    return "other files"
