"""Streaming: the sampler, the pipeline around it, and reading, writing and showing videos."""
