"""Training examples: ``python -m examples.train --config=configs/mlp.py --workdir=runs/mlp``."""
