"""VQGAN's script on two processes trains as on one, to the last digits that float64 has.

In float32 a latent that lies between two codes gets the one or the other by rounding, and the runs part; here none
does, so that every step is compared at a tight limit.
"""

import pytest
import torch
from safetensors.torch import load_file

from tests.examples.runs import rows, script
from tests.process_groups import in_processes


STEPS = 5
SIZES = {
    "base_channels": 32, "channel_multiplier": (1, 1), "num_res_blocks": 1, "attn_resolutions": 4,
    "latent_channels": 32, "embed_dim": 4, "num_embeddings": 16, "disc_channels": 8, "disc_layers": 1,
    "perceptual": "none", "disc_start_step": 2,
}  # fmt: skip


class InFloat64:
    def __init__(self, images):
        self.images, self.class_names = images, images.class_names

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.sample(index)

    def sample(self, index, epoch=0):
        sample = self.images.sample(index, epoch)
        return {**sample, "pixel_values": sample["pixel_values"].double()}


def train(images, folder, quantizer):
    """Whatever is cast to float32, so that half precision is none, keeps float64."""
    module, to_float32 = script("vqgan"), torch.Tensor.float
    torch.Tensor.float = lambda tensor: tensor if tensor.dtype == torch.float64 else to_float32(tensor)
    load, build, build_critic = module.load_splits, module.build_model, module.build_discriminator
    module.load_splits = lambda *arguments: tuple(InFloat64(split) for split in load(*arguments))
    module.build_model = lambda *arguments: build(*arguments).double()
    module.build_discriminator = lambda *arguments: build_critic(*arguments).double()
    options = [str(part) for name, value in SIZES.items() for part in (f"--{name}", *_parts(value))]
    restarts = '{"restart_threshold": 0.3}' if quantizer == "ema" else "{}"
    places = [
        "--dataset_name_or_path",
        str(images),
        "--resolution",
        "16",
        "--cpu",
        "true",
        "--output_dir",
        str(folder),
    ]
    steps = ["--max_train_steps", str(STEPS), "--train_batch_size", "4", "--logging_steps", "1", "--ema_decay", "0.9"]
    steps += ["--validation_steps", "0", "--learning_rate", "1e-3"]
    module.main([*options, "--quantizer", quantizer, "--quantizer_kwargs", restarts, *places, *steps])


def _parts(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("quantizer", ["ema", pytest.param("vq", marks=pytest.mark.slow)])
def test_two_processes_are_one(inputs, quantizer, tmp_path):
    script("vqgan")  # imported once, for the processes that fork
    for count in (1, 2):
        in_processes(count, tmp_path, train, inputs / "images", tmp_path / str(count), quantizer)
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert len(one) == STEPS + 1 and "disc_loss" in one[-2] and "disc_loss" not in one[0]
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=1e-9)
    weights = [load_file(tmp_path / count / "tokenizer" / "model.safetensors") for count in ("1", "2")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-6, atol=1e-8, msg=name)
