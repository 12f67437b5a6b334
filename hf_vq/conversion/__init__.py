"""Original checkpoints, and other layouts of the Hub, as models and pipelines of hf_vq."""
