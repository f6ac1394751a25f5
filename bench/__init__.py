"""Timings: `python -m bench.training` of local training and what is around it, `python -m bench.ops` of the kernels."""
