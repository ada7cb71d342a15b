"""Every field of a config, with its meaning; the other files override some of them.

Fields that do not apply to a run may keep their defaults; setting them on the command line is an
error.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config: Any = ConfigDict()
    config.seed = 0  # of initialization, shuffling, augmentation and noise

    config.task = "classification"  # classification | regression | language | adversarial
    config.dataset = "digits"  # digits | fashion_mnist | mnist | cifar10 | diabetes | text | shards
    config.data_dir = ""  # folder of the data's files; "": where Debian puts Fashion-MNIST
    config.text_file = ""  # for text; "": the documentation that ships with Python
    config.on_bad = "refuse"  # refuse | skip: what to do with bad records of shards
    config.devices = 0  # how many of the devices to use; 0: all
    config.batch_size = 128  # samples per update, over all devices
    config.eval_batch_size = 1000
    config.accumulate = 1  # micro-batches per update, one after the other
    config.augment = ConfigDict()
    config.augment.flip = False  # mirror left and right
    config.augment.shift = 0  # pixels; as padding and cropping at random
    config.augment.zoom = 0.0  # crop to a side of at least 1 - zoom and scale back

    config.model = ConfigDict()
    config.model.name = "mlp"  # linear | mlp | cnn | resnet | gru | transformer | dcgan
    config.model.hidden_sizes = (256, 128)  # mlp
    config.model.channels = (32, 64)  # cnn: of both stages; resnet: of each stage
    config.model.hidden = 128  # cnn: dense layer; gru: state
    config.model.blocks = 1  # resnet: per stage; transformer: all
    config.model.embedding = 64  # gru
    config.model.length = 64  # gru, transformer: characters per window
    config.model.latent = 64  # dcgan: size of the noise
    config.model.width = 32  # dcgan: channels next to the image; transformer: units
    config.model.heads = 4  # transformer: of attention, in each block

    config.optimizer = ConfigDict()
    # nag | averaged | lookahead | snoo (these three wrap nag) | nag_then_sgd (no schedule of the
    # learning rate) | nag_auto (finds its learning rate) | heavy_ball | fista | chambolle_dossal |
    # ogm | estimate_sequence | qhm | gpa | agnes | mass | accsgd | srsgd (defaults of the papers) |
    # sgd | momentum | nesterov | adam | adamw | ema_nesterov (around adamw) | nadam | nadamw
    config.optimizer.name = "nag"
    config.optimizer.convention = "optax"  # nag: optax | sutskever
    config.optimizer.switch_step = 1000  # nag_then_sgd: the first step of SGD
    config.optimizer.transition_steps = 200  # nag_then_sgd: the hand-over before it
    config.optimizer.b2 = 0.999  # adam and its relatives
    config.learning_rate = 0.05  # the peak of the schedule
    config.momentum = 0.9  # b1 of adam and its relatives
    config.momentum_schedule = "constant"  # constant | sutskever | convex | linear (over warm-up)
    config.weight_decay = 0.0  # of weight matrices, not of biases
    config.decay = "coupled"  # coupled | decoupled, for nag
    config.clip_norm = 0.0  # largest global norm of the gradient; 0: no limit
    config.schedule = "cosine"  # constant | cosine: down to 0 at the end
    config.warmup_epochs = 1.0  # linear, from 0
    config.num_epochs = 30
    config.plateau = ConfigDict()  # lowers the learning rate when test results stop improving
    config.plateau.patience = 0  # evaluations without a better one; 0: never
    config.plateau.factor = 0.1
    config.plateau.min_change = 0.0  # by how much better counts, in units of the test result
    config.stop = ConfigDict()  # ends the run before num_epochs
    config.stop.patience = 0  # evaluations without a better one; 0: never
    config.stop.min_change = 0.0
    config.stop.target = placeholder(float)  # test result to reach; None: never
    config.nonfinite = "stop"  # stop | skip: what to do with a step whose gradient is not finite

    config.find_lr = False  # sweep learning rates instead of training, and suggest one
    config.sweep = ConfigDict()
    config.sweep.low = 1e-5
    config.sweep.high = 10.0
    config.sweep.steps = 200  # updates from low to high

    config.cpu_fusions = ("REDUCE",)  # what XLA leaves to YNNPACK on CPU: DOT, REDUCE, both, none
    config.scan = True  # many steps in one program; slow for convolutions on CPU
    config.log_every = 100  # steps
    config.eval_every = 1  # epochs
    config.checkpoint_every = 0  # steps; 0: at the end of each epoch
    config.keep = 3  # newest checkpoints
    config.keep_best = True  # the one with the best test result as well
    config.tensorboard = True
    return config
