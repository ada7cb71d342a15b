"""A character-level GRU on the documentation that ships with Python.

Any text: --config.text_file=FILE
"""

from typing import Any

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config: Any = default.get_config()
    config.task = "language"
    config.dataset = "text"
    config.model.name = "gru"
    config.model.hidden = 256
    config.batch_size = 32
    config.eval_batch_size = 200
    config.optimizer.convention = "sutskever"
    config.learning_rate = 0.5
    config.clip_norm = 1.0
    config.cpu_fusions = ("DOT", "REDUCE")
    config.num_epochs = 15
    return config
