"""Sampling from language models: the interface, a sampler by transformers, and samples committed in shards."""
