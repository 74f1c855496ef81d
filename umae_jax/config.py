"""The keys of a run's configuration: defaults, derived numbers, validation."""

import math
from typing import NamedTuple

import ml_collections

from umae_jax import UserError

# Encoders of the ViT family, for `config.model.update(MODELS[...])`.
MODELS = {
  "vit_ti": dict(width=192, depth=12, num_heads=3),
  "vit_s": dict(width=384, depth=12, num_heads=6),
  "vit_b": dict(width=768, depth=12, num_heads=12),
  "vit_l": dict(width=1024, depth=24, num_heads=16),
  "vit_h": dict(width=1280, depth=32, num_heads=16),
}

# Keys that do not change what a run computes: a resumed run may change them.
FREE_KEYS = ("checkpoint.", "mesh.", "data.directory", "data.max_unreadable")

# All other numbers are greater than 0.
_MAY_BE_ZERO = {
  "seed",
  "loss.mask_ratio",
  "loss.uniformity_weight",
  "optimizer.min_lr",
  "optimizer.warmup_epochs",
  "optimizer.weight_decay",
  "optimizer.b1",
  "optimizer.b2",
  "evaluation.every_epochs",
  "checkpoint.keep_every_steps",
  "data.max_unreadable",
}


def defaults() -> ml_collections.ConfigDict:
  """Every key there is, with the values of the paper's ImageNet recipe."""
  c = ml_collections.ConfigDict()
  c.task = "pretrain"
  c.seed = 0  # Of parameters, data order, augmentation and masks.
  c.batch_size = 1024  # Global, images per step.
  c.micro_batches = 1  # Gradient accumulation; the result does not change.
  c.num_epochs = 200.0

  c.data = ml_collections.ConfigDict()
  c.data.name = "imagenet2012"  # "digits", "folder", "made", or TFDS's name.
  c.data.directory = ""  # TFDS's data_dir, or the root of the class folders.
  c.data.train_split = "train"  # TFDS's syntax, or a sub-folder.
  c.data.eval_split = "validation"
  c.data.eval_fraction = 0.1  # Of a folder without train/ and val/.
  c.data.classes = ""  # All; "imagenet100"; or a text file, a name per line.
  c.data.image_size = (224, 224)  # Height, width: pixels.
  c.data.channels = 3
  c.data.mean = (0.485, 0.456, 0.406)  # Per channel, of values in [0, 1].
  c.data.std = (0.229, 0.224, 0.225)
  c.data.crop_scale = (0.2, 1.0)  # Area of the random crop; () = no crop.
  c.data.flip = True  # Left-right, half of the time.
  c.data.shuffle_buffer = 16_384  # Encoded examples in memory; TFDS only.
  c.data.max_unreadable = 0.001  # Fraction of the set; more stops the run.

  c.model = ml_collections.ConfigDict()
  c.model.patch_size = 16
  c.model.update(MODELS["vit_b"])
  c.model.mlp_ratio = 4.0
  c.model.decoder_width = 512
  c.model.decoder_depth = 8
  c.model.decoder_num_heads = 16
  c.model.dtype = "auto"  # bfloat16 on TPU and GPU, float32 on CPU.

  c.loss = ml_collections.ConfigDict()
  c.loss.mask_ratio = 0.75  # Fraction of the patches removed.
  c.loss.normalize_pixels = True  # Targets, per patch.
  c.loss.uniformity_weight = 0.01  # lambda; 0 is plain MAE.

  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.base_lr = 1.5e-4  # Per 256 images: lr = base_lr * batch / 256.
  c.optimizer.min_lr = 0.0  # Not scaled.
  c.optimizer.warmup_epochs = 40.0
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.95
  c.optimizer.weight_decay = 0.05  # Not on 1-D parameters.

  c.mesh = ml_collections.ConfigDict()
  c.mesh.fsdp = 1  # Devices that share one copy of the state.

  c.evaluation = ml_collections.ConfigDict()
  c.evaluation.every_epochs = 10.0  # And at the end; 0 = only at the end.
  c.evaluation.train_images = 20_000  # That the probes learn from, at most.
  c.evaluation.test_images = 10_000  # That they are tested on, at most.
  c.evaluation.knn_k = 20
  c.evaluation.knn_temperature = 0.07

  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every_steps = 1_000
  c.checkpoint.keep_last = 2
  c.checkpoint.keep_every_steps = 0  # Kept for good as well; 0 = none.

  c.log = ml_collections.ConfigDict()
  c.log.every_steps = 50  # Steps between lines; the only time we wait.
  c.log.images = 8  # Shown in reconstructions.png.
  return c


