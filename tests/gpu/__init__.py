"""Tests of kernels for GPUs, run by `make test-kernels`: in Triton's interpreter if there is none."""
