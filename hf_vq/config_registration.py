"""How the arguments of diffusers' kind of models and schedulers come into their configuration."""

import functools
import inspect
from collections.abc import Callable

from diffusers.configuration_utils import register_to_config


def register_by_name(init: Callable[..., None]) -> Callable[..., None]:
    """Decorates an `__init__` as diffusers' `register_to_config` does, with positional arguments too.

    That one records them, but counts them among the defaults, which `from_config` leaves out.
    """
    registered = register_to_config(init)
    signature = inspect.signature(init)

    @functools.wraps(init)
    def init_by_name(self, *args, **kwargs):
        if args:
            given = signature.bind_partial(self, *args).arguments
            names = list(given)[1:]  # without self
            for name in names:
                if name in kwargs:
                    raise TypeError(f"{type(self).__name__} got `{name}` twice, by place and by name.")
            kwargs = {**{name: given[name] for name in names}, **kwargs}
        registered(self, **kwargs)

    return init_by_name


__all__ = ["register_by_name"]
