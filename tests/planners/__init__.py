"""Our plans beside vLLM's and Mooncake's; run by hand: `make planners`, docs/layouts.md."""
