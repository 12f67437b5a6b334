"""Image tokenizers in diffusers' format, and in every other that `load_tokenizer` knows, to hf_vq.

hf-vq convert diffusers --checkpoint amused/amused-256 --part vqvae --output folder
"""

from pathlib import Path

from ..hub import push_folder
from .checkpoints import argument_parser, save_tokenizer, written_folder
from .load_tokenizer import LAYOUTS, load_tokenizer


def convert(
    checkpoint: str | Path,
    output: str | Path,
    part: str | None = None,
    layout: str | None = None,
    resolution: int | None = None,
) -> None:
    """
    Writes the folder `output`: the model and its image processor.

    Args:
        checkpoint (`str` or `Path`): a folder, the id of a repository, or a file.
        output (`str` or `Path`): the folder.
        part, layout, resolution: `subfolder`, `layout` and `resolution` of [`load_tokenizer`].
    """
    with written_folder(output) as folder:
        save_tokenizer(load_tokenizer(checkpoint, subfolder=part, layout=layout, resolution=resolution), folder)


def main(arguments: list[str] | None = None) -> None:
    """Runs the converter by its command line arguments."""
    parser = argument_parser("A tokenizer of diffusers, or another of the Hub's, to hf_vq.")
    parser.add_argument("--part", help="the subfolder that holds the tokenizer, such as vqvae or movq")
    parser.add_argument("--layout", choices=LAYOUTS, help="where it cannot be told")
    parser.add_argument("--resolution", type=int, help="of the images, where the files do not say")
    options = parser.parse_args(arguments)
    convert(options.checkpoint, options.output, options.part, options.layout, options.resolution)
    if options.push_to_hub:
        print(push_folder(options.output, options.push_to_hub, "Upload converted weights"))
