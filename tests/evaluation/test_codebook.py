import math
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hf_vq.evaluation.codebook import CodebookCounts
from hf_vq.evaluation.likelihood import CodeLikelihood
from hf_vq.evaluation.reconstruction import MeanOverImages


def test_statistics_over_batches_agree_with_counting():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(3, 40, (2, 5, 5), generator=generator) for _ in range(3)]
    counts = CodebookCounts(50)
    for batch in batches:
        counts.update(batch)
    tally = Counter(code for batch in batches for code in batch.flatten().tolist())
    total = sum(tally.values())
    entropy = -sum(n / total * math.log(n / total) for n in tally.values())
    statistics = counts.compute()
    assert float(statistics.perplexity) == pytest.approx(math.exp(entropy), rel=1e-6)
    assert float(statistics.usage) == pytest.approx(len(tally) / 50)
    assert int(statistics.dead_codes) == 50 - len(tally)
    assert counts.counts.tolist() == [tally[code] for code in range(50)]


def test_uniform_and_collapsed_codebooks():
    uniform, collapsed = CodebookCounts(8), CodebookCounts(8)
    uniform.update(torch.arange(8).repeat(3))
    collapsed.update(torch.full((4, 4), 5))
    assert float(uniform.compute().perplexity) == pytest.approx(8)
    assert float(collapsed.compute().perplexity) == pytest.approx(1)
    assert int(collapsed.compute().dead_codes) == 7


def test_wrong_indices_are_refused():
    counts = CodebookCounts(4)
    with pytest.raises(ValueError, match="got values from 0 to 4"):
        counts.update(torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="got values from -1 to 0"):
        counts.update(torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="integers"):
        counts.update(torch.tensor([0.0]))
    with pytest.raises(ValueError, match="no code has been counted"):
        counts.compute()
    with pytest.raises(ValueError, match="num_embeddings"):
        CodebookCounts(0)


def _process(rank: int, init_file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    counts = CodebookCounts(4)
    counts.update(torch.tensor([0, 1]) + 2 * rank)
    # Twice, since reducing must leave the local counts alone.
    assert counts.total().tolist() == counts.total().tolist() == [1, 1, 1, 1]
    assert float(counts.compute().usage) == 1.0
    mean = MeanOverImages(["psnr"])
    if rank == 0:  # the other process has no image, and must not hang
        mean.update(psnr=torch.tensor([10.0, 20.0, 60.0]))
    assert mean.compute() == {"psnr": 30.0, "num_images": 3}
    likelihood = CodeLikelihood()
    likelihood.update(torch.full((1,), -math.log(2) * 4 * (rank + 1)), num_indices=4)
    assert likelihood.compute()["bits_per_index"] == pytest.approx(1.5)
    dist.destroy_process_group()


@pytest.mark.slow
def test_sums_over_two_processes(tmp_path):
    mp.spawn(_process, args=(str(tmp_path / "init"),), nprocs=2)
