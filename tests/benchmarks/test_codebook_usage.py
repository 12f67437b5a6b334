"""The benchmark of codes in use: its rows, and that a collapsed codebook is told from a whole one."""

from benchmarks.codebook_usage import run, train


def test_rows():
    rows = run(quick=True, threads=1)
    assert [row["quantizer"] for row in rows] == ["vq", "simvq", "bsq"]
    assert all(row["used"].endswith(" %") and 1 <= row["perplexity"] <= 512 for row in rows)


def test_what_collapses_uses_less():
    used = {name: float(train(name, 4096, 60, 256)["used"].removesuffix(" %")) for name in ("vq", "simvq")}
    assert used["vq"] < 0.5 * used["simvq"], used
