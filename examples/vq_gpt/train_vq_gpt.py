# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_vq[train]"]
# ///
"""Train a GPT prior (Esser et al. 2021) over the codes of a trained tokenizer: unconditional, by class, or by an
image. With --architecture llama it is a Llama with rotary positions on the grid of codes (Sun et al. 2024).

    python examples/vq_gpt/train_vq_gpt.py examples/vq_gpt/emoji_32.yaml --tokenizer outputs/vqgan/tokenizer
    accelerate launch examples/vq_gpt/train_vq_gpt.py CONFIG.yaml [--argument value ...]

The model, the losses and the loop stand in `hf_vq/training/scripts/train_vq_gpt.py`;
`hf-vq train vq_gpt` runs it too.
"""

from hf_vq.training.scripts.train_vq_gpt import main


if __name__ == "__main__":
    main()
