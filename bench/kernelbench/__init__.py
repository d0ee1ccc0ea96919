"""The kernel benchmark suite behind `pytest bench`: every op of the contract in the shapes of real models."""
