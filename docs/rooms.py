"""The public names by the rooms of the package, which are the sections of the documentation's classes."""

from typing import TYPE_CHECKING

import hf_vq


if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

ROOMS = {
    "Tokenizers": ("hf_vq.models.autoencoders", "hf_vq.models.modeling_outputs"),
    "Quantizers": ("hf_vq.models.quantizers",),
    "Priors": ("hf_vq.models.priors", "hf_vq.models.linear_layers"),
    "Schedulers": ("hf_vq.schedulers",),
    "Pipelines": ("hf_vq.pipelines",),
    "Sharing and converting": ("hf_vq.hub", "hf_vq.conversion"),
}


def rooms() -> dict[str, list[str]]:
    """The names of each room.

    Raises:
        ValueError: a public name that is in none of them.
    """
    found = {
        title: [name for name in hf_vq.__all__ if hf_vq._MODULES[name].startswith(modules)]
        for title, modules in ROOMS.items()
    }
    missing = set(hf_vq.__all__) - {name for names in found.values() for name in names}
    if missing:
        raise ValueError(f"`ROOMS` must have a room for each public name, got none for {sorted(missing)}.")
    return found


def on_config(config: "MkDocsConfig") -> "MkDocsConfig":
    """Called by MkDocs: puts the page of each name below "Classes"."""
    pages = [{title: [{name: f"classes/{name}.md"} for name in names]} for title, names in rooms().items()]
    next(item for item in config.nav if "Classes" in item)["Classes"] += pages
    return config