class Plan(NamedTuple):
  """Numbers that follow from a configuration and its data.

  Attributes:
    steps_per_epoch: N // batch_size, as the reference drops the remainder.
    total_steps: of the run.
    warmup_steps: of the learning rate.
    evaluate_every: steps; larger than `total_steps` if only at the end.
    learning_rate: the peak, scaled by the batch.
  """

  steps_per_epoch: int
  total_steps: int
  warmup_steps: int
  evaluate_every: int
  learning_rate: float


def plan(config: ml_collections.ConfigDict, num_examples: int) -> Plan:
  """Derives the numbers of a run on `num_examples` = N training images.

  Raises:
    UserError: the data are fewer than a batch, or the run has no step.
  """
  steps_per_epoch = num_examples // config.batch_size
  _require(
    steps_per_epoch >= 1,
    f"config.batch_size={config.batch_size} is more than the {num_examples} "
    f"training images of config.data.name={config.data.name!r}; use at most "
    f"{num_examples}.",
  )
  total_steps = round(config.num_epochs * steps_per_epoch)
  _require(
    total_steps >= 1,
    f"config.num_epochs={config.num_epochs} is no step at all: an epoch has "
    f"{steps_per_epoch}; use a larger number.",
  )
  every = round(config.evaluation.every_epochs * steps_per_epoch)
  if config.evaluation.every_epochs == 0:
    every = total_steps + 1
  return Plan(
    steps_per_epoch,
    total_steps,
    round(config.optimizer.warmup_epochs * steps_per_epoch),
    max(every, 1),
    config.optimizer.base_lr * config.batch_size / 256,
  )


def validate(
  config: ml_collections.ConfigDict, *, num_devices: int, num_processes: int = 1
) -> None:
  """Refuses what cannot run, before anything expensive starts.

  Args:
    config: of `defaults`, with changes.
    num_devices: of all processes.
    num_processes: that feed them.

  Raises:
    UserError: names the key, its value, and what would be right.
  """
  _require(
    config.task == "pretrain",
    f"config.task={config.task!r} is not a task; there is 'pretrain'.",
  )
  _validate_ranges(config)
  _validate_batch(config, num_devices, num_processes)
  _validate_data(config.data)
  _validate_model(config)


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise UserError(message)


def _validate_ranges(config):
  """Each number in its range, whatever the others are."""
  for key, value in flatten(config).items():
    if isinstance(value, bool | str | list):
      continue
    may_be_zero = key in _MAY_BE_ZERO
    _require(
      math.isfinite(value) and (value > 0 or (may_be_zero and value == 0)),
      f"config.{key}={value} must be "
      f"{'0 or more' if may_be_zero else 'greater than 0'}.",
    )
  for key in ("optimizer.b1", "optimizer.b2"):
    value = flatten(config)[key]
    _require(value < 1, f"config.{key}={value} must lie in [0, 1).")
  _require(
    config.optimizer.warmup_epochs <= config.num_epochs,
    f"config.optimizer.warmup_epochs={config.optimizer.warmup_epochs} is "
    f"longer than the run, config.num_epochs={config.num_epochs}.",
  )
  _require(
    config.seed < 2**31,
    f"config.seed={config.seed} must be less than 2^31.",
  )


