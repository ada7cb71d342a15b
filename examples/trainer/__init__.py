"""A trainer for Flax models: ``python -m examples.trainer --config=CONFIG --workdir=FOLDER``."""
