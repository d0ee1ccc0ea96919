"""The kernel benchmark suite behind `pytest bench`: every op of the contract in the shapes of real models."""

import os

# Read when numpy is loaded. OpenBLAS's threads go on asking for work for seconds after a product, and on two cores a
# kernel that takes 20 us then waits some ms for a turn. 2**4 tries are enough for products that follow each other.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
