# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_vq[train]"]
# ///
"""Train a PixelCNN (van den Oord et al. 2016) or a PixelSNAIL (Razavi et al. 2019) over the codes of a trained
tokenizer.

    python examples/pixelcnn/train_pixelcnn.py examples/pixelcnn/emoji_32.yaml --tokenizer outputs/vqvae/tokenizer
    python examples/pixelcnn/train_pixelcnn.py CONFIG.yaml --prior pixelsnail --level top --tokenizer outputs/vqvae2
    accelerate launch examples/pixelcnn/train_pixelcnn.py CONFIG.yaml [--argument value ...]

The model, the losses and the loop stand in `hf_vq/training/scripts/train_pixelcnn.py`;
`hf-vq train pixelcnn` runs it too.
"""

from hf_vq.training.scripts.train_pixelcnn import main


if __name__ == "__main__":
    main()
