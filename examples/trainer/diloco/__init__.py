"""DiLoCo with simulated workers: ``python -m examples.trainer.diloco``."""
