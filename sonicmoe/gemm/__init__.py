"""Grouped GEMM: the fused stages of an expert MLP, by architecture and recipe."""
