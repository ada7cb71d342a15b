"""The classic CNN on Fashion-MNIST, with augmentation.

Without: --config.augment.flip=False --config.augment.shift=0 --config.augment.zoom=0.0
"""

from typing import Any

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config: Any = default.get_config()
    config.dataset = "fashion_mnist"
    config.model.name = "cnn"
    config.augment.flip = True
    config.augment.shift = 2
    config.augment.zoom = 0.1
    config.weight_decay = 5e-4
    config.num_epochs = 10
    config.scan = False
    return config
