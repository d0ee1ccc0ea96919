"""The contract: what every kernel computes, how it is judged, and what a backend must provide.

Imports nothing but the standard library, numpy, ml_dtypes and gguf's tables.
"""

if __name__ != "polykern.kernels":
    # A working directory that happens to hold this folder must not shadow the PyPI package `kernels`
    # (transformers imports it).
    raise ImportError(f"{__file__} is polykern.kernels, imported here as {__name__!r}: run from another directory")
