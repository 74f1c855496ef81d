"""What can be trained: each task hands the loop what is its own."""

from collections.abc import Callable
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from umae_jax import train_step


class Evaluation(NamedTuple):
  """What is known of a state after evaluating it.

  Attributes:
    scalars: figures for the log and the closing table.
    pictures: name -> function that draws one: it writes a PNG file of the
      given path, and returns it as (h, w, 3) uint8.
  """

  scalars: dict[str, float]
  pictures: dict[str, Callable[[pathlib.Path], np.ndarray]]


class Task(NamedTuple):
  """All that the loop does not know by itself.

  Attributes:
    init: key -> params.
    objective: what a step minimises.
    optimizer: how.
    schedule: applied updates -> learning rate.
    evaluate: params -> Evaluation; every process must call it, and gets the
      same figures.
  """

  init: Callable[[jax.Array], Any]
  objective: train_step.Objective
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  evaluate: Callable[[Any], Evaluation]
