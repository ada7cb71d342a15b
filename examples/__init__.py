"""Examples of nag_jax; the largest is ``python -m examples.trainer``."""
