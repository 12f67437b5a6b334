"""What a saved part of a pipeline does not say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.configuration_utils import FrozenDict


@contextmanager
def without_path(*parts: Any) -> Iterator[None]:
    """While it lasts, parts of diffusers forget where they were loaded from, which they would save in their
    configuration.
    """
    known = [(part, part._internal_dict) for part in parts if "_name_or_path" in getattr(part, "_internal_dict", {})]
    try:
        for part, config in known:
            part._internal_dict = FrozenDict({k: v for k, v in config.items() if k != "_name_or_path"})
        yield
    finally:
        for part, config in known:
            part._internal_dict = config
