import pytest

from hf_vq.training.data.samplers import ProcessBatchSampler, SampleOrder, process_slice


def steps_of(sampler, micro_batches):
    batches = list(sampler)
    return [batches[i : i + micro_batches] for i in range(0, len(batches), micro_batches)]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_a_step_reads_the_same_samples_on_any_number_of_processes(processes, micro_batches):
    expected = list(ProcessBatchSampler(SampleOrder(50, seed=3), position=7, steps=9, batch_size=24))
    shares = [
        steps_of(
            ProcessBatchSampler(SampleOrder(50, seed=3), 7, 9, 24, micro_batches, process, processes), micro_batches
        )
        for process in range(processes)
    ]
    for step, whole in enumerate(expected):
        parts = [shares[process][step][micro] for micro in range(micro_batches) for process in range(processes)]
        assert [pair for part in parts for pair in part] == whole
        assert {len(part) for part in parts} == {24 // (processes * micro_batches)}


def test_an_epoch_is_a_permutation_and_differs_from_the_next():
    order = SampleOrder(20, seed=1)
    epochs = [[order[epoch * 20 + i] for i in range(20)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == [(number, index) for index in range(20)]
    assert len({tuple(index for _, index in epoch) for epoch in epochs}) == 3
    assert [order[i] for i in range(20)] == epochs[0]  # going back gives the same
    assert [SampleOrder(20, seed=2)[i] for i in range(20)] != epochs[0]
    assert [SampleOrder(3, shuffle=False)[i] for i in (0, 1, 2, 3)] == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_any_position_is_reached_directly():
    whole = list(ProcessBatchSampler(SampleOrder(7), position=0, steps=10, batch_size=4))
    assert list(ProcessBatchSampler(SampleOrder(7), position=24, steps=4, batch_size=4)) == whole[6:]
    assert len(ProcessBatchSampler(SampleOrder(7), 0, 10, 4, micro_batches=2)) == 20


def test_process_slice():
    assert process_slice(100, 8, 2, 1, 2) == [range(102, 104), range(106, 108)]


@pytest.mark.parametrize("batch_size", [0, 6, -4])
def test_batches_that_cannot_be_shared(batch_size):
    with pytest.raises(ValueError, match=rf"train_batch_size={batch_size} .* 2 × 2 = 4"):
        ProcessBatchSampler(SampleOrder(10), 0, 1, batch_size, 2, 0, 2)


def test_empty_data():
    with pytest.raises(ValueError, match="empty"):
        SampleOrder(0)
