"""A character-level transformer on the documentation that ships with Python.

Any text: --config.text_file=FILE
"""

from typing import Any

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config: Any = default.get_config()
    config.task = "language"
    config.dataset = "text"
    config.model.name = "transformer"
    config.model.width = 144
    config.model.blocks = 4
    config.batch_size = 32
    config.eval_batch_size = 200
    config.optimizer.name = "nadamw"
    config.learning_rate = 0.002
    config.weight_decay = 0.1
    config.clip_norm = 1.0
    config.num_epochs = 10
    return config
