"""What the steps of a run are taken on: batches of the host, or its memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from umae_jax import device_crop, sharding, train_step
from umae_jax.data import in_memory, on_device, pipeline, sources

MOST_STEPS = 20  # Taken at once; more gain nothing.


class Feed(NamedTuple):
  """Gives the train step what it needs, in the order of the steps.

  Attributes:
    draw: of `train_step.make_train_step`.
    take: (steps done, until) -> (arguments of the step function besides the
      state, how many steps it takes with these, not beyond `until`).
    unreadable: () -> images met so far that are not readable. Each process
      counts its own.
    close: stops reading.
  """

  draw: Callable[[Any, jax.Array], Any] | None
  take: Callable[[int, int], tuple[tuple[Any, ...], int]]
  unreadable: Callable[[], int]
  close: Callable[[], None]


def open_feed(
  config: ml_collections.ConfigDict,
  source: sources.Source | in_memory.MemorySource,
  mesh: Mesh,
  start: int,
) -> Feed:
  """The feed of a run that has taken `start` steps; loads a set in memory."""
  data = config.data
  if data.feed != "memory":
    return host_feed(train_batches(config, source, start), mesh)
  return memory_feed(
    on_device.TrainingSet(
      source,
      mesh,
      batch_size=config.batch_size,
      seed=config.seed,
      crop_scale=tuple(data.crop_scale),
      flip=data.flip,
      max_unreadable=data.max_unreadable,
    )
  )


def host_feed(batches: pipeline.Batches, mesh: Mesh) -> Feed:
  """This process's batches, a step each."""

  def take(step, until):
    del step, until
    return (sharding.to_global(next(batches), mesh),), 1

  return Feed(None, take, lambda: len(batches.unreadable), batches.close)


def memory_feed(images: on_device.TrainingSet) -> Feed:
  """A set in device memory, as many steps at once as may be."""

  def take(step, until):
    data, most = images.at(step)
    steps = min(until - step, most, MOST_STEPS)
    return (data, np.int32(steps)), steps

  # Every process has all of the images: the first one counts.
  unreadable = 0 if jax.process_index() else len(images.unreadable)
  return Feed(images.draw, take, lambda: unreadable, lambda: None)


def train_batches(
  config: ml_collections.ConfigDict, source: sources.Source, start: int
) -> pipeline.Batches:
  """This process's rows of the batches of steps `start` + 1, ..."""
  data = config.data
  return pipeline.train_batches(
    source,
    batch_size=config.batch_size,
    seed=config.seed,
    start_step=start,
    image_size=tuple(data.image_size),
    channels=data.channels,
    crop_scale=tuple(data.crop_scale),
    flip=data.flip,
    rand_augment=data.rand_augment,
    device_crop=data.feed == "device_crop",
    shuffle_buffer=data.shuffle_buffer,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    max_unreadable=data.max_unreadable,
  )


def finish_on_device(
  objective: train_step.Objective, config: ml_collections.ConfigDict
) -> train_step.Objective:
  """The objective, of batches as the feed of the configuration has them."""
  if config.data.feed != "device_crop":
    return objective
  image_size = tuple(config.data.image_size)

  def randomize(key, batch):
    return objective.randomize(key, device_crop.finish(batch, image_size))

  return objective._replace(randomize=randomize)
