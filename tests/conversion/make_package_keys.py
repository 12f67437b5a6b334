"""Makes lists of keys of published tokenizers from the classes of other packages: `python -m
tests.conversion.make_package_keys`.

Each list is that of the class at the published configuration, built without weights; it goes into
`tests/fixtures/golden/published_keys`, beside those of the original programs.
"""

import gzip
import json

import torch
from diffusers import VQModel
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, JanusVQVAE, JanusVQVAEConfig

from tests.conversion.golden import GOLDEN


def vqmodel(widths, attention=(), **options):
    """The options of a `VQModel` whose levels `attention` have attention."""
    down = ["AttnDownEncoderBlock2D" if i in attention else "DownEncoderBlock2D" for i in range(len(widths))]
    up = ["AttnUpDecoderBlock2D" if i in attention else "UpDecoderBlock2D" for i in reversed(range(len(widths)))]
    return {
        "block_out_channels": widths,
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": 2,
        **options,
    }


# config.json of the repositories' `vqvae` (of Kandinsky `movq`)
VQMODELS = {
    "amused-256": vqmodel(
        [128, 256, 256, 512, 768],
        latent_channels=64,
        num_vq_embeddings=8192,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
        sample_size=32,
    ),
    "ldm-celebahq-256": vqmodel([128, 256, 512], latent_channels=3, num_vq_embeddings=8192, sample_size=256),
    "kandinsky-2-2-decoder": vqmodel(
        [128, 256, 256, 512],
        attention=(3,),
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=16384,
        norm_type="spatial",
        scaling_factor=0.18215,
    ),
    "vq-diffusion-ithq": vqmodel(
        [64, 128, 256, 512], attention=(3,), latent_channels=256, vq_embed_dim=128, num_vq_embeddings=4096
    ),
}


def keys(model: torch.nn.Module, prefix: str = "") -> dict[str, list]:
    """Shape and dtype of each weight."""
    weights = model.state_dict()
    return {
        prefix + key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in weights.items()
    }


def write(name: str, content: dict) -> None:
    text = json.dumps(content, sort_keys=True).encode()
    (GOLDEN / "published_keys" / f"{name}.json.gz").write_bytes(gzip.compress(text, mtime=0))


def main() -> None:
    with torch.device("meta"):
        for name, options in VQMODELS.items():
            model = VQModel(**options)
            config = {key: value for key, value in model.config.items() if not key.startswith("_")}
            write(f"diffusers__{name}", {"params": config, "keys": keys(model)})
        # both have the defaults of their classes
        write("transformers__janus-pro", {"keys": keys(JanusVQVAE(JanusVQVAEConfig()), "model.vqmodel.")})
        write("transformers__chameleon-7b", {"keys": keys(ChameleonVQVAE(ChameleonVQVAEConfig()), "model.vqmodel.")})


if __name__ == "__main__":
    main()
