"""Benchmarks: every figure a ratio against a peer that ran in the same minutes on the same machine."""
