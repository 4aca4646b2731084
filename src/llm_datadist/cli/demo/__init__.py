"""`llm-datadist demo`: one process computes the KV cache of a prompt, another one goes on from it.

    command   the verb: options, exit codes
    proxy     the parent: hands requests from worker to worker, and shows what happens
    process   the parent's handle of a worker process     worker   the inside of one
    prefill   prompt -> KV cache in blocks, first token   decode   blocks -> the rest of the answer
    cluster   what both use of llm_datadist               model    the language model of both

The cache in blocks, and the way of a request from prefill to decode, are those of
`llm_datadist.integrations.transformers`.

Only the worker processes import torch: `prefill`, `decode`, and what these import.
"""
