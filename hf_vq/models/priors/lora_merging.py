"""LoRA adapters added to the weights of a prior, those with weight normalisation too."""

from typing import TYPE_CHECKING

from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from .modeling_code_prior import effective_weight


if TYPE_CHECKING:
    from peft import PeftModel


def merge_lora(model: "PeftModel") -> PreTrainedModel:
    """Adds the active LoRA adapters of a prior to its weights; returns the prior without PEFT's layers.

    The same as PEFT's `merge_and_unload`, which leaves out in silence the layers with weight normalisation, of which
    PixelSNAIL consists and PixelCNN may: it adds to a weight that is computed anew from length and direction.

    Args:
        model: of `peft.get_peft_model` or `peft.PeftModel.from_pretrained`, around a prior of hf_vq.

    Raises:
        ValueError: an adapter of another kind on such a layer, whose weight cannot be told.
    """
    wrapped = [module for module in model.modules() if hasattr(module, "get_base_layer")]
    normalised = {
        layer.get_base_layer(): effective_weight(layer).detach().clone()
        for layer in wrapped
        if is_parametrized(layer.get_base_layer(), "weight")
    }
    merged = model.merge_and_unload()
    for layer, weight in normalised.items():
        layer.weight = weight  # the parametrization takes it apart into length and direction
    return merged


__all__ = ["merge_lora"]
