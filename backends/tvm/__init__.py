"""Kernels written in TIR, compiled by TVM."""
