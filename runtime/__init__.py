"""The thin runtime: from a GGUF file to tokens, on a backend chosen when the model is loaded.

    settings.py   what the user asked for: model, backend, context, sampling
    gguf.py       the file: header, keys, tensors as views of the mapped file
    tokenizer.py  text to ids and back; chat.py and stream.py: what stands around a reply
    config.py     what a key or tensor means: ModelConfig; architectures are rows of a table
    model.py      one forward step as a Program of the contract's ops
    plan.py       which kernel runs each call, and why not another
    step.py       buffers on the device, launches bound and captured for replay
    programs.py   which programs there are: decode, prefill chunks, scoring; compiled on first use
    load.py       each part once, in order: file, tokenizer, backend, weights, plan
    session.py    prefill, the decode loop, sampling, the KV cache between prompts

Imports the contract (`kernels`) and `backends.open_backend`; nothing here knows which backend is running.
"""
