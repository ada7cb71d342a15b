"""Optimizers, one method per file."""
