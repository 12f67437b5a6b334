"""``hf-vq push``: a folder on the Hub."""

import argparse
from pathlib import Path

from ..loading import load
from .sources import announce, is_indices


def push(options: argparse.Namespace) -> None:
    """Uploads a model, a pipeline, a part of one, or indices, in one commit; prints the address."""
    from ..hub import push_saved, push_to_hub

    source = Path(options.folder)
    if not source.is_dir():
        raise ValueError(f"`FOLDER` must be a folder, got {options.folder!r}.")
    to = {"revision": options.revision, "create_pr": options.create_pr, "private": options.private or None}
    if is_indices(source):
        address = push_to_hub(source, options.repo, commit_message=options.message, **to)
    else:
        model = load(str(source))
        address = push_saved(source, model, options.repo, options.license, options.code, options.message, **to)
    announce(options, {"address": address})
