"""Restart conditions for ``accelerate(rule, restart=...)``, which decide when to reset momentum.

If the strong convexity is not known, momentum that tends to 1 overshoots and oscillates. A restart
starts the rule again with an empty buffer. On well-behaved problems the result is the linear rate
of the best constant momentum, up to a constant factor.

A condition is a function ``seen -> (fire, remembered)`` of a :class:`Seen`. ``fire`` is whether to
restart, and ``remembered`` is a number that the condition gets at the next step. ``accelerate``
restarts in the step after the condition was true, which needs no additional pass over the arrays;
``decision.py`` has the equations.
"""

from nag_jax.restart.conditions import by_name as by_name
from nag_jax.restart.conditions import every as every
from nag_jax.restart.conditions import gradient as gradient
from nag_jax.restart.conditions import speed as speed
from nag_jax.restart.conditions import value as value
from nag_jax.restart.decision import Condition as Condition
from nag_jax.restart.decision import RestartState as RestartState
from nag_jax.restart.decision import Seen as Seen

__all__ = ["Condition", "RestartState", "Seen", "by_name", "every", "gradient", "speed", "value"]


def __dir__() -> list[str]:
    return __all__
