"""The command ``hf-vq``. Everything heavy is imported by the subcommand that needs it."""

import argparse
import json
import sys
from pathlib import Path

from . import __version__


# of `hf-vq sample`: arguments of the pipelines' calls that not all of them have
SAMPLING_OPTIONS = {
    "guidance_scale": float,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "num_inference_steps": int,
    "truncation_rate": float,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 after printing the error that a user can mend."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"hf-vq {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand."""
    parser = argparse.ArgumentParser(prog="hf-vq", description="Vector-quantized image models.")
    parser.add_argument("--version", action="version", version=f"hf-vq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, run, summary, source, **source_options):
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        command.add_argument(source, **source_options)
        return command

    model = {"metavar": "MODEL", "help": "folder or Hub id of a tokenizer, or of a pipeline that has one"}
    add("info", info, "show what a model or a pipeline is", "model", metavar="MODEL", help="folder or Hub id")

    command = add("reconstruct", reconstruct, "encode and decode images, and show both", "model", **model)
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    command.add_argument("--output", type=Path, default=Path("reconstructions.png"), help="(default: %(default)s)")
    add_tokenizer_options(command)

    command = add("encode", encode, "turn images into code indices", "model", **model)
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    command.add_argument("--output", type=Path, default=Path("indices.safetensors"), help="(default: %(default)s)")
    add_tokenizer_options(command)

    command = add("decode", decode, "turn the output of `encode` into images", "model", **model)
    command.add_argument("indices", type=Path, metavar="INDICES", help="a safetensors file, of `encode`")
    command.add_argument("--output", type=Path, default=Path("decoded"), help="folder (default: %(default)s)")
    add_device(command)

    command = add("sample", sample, "draw new images", "pipeline", metavar="PIPELINE", help="folder or Hub id")
    command.add_argument("--class-label", nargs="+", metavar="CLASS", help="one row for each, a number or a name")
    command.add_argument("--prompt", nargs="+", metavar="TEXT", help="one row for each")
    command.add_argument("--num-images", type=positive, default=8, help="in a row (default: %(default)s)")
    for name, kind in SAMPLING_OPTIONS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, help="(default: the pipeline's)")
    command.add_argument("--seed", type=int, help="(default: a new one each time)")
    command.add_argument("--output", type=Path, default=Path("samples.png"), help="(default: %(default)s)")
    add_device(command)
    return parser


def add_tokenizer_options(command):
    """The options of the subcommands that read images."""
    command.add_argument(
        "--size", type=positive, help="side of the images (default: the one the model was trained at)"
    )
    add_device(command)


def add_device(command):
    """The option that says where to compute."""
    command.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")


def positive(text: str) -> int:
    """A number of at least 1; argparse turns the error into its own."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def info(options):
    """Prints what a model or a pipeline is."""
    from diffusers import DiffusionPipeline

    from .hub import facts

    model = load(options.model)
    parts = model.components if isinstance(model, DiffusionPipeline) else {"": model}
    for name, part in parts.items():
        if part is None:
            continue
        if name:
            print(f"{name}:")
        for key, value in facts(part):
            print(f"  {key:14} {value}")


def reconstruct(options):
    """Writes one picture: images above their reconstructions."""
    import torch

    from .evaluation.pictures import reconstruction_grid
    from .evaluation.reconstruction import psnr

    model = load_tokenizer(options)
    pixel_values = read_images(options, model)
    with torch.no_grad():
        sample = model.decode(model.encode(pixel_values).latents).sample.clamp(-1, 1)
    for path, value in zip(options.images, psnr(sample, pixel_values), strict=True):
        print(f"{path}: PSNR {value:.2f} dB")
    write_image(reconstruction_grid(pixel_values, sample), options.output)


def encode(options):
    """Writes the indices of images to a safetensors file."""
    import torch
    from safetensors.torch import save_file

    model = load_tokenizer(options)
    with torch.no_grad():
        indices = model.encode(read_images(options, model)).indices
    levels = dict(zip(level_names(model), indices if isinstance(indices, tuple) else (indices,), strict=True))
    metadata = {"model": options.model, "images": json.dumps([str(path) for path in options.images])}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: codes.cpu().contiguous() for name, codes in levels.items()}
    save_file(tensors, options.output, metadata=metadata)
    for name, codes in tensors.items():
        print(f"{options.output}: {name} {tuple(codes.shape)}, {codes.unique().numel()} different codes")


def level_names(model) -> list[str]:
    """The names of a tokenizer's indices in a file, those of a hierarchy from top to bottom."""
    count = len(model.config.downsample_factors)
    return ["indices"] if count == 1 else [f"indices_{level}" for level in range(count)]


def decode(options):
    """Writes one image for each grid of indices in a file of `encode`."""
    import torch
    from safetensors import SafetensorError, safe_open

    from .models.autoencoders.image_processing_vq import VQImageProcessor

    model = load_tokenizer(options)
    levels = level_names(model)
    try:
        with safe_open(options.indices, "pt") as file:
            for name in levels:
                if name not in file.keys():
                    raise ValueError(f"`{options.indices}` must hold a tensor `{name}`, got {sorted(file.keys())}.")
            indices = [file.get_tensor(name) for name in levels]
            names = json.loads((file.metadata() or {}).get("images", "[]"))
    except SafetensorError as error:
        raise ValueError(f"`{options.indices}` must be a safetensors file: {error}.") from error
    codes = model.config.num_embeddings
    shape = "(B, h, w, depth)" if model.config.quantizer == "residual" else "(B, h, w)"
    for name, level in zip(levels, indices, strict=True):
        wrong = level.ndim != shape.count(",") + 1 or level.numel() == 0 or level.is_floating_point()
        if wrong or level.min() < 0 or level.max() >= codes:
            raise ValueError(f"`{name}` must be whole numbers {shape} below {codes}, the size of the codebook.")
    indices = [level.long().to(model.device) for level in indices]
    with torch.no_grad():
        sample = model.decode_indices(indices[0] if len(indices) == 1 else tuple(indices)).sample
    images = VQImageProcessor().postprocess(sample)
    for number, image in enumerate(images):
        stem = Path(names[number]).stem if len(names) == len(images) else "image"
        write_image(image, options.output / f"{number:04d}-{stem}.png")


def sample(options):
    """Writes a sheet of new images, a row for each class or prompt."""
    import inspect

    import torch

    from .evaluation.pictures import labelled_rows

    pipeline = load(options.pipeline)
    if not callable(pipeline) or not hasattr(pipeline, "components"):
        raise ValueError(f"`{options.pipeline}` is not a pipeline, but a {type(pipeline).__name__}.")
    labels = [int(label) if label.isdigit() else label for label in options.class_label or []]
    given = {"class_labels": labels or None, "prompt": options.prompt}
    given |= {name: getattr(options, name) for name in SAMPLING_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in inspect.signature(type(pipeline).__call__).parameters:
            flag = {"class_labels": "class-label"}.get(name, name.replace("_", "-"))
            raise ValueError(f"`--{flag}` has no meaning for a {type(pipeline).__name__}.")
    pipeline.to(device(options))
    generator = None if options.seed is None else torch.Generator().manual_seed(options.seed)
    output = pipeline(**given, num_images_per_prompt=options.num_images, generator=generator)
    rows = [
        output.images[start : start + options.num_images] for start in range(0, len(output.images), options.num_images)
    ]
    write_image(
        labelled_rows(list(zip(map(str, labels or options.prompt or [""]), rows, strict=True))), options.output
    )


def device(options) -> str:
    """`--device`, once something was placed on it, or else a GPU if there is one."""
    import torch

    if options.device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without the device
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"`--device` must be one that torch can use here, got {options.device!r}: {reason}"
        ) from error
    return options.device


def load(source: str):
    """The model or pipeline of hf_vq in a folder or Hub repository."""
    import hf_vq

    index = read_json(source, "model_index.json")
    if index is None:
        config = read_json(source, "config.json", needed=True)
        if config is None:
            raise ValueError(f"`{source}` must hold a model_index.json or a config.json.")
        name = (config.get("architectures") or [config.get("_class_name")])[0]
    else:
        name = index["_class_name"]
        name = name if isinstance(name, str) else name[-1]
    if name not in hf_vq.__all__:
        raise ValueError(f"`{source}` must be a model or pipeline of hf_vq, got a {name}.")
    return getattr(hf_vq, name).from_pretrained(source)


def read_json(source: str, name: str, needed: bool = False) -> dict | None:
    """A JSON file of a folder or Hub repository; None if it is not there.

    Without the Hub its cache is read; whether a file that is not in it exists is then unknown, an error if it is `needed`.
    """
    if Path(source).is_dir():
        path = Path(source) / name
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(source, name))
        except HFValidationError as error:
            raise ValueError(
                f"The folder `{source}` does not exist, and it is not the name of a repository."
            ) from error
        except LocalEntryNotFoundError as error:
            if needed:
                raise ValueError(f"The folder `{source}` does not exist, and the Hub could not be reached.") from error
            return None
        except EntryNotFoundError:
            return None
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def load_tokenizer(options):
    """The tokenizer `options.model`, or that of the pipeline `options.model`, on the device."""
    model = load(options.model)
    model = getattr(model, "vqvae", model)
    if not hasattr(model, "decode_indices"):
        raise ValueError(
            f"`{options.model}` must be a tokenizer or a pipeline that has one, got {type(model).__name__}."
        )
    return model.to(device(options)).eval()


def read_images(options, model):
    """The images as `pixel_values` (B, 3, H, W) on the model's device, prepared as the model's folder says."""
    from PIL import Image

    from .models.autoencoders.image_processing_vq import VQImageProcessor

    names = ("preprocessor_config.json", "vqvae/preprocessor_config.json")  # of a tokenizer, of a pipeline
    saved = next(filter(None, (read_json(options.model, name) for name in names)), None)
    processor = VQImageProcessor.from_dict(saved) if saved else VQImageProcessor(size=model.config.resolution)
    size = {} if options.size is None else {"size": options.size}
    images = []
    for path in options.images:
        with Image.open(path) as image:
            image.load()
        images.append(image)
    return processor(images, return_tensors="pt", **size).pixel_values.to(model.device, model.dtype)


def write_image(image, path: Path):
    """Saves a PIL image, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
