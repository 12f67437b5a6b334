"""Figures beside those of the peers, measured in one run on one machine: `python -m benchmarks [name...]`.

Absolute times belong to the machine; the ratios are what to read.
"""
