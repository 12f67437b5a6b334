# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_vq[train]"]
# ///
"""Train VQ-Diffusion (Gu et al. 2022) on the codes of a trained tokenizer: by caption, by class, or unconditional.

    python examples/vq_diffusion/train_vq_diffusion.py \\
        examples/vq_diffusion/emoji_32.yaml --tokenizer outputs/vqgan/tokenizer
    accelerate launch examples/vq_diffusion/train_vq_diffusion.py CONFIG.yaml [--argument value ...]

The model, the losses and the loop stand in `hf_vq/training/scripts/train_vq_diffusion.py`;
`hf-vq train vq_diffusion` runs it too.
"""

from hf_vq.training.scripts.train_vq_diffusion import main


if __name__ == "__main__":
    main()
