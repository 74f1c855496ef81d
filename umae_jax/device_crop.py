"""Random crops on the device: two small matrix products for each image.

Resizing is linear and separable: rows and columns of a window are combined by
two matrices of weights, which also hold the crop and the flip. Gathers and
loops over pixels, which accelerators are bad at, are not needed.
"""

import jax
import jax.numpy as jnp

ATTEMPTS = 10  # Windows drawn before falling back to the central one.


def resample_matrix(
  start: jax.Array, extent: jax.Array, size: int, canvas: int
) -> jax.Array:
  """Weights that resize windows of a line of pixels, antialiased bicubic.

  Args:
    start: (B,), first pixel of each window, in [0, canvas).
    extent: (B,), its pixels, at least 1 and inside the canvas.
    size: pixels of the result.
    canvas: pixels of the line.

  Returns:
    (B, size, canvas) float32: row i holds the weights of the pixels of the
    line in pixel i of the result. Their sum is 1; outside of the window they
    are 0, so what lies there does not matter.

  Source: `tf.image.resize(method="bicubic", antialias=True)`: the kernel of
  Keys with a = -1/2, widened by the factor by which the window shrinks, and at
  the window's ends divided by what is left of its sum. Pillow does the same.
  """
  start, extent = (jnp.float32(x)[:, None, None] for x in (start, extent))
  scale = extent / size  # Pixels of the window for one of the result.
  centre = (jnp.arange(size)[None, :, None] + 0.5) * scale
  pixel = jnp.arange(canvas)[None, None, :] + 0.5 - start
  weights = _keys((pixel - centre) / jnp.maximum(scale, 1))
  weights = jnp.where((pixel > 0) & (pixel < extent), weights, 0)
  return weights / weights.sum(-1, keepdims=True)


def _keys(x: jax.Array) -> jax.Array:
  """The cubic kernel of Keys (1981), zero from 2 on; a = -1/2."""
  x = jnp.abs(x)
  near = (1.5 * x - 2.5) * x * x + 1
  far = ((-0.5 * x + 2.5) * x - 4) * x + 2
  return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


def crop_resize(
  images: jax.Array,
  windows: jax.Array,
  image_size: tuple[int, int],
  flip: jax.Array | None = None,
) -> jax.Array:
  """Cuts a window out of each image and resizes it.

  Args:
    images: (B, h, w, C) uint8.
    windows: (B, 4) int32: top, left, height, width in pixels, inside (h, w).
    image_size: (H, W) of the result, in pixels.
    flip: (B,) bool, which to mirror left-right; None for none.

  Returns:
    (B, H, W, C) uint8, rounded and clipped. Equals `data.augment.resize` of
    the window but for values that lie halfway between two grey levels.
  """
  top, left, height, width = windows.T
  _, h, w, _ = images.shape
  rows = resample_matrix(top, height, image_size[0], h)  # (B, H, h)
  columns = resample_matrix(left, width, image_size[1], w)  # (B, W, w)
  if flip is not None:
    columns = jnp.where(flip[:, None, None], columns[:, ::-1], columns)
  # Pixels are exact in bfloat16, weights are not: one pass is off by a grey
  # level on a TPU and on the tensor cores of a GPU.
  resized = jnp.einsum(
    "byh,bhwc->bywc", rows, images.astype(jnp.float32), precision="highest"
  )
  resized = jnp.einsum("bxw,bywc->byxc", columns, resized, precision="highest")
  return jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)


def random_windows(
  key: jax.Array,
  number: int,
  shape: tuple[int, int],
  scale: tuple[float, float],
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
  """Draws windows of images of one size.

  Args:
    key: of everything drawn; row i depends on it and on i alone.
    number: B, windows to draw.
    shape: (h, w) of the images, in pixels.
    scale: range of a window's area, as a fraction of the image's; uniform.
    ratio: range of a window's width / height; log-uniform.

  Returns:
    (B, 4) int32: top, left, height, width in pixels, inside the image, of the
    distribution of `data.augment.random_window`.

  Source: torchvision RandomResizedCrop.get_params.
  """
  h, w = shape
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(number))
  draws = jax.vmap(lambda k: jax.random.uniform(k, (4, ATTEMPTS)))(keys)
  area, aspect, y, x = draws.swapaxes(0, 1)  # (B, ATTEMPTS) each.
  area = h * w * (scale[0] + area * (scale[1] - scale[0]))
  low, high = jnp.log(jnp.array(ratio))
  aspect = jnp.exp(low + aspect * (high - low))
  height = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
  width = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
  fits = (height > 0) & (height <= h) & (width > 0) & (width <= w)
  top = jnp.floor(y * (h - height + 1)).astype(jnp.int32)
  left = jnp.floor(x * (w - width + 1)).astype(jnp.int32)
  # A product with a number just below 1 may round up.
  top, left = jnp.minimum(top, h - height), jnp.minimum(left, w - width)
  drawn = jnp.stack([top, left, height, width], -1)
  first = fits.argmax(1)[:, None, None]
  drawn = jnp.take_along_axis(drawn, first, 1)[:, 0]
  most = [max(1, round(min(h, w / ratio[0])))]
  most += [max(1, round(min(w, h * ratio[1])))]
  central = jnp.array([(h - most[0]) // 2, (w - most[1]) // 2, *most])
  return jnp.where(fits.any(1)[:, None], drawn, central[None])


def finish(
  batch: dict[str, jax.Array], image_size: tuple[int, int]
) -> dict[str, jax.Array]:
  """Resizes and mirrors a batch of cropped, not yet resized images.

  Args:
    batch: of `data.pipeline.train_batches(device_crop=True)`: "image"
      (B, h, w, C) uint8, of which the corner "extent" (B, 2) int32 is the
      image; "flip" (B,) bool, which to mirror; and more.
    image_size: (H, W) of the result, in pixels.

  Returns:
    "image" (B, H, W, C) uint8, and the rest of the batch.
  """
  rest = {k: v for k, v in batch.items() if k not in ("extent", "flip")}
  windows = jnp.pad(batch["extent"], ((0, 0), (2, 0)))  # From (0, 0).
  images = crop_resize(batch["image"], windows, image_size, batch["flip"])
  return rest | {"image": images}
