"""Disentangling: short codes whose numbers mean one thing each."""
