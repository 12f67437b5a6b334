# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_vq[train]"]
# ///
"""Train latent diffusion (Rombach et al. 2022) on the latents of a trained tokenizer, before their quantization.

    python examples/vq_latent_diffusion/train_vq_latent_diffusion.py \\
        examples/vq_latent_diffusion/emoji_32.yaml --tokenizer outputs/vqgan/tokenizer
    accelerate launch examples/vq_latent_diffusion/train_vq_latent_diffusion.py CONFIG.yaml [--argument value ...]

The model, the losses and the loop stand in `hf_vq/training/scripts/train_vq_latent_diffusion.py`;
`hf-vq train vq_latent_diffusion` runs it too.
"""

from hf_vq.training.scripts.train_vq_latent_diffusion import main


if __name__ == "__main__":
    main()
