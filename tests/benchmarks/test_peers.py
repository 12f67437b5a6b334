import pytest

from benchmarks import growth, peers


def test_the_exponent_of_a_power_is_found():
    sizes = [1, 10, 100]
    assert growth.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert growth.exponent(sizes, [2.0, 4.0, 2.0]) == pytest.approx(0)


@pytest.mark.parametrize("name,agreement", [("GPT, 256 codes", "100.0%"), ("VQGAN f16, decode", None)])
def test_both_sides_compute_the_same(name, agreement):
    measured = peers.measure(name, batch=1, threads=1, quick=True)
    assert measured["our_seconds"] > 0 and measured["peer_seconds"] > 0
    assert measured["agreement"] == agreement if agreement else float(measured["agreement"]) < 1e-4


@pytest.mark.slow
def test_a_start_of_python_has_no_memory():
    measured = peers.measure("first picture after the start", batch=1, threads=1, quick=True)
    assert measured["our_seconds"] > 1 and measured["memory_ratio"] is None
