"""References in docstrings, [`VQGANModel`] as transformers writes them, as links to the pages of the classes."""

import re

from griffe import Extension, Object

import hf_vq


ARGUMENT = re.compile(r"^( +\w+(?:, \w+)* )\(((?:`[^`]*`|[^()`])+)\):", flags=re.MULTILINE)
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")


class DocstringLinks(Extension):
    """Rewrites every docstring that griffe has read."""

    def on_object(self, *, obj: Object, **kwargs) -> None:
        if obj.docstring is not None:
            text = ARGUMENT.sub(_type, obj.docstring.value)
            obj.docstring.value = REFERENCE.sub(_link, text)


def _type(match: re.Match) -> str:
    """The type of an argument without Markdown, which is not read there, nor its default, which the signature has."""
    kind = re.sub(r", \*?optional\*?|, defaults to .*", "", match[2]).replace("`", "").replace("*", "")
    return f"{match[1]}({kind}):"


def _link(match: re.Match) -> str:
    name = match[1].rpartition(".")[2]
    return f"[`{name}`][{hf_vq._MODULES[name]}.{name}]" if name in hf_vq._MODULES else f"`{name}`"
