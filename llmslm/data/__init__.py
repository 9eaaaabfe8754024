"""Text to batches: sources, codec, tokenizers, sampler and the data module."""
