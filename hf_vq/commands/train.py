"""``hf-vq train``: the training scripts of an installed package."""

import argparse
import importlib
import sys


def train(options: argparse.Namespace) -> None:
    """Runs the script of `options.system`, which reads the rest of the command line."""
    from ..training.metrics import TrainingStoppedError

    script = importlib.import_module(f"hf_vq.training.scripts.train_{options.system}")
    given = sys.argv
    sys.argv = [f"hf-vq train {options.system}", *options.arguments]  # which the script names in its help and its card
    try:
        script.main(list(options.arguments))
    except TrainingStoppedError as error:  # which says what to change
        raise ValueError(str(error)) from error
    finally:
        sys.argv = given
