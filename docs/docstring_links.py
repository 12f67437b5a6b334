"""References in docstrings, [`VQGANModel`] as transformers writes them, as links to the pages of the classes."""

import re

from griffe import Extension, Object

import hf_vq


REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")


class DocstringLinks(Extension):
    """Rewrites every docstring that griffe has read."""

    def on_object(self, *, obj: Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = REFERENCE.sub(_link, obj.docstring.value)


def _link(match: re.Match) -> str:
    name = match[1].rpartition(".")[2]
    return f"[`{name}`][{hf_vq._MODULES[name]}.{name}]" if name in hf_vq._MODULES else f"`{name}`"
