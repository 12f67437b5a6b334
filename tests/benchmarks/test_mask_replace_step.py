import pytest
import torch

from benchmarks.mask_replace_step import STEPS, diffusers_step, hf_vq_step, measure
from benchmarks.measure import peak_allocated_bytes
from hf_vq import MaskReplaceScheduler


def test_each_step_is_measured():
    result = measure(batch_size=1, side=4, codes=64, rate=0.86, threads=torch.get_num_threads())
    assert set(result) == {"diffusers", *STEPS}
    assert all(values["seconds"] > 0 and values["allocated"] > 0 for values in result.values())
    # diffusers holds the two predictions in float64
    assert result["diffusers"]["allocated"] >= 2 * 16 * 64 * 8


def test_both_sides_do_the_same():
    """One position many times, as sharp as guidance makes it, so that few codes are left."""
    torch.manual_seed(0)
    codes, count = 6, 20_000
    logits = 0.3 * torch.randn(2, 1, codes).expand(2, count, codes)
    scheduler = MaskReplaceScheduler(codes)
    sample = torch.full((1, count), codes)
    theirs = diffusers_step(logits, sample, 0.86)()
    ours = hf_vq_step(logits, scheduler, 50, 49, sample, 0.86, {})()
    counts = torch.stack([x.flatten().bincount(minlength=codes + 1) for x in (theirs, ours)]).double()
    assert torch.equal(counts[0] > 0, counts[1] > 0) and 2 < (counts[0] > 0).sum() <= codes
    noise = (counts.sum(dim=0) + 1).sqrt()
    assert ((counts[0] - counts[1]).abs() < 4 * noise).all()


@pytest.mark.parametrize("t, s", [(50, 49), (99, -1)])
def test_a_step_needs_less_memory_than_a_copy_of_the_prediction(t, s):
    scheduler = MaskReplaceScheduler(4096, 100)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 32, 32, 4096, generator=generator)
    x = scheduler.add_noise(torch.zeros(4, 32, 32, dtype=torch.long), t, generator)
    peak = peak_allocated_bytes(lambda: scheduler.step(logits, t, x, generator, 0.9, prev_timestep=s))
    assert peak < logits.nbytes / 2