def _validate_batch(config, num_devices, num_processes):
  """The batch over devices, processes and micro-batches."""
  fsdp = config.mesh.fsdp
  _require(
    num_devices % fsdp == 0,
    f"config.mesh.fsdp={fsdp} does not divide the {num_devices} devices; use "
    f"one of {[n for n in range(1, num_devices + 1) if num_devices % n == 0]}.",
  )
  unit = num_devices * config.micro_batches
  _require(
    config.batch_size % unit == 0,
    f"config.batch_size={config.batch_size} (global) does not divide over "
    f"{num_devices} devices x config.micro_batches={config.micro_batches}; "
    f"use a multiple of {unit}.",
  )
  _require(
    num_devices % num_processes == 0,
    f"{num_devices} devices do not divide over {num_processes} processes; "
    "give every process the same number.",
  )


def _validate_data(data):
  """Shapes of images and of what normalises and augments them."""
  for key, length in (
    ("image_size", 2),
    ("mean", data.channels),
    ("std", data.channels),
  ):
    value = data[key]
    words = "height and width" if key == "image_size" else "one per channel"
    _require(
      len(value) == length,
      f"config.data.{key}={value} needs {length} numbers, {words} "
      f"(config.data.channels={data.channels}).",
    )
  _require(
    all(side > 0 and side == int(side) for side in data.image_size),
    f"config.data.image_size={data.image_size} must be positive integers.",
  )
  _require(
    all(std > 0 for std in data.std),
    f"config.data.std={data.std} must be greater than 0.",
  )
  _require(
    data.channels in (1, 3) or data.name == "made",
    f"config.data.channels={data.channels}: images are read as grey (1) or "
    "RGB (3).",
  )
  scale = data.crop_scale
  _require(
    len(scale) == 0 or (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1),
    f"config.data.crop_scale={scale} must be (low, high) in (0, 1], or () for "
    "no crop. MAE: (0.2, 1.0).",
  )
  _require(
    0 < data.eval_fraction < 1,
    f"config.data.eval_fraction={data.eval_fraction} must lie in (0, 1).",
  )


def _validate_model(config):
  """Patches, heads and positions fit the image and the widths."""
  model, patch = config.model, config.model.patch_size
  for side in config.data.image_size:
    low = side - side % patch
    _require(
      side % patch == 0,
      f"config.data.image_size={config.data.image_size} is not a multiple of "
      f"config.model.patch_size={patch}; the nearest valid sides to {side} "
      f"are {low or patch} and {low + patch}.",
    )
  for width_key, heads_key in (
    ("width", "num_heads"),
    ("decoder_width", "decoder_num_heads"),
  ):
    width, heads = model[width_key], model[heads_key]
    _require(
      width % heads == 0,
      f"config.model.{width_key}={width} does not divide over "
      f"config.model.{heads_key}={heads}; use a multiple of {heads}.",
    )
    _require(
      width % 4 == 0,
      f"config.model.{width_key}={width} cannot hold 2-D sine-cosine "
      "positions; use a multiple of 4.",
    )
  _require(
    model.dtype in ("auto", "float32", "bfloat16"),
    f"config.model.dtype={model.dtype!r} is not one of 'auto', 'float32', "
    "'bfloat16'.",
  )
  height, width = config.data.image_size
  patches = height * width // patch**2
  ratio = config.loss.mask_ratio
  visible = int(patches * (1 - ratio)) if 0 <= ratio <= 1 else 0
  _require(
    1 <= visible < patches,
    f"config.loss.mask_ratio={ratio} leaves {visible} of {patches} patches "
    "visible; at least one must be visible and one removed. MAE: 0.75.",
  )
  _require(
    not config.loss.normalize_pixels or patch**2 * config.data.channels > 1,
    "config.loss.normalize_pixels=True needs patches of two values or more; "
    "set it to False.",
  )


def flatten(config: ml_collections.ConfigDict) -> dict[str, object]:
  """{"a.b": value} of all keys; tuples are lists, as JSON gives them back."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      flat |= {f"{key}.{name}": x for name, x in flatten(value).items()}
    else:
      flat[key] = list(value) if isinstance(value, tuple) else value
  return flat
