"""Measures of reconstructions, codebooks, priors and samples, and pictures of them."""
