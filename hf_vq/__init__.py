"""Vector-quantized image models for transformers and diffusers.

Names are imported when first used. The one side effect of importing the package is that transformers' Auto classes and
diffusers' pipelines learn the classes below (see ``registration.py``).
"""

import importlib

from . import registration


__version__ = "0.1.0"

_MODULES = {
    "MaskReplaceScheduler": "hf_vq.schedulers.scheduling_mask_replace",
    "PixelCNNConfig": "hf_vq.models.priors.configuration_pixelcnn",
    "PixelCNNForCausalLM": "hf_vq.models.priors.modeling_pixelcnn",
    "PixelSNAILConfig": "hf_vq.models.priors.configuration_pixelsnail",
    "PixelSNAILForCausalLM": "hf_vq.models.priors.modeling_pixelsnail",
    "VQAutoregressivePipeline": "hf_vq.pipelines.pipeline_vq_autoregressive",
    "VQConditionProcessor": "hf_vq.models.autoencoders.image_processing_vq_condition",
    "VQDiffusionImagePipeline": "hf_vq.pipelines.pipeline_vq_diffusion",
    "VQDiffusionTransformer2DModel": "hf_vq.models.priors.transformer_vq_diffusion",
    "VQGANConfig": "hf_vq.models.autoencoders.configuration_vqgan",
    "VQGANModel": "hf_vq.models.autoencoders.modeling_vqgan",
    "VQGPTConfig": "hf_vq.models.priors.configuration_vq_gpt",
    "VQGPTForCausalLM": "hf_vq.models.priors.modeling_vq_gpt",
    "VQImageProcessor": "hf_vq.models.autoencoders.image_processing_vq",
    "VQLatentDiffusionPipeline": "hf_vq.pipelines.pipeline_vq_latent_diffusion",
    "VQVAE2Config": "hf_vq.models.autoencoders.configuration_vqvae2",
    "VQVAE2Model": "hf_vq.models.autoencoders.modeling_vqvae2",
    "VQVAE2Pipeline": "hf_vq.pipelines.pipeline_vqvae2",
    "VQVAEConfig": "hf_vq.models.autoencoders.configuration_vqvae",
    "VQVAEModel": "hf_vq.models.autoencoders.modeling_vqvae",
}

# diffusers looks on a component's package for the base class that says how the component is saved and loaded.
_BASES = {
    "ImageProcessingMixin": "transformers",
    "ModelMixin": "diffusers",
    "PreTrainedModel": "transformers",
    "SchedulerMixin": "diffusers",
}

__all__ = sorted(_MODULES)


def __getattr__(name):
    module = _MODULES.get(name) or _BASES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})


registration.install()
