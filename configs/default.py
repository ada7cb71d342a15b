"""Every field of a run, with its meaning; the other files override some of them."""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config: Any = ConfigDict()
    config.seed = 0  # of initialization and shuffling

    config.dataset = "digits"  # digits | fashion_mnist | mnist
    config.data_dir = ""  # folder of the IDX files, plain or gzipped; "": where Debian puts them
    config.batch_size = 128
    config.eval_batch_size = 2000

    config.model = ConfigDict()
    config.model.name = "mlp"
    config.model.hidden_sizes = (256, 128)

    config.optimizer = ConfigDict()
    config.optimizer.name = "nag"
    config.optimizer.convention = "optax"  # optax | sutskever
    config.learning_rate = 0.05  # the peak of the schedule
    config.momentum = 0.9
    config.weight_decay = 0.0  # of weight matrices, not of biases
    config.decay = "coupled"  # coupled | decoupled
    config.schedule = "cosine"  # constant | cosine: down to 0 at the end
    config.warmup_epochs = 1.0  # linear, from 0
    config.num_epochs = 30
    return config
