"""A small character-level GRU for ``examples.trainer.diloco``: workers that communicate rarely.

``examples.trainer`` trains the same model with the same number of steps on all samples.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import rnn


def get_config() -> ConfigDict:
    config: Any = rnn.get_config()
    config.model.hidden = 64
    config.model.embedding = 32
    config.model.length = 32
    config.batch_size = 64  # over all workers
    config.num_epochs = 10
    config.learning_rate = 2.0

    config.local = ConfigDict()
    config.local.workers = 8
    config.local.mode = "vmap"  # vmap: all on one device | shard_map: a device for each
    config.local.every = (1, 8, 32, 128)  # H, inner steps per outer step: a run each
    config.local.learning_rate = 1.0  # of the inner steps
    config.local.outer_learning_rate = 0.7
    config.local.outer_momentum = 0.5  # 0.9 in the paper, where AdamW is inside, not NAG
    return config
