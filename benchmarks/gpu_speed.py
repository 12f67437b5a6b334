"""Seconds of encoding, decoding and sampling on this device, beside diffusers' and transformers' own."""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import VQModel
from transformers import GPT2Config, GPT2LMHeadModel

import hf_vq


def seconds(function, repeats: int) -> float:
    """The median of `repeats` calls, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    device = "cpu" if args.quick or not torch.cuda.is_available() else "cuda"
    side, batch, repeats, width, codes = (32, 1, 1, 64, 16) if args.quick else (256, 16, 5, 512, 256)
    channels = [32, 64] if args.quick else [128, 128, 256, 256, 512]
    torch.manual_seed(0)
    theirs = VQModel(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        layers_per_block=2,
        latent_channels=64,
        num_vq_embeddings=1024,
        norm_num_groups=32,
    )
    ours = hf_vq.VQGANModel(
        hf_vq.VQGANConfig(
            base_channels=channels[0],
            channel_multiplier=[c // channels[0] for c in channels],
            num_res_blocks=2,
            attn_resolutions=[],
            latent_channels=64,
            embed_dim=64,
            num_embeddings=1024,
            resolution=side,
        )
    )
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        ours.to(device, dtype).eval()
        theirs.to(device, dtype).eval()
        pixels = images.to(dtype)
        latents = ours.encode(pixels).latents
        pairs = {
            "encode": (lambda p=pixels: ours.encode(p), lambda p=pixels: theirs.encode(p)),
            "decode": (lambda x=latents: ours.decode(x), lambda x=latents: theirs.decode(x)),
        }
        for what, (own, other) in pairs.items():
            a, b = seconds(own, repeats), seconds(other, repeats)
            found[f"VQGAN {what} {name}"] = f"{a * 1e3:.1f} ms, diffusers {b * 1e3:.1f} ms, ratio {a / b:.2f}"
    layers = 2 if args.quick else 12
    prior = hf_vq.VQGPTForCausalLM(
        hf_vq.VQGPTConfig(codebook_size=1024, grid_size=int(codes**0.5), n_embd=width, n_layer=layers, n_head=8)
    )
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=1025, n_positions=codes + 1, n_embd=width, n_layer=layers, n_head=8))
    prior.to(device).eval()
    gpt2.to(device).eval()
    options = {"do_sample": True, "max_new_tokens": codes, "min_new_tokens": codes}
    for count in (1, 8):
        prompt = prior.prepare_condition(None).expand(count, -1).to(device)
        a = seconds(lambda p=prompt: prior.generate(p, **options), 2)
        b = seconds(lambda p=prompt: gpt2.generate(p, pad_token_id=0, **options), 2)
        found[f"GPT, {codes} codes, batch {count}"] = f"{a:.2f} s, transformers {b:.2f} s, ratio {a / b:.2f}"
    (args.work / "speed.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
