"""Importance-sampled timesteps, against the original program, by hand, and on two processes."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hf_vq.training.objectives.timestep_sampler import ImportanceTimestepSampler
from tests.conversion.golden import Golden


def warmed_up(history):
    sampler = ImportanceTimestepSampler(len(history))
    sampler.load_state_dict({"history": history.double(), "counts": torch.full((len(history),), 11)})
    return sampler


def test_the_history_of_the_original():
    golden = Golden("vqdiff_uncond")
    sampler = ImportanceTimestepSampler(100)
    sampler.update(golden["train_t"], golden["train.vb_loss_noaux"] * golden["train_pt"])
    golden.compare("train.Lt_history", sampler.history.float())
    golden.compare("train.Lt_count", sampler.counts.float())


def test_the_probabilities_of_the_original():
    golden = Golden("vqdiff_uncond")
    sampler = warmed_up(golden["imp_Lt_history"])
    golden.compare("train.imp_pt", sampler.probabilities[golden["train.imp_t"]].float())


def test_draws_have_the_probabilities_that_come_with_them():
    sampler = warmed_up(torch.tensor([900.0, 0.0, 1.0, 4.0, 25.0]))
    # √L + 1e-4, the first as the second, where √1e-10 is left of a history of 0
    expected = torch.tensor([1.1e-4, 1.1e-4, 1.0001, 2.0001, 5.0001], dtype=torch.float64)
    expected = expected / expected.sum()
    torch.testing.assert_close(sampler.probabilities, expected)
    timesteps, probabilities = sampler.sample(20000, generator=torch.Generator().manual_seed(0))
    assert timesteps.dtype == torch.int64 and probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, expected[timesteps].float())
    frequencies = timesteps.bincount(minlength=5) / 20000
    error = (expected * (1 - expected) / 20000).sqrt()
    assert ((frequencies - expected).abs() < 5 * error).all()


def test_uniform_until_every_timestep_was_met_more_than_ten_times():
    sampler = ImportanceTimestepSampler(3)
    for _ in range(11):
        torch.testing.assert_close(sampler.probabilities, torch.full((3,), 1 / 3, dtype=torch.float64))
        sampler.update(torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 3.0]))
    assert sampler.probabilities[2] / sampler.probabilities[1] == pytest.approx(1.5, rel=1e-3)


def test_samples_of_one_timestep_count_alike_in_any_order():
    timesteps, losses = torch.tensor([4, 1, 4, 4]), torch.tensor([1.0, 5.0, 2.0, 3.0])
    sampler = ImportanceTimestepSampler(6)
    sampler.history[4] = 100.0
    sampler.update(timesteps, losses)
    assert sampler.history[4] == pytest.approx(0.9 * 100 + 0.1 * (1 + 4 + 9) / 3)
    assert sampler.history[1] == pytest.approx(0.1 * 25)
    assert sampler.counts.tolist() == [0, 1, 0, 0, 3, 0]
    for order in ([3, 2, 1, 0], [2, 3, 0, 1]):
        other = ImportanceTimestepSampler(6)
        other.history[4] = 100.0
        other.update(timesteps[order], losses[order])
        assert torch.equal(other.history, sampler.history)


def test_a_restored_sampler_goes_on_alike():
    sampler = warmed_up(torch.rand(4, generator=torch.Generator().manual_seed(1)))
    restored = ImportanceTimestepSampler(4)
    restored.load_state_dict(sampler.state_dict())
    for one in (sampler, restored):
        one.update(torch.tensor([1, 3]), torch.tensor([2.0, 0.5]))
    assert torch.equal(sampler.history, restored.history) and torch.equal(sampler.counts, restored.counts)
    first, second = (one.sample(50, generator=torch.Generator().manual_seed(2)) for one in (sampler, restored))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: ImportanceTimestepSampler(1), "`num_train_timesteps` must be an int of at least 2, got 1"),
        (lambda s: s.sample(0), "`batch_size` must be an int of at least 1, got 0"),
        (lambda s: s.update(torch.tensor([4]), torch.ones(1)), "must lie in 0…3, got 4 to 4"),
        (lambda s: s.update(torch.tensor([0]), torch.ones(2)), r"must have one shape \(B,\), got \(1,\) and \(2,\)"),
        (lambda s: s.update([0], torch.ones(1)), "`timesteps` must be a tensor, got a list"),
        (lambda s: s.update(torch.tensor([0]), [1.0]), "`losses` must be a tensor, got a list"),
        (lambda s: s.update(torch.tensor([0.0]), torch.ones(1)), "`timesteps` must be int64, got torch.float32"),
        (lambda s: s.update(torch.tensor([0]), torch.tensor([torch.nan])), "`losses` must be finite"),
        (lambda s: s.load_state_dict(ImportanceTimestepSampler(9).state_dict()), "`state` is of 9 timesteps"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(ImportanceTimestepSampler(4))


# ----------------------------------------------------------------------------------------------------------
# distributed


def part_of_a_batch(rank, step):
    # processes hold batches of different sizes, with timesteps in common
    generator = torch.Generator().manual_seed(10 * step + rank)
    size = 3 + 2 * rank
    return torch.randint(5, (size,), generator=generator), torch.rand(size, generator=generator)


def update_on_one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    sampler = ImportanceTimestepSampler(5)
    for step in range(12):
        sampler.update(*part_of_a_batch(rank, step))
    torch.save(sampler.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_history_of_one(tmp_path):
    mp.spawn(update_on_one_of_two, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = ImportanceTimestepSampler(5)
    for step in range(12):
        parts = zip(part_of_a_batch(0, step), part_of_a_batch(1, step), strict=True)
        alone.update(*(torch.cat(pair) for pair in parts))
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)
