"""rope: no kernels yet."""

from __future__ import annotations

from .launch import OpKernel

KERNELS: list[OpKernel] = []
