"""Time and memory beside the peers', each case in a process of its own, both sides in turns."""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .measure import in_subprocess, peak_allocated_bytes
from .peer_training import (
    LUCIDRAINS,
    pixelsnail_steps,
    quantizer_steps,
    vq_diffusion_steps,
    vq_diffusion_transformer,
    vqgan_steps,
)


TITLE = "Beside the peers"
NOTES = """
Seconds of the processor (all threads of the process), or on a GPU of the clock, for ours and the peer's, medians of
runs in turns; "ratio" is the median of the ratios of neighbouring runs with its quartiles, and "at most" what is aimed
at. Memory is the most that torch's allocator held above what was there before. Where both can have the same weights
they have them, and "equal" says how far the results agree: the largest difference, or the share of equal codes. The
batch of a quantizer is the number of its latents, of 256 channels.
"""


@dataclass
class Case:
    """`ours` and `peer` do the same; `agreement` compares what they return. Their memory can be measured if they do it
    in this process.
    """

    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_name: str
    at_most: str
    agreement: Callable[[object, object], str] | None = None
    repetitions: int = 7
    in_process: bool = True


def largest_difference(ours: torch.Tensor, peer: torch.Tensor) -> str:
    return f"{float((ours - peer).abs().max()):.1e}"


def share_of_equal(ours: torch.Tensor, peer: torch.Tensor) -> str:
    return f"{float((ours == peer).double().mean()):.1%}"


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------


