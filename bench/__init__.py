"""Measurements of speed and memory; see docs/performance.md. `make bench` runs them."""
