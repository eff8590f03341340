"""Batched LLM inference on an NPU with processing-in-memory HBM: what is run (`workload`)."""
