# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_vq[train]"]
# ///
"""Train a VQGAN tokenizer (Esser et al. 2021) on a folder of images, parquet files or a Hub data set.

    python examples/vqgan/train_vqgan.py examples/vqgan/emoji_32.yaml --output_dir outputs/vqgan
    accelerate launch examples/vqgan/train_vqgan.py CONFIG.yaml [--argument value ...]

The model, the losses and the loop stand in `hf_vq/training/scripts/train_vqgan.py`;
`hf-vq train vqgan` runs it too.
"""

from hf_vq.training.scripts.train_vqgan import main


if __name__ == "__main__":
    main()
