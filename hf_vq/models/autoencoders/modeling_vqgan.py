"""The VQGAN tokenizer (Esser, Rombach and Ommer 2021, "Taming Transformers for High-Resolution Image Synthesis")."""

from torch import nn
from transformers import PreTrainedModel  # noqa: F401  (diffusers looks for a base class in the module it loads from)

from .autoencoder_blocks import Decoder, Encoder
from .configuration_vqgan import VQGANConfig
from .modeling_tokenizer import VQTokenizerModel, build_quantizer_of


class VQGANModel(VQTokenizerModel):
    """Convolutional encoder and decoder with residual blocks and attention around a vector quantizer.

    The model is the generator alone; the perceptual and adversarial losses that make it a VQGAN are in
    `hf_vq.training.objectives.vqgan_loss`. `forward` gives the plain squared error.
    """

    config: VQGANConfig
    config_class = VQGANConfig
    _no_split_modules = ["ResnetBlock", "AttnBlock"]

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, 1)
        self.quantize = build_quantizer_of(config)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)
        self.post_init()

    def get_last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last convolution, which the adaptive adversarial weight is measured on."""
        return self.decoder.conv_out.weight


__all__ = ["VQGANModel"]
