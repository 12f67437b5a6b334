# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_vq[train]"]
# ///
"""Train a VQ-VAE tokenizer (van den Oord et al. 2017) on a folder of images, parquet files or a Hub data set.

    python examples/vqvae/train_vqvae.py examples/vqvae/emoji_32.yaml --output_dir outputs/vqvae
    accelerate launch examples/vqvae/train_vqvae.py CONFIG.yaml [--argument value ...]

The model, the losses and the loop stand in `hf_vq/training/scripts/train_vqvae.py`;
`hf-vq train vqvae` runs it too.
"""

from hf_vq.training.scripts.train_vqvae import main


if __name__ == "__main__":
    main()
