"""A small ResNet with BatchNorm.

CIFAR-10: --config.dataset=cifar10 --config.data_dir=FOLDER --config.model.blocks=3
"""

from typing import Any

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config: Any = default.get_config()
    config.dataset = "fashion_mnist"
    config.model.name = "resnet"
    config.model.channels = (16, 32, 64)
    config.model.blocks = 1
    config.augment.flip = True
    config.augment.shift = 2
    config.learning_rate = 0.1
    config.weight_decay = 5e-4
    config.num_epochs = 6
    config.scan = False
    return config
