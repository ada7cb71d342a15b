"""MLP classifier on scikit-learn's handwritten digits; nothing to download.

Fashion-MNIST: --config.dataset=fashion_mnist --config.num_epochs=12 --config.checkpoint_every=0
"""

from typing import Any

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config: Any = default.get_config()
    config.model.name = "mlp"
    config.model.hidden_sizes = (256, 128)
    config.weight_decay = 5e-4
    config.log_every = 0
    config.checkpoint_every = 110
    return config
