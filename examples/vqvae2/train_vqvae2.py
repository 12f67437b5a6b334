# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_vq[train]"]
# ///
"""Train VQ-VAE-2's hierarchical tokenizer (Razavi et al. 2019) on a folder of images, parquet files or a Hub data set.

    python examples/vqvae2/train_vqvae2.py examples/vqvae2/emoji_64.yaml --output_dir outputs/vqvae2
    accelerate launch examples/vqvae2/train_vqvae2.py CONFIG.yaml [--argument value ...]

The model, the losses and the loop stand in `hf_vq/training/scripts/train_vqvae2.py`;
`hf-vq train vqvae2` runs it too.
"""

from hf_vq.training.scripts.train_vqvae2 import main


if __name__ == "__main__":
    main()
