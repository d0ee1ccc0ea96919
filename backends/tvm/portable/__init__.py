"""Portable kernels: every op written once in TIR, for CPUs without threads and for whatever has work-groups.

Weights are read as they lie in a GGUF file and dequantised in registers; sums are float32. `runtime compile` turns
these kernels into artefacts, and the backend `opencl-tvm` runs them. `emit.kernels` lists them by op.
"""
