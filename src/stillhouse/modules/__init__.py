"""Trainable parts that methods share: quantisers, heads, masks, noise schedules and their like."""
