"""Training batches drawn within the jitted step, from images on the devices.

Order, crops and flips are a pure function of (seed, step). Every device holds
all images, as uint8, and makes its own rows of the batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from umae_jax import device_crop, sharding
from umae_jax.data import pipeline
from umae_jax.data.in_memory import MemorySource

# Folded into the key: no steps. (2^32 - 1 are the masks of evaluation.)
ORDER, AUGMENTATION = 2**32 - 2, 2**32 - 3


class TrainingSet:
  """The images to train on, on every device of a mesh.

  Args:
    source: is loaded, if it is not yet.
    mesh: each of its devices holds all the images.
    batch_size: B, at most N.
    seed: of the order, the crops and the flips.
    crop_scale: range of the area of the random crop, as a fraction of the
      image; () for none.
    flip: whether to mirror half of the images.
    max_unreadable: fraction of the N images that may not be readable.

  Attributes:
    unreadable: names of the images that are not readable.

  Raises:
    UserError: too many are not readable.
  """

  def __init__(
    self,
    source: MemorySource,
    mesh: Mesh,
    *,
    batch_size: int,
    seed: int,
    crop_scale: tuple[float, float] | tuple[()],
    flip: bool,
    max_unreadable: float,
  ):
    pixels = source.pixels
    bad = np.flatnonzero(~pixels.readable).tolist()
    self.unreadable = [source.name_of(row) for row in bad]
    pipeline.refuse_unreadable(
      self.unreadable, source.num_examples, max_unreadable
    )
    self._size, self._shape = source.num_examples, pixels.images.shape[1:]
    self._image_size, self._batch_size = source.image_size, batch_size
    self._crop_scale, self._flip, self._mesh = crop_scale, flip, mesh
    self._key = jax.random.key(seed)
    everywhere = sharding.replicated(mesh)
    # Flat, for a TPU pads the last dimension of an array to 128.
    self._images = jax.make_array_from_process_local_data(
      everywhere,
      {
        "image": pixels.images.reshape(self._size, -1),
        "label": pixels.labels,
      },
    )
    self._orders = jax.jit(self._two_epochs, out_shardings=everywhere)
    self._epoch, self._data = None, None

  def at(self, step: int) -> tuple[Any, int]:
    """What to draw batches from, after `step` steps.

    Returns:
      data: a tree of arrays, for `draw`.
      steps: how many steps, at least one, can be drawn from it.
    """
    epoch, offset = divmod(step * self._batch_size, self._size)
    if epoch != self._epoch:
      self._epoch = epoch
      self._data = self._images | self._orders(np.int32(epoch))
    return self._data, (2 * self._size - offset) // self._batch_size

  def draw(self, data: Any, step: jax.Array) -> dict[str, jax.Array]:
    """The batch of a step, for use inside jit.

    Every epoch is a permutation of all N examples; batches cross its end. Each
    device makes its rows alone, the same ones on any number of devices.

    Args:
      data: of `at`.
      step: () int32, steps done before.

    Returns:
      "image" (B, H, W, C) uint8 and "label" (B,) int32.
    """
    # Both products may overflow; their difference is right for all that.
    first = step * self._batch_size - data["epoch"] * self._size
    rows = jax.lax.with_sharding_constraint(
      first + jnp.arange(self._batch_size), sharding.batch_sharding(self._mesh)
    )

    def take(array, index):
      return array.at[index].get(mode="promise_in_bounds")

    index = take(data["order"], rows)
    images = take(data["image"], index).reshape(-1, *self._shape)
    return {
      "image": self._augment(images, step),
      "label": take(data["label"], index),
    }

  def _augment(self, images: jax.Array, step: jax.Array) -> jax.Array:
    """(B, h, w, C) uint8 to (B, H, W, C): crops and flips."""
    key = jax.random.fold_in(jax.random.fold_in(self._key, AUGMENTATION), step)
    crop, flip = jax.random.split(key)
    mirrored = None
    if self._flip:
      mirrored = jax.random.bernoulli(flip, shape=(self._batch_size,))
    if self._crop_scale:
      windows = device_crop.random_windows(
        crop, self._batch_size, self._shape[:2], self._crop_scale
      )
      return device_crop.crop_resize(
        images, windows, self._image_size, mirrored
      )
    if mirrored is None:
      return images
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)

  def _two_epochs(self, epoch: jax.Array) -> dict[str, jax.Array]:
    """ "order" (2N,): that of an epoch, then that of the next."""
    key = jax.random.fold_in(self._key, ORDER)
    orders = [
      jax.random.permutation(jax.random.fold_in(key, epoch + i), self._size)
      for i in range(2)
    ]
    return {"order": jnp.concatenate(orders), "epoch": epoch}