def vqgan_pair(quick: bool, memory_format: torch.memory_format):
    """The f16 network of the paper and diffusers' `VQModel` with its weights."""
    import tempfile

    from diffusers import VQModel

    from hf_vq import VQGANConfig, VQGANModel

    channels = {"base_channels": 32, "channel_multiplier": (1, 2)} if quick else {}
    shape = {"attn_resolutions": (16,), "latent_channels": 32 if quick else 256, "embed_dim": 32 if quick else 256}
    config = VQGANConfig(resolution=32 if quick else 256, quantizer="vq", num_embeddings=1024, **channels, **shape)
    ours = VQGANModel(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        ours.to_diffusers(folder)
        peer = VQModel.from_pretrained(folder).to(ours.device).eval()
    return ours.to(memory_format=memory_format), peer, config.resolution


def coding(
    method: str,
    at_most: str,
    memory_format: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float32,
) -> Callable[[int, int], Case]:
    """`method` is "encode" or "decode"; ours in `dtype` beside the peer in float32."""

    def build(quick: bool, batch: int) -> Case:
        ours, peer, side = vqgan_pair(quick, memory_format)
        inputs = torch.rand(batch, 3, side, side) * 2 - 1
        if method == "decode":
            inputs = ours.encode(inputs).latents
        output = {"encode": "latents", "decode": "sample"}[method]
        ours, own_inputs = ours.to(dtype), inputs.to(dtype)
        return Case(
            ours=lambda: getattr(getattr(ours, method)(own_inputs), output),
            peer=lambda: getattr(getattr(peer, method)(inputs), output),
            peer_name="diffusers VQModel",
            at_most=at_most,
            agreement=largest_difference,
            repetitions=5,
        )

    return build


def tiled_decode(quick: bool, batch: int) -> Case:
    from diffusers import AutoencoderKL

    from hf_vq import VQGANConfig, VQGANModel

    widths, side, tile = ((32, 64), 64, 32) if quick else ((128, 256, 512, 512), 1024, 256)
    ours = VQGANModel(
        VQGANConfig(
            base_channels=widths[0],
            channel_multiplier=tuple(width // widths[0] for width in widths),
            num_res_blocks=2,
            attn_resolutions=(),
            latent_channels=4,
            embed_dim=4,
            num_embeddings=1024,
            resolution=tile,
        )
    )
    peer = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        layers_per_block=2,
        latent_channels=4,
        sample_size=tile,
    )
    ours.eval().to(memory_format=torch.channels_last).enable_tiling(tile, tile // 4)
    peer.eval().enable_tiling()
    latents = torch.randn(batch, 4, side >> len(widths) - 1, side >> len(widths) - 1)
    return Case(
        ours=lambda: ours.decode(latents, quantize=False).sample,
        peer=lambda: peer.decode(latents).sample,
        peer_name="diffusers AutoencoderKL, tiles of the same size and overlap",
        at_most="1.0",
        repetitions=1,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def vq_gpt(quick: bool, **options):
    from hf_vq import VQGPTConfig, VQGPTForCausalLM

    size = {"n_embd": 64, "n_layer": 2, "n_head": 4} if quick else {"n_embd": 512, "n_layer": 12, "n_head": 8}
    side = 4 if quick else 16
    model = VQGPTForCausalLM(VQGPTConfig(codebook_size=1024, grid_size=(side, side), **size, **options)).eval()
    model.lm_head.weight.data.mul_(50)  # the heads of an untrained model nearly tie, and a tie is decided by rounding
    return model, side


def generate_gpt(quick: bool, batch: int) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    ours, side = vq_gpt(quick)
    size = {name: getattr(ours.config, name) for name in ("n_embd", "n_layer", "n_head", "n_positions")}
    peer = GPT2LMHeadModel(GPT2Config(vocab_size=ours.config.input_vocab_size, tie_word_embeddings=False, **size))
    peer.transformer.load_state_dict(ours.transformer.state_dict())
    peer.lm_head.weight.zero_()[: len(ours.lm_head.weight)] = ours.lm_head.weight
    prompt = ours.prepare_condition(batch_size=batch)
    length = side * side
    fixed = {"max_new_tokens": length, "min_new_tokens": length, "pad_token_id": 0, "eos_token_id": None}
    return Case(
        ours=partial(ours.generate, prompt, do_sample=False),
        peer=partial(peer.eval().generate, prompt, do_sample=False, **fixed),
        peer_name="transformers GPT2LMHeadModel",
        at_most={1: "0.9", 8: "0.75", 32: "0.7"}[batch],
        agreement=share_of_equal,
        repetitions=3 if batch < 32 else 1,
    )


def compiled_gpt(quick: bool, batch: int) -> Case:
    """Both with transformers' static cache, whose step it compiles; on a CPU only where it is told to."""
    from transformers import CompileConfig

    case = generate_gpt(quick, batch)
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    case.ours, case.peer = (partial(function, **options) for function in (case.ours, case.peer))
    case.peer_name, case.at_most = "transformers GPT2LMHeadModel, compiled", "0.9"
    return case


def guidance(model, batch: int, repetitions: int) -> Case:
    prompt = model.prepare_condition(torch.arange(batch) % 10)
    return Case(
        ours=lambda: model.generate(prompt, do_sample=True, guidance_scale=2.0),
        peer=lambda: model.generate(prompt, do_sample=True),
        peer_name="ourselves, without guidance",
        at_most={1: "1.25", 8: "1.6"}[batch],
        repetitions=repetitions,
    )


CLASSES = {"condition_type": "class", "condition_vocab_size": 10}


def guided_gpt(quick: bool, batch: int) -> Case:
    return guidance(vq_gpt(quick, **CLASSES)[0], batch, repetitions=3)


def grid_prior(kind: str, quick: bool, side: int, **options):
    import hf_vq

    size = {"hidden_size": 32 if quick else 128, "codebook_size": 512, "grid_size": 4 if quick else side, **options}
    if kind == "PixelCNN":
        return hf_vq.PixelCNNForCausalLM(hf_vq.PixelCNNConfig(num_hidden_layers=2 if quick else 12, **size)).eval()
    blocks = {"num_blocks": 1, "num_res_blocks": 1} if quick else {"num_blocks": 3, "num_res_blocks": 4}
    return hf_vq.PixelSNAILForCausalLM(
        hf_vq.PixelSNAILConfig(res_channels=size["hidden_size"], **blocks, **size)
    ).eval()


def guided_pixelcnn(quick: bool, batch: int) -> Case:
    return guidance(grid_prior("PixelCNN", quick, 16, **CLASSES), batch, repetitions=3)


def guided_pixelsnail(quick: bool, batch: int) -> Case:
    return guidance(grid_prior("PixelSNAIL", quick, 16, **CLASSES), batch, repetitions=3)


def pixelsnail_map(quick: bool, batch: int) -> Case:
    model = grid_prior("PixelSNAIL", quick, 32)
    prompt = model.prepare_condition(batch_size=batch)
    codes = torch.randint(512, (batch, *model.config.grid_size))
    return Case(
        ours=lambda: model.generate(prompt, do_sample=True),
        peer=lambda: model(**model.prepare_inputs(codes), use_cache=False),
        peer_name="ourselves, one forward pass",
        at_most={1: "4", 16: "2"}[batch],
        repetitions=3,
    )


def guided_diffusion(rate: float, at_most: str) -> Callable[[bool, int], Case]:
    """Ten steps of VQ-Diffusion from the same transformer, with guidance, to codes."""

    def build(quick: bool, batch: int) -> Case:
        from diffusers import VQDiffusionScheduler
        from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import VQDiffusionPipeline

        from hf_vq import MaskReplaceScheduler, VQDiffusionImagePipeline
        from hf_vq.pipelines.vq_diffusion_from_diffusers import convert_transformer

        num_codes, side, layers = (64, 4, 2) if quick else (4096, 32, 6)
        peer = vq_diffusion_transformer(num_codes, side, layers).eval()
        transformer = convert_transformer(peer, text_length=16)
        pipe = VQDiffusionImagePipeline(None, transformer, MaskReplaceScheduler(num_codes)).to(peer.device)
        pipe.set_progress_bar_config(disable=True)
        text, null = torch.randn(batch, 16, 64), torch.randn(batch, 16, 64)
        options = {"guidance_scale": 5.0, "truncation_rate": rate, "output_type": "indices"}
        embeds = {"prompt_embeds": text, "negative_prompt_embeds": null}
        scheduler = VQDiffusionScheduler(num_codes + 1)

        def theirs():
            sample = torch.full((batch, side**2), num_codes, device=text.device)
            for t in range(99, -1, -10):
                output = peer(
                    torch.cat([sample] * 2),
                    encoder_hidden_states=torch.cat([null, text]),
                    timestep=torch.tensor(t),
                    return_dict=False,
                )[0]
                unconditional, conditional = output.chunk(2)
                output = unconditional + 5.0 * (conditional - unconditional)
                output -= output.logsumexp(dim=1, keepdim=True)
                output = VQDiffusionPipeline.truncate(None, output, rate).clamp(-70)
                sample = scheduler.step(output, timestep=torch.tensor(t), sample=sample).prev_sample
            return sample

        return Case(
            ours=lambda: pipe(num_inference_steps=10, **embeds, **options),
            peer=theirs,
            peer_name="diffusers' transformer, truncation and scheduler",
            at_most=at_most,
            repetitions=3,
        )

    return build


# ---------------------------------------------------------------------------------------------------------------------
# Training and data
# ---------------------------------------------------------------------------------------------------------------------


def train_gpt(quick: bool, batch: int) -> Case:
    """A step as the script does it, and one of the plain loop."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_grad_enabled(True)
    ours, side = vq_gpt(quick)
    ours.train()
    size = {name: getattr(ours.config, name) for name in ("n_embd", "n_layer", "n_head", "n_positions")}
    peer = GPT2LMHeadModel(GPT2Config(vocab_size=ours.config.input_vocab_size, tie_word_embeddings=False, **size))
    codes = torch.randint(1024, (batch, side, side))
    inputs = ours.prepare_inputs(codes)
    steps = [torch.optim.AdamW(model.parameters(), lr=1e-4) for model in (ours, peer)]

    def step(model, optimizer, **arguments):
        loss = model(**arguments).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    tokens = {"input_ids": inputs["input_ids"][:, :-1], "labels": inputs["input_ids"][:, :-1]}
    return Case(
        ours=lambda: step(ours, steps[0], **inputs),
        peer=lambda: step(peer.train(), steps[1], **tokens),
        peer_name="transformers GPT2LMHeadModel, the plain loop",
        at_most="0.91",
        repetitions=3,
    )


def training_case(steps: Callable, peer_name: str, at_most: str) -> Callable[[bool, int], Case]:
    """`steps` gives our training step and the peer's."""

    def build(quick: bool, batch: int) -> Case:
        torch.set_grad_enabled(True)
        ours, peer = steps(quick, batch)
        return Case(ours=ours, peer=peer, peer_name=peer_name, at_most=at_most, repetitions=3)

    return build


train_vqgan = training_case(vqgan_steps, "diffusers' train_vqgan: an update of both networks", "0.91")
train_vq_diffusion = training_case(vq_diffusion_steps, "diffusers' transformer, the original's dense chain", "0.77")
train_pixelsnail = training_case(pixelsnail_steps, "rosinality's arithmetic", "0.77")


def quantizer_case(peer: str, num_codes: int, at_most: str) -> Callable[[int, int], Case]:
    """`batch` is the number of latents, of 256 channels."""

    def build(quick: bool, batch: int) -> Case:
        torch.set_grad_enabled(True)
        ours, theirs = quantizer_steps(peer, *((64, 64) if quick else (num_codes, batch)))
        # moving averages are learned in other ways, and ours restart codes
        agreement = None if peer == LUCIDRAINS else share_of_equal
        return Case(ours, theirs, peer, at_most, agreement, repetitions=5)

    return build


def read_images(quick: bool, batch: int) -> Case:
    """JPEGs of 500×375 to 256×256 tensors in one process, beside what torchvision's transforms do with Pillow; both
    bicubic.
    """
    import io

    import datasets
    import numpy as np
    from PIL import Image

    from hf_vq.training.data.image_datasets import ImageDataset

    rng, files = np.random.default_rng(0), []
    for _ in range(8 if quick else 128):
        picture = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        buffer = io.BytesIO()
        picture.save(buffer, "jpeg", quality=90)
        files.append(buffer.getvalue())
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": file, "path": None} for file in files]}, features=features)
    dataset = ImageDataset(rows, 256)

    def theirs():
        read = []
        for file in files:
            image = Image.open(io.BytesIO(file)).convert("RGB")
            scale = 256 / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
            left, top = (image.width - 256) // 2, (image.height - 256) // 2
            image = image.crop((left, top, left + 256, top + 256))
            pixels = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous().float().div(255)
            read.append(pixels.sub(0.5).div(0.5))
        return torch.stack(read)

    return Case(
        ours=lambda: torch.stack([dataset[index]["pixel_values"] for index in range(len(files))]),
        peer=theirs,
        peer_name="Resize, CenterCrop, ToTensor, Normalize, as torchvision computes them",
        at_most="1.0",
        repetitions=3,
    )


def first_picture(quick: bool, batch: int) -> Case:
    """From the start of Python to a picture of 8×8 codes by a packaged checkpoint, beside importing the bases."""
    folder = Path(__file__).resolve().parent.parent / "examples" / "checkpoints" / "emoji-32-segmentation"
    ours = f"import hf_vq; hf_vq.VQAutoregressivePipeline.from_pretrained({str(folder)!r})(batch_size=1)"
    # the bases: the classes that the pipeline's parts inherit
    peer = "import torch; from transformers import GPT2LMHeadModel; from diffusers import DiffusionPipeline"

    def start(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    return Case(
        ours=lambda: start(ours),
        peer=lambda: start(peer),
        peer_name="importing torch, transformers' GPT-2 and diffusers' pipeline",
        at_most="1.2",
        repetitions=3,
        in_process=False,
    )


QUANTIZER_TARGETS = {
    1024: {"diffusers": "1.0", LUCIDRAINS: "0.35"},
    16384: {"taming": "0.6", "diffusers": "0.9", LUCIDRAINS: "0.3"},
}

CASES = {
    "VQGAN f16, encode": (coding("encode", "0.92"), (1,)),
    "VQGAN f16, decode": (coding("decode", "0.95"), (1,)),
    "VQGAN f16 in channels_last, encode": (coding("encode", "0.92", torch.channels_last), (1,)),
    "VQGAN f16 in channels_last, decode": (coding("decode", "0.95", torch.channels_last), (1,)),
    "1024 px in tiles, decode": (tiled_decode, (1,)),
    "GPT, 256 codes": (generate_gpt, (1, 8, 32)),
    "GPT, 256 codes, compiled": (compiled_gpt, (1,)),
    "GPT, with guidance": (guided_gpt, (1, 8)),
    "PixelCNN 16×16, with guidance": (guided_pixelcnn, (1, 8)),
    "PixelSNAIL 16×16, with guidance": (guided_pixelsnail, (1, 8)),
    "PixelSNAIL 32×32, a map": (pixelsnail_map, (1, 16)),
    "VQ-Diffusion 32×32, K = 4096, ten guided steps": (guided_diffusion(1.0, "0.4"), (1,)),
    "VQ-Diffusion 32×32, K = 4096, ten guided steps, truncated": (guided_diffusion(0.86, "0.2"), (1,)),
    "VQGAN 64 px with discriminator, a training step": (train_vqgan, (4,)),
    "GPT, a training step": (train_gpt, (8,)),
    "PixelSNAIL 32×32, a training step": (train_pixelsnail, (4,)),
    "VQ-Diffusion 16×16, K = 2048, a training step": (train_vq_diffusion, (8,)),
    **{
        f"quantizer of {num_codes} codes, a training step, beside {peer}": (
            quantizer_case(peer, num_codes, at_most),
            (2048,) if num_codes == 1024 else (2048, 16384),
        )
        for num_codes, targets in QUANTIZER_TARGETS.items()
        for peer, at_most in targets.items()
    },
    "reading JPEGs to 256 px": (read_images, (1,)),
    "first picture after the start": (first_picture, (1,)),
}


# there is nothing of them on a GPU
ON_THE_HOST = ("reading JPEGs to 256 px", "first picture after the start")
ON_A_GPU = {
    f"VQGAN f16 in bfloat16, {method}": (coding(method, "0.5", torch.channels_last, torch.bfloat16), (1, 16))
    for method in ("encode", "decode")
}


def run(quick: bool, threads: int) -> list[dict]:
    """A row for each device, case and batch size; those beside vector-quantize-pytorch where it is installed."""
    has_lucidrains = importlib.util.find_spec("vector_quantize_pytorch") is not None
    jobs = [("cpu", name, batches) for name, (_, batches) in CASES.items()]
    if torch.cuda.is_available():
        jobs += [("cuda", name, batches) for name, (_, batches) in CASES.items() if name not in ON_THE_HOST]
        jobs += [("cuda", name, batches) for name, (_, batches) in ON_A_GPU.items()]
    rows = []
    for device, name, batches in jobs:
        if LUCIDRAINS in name and not has_lucidrains:
            continue
        for batch in batches[:1] if quick else batches:
            options = {"threads": threads, "quick": int(quick), "device": device}
            measured = in_subprocess("benchmarks.peers", case=name, batch=batch, **options)
            low, middle, high = measured["ratios"]
            rows.append(
                {
                    "figure": name if device == "cpu" else f"{device}: {name}",
                    "batch": batch,
                    "peer": measured["peer_name"],
                    "peer s": measured["peer_seconds"],
                    "ours s": measured["our_seconds"],
                    "ratio": f"{middle:.2f} ({low:.2f} … {high:.2f})",
                    "at most": measured["at_most"],
                    "memory": measured["memory_ratio"],
                    "equal": measured["agreement"],
                }
            )
    return rows


def seconds_now(device: str) -> float:
    """Of the processor, by this process and those that it has started and that have ended; of the clock on a GPU."""
    if device == "cpu":
        return time.process_time() + sum(os.times()[2:4])
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def measure(name: str, batch: int, threads: int, quick: bool, device: str = "cpu") -> dict:
    """One case in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with torch.device(device):
        case = (CASES | ON_A_GPU)[name][0](quick, batch)
    results = case.ours(), case.peer()  # once to warm up
    agreement = None if case.agreement is None else case.agreement(*results)
    seconds = {"ours": [], "peer": []}
    for _ in range(1 if quick else case.repetitions):
        for side, function in (("ours", case.ours), ("peer", case.peer)):
            start = seconds_now(device)
            function()
            seconds[side].append(seconds_now(device) - start)
    ratios = [ours / max(peer, 1e-9) for ours, peer in zip(seconds["ours"], seconds["peer"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    memory = None
    if case.in_process:
        own, other = (peak_allocated_bytes(function, device) for function in (case.ours, case.peer))
        memory = own / max(other, 1)
    return {
        "peer_name": case.peer_name,
        "at_most": case.at_most,
        "our_seconds": statistics.median(seconds["ours"]),
        "peer_seconds": statistics.median(seconds["peer"]),
        "ratios": quartiles,
        "memory_ratio": memory,
        "agreement": agreement,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures one case and prints JSON.")
    parser.add_argument("--case", choices=[*CASES, *ON_A_GPU], required=True)
    parser.add_argument("--device", default="cpu")
    for name in ("batch", "threads", "quick"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    quick, device = bool(arguments.quick), arguments.device
    print(json.dumps(measure(arguments.case, arguments.batch, arguments.threads, quick, device)))


if __name__ == "__main__":
    main()
