"""Generators: diffusion models and the few-step samplers distilled from them."""
