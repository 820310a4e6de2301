"""Kernels for GPUs, tested by `make test-kernels`: in Triton's interpreter where there is none."""
