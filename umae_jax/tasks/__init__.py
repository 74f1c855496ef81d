"""What can be trained: each task hands the loop what is its own."""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
import types
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import optax

from umae_jax import train_step


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What is known of a state after evaluating it.

  Attributes:
    scalars: figures for the log and the closing table.
    pictures: name -> function that draws one: it writes a PNG file of the
      given path, and returns it as (h, w, 3) uint8.
    files: name -> function that writes one into an open binary file.
    table: to be printed, if any.
  """

  scalars: dict[str, float]
  pictures: dict[str, Callable[[pathlib.Path], np.ndarray]] = dataclasses.field(
    default_factory=dict
  )
  files: dict[str, Callable[[BinaryIO], None]] = dataclasses.field(
    default_factory=dict
  )
  table: str = ""


class Task(NamedTuple):
  """All that the loop does not know by itself.

  Attributes:
    init: key -> params, or (key, given) -> params where something is given.
    objective: what a step minimises; of a run without steps, which only
      evaluates, nothing but `frozen` is used.
    optimizer: how.
    schedule: applied updates -> learning rate.
    evaluate: params -> Evaluation; every process must call it, and gets the
      same figures.
    given: pretrained parameters, or None.
    found: what is known of these, for the run's identity.
  """

  init: Callable[..., Any]
  objective: train_step.Objective
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  evaluate: Callable[[Any], Evaluation]
  given: Any = None
  found: Mapping[str, object] = types.MappingProxyType({})
