"""Wan 2.2 itself: facts, flow, encoders, experts, sampling, adapter files. Knows nothing of training."""
