"""Running the command in this process."""

import argparse

from hf_vq.cli import build_parser, main


SUBCOMMANDS = next(
    action.choices for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
)


def run(*arguments):
    return main([str(argument) for argument in arguments])
