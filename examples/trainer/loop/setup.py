"""What a config describes, ready to train: data, model, optimizer and the first state."""

from typing import Any, NamedTuple

import jax

from examples.trainer.cluster import processes
from examples.trainer.cluster.layout import Layout
from examples.trainer.data import datasets
from examples.trainer.errors import UserError
from examples.trainer.loop import feeds, steps
from examples.trainer.optimizer import Optimizer, make_optimizer
from examples.trainer.run.state import TrainState
from examples.trainer.tasks.choose import make_task
from examples.trainer.tasks.task import Batch, Task


class Setup(NamedTuple):
    """Everything that a run needs before its first update."""

    task: Task
    feed: feeds.Feed
    test: Batch  # the whole test set, on every device
    optimizer: Optimizer
    state: TrainState
    total: int  # updates in the whole run
    layout: Layout
    fingerprint: int  # of the data; for a stream, of the part that is read before it starts


def set_up(config: Any) -> Setup:
    """Reads the data and puts the first state on all devices."""
    layout = Layout(config.devices)
    if config.dataset == "shards":
        dataset, source = feeds.open_stream(config)
        feed = feeds.StreamFeed(config, source, dataset.train, layout)
    else:
        dataset = datasets.load(config)
        feed = feeds.MemoryFeed(config, dataset, layout)
    total = config.num_epochs * feed.steps_per_epoch
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    task = make_task(config, dataset, init_key)
    optimizer = make_optimizer(config, feed.steps_per_epoch, total)
    state = steps.initial_state(task, optimizer.transformation, run_key, feed.samples)
    test = layout.put_whole(dataset.test)
    fingerprint = datasets.fingerprint(dataset)
    if not processes.all_have(fingerprint):
        raise UserError(
            f"the processes found different data for config.dataset={config.dataset}; give all of "
            "them the same files"
        )
    return Setup(task, feed, test, optimizer, layout.put_whole(state), total, layout, fingerprint)
