"""Data sets in memory, and data streamed from disk."""
