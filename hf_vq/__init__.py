"""Vector-quantized image models for transformers and diffusers.

Names are imported when first used. The one side effect of importing the package is that transformers' Auto classes and
diffusers' loaders learn its classes (see ``registration.py``).
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import registration


__version__ = "0.1.0"

# each name, imported when it is first used; the lines under TYPE_CHECKING below say the same to editors
_MODULES = {
    "BSQuantizer": "hf_vq.models.quantizers.scalar_quantizers",
    "BoundingBoxTokenizer": "hf_vq.models.priors.bounding_boxes",
    "CosineVectorQuantizer": "hf_vq.models.quantizers.vector_quantizers",
    "EMAVectorQuantizer": "hf_vq.models.quantizers.vector_quantizers",
    "FSQuantizer": "hf_vq.models.quantizers.scalar_quantizers",
    "GumbelQuantizer": "hf_vq.models.quantizers.gumbel_quantizer",
    "IndexPropagationQuantizer": "hf_vq.models.quantizers.index_propagation_quantizer",
    "LFQuantizer": "hf_vq.models.quantizers.scalar_quantizers",
    "MaskReplaceScheduler": "hf_vq.schedulers.scheduling_mask_replace",
    "MaskReplaceSchedulerOutput": "hf_vq.schedulers.scheduling_mask_replace",
    "ObjectBox": "hf_vq.models.priors.bounding_boxes",
    "PixelCNNConfig": "hf_vq.models.priors.configuration_pixelcnn",
    "PixelCNNForCausalLM": "hf_vq.models.priors.modeling_pixelcnn",
    "PixelSNAILConfig": "hf_vq.models.priors.configuration_pixelsnail",
    "PixelSNAILForCausalLM": "hf_vq.models.priors.modeling_pixelsnail",
    "Quantizer": "hf_vq.models.quantizers.quantizer",
    "QuantizerOutput": "hf_vq.models.modeling_outputs",
    "ResidualQuantizer": "hf_vq.models.quantizers.residual_quantizer",
    "SimVectorQuantizer": "hf_vq.models.quantizers.vector_quantizers",
    "VQAutoregressivePipeline": "hf_vq.pipelines.pipeline_vq_autoregressive",
    "VQConditionProcessor": "hf_vq.models.autoencoders.image_processing_vq_condition",
    "VQDecoderOutput": "hf_vq.models.modeling_outputs",
    "VQDiffusionImagePipeline": "hf_vq.pipelines.pipeline_vq_diffusion",
    "VQDiffusionTransformer2DModel": "hf_vq.models.priors.transformer_vq_diffusion",
    "LatentUNet2DConditionModel": "hf_vq.models.priors.unet_2d_latent",
    "LatentUNet2DModel": "hf_vq.models.priors.unet_2d_latent",
    "VQDiffusionTransformerOutput": "hf_vq.models.priors.transformer_vq_diffusion",
    "VQEncoderOutput": "hf_vq.models.modeling_outputs",
    "VQGANConfig": "hf_vq.models.autoencoders.configuration_vqgan",
    "VQGANModel": "hf_vq.models.autoencoders.modeling_vqgan",
    "VQGPTConfig": "hf_vq.models.priors.configuration_vq_gpt",
    "VQGPTForCausalLM": "hf_vq.models.priors.modeling_vq_gpt",
    "VQLlamaConfig": "hf_vq.models.priors.configuration_vq_llama",
    "VQLlamaForCausalLM": "hf_vq.models.priors.modeling_vq_llama",
    "VQImageProcessor": "hf_vq.models.autoencoders.image_processing_vq",
    "VQLatentDiffusionPipeline": "hf_vq.pipelines.pipeline_vq_latent_diffusion",
    "VQLatentDiffusionPipelineOutput": "hf_vq.pipelines.pipeline_vq_latent_diffusion",
    "VQModelOutput": "hf_vq.models.modeling_outputs",
    "VQPipelineOutput": "hf_vq.pipelines.pipeline_output",
    "VQVAE2Config": "hf_vq.models.autoencoders.configuration_vqvae2",
    "VQVAE2Model": "hf_vq.models.autoencoders.modeling_vqvae2",
    "VQVAE2Pipeline": "hf_vq.pipelines.pipeline_vqvae2",
    "VQVAEConfig": "hf_vq.models.autoencoders.configuration_vqvae",
    "VQVAEModel": "hf_vq.models.autoencoders.modeling_vqvae",
    "VectorQuantizer": "hf_vq.models.quantizers.vector_quantizers",
    "as_linear": "hf_vq.models.linear_layers",
    "build_quantizer": "hf_vq.models.quantizers.build",
    "load_tokenizer": "hf_vq.conversion.load_tokenizer",
    "merge_lora": "hf_vq.models.priors.lora_merging",
    "model_card": "hf_vq.hub_cards",
    "push_to_hub": "hf_vq.hub",
    "rotation_trick": "hf_vq.models.quantizers.gradient_estimators",
    "save_for_sharing": "hf_vq.hub",
    "save_with_code": "hf_vq.hub",
    "straight_through": "hf_vq.models.quantizers.gradient_estimators",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name) or registration.COMPONENT_BASES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from .conversion.load_tokenizer import load_tokenizer as load_tokenizer
    from .hub import push_to_hub as push_to_hub
    from .hub import save_for_sharing as save_for_sharing
    from .hub import save_with_code as save_with_code
    from .hub_cards import model_card as model_card
    from .models.autoencoders.configuration_vqgan import VQGANConfig as VQGANConfig
    from .models.autoencoders.configuration_vqvae import VQVAEConfig as VQVAEConfig
    from .models.autoencoders.configuration_vqvae2 import VQVAE2Config as VQVAE2Config
    from .models.autoencoders.image_processing_vq import VQImageProcessor as VQImageProcessor
    from .models.autoencoders.image_processing_vq_condition import VQConditionProcessor as VQConditionProcessor
    from .models.autoencoders.modeling_vqgan import VQGANModel as VQGANModel
    from .models.autoencoders.modeling_vqvae import VQVAEModel as VQVAEModel
    from .models.autoencoders.modeling_vqvae2 import VQVAE2Model as VQVAE2Model
    from .models.linear_layers import as_linear as as_linear
    from .models.modeling_outputs import QuantizerOutput as QuantizerOutput
    from .models.modeling_outputs import VQDecoderOutput as VQDecoderOutput
    from .models.modeling_outputs import VQEncoderOutput as VQEncoderOutput
    from .models.modeling_outputs import VQModelOutput as VQModelOutput
    from .models.priors.bounding_boxes import BoundingBoxTokenizer as BoundingBoxTokenizer
    from .models.priors.bounding_boxes import ObjectBox as ObjectBox
    from .models.priors.configuration_pixelcnn import PixelCNNConfig as PixelCNNConfig
    from .models.priors.configuration_pixelsnail import PixelSNAILConfig as PixelSNAILConfig
    from .models.priors.configuration_vq_gpt import VQGPTConfig as VQGPTConfig
    from .models.priors.configuration_vq_llama import VQLlamaConfig as VQLlamaConfig
    from .models.priors.lora_merging import merge_lora as merge_lora
    from .models.priors.modeling_pixelcnn import PixelCNNForCausalLM as PixelCNNForCausalLM
    from .models.priors.modeling_pixelsnail import PixelSNAILForCausalLM as PixelSNAILForCausalLM
    from .models.priors.modeling_vq_gpt import VQGPTForCausalLM as VQGPTForCausalLM
    from .models.priors.modeling_vq_llama import VQLlamaForCausalLM as VQLlamaForCausalLM
    from .models.priors.transformer_vq_diffusion import VQDiffusionTransformer2DModel as VQDiffusionTransformer2DModel
    from .models.priors.transformer_vq_diffusion import VQDiffusionTransformerOutput as VQDiffusionTransformerOutput
    from .models.priors.unet_2d_latent import LatentUNet2DConditionModel as LatentUNet2DConditionModel
    from .models.priors.unet_2d_latent import LatentUNet2DModel as LatentUNet2DModel
    from .models.quantizers.build import build_quantizer as build_quantizer
    from .models.quantizers.gradient_estimators import rotation_trick as rotation_trick
    from .models.quantizers.gradient_estimators import straight_through as straight_through
    from .models.quantizers.gumbel_quantizer import GumbelQuantizer as GumbelQuantizer
    from .models.quantizers.index_propagation_quantizer import IndexPropagationQuantizer as IndexPropagationQuantizer
    from .models.quantizers.quantizer import Quantizer as Quantizer
    from .models.quantizers.residual_quantizer import ResidualQuantizer as ResidualQuantizer
    from .models.quantizers.scalar_quantizers import BSQuantizer as BSQuantizer
    from .models.quantizers.scalar_quantizers import FSQuantizer as FSQuantizer
    from .models.quantizers.scalar_quantizers import LFQuantizer as LFQuantizer
    from .models.quantizers.vector_quantizers import CosineVectorQuantizer as CosineVectorQuantizer
    from .models.quantizers.vector_quantizers import EMAVectorQuantizer as EMAVectorQuantizer
    from .models.quantizers.vector_quantizers import SimVectorQuantizer as SimVectorQuantizer
    from .models.quantizers.vector_quantizers import VectorQuantizer as VectorQuantizer
    from .pipelines.pipeline_output import VQPipelineOutput as VQPipelineOutput
    from .pipelines.pipeline_vq_autoregressive import VQAutoregressivePipeline as VQAutoregressivePipeline
    from .pipelines.pipeline_vq_diffusion import VQDiffusionImagePipeline as VQDiffusionImagePipeline
    from .pipelines.pipeline_vq_latent_diffusion import VQLatentDiffusionPipeline as VQLatentDiffusionPipeline
    from .pipelines.pipeline_vq_latent_diffusion import (
        VQLatentDiffusionPipelineOutput as VQLatentDiffusionPipelineOutput,
    )
    from .pipelines.pipeline_vqvae2 import VQVAE2Pipeline as VQVAE2Pipeline
    from .schedulers.scheduling_mask_replace import MaskReplaceScheduler as MaskReplaceScheduler
    from .schedulers.scheduling_mask_replace import MaskReplaceSchedulerOutput as MaskReplaceSchedulerOutput

registration.install()
