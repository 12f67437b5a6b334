"""The recipes of examples/conditional/README.md: every one of its options is an argument of the script."""

import re

import pytest

from hf_vq.training.data.image_datasets import DataArguments
from hf_vq.training.run_arguments import RunArguments, parse_arguments
from tests.examples.test_training_scripts import EXAMPLES, script


FOLDER = EXAMPLES / "conditional"
TABLE = (FOLDER / "README.md").read_text().partition("## One recipe")[2]
ROWS = [line.split("|")[1:-1] for line in TABLE.splitlines() if line.startswith("| ")][1:]


def options_of(cell):
    text = " ".join(part for part in re.findall(r"`([^`]*)`", cell) if "--" in part and "annotate.py" not in part)
    return text.replace("$(seq 1 182)", " ".join(map(str, range(1, 183)))).split()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_options_are_arguments(row):
    assert len(ROWS) == 9
    vqgan, gpt = script("vqgan"), script("vq_gpt")
    given = ["--dataset_name_or_path", "DATA"]
    tokenizer = (RunArguments, DataArguments, vqgan.VQGANArguments)
    _, data, args = parse_arguments(tokenizer, [str(FOLDER / "vqgan_f16.yaml"), *given])
    assert (args.condition, args.in_channels, args.perceptual, data.size) == (None, 3, "lpips", (256, 256))
    if row[1].strip() != "none":
        _, data, args = parse_arguments(tokenizer, [str(FOLDER / "condition_f16.yaml"), *given, *options_of(row[1])])
        labels = re.search(r"(\d+) labels", row[0])
        expected = {"depth": 1, "edges": 1, "pose": 3}.get(args.condition) or int(labels.group(1))
        assert args.processor(256).num_channels == args.in_channels == expected
    prior = (RunArguments, DataArguments, gpt.VQGPTArguments)
    _, data, args = parse_arguments(
        prior, [str(FOLDER / "gpt_f16.yaml"), *given, "--tokenizer", "IMAGE", *options_of(row[2])]
    )
    assert (args.condition_tokenizer is not None) == (row[1].strip() != "none")
