"""What converting takes beside the program itself: the checkpoint's own pages, which are read from the disk and can be
dropped again, one copy while it is written, and little more.
"""

import subprocess
import sys

import pytest
import torch
import yaml

from hf_vq import VQGANConfig, VQGANModel


PROGRAM = """
import resource, sys
from hf_vq.cli import main
import hf_vq.conversion.convert_taming, hf_vq.hub, diffusers, transformers, hf_vq.conversion.verification
from hf_vq import VQGANModel, VQAutoregressivePipeline
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
main(["convert", "taming", "--checkpoint", sys.argv[1], "--config", sys.argv[3], "--output", sys.argv[4] + "-small"])
before = peak()
assert main(["convert", "taming", "--checkpoint", sys.argv[2], "--config", sys.argv[5], "--output", sys.argv[4]]) == 0
print("grew by", peak() - before)
"""


def checkpoint(folder, name, codes):
    config = VQGANConfig(
        base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, attn_resolutions=[], latent_channels=8,
        embed_dim=512, num_embeddings=codes, resolution=32,
    )  # fmt: skip
    weights = VQGANModel(config).state_dict()
    torch.save({"state_dict": weights}, folder / f"{name}.ckpt")
    network = {"double_z": False, "z_channels": 8, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32}
    network |= {"ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    params = {"embed_dim": 512, "n_embed": codes, "ddconfig": network, "lossconfig": {"target": "taming.DummyLoss"}}
    model = {"target": "taming.models.vqgan.VQModel", "params": params}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"model": model}))
    return str(folder / f"{name}.ckpt"), str(folder / f"{name}.yaml")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_the_peak_of_resident_memory(tmp_path):
    small, small_config = checkpoint(tmp_path, "small", 16)
    large, config = checkpoint(tmp_path, "large", 100_000)
    arguments = [small, large, small_config, str(tmp_path / "out"), config]
    run = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    grown = int(run.stdout.rsplit("grew by ", 1)[1])
    size = (tmp_path / "large.ckpt").stat().st_size
    # 60 MB at any size, and twice the checkpoint: 1292 MB for one of 615 MB
    assert size > 200e6 and grown <= 2 * size + 90e6, f"{grown / 1e6:.0f} MB for {size / 1e6:.0f} MB"
