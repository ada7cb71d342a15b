"""A small DCGAN on Fashion-MNIST: one NAG optimizer for each network."""

from typing import Any

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config: Any = default.get_config()
    config.task = "adversarial"
    config.dataset = "fashion_mnist"
    config.model.name = "dcgan"
    config.learning_rate = 0.01
    config.momentum = 0.5
    config.schedule = "constant"
    config.num_epochs = 5
    config.scan = False
    config.keep_best = False
    return config
