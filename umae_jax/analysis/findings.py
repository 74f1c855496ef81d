"""What a trained encoder makes of given images, for pictures and tables."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from umae_jax import losses
from umae_jax.analysis import encoders, guarantees, runs, similarity
from umae_jax.models import masking
from umae_jax.models import patches as patches_lib
from umae_jax.tasks import inputs, pretrain

BATCH = 64  # Images at a time.
SEED = 0  # Of the masks, whatever the runs' own, so that they agree.
MASKS = 6  # Of each image of `bounds`.
PAIRS = ("same image, two masks", "sharing a target", "random")


class Findings(NamedTuple):
  """Of one run, on N images; class tokens of layers are as of `encoders`.

  Attributes:
    whole: class tokens of whole images, (depth + 1, N, D).
    masked: of the images under a mask of the run's own ratio, likewise.
    cosines: of pairs of masked images, after the last layer, {kind: (n,)}.
    alignment: mean squared distance of these pairs, {kind: in [0, 4]}.
    same_label: share of the pairs that have one label, {kind: in [0, 1]}.
    uniformity: loss of the masked images, in [1 / D, 1].
  """

  whole: np.ndarray
  masked: np.ndarray
  cosines: dict[str, np.ndarray]
  alignment: dict[str, float]
  same_label: dict[str, float]
  uniformity: float


def find(run: runs.Run, images: np.ndarray, labels: np.ndarray) -> Findings:
  """Encodes images (N, H, W, C) uint8 whole, and under two masks each."""
  model, data, ratio = run.model, run.config.data, run.config.loss.mask_ratio
  noises = [noise_of(model, images, seed) for seed in (SEED, SEED + 1)]

  @jax.jit
  def encode(params, batch, first, second):
    batch = inputs.normalize(batch, data.mean, data.std)
    look = functools.partial(encoders.layers, model, params, batch)
    whole, masked = look(), look(first, ratio)
    other = look(second, ratio).tokens[-1][:, 0]
    tokens = [jnp.stack([t[:, 0] for t in x.tokens]) for x in (whole, masked)]
    return *tokens, other[None]

  parts = []
  for start in range(0, len(images), BATCH):  # The last one is filled up.
    rows = np.arange(start, start + BATCH) % len(images)
    batch = [x[rows] for x in (images, *noises)]
    parts.append(jax.device_get(encode(run.params, *batch)))
  whole, masked, (other,) = (
    np.concatenate(x, axis=1)[:, : len(images)] for x in zip(*parts)
  )
  visible = masking.num_visible(noises[0].shape[1], ratio)
  partners = similarity.sharing_pairs(
    np.asarray(patches_lib.patchify(images, model.patch_size)),
    noises[0],
    np.asarray(masking.from_noise(noises[1], visible).mask),
    normalize=run.config.loss.normalize_pixels,
  )
  own = np.arange(len(images))
  pairs = {}
  for kind, partner in zip(PAIRS, (own, partners, np.roll(own, 1))):
    found = partner >= 0
    z = [similarity.unit(x) for x in (masked[-1, found], other[partner[found]])]
    pairs[kind] = (z, (labels[found] == labels[partner[found]]).mean())
  return Findings(
    whole,
    masked,
    {kind: (z[0] * z[1]).sum(1) for kind, (z, _) in pairs.items()},
    {k: float(losses.alignment_loss(*z)) for k, (z, _) in pairs.items()},
    {kind: float(share) for kind, (_, share) in pairs.items()},
    float(losses.uniformity_loss(masked[-1])),
  )


def noise_of(model: Any, images: np.ndarray, seed: int) -> np.ndarray:
  """(N, L) noise, the same for models of one patch size."""
  return np.asarray(pretrain.evaluation_noise(model, images, seed, 0))


def reconstruct(
  run: runs.Run, images: np.ndarray, ratio: float
) -> tuple[np.ndarray, np.ndarray]:
  """What a run makes of a few images at a mask ratio.

  Returns:
    masked and filled in, each (n, H, W, C) in [0, 1]. The masks are those of
    any run; a larger ratio removes what a smaller one does, and more.
  """
  config = run.config.copy_and_resolve_references()
  config.seed, config.loss.mask_ratio = SEED, ratio
  original, masked, predicted = map(
    np.asarray, pretrain.reconstructions(run.model, config, run.params, images)
  )
  return masked, np.where(masked == original, original, predicted)


def bounds(run: runs.Run, images: np.ndarray) -> dict[str, guarantees.Bound]:
  """What docs/theory.md says of the reconstruction of a few images.

  Predictions and targets are scaled to length 1, so that the loss is 2 minus
  twice their mean cosine.
  """
  model, data, loss = run.model, run.config.data, run.config.loss
  x = inputs.normalize(images, data.mean, data.std)
  target = patches_lib.patchify(x, model.patch_size)
  if loss.normalize_pixels:
    target = losses.normalize_patches(target)
  predict = jax.jit(functools.partial(model.apply, mask_ratio=loss.mask_ratio))
  noises = [noise_of(model, images, seed) for seed in range(MASKS)]
  outs = [jax.device_get(predict({"params": run.params}, x, n)) for n in noises]
  world = guarantees.of_predictions(
    np.stack([out.prediction for out in outs], axis=1),
    np.stack([out.mask for out in outs], axis=1) > 0,
    np.asarray(target),
  )
  joint, outputs, targets, _ = world
  return {
    "asymmetric": guarantees.asymmetric_bound(*world),
    "alignment": guarantees.alignment_bound(joint, outputs, targets),
    "sharp": guarantees.alignment_bound(joint, outputs, targets, sharp=True),
  }


def attention(run: runs.Run, images: np.ndarray) -> np.ndarray:
  """The class token's weights over the patches of a few whole images.

  Returns:
    (heads, n, rows, columns) of the last block, in [0, 1]; what is left to 1
    is the class token's weight of itself.
  """
  data = run.config.data
  x = inputs.normalize(images, data.mean, data.std)
  weights = encoders.layers(run.model, run.params, x).attention[-1][:, :, 1:]
  grid = patches_lib.grid_shape(images.shape[1:3], run.model.patch_size)
  weights = weights.reshape(*weights.shape[:2], *grid)
  return np.asarray(weights.swapaxes(0, 1))
