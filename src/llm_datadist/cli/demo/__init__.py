"""`llm-datadist demo`: one process computes the KV cache of a prompt, another one goes on from it.

    command   the verb: options, exit codes      settings   what they decide, and where the model is
    proxy     the parent: hands requests from worker to worker, and measures them
    screens   what it shows meanwhile, and reports in the end
    workers   the objects in the two processes: Prefill and Decode, which the parent calls
    request   what the parent and the workers say to each other of a request
    model     the language model of both workers; it and `gguf_file` are what imports torch

The processes are those of `llm_datadist.testing.process`: an object in each, whose methods stream
what they find to the parent. The cache in blocks, and the way of a request from prefill to decode,
are those of `llm_datadist.integrations.transformers`.
"""
