"""Device code in Triton. Loaded by sources.py, for the compiler or for the interpreter; import nothing from outside.

Use builtins of triton.language only: `sum`, `max`, `zeros`, `cdiv`, `sigmoid` and what else lies in
triton.language.standard are compiled functions, made for the compiler or for the interpreter when Triton is imported,
and here both are wanted in one process; reduce.py has sums and extremes. No names that Triton 3.6 lacks.
"""
