"""``hf-vq info``."""

import argparse
import json

from .sources import load


def info(options: argparse.Namespace) -> None:
    """Prints what a model or a pipeline is."""
    from diffusers import DiffusionPipeline

    from ..hub import facts

    model = load(options.model)
    parts = model.components if isinstance(model, DiffusionPipeline) else {"": model}
    found = {name: dict(facts(part)) for name, part in parts.items() if part is not None}
    if options.json:
        print(json.dumps(found if isinstance(model, DiffusionPipeline) else found[""], indent=2, ensure_ascii=False))
        return
    for name, part in found.items():
        if name:
            print(f"{name}:")
        for key, value in part.items():
            print(f"  {key:14} {value}")
