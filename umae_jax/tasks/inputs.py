"""What the tasks share: images as the network wants them, and encoders."""

from collections.abc import Callable, Iterator
import functools
import math
from typing import Any
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np
import optax

from umae_jax import UserError, convert, models, optimizers, sharding
from umae_jax import config as config_lib
from umae_jax.data import in_memory, pipeline, sources
from umae_jax.evals import features
from umae_jax.models import attention, vit
from umae_jax.models import patches as patches_lib


def normalize(images: jax.Array, mean, std) -> jax.Array:
  """(B, H, W, C) uint8 to float32, with given mean and deviation of [0, 1]."""
  shape = (1, 1, 1, images.shape[-1])
  mean, std = (jnp.asarray(x, jnp.float32).reshape(shape) for x in (mean, std))
  return (images.astype(jnp.float32) / 255 - mean) / std


def compute_dtype(config: ml_collections.ConfigDict, mesh: Mesh) -> jnp.dtype:
  """`config.model.dtype`; "auto" is bfloat16 unless the mesh is of CPUs."""
  name = config.model.dtype
  if name == "auto":
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    name = "float32" if on_cpu else "bfloat16"
  return jnp.dtype(name)


def num_patches(config: ml_collections.ConfigDict) -> int:
  """L of the images of a configuration."""
  size = tuple(config.data.image_size)
  return math.prod(patches_lib.grid_shape(size, config.model.patch_size))


def attentions(config: ml_collections.ConfigDict, mesh: Mesh) -> list[str]:
  """The implementations of attention that can be had on this mesh."""
  on_gpu = mesh.devices.flat[0].platform == "gpu"
  fused = on_gpu and compute_dtype(config, mesh) == jnp.bfloat16
  return [x for x in attention.IMPLEMENTATIONS if fused or x != "cudnn"]


def execution(
  config: ml_collections.ConfigDict, mesh: Mesh, tokens: int, prefix: str = ""
) -> vit.Execution:
  """How to compute a transformer on this mesh, of `config.execution`.

  Args:
    config: of the run.
    mesh: where.
    tokens: T of its sequences.
    prefix: "" of the encoder, "decoder_" of the decoder.

  Raises:
    UserError: cuDNN's attention is asked for where there is none.
  """
  names = config.execution.attention.split(",")
  chosen = names[-1] if prefix else names[0]
  possible = attentions(config, mesh)
  if chosen == "cudnn" and chosen not in possible:
    raise UserError(
      f"config.execution.attention={config.execution.attention!r}: 'cudnn' is "
      f"for bfloat16 on NVIDIA GPUs; here are {mesh.devices.size} x "
      f"{mesh.devices.flat[0].device_kind} and {compute_dtype(config, mesh)}. "
      "Set it to 'auto'."
    )
  if chosen == "auto":
    chosen = possible[0]
    if len(possible) > 1:
      images = config.batch_size // config.micro_batches // mesh.devices.size
      heads = config.model[f"{prefix}num_heads"]
      width = config.model[f"{prefix}width"]
      shape = (max(images, 1), tokens, heads, width // heads)
      fastest = attention.fastest(shape, compute_dtype(config, mesh))
      # All processes must run the same program.
      chosen = possible[sharding.from_first_process(possible.index(fastest))]
  return vit.Execution(
    chosen, config.execution.remat, config.execution.scan_layers
  )


def make_batches(
  config: ml_collections.ConfigDict,
) -> Callable[..., Iterator[dict[str, np.ndarray]]]:
  """Returns (source, limit=N) -> this process's batches for evaluation."""
  share = {
    # No more at once than a training step has, though images are whole.
    "batch_size": config.batch_size // config.micro_batches,
    "process_index": jax.process_index(),
    "process_count": jax.process_count(),
  }

  def batches(source, limit=None):
    if isinstance(source, in_memory.MemorySource):
      return in_memory.eval_batches(source, limit=limit, **share)
    return pipeline.eval_batches(
      source,
      limit=limit,
      image_size=tuple(config.data.image_size),
      channels=config.data.channels,
      **share,
    )

  return batches


def make_extract(
  function: Callable[[Any, jax.Array], jax.Array],
  config: ml_collections.ConfigDict,
  mesh: Mesh,
) -> Callable[[Any, sources.Source, int], features.Features]:
  """Returns (params, source, limit) -> outputs (N, F), as Features.

  Every image of the source is encoded once, at most `limit` (0: all); every
  process must call it, and gets all rows.

  Args:
    function: (params, (B, H, W, C) float, normalised) -> (B, F).
    config: of the run.
    mesh: the batches are split over all of it.
  """
  batches = make_batches(config)
  to_global = functools.partial(sharding.to_global, mesh=mesh)

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def encode(params, images):
    images = normalize(images, config.data.mean, config.data.std)
    return function(params, images)

  def extract(params, source, limit):
    encoder = functools.partial(encode, params)
    return features.extract(encoder, batches(source, limit=limit), to_global)

  return extract


def load_pretrained(
  config: ml_collections.ConfigDict, mesh: Mesh
) -> tuple[models.MaskedAutoencoder | models.Classifier, Any]:
  """(model, params) of `config.pretrained`, for images of `config.data`.

  Raises:
    UserError: it cannot be read, or is another encoder than `config.model`.
  """
  model, params = convert.load_pretrained(
    config.pretrained,
    image_size=tuple(config.data.image_size),
    num_heads=config.model.num_heads,
    decoder_num_heads=1,  # Of no use here, and of any decoder a divisor.
  )
  differing = [
    f"config.model.{key}={config.model[key]}, there {getattr(model, key)}"
    for key in ("patch_size", "width", "depth", "num_heads", "mlp_ratio")
    if config.model[key] != getattr(model, key)
  ]
  values = len(params["encoder"]["patch_embed"]["kernel"])
  channels = values // model.patch_size**2
  if channels != config.data.channels:
    differing.append(
      f"config.data.channels={config.data.channels}, there {channels}"
    )
  if differing:
    raise UserError(
      f"config.pretrained={config.pretrained!r} is of another encoder: "
      f"{'; '.join(differing)}. Set these keys to what is there."
    )
  execute = execution(config, mesh, 1 + num_patches(config))
  dtype = compute_dtype(config, mesh)
  return model.clone(dtype=dtype, execution=execute), params


def facts(model, params: Any) -> dict[str, object]:
  """Of pretrained weights: their CRC-32, and what else their run records."""
  crc = functools.reduce(
    lambda crc, x: zlib.crc32(np.ascontiguousarray(x).tobytes(), crc),
    jax.tree.leaves(params),
    0,
  )
  return {
    "pretrained": crc,
    "norm_epsilon": model.norm_epsilon,
    "attention": model.execution.attention,
  }


def make_schedule(
  config: ml_collections.ConfigDict, plan: config_lib.Plan
) -> optax.Schedule:
  """Warm-up and cosine of the run."""
  return optimizers.warmup_cosine(
    plan.learning_rate,
    warmup_steps=plan.warmup_steps,
    total_steps=plan.total_steps,
    min_learning_rate=config.optimizer.min_lr,
  )


def pool(tokens: jax.Array, feature: str) -> jax.Array:
  """(B, 1 + L, D) to the class token or the "mean" of the patches, (B, D)."""
  return tokens[:, 0] if feature == "cls" else tokens[:, 1:].mean(1)
