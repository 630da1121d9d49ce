"""Encoders, encoder-decoders and causal language models."""
