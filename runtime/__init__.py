"""The thin runtime: from a GGUF file to tokens, on a backend chosen when the model is loaded.

    settings.py   what the user asked for: model, backend, context, sampling
    gguf.py       the file: header, keys, tensors as views of the mapped file
    config.py     what a key or tensor means: ModelConfig; architectures are rows of a table
    model.py      one forward step as a Program of the contract's ops
    plan.py       which kernel runs each call, and why not another
    step.py       buffers on the device, launches bound and captured for replay
    load.py       all of this once, in order: file, tokenizer, backend, weights, plan
    session.py    prefill, the decode loop, sampling, the KV cache between prompts

Imports the contract (`kernels`) and `backends.open_backend`; nothing here knows which backend is running.
"""
