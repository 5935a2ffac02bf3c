"""The Nirvana language model: architecture, kernels, cache, loading and tokenizer."""
