"""The quantizers by name."""

from typing import Any

from .gumbel_quantizer import GumbelQuantizer
from .index_propagation_quantizer import IndexPropagationQuantizer
from .quantizer import Quantizer, check_options
from .residual_quantizer import ResidualQuantizer
from .scalar_quantizers import BSQuantizer, FSQuantizer, LFQuantizer
from .vector_quantizers import CosineVectorQuantizer, EMAVectorQuantizer, SimVectorQuantizer, VectorQuantizer


QUANTIZERS: dict[str, type[Quantizer]] = {
    "vq": VectorQuantizer,
    "ema": EMAVectorQuantizer,
    "gumbel": GumbelQuantizer,
    "cosine": CosineVectorQuantizer,
    "simvq": SimVectorQuantizer,
    "ibq": IndexPropagationQuantizer,
    "fsq": FSQuantizer,
    "lfq": LFQuantizer,
    "bsq": BSQuantizer,
    "residual": ResidualQuantizer,
}


def build_quantizer(name: str, num_embeddings: int, embed_dim: int, **kwargs: Any) -> Quantizer:
    """The quantizer called `name`, one of `QUANTIZERS`, with `kwargs` of its class.

    Raises:
        ValueError: there is none of this name, or it has no such argument.
    """
    if name not in QUANTIZERS:
        raise ValueError(f"`quantizer` must be one of {sorted(QUANTIZERS)}, got {name!r}.")
    check_options(name, QUANTIZERS[name], kwargs)
    return QUANTIZERS[name](num_embeddings, embed_dim, **kwargs)


__all__ = ["QUANTIZERS", "build_quantizer"]
