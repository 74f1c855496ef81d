"""Augmentations on the device: erasing, mixup, cutmix, smooth labels.

All but `smooth_labels` take the global batch and one key, and draw one row of
randomness per image, so that devices and micro-batches make no difference.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

ATTEMPTS = 10  # Rectangles drawn before an image is left as it is.


def random_erasing(
  key: jax.Array, images: jax.Array, probability: float
) -> jax.Array:
  """Fills one rectangle of some of the images with noise.

  Its share of the area is uniform in [0.02, 1/3], its height / width
  log-uniform in [0.3, 1/0.3]; a rectangle that does not fit is drawn again.
  Each value in it is standard-normal.

  Args:
    key: of everything drawn.
    images: (B, H, W, C) float, normalised.
    probability: of an image to be erased, in [0, 1].

  Returns:
    Like `images`.

  Source: timm's RandomErasing, mode "pixel", one region: MAE's fine-tuning.
  """
  b, h, w, _ = images.shape
  drawn, noise = jax.random.split(key)
  draws = jax.random.uniform(drawn, (b, 3 + 2 * ATTEMPTS))
  chosen, y, x = draws[:, :3].T
  area, aspect = draws[:, 3::2], draws[:, 4::2]  # (B, ATTEMPTS)
  area = h * w * (0.02 + area * (1 / 3 - 0.02))
  aspect = 0.3 ** (1 - 2 * aspect)
  height = jnp.round(jnp.sqrt(area * aspect))
  width = jnp.round(jnp.sqrt(area / aspect))
  fits = (height < h) & (width < w)
  first = fits.argmax(1, keepdims=True)
  height, width = (
    jnp.take_along_axis(side, first, 1)[:, 0] for side in (height, width)
  )
  top = jnp.floor(y * (h - height + 1))
  left = jnp.floor(x * (w - width + 1))
  erased = (chosen < probability) & fits.any(1)
  inside = _box(images, top, left, top + height, left + width)
  inside &= erased[:, None, None, None]
  noise = jax.random.normal(noise, images.shape, images.dtype)
  return jnp.where(inside, noise, images)


def mix(
  key: jax.Array,
  images: jax.Array,
  targets: jax.Array,
  *,
  mixup: float,
  cutmix: float,
  switch: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
  """Mixes each image i, and its targets, with image B - 1 - i.

  Either lambda times the image plus 1 - lambda times the other (mixup), or the
  image with a box of the other pasted in (cutmix), the box's area being
  1 - lambda before it is clipped at the border, and lambda that of the image
  left uncovered. Lambda ~ Beta(a, a), drawn for every image.

  Args:
    key: of everything drawn.
    images: (B, H, W, C) float.
    targets: (B, classes) float, such as of `smooth_labels`.
    mixup: a of mixup; 0 for cutmix only.
    cutmix: a of cutmix; 0 for mixup only. Both 0: nothing is mixed.
    switch: probability of cutmix where both are possible.

  Returns:
    Like `images` and `targets`.

  Source: timm's Mixup, mode "elem"; MAE's fine-tuning has 0.8, 1.0 and mode
  "batch": one lambda and one choice for each GPU's batch.
  """
  if not mixup and not cutmix:
    return images, targets
  b, h, w, _ = images.shape
  draws = jax.random.uniform(key, (b, 5))
  pasted, blend, paste, y, x = draws.T
  if not mixup or not cutmix:
    switch = float(cutmix > 0)
  pasted = pasted < switch
  # A law that is never used may have any positive parameter.
  blend = _beta_quantile(blend, mixup or 1.0)
  side = jnp.sqrt(1 - _beta_quantile(paste, cutmix or 1.0))
  half_height, half_width = jnp.floor(h * side) // 2, jnp.floor(w * side) // 2
  y, x = jnp.floor(y * h), jnp.floor(x * w)
  top, bottom = jnp.clip(y - half_height, 0), jnp.clip(y + half_height, max=h)
  left, right = jnp.clip(x - half_width, 0), jnp.clip(x + half_width, max=w)
  covered = (bottom - top) * (right - left) / (h * w)
  weight = jnp.where(pasted, 1 - covered, blend)[:, None]  # Lambda.
  # As much of the image itself in every pixel:
  inside = _box(images, top, left, bottom, right)
  own = jnp.where(inside, 0.0, 1.0)
  own = jnp.where(pasted[:, None, None, None], own, weight[..., None, None])
  mixed = own * images + (1 - own) * images[::-1]
  targets = weight * targets + (1 - weight) * targets[::-1]
  return mixed.astype(images.dtype), targets


def smooth_labels(
  labels: jax.Array, num_classes: int, smoothing: float
) -> jax.Array:
  """(B,) int to (B, num_classes) float32 targets that sum to 1.

  Every class gets smoothing / num_classes, and the true one 1 - smoothing
  more.
  """
  hot = jax.nn.one_hot(labels, num_classes)
  return hot * (1 - smoothing) + smoothing / num_classes


def _beta_quantile(levels, a):
  """Makes (B,) draws of Beta(a, a) of uniform ones; linear between 4097 points.

  jax.random.beta rejects in a loop, and takes seconds to compile.
  """
  points = np.linspace(0, 1, 4097)
  quantiles = special.betaincinv(a, a, points).astype(np.float32)
  return jnp.interp(levels, points.astype(np.float32), quantiles)


def _box(images, top, left, bottom, right):
  """(B, H, W, 1) bool: in [top, bottom) x [left, right), each of them (B,)."""
  _, h, w, _ = images.shape
  y, x = jnp.arange(h)[None], jnp.arange(w)[None]
  rows = (y >= top[:, None]) & (y < bottom[:, None])
  columns = (x >= left[:, None]) & (x < right[:, None])
  return (rows[:, :, None] & columns[:, None, :])[..., None]
