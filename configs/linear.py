"""Softmax regression: the convex case, in the same trainer."""

from typing import Any

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config: Any = default.get_config()
    config.dataset = "fashion_mnist"
    config.model.name = "linear"
    config.optimizer.convention = "sutskever"
    config.learning_rate = 0.01
    config.num_epochs = 10
    return config
