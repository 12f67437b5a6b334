"""What each process holds of a sharded model: `python -m benchmarks.fsdp_memory`."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from .table import markdown


TITLE = "Memory of fully sharded training (FSDP2)"
NOTES = """
A VQGPT of 12 layers and width 832, AdamW and an average of the weights, after one step: what a process holds of each,
measured on the tensors themselves, and the time of the step (one thread a process).
"""


def hold(rank: int, world: int, folder: str, width: int, layers: int) -> None:
    """One process: a step of the sharded model."""
    from accelerate.state import AcceleratorState

    from hf_vq import VQGPTConfig, VQGPTForCausalLM
    from hf_vq.training.run import RunArguments, TrainingRun
    from hf_vq.training.sharding import local

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {"fsdp": "full_shard", "ema_decay": 0.99, "train_batch_size": 4, "max_train_steps": 1, "cpu": True}
    run = TrainingRun(RunArguments(f"{folder}/run-{world}", **options))
    config = VQGPTConfig(codebook_size=1024, grid_size=(4, 4), n_layer=layers, n_embd=width, n_head=width // 64)
    prior = VQGPTForCausalLM(config)
    count = sum(parameter.numel() for parameter in prior.parameters())
    model = run.add_model("model", prior, ema=True)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-4)
    indices = torch.arange(16).reshape(1, 4, 4)
    model(**prior.prepare_inputs(indices)).loss.backward()
    optimizer.step()

    def mebibytes(tensors):
        return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors) / 2**20

    state = [value for entry in optimizer.state.values() for value in entry.values() if value.ndim]
    held = {
        "parameters": mebibytes(prior.parameters()),
        "optimizer": mebibytes(state),
        "average": mebibytes(run.emas["model"].averages.values()),
    }
    torch.save({"count": count, **held, "together": sum(held.values())}, f"{folder}/held-{world}-{rank}.pt")
    dist.barrier()
    os._exit(0)  # the run was not started, and so is not ended


def run(quick: bool, threads: int) -> list[dict]:
    width, layers = (64, 2) if quick else (832, 12)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2, 4):
            torch.multiprocessing.spawn(hold, (world, folder, width, layers), nprocs=world)
            held = [torch.load(Path(folder, f"held-{world}-{rank}.pt"), weights_only=True) for rank in range(world)]
            largest = {f"{name}, MiB": max(part[name] for part in held) for name in held[0] if name != "count"}
            rows.append({"processes": world, "parameters, M": held[0]["count"] / 1e6, **largest})
    return rows


if __name__ == "__main__":
    print(markdown(run(quick=False, threads=1)), NOTES, sep="\n")
