"""Buffers and parameters in low precision."""
