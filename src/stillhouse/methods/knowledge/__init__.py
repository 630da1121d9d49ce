"""Model to model: a smaller classifier from a larger one, on images or vectors."""
