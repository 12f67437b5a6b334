"""The training scripts, one for each system.

`hf-vq train SYSTEM`, `examples/SYSTEM/train_SYSTEM.py` and `accelerate launch -m hf_vq.training.scripts.train_SYSTEM`
run them.
"""
