"""MLP regression with mean squared error on scikit-learn's diabetes data."""

from typing import Any

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config: Any = default.get_config()
    config.task = "regression"
    config.dataset = "diabetes"
    config.model.name = "mlp"
    config.model.hidden_sizes = (32,)
    config.batch_size = 32
    config.learning_rate = 0.002
    config.weight_decay = 0.1
    config.num_epochs = 100
    config.eval_every = 10
    return config
