"""What a configuration must fulfil, in words, before anything starts."""

import math

import ml_collections

from umae_jax import UserError
from umae_jax.config import defaults, flatten, trains

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
  "evaluation.train_images",
  "evaluation.test_images",
  "num_epochs",
  "data.rand_augment",
  "classifier.drop_path",
  "classifier.label_smoothing",
  "classifier.mixup",
  "classifier.cutmix",
  "classifier.random_erasing",
  "classifier.ema_decay",
  "checkpoint.keep_every_steps",
  "data.max_unreadable",
}

_BELOW_ONE = (
  "optimizer.b1",
  "optimizer.b2",
  "classifier.drop_path",
  "classifier.label_smoothing",
  "classifier.ema_decay",
)
_CHOICES = {
  "data.feed": ("host", "device_crop", "memory"),
  "task": ("pretrain", "linear_probe", "finetune", "features"),
  "probe.mode": ("train", "fast", "sweep"),
  "probe.feature": ("cls", "mean"),
  "classifier.pool": ("mean", "cls"),
  "execution.attention": ("auto", "xla", "cudnn", "xla,cudnn", "cudnn,xla"),
  "execution.remat": ("none", "dots", "full"),
  "model.dtype": ("auto", "float32", "bfloat16"),
}


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
  _validate_keys(config)
  _validate_ranges(config)
  _validate_task(config)
  _validate_batch(config, num_devices, num_processes)
  _validate_data(config.data)
  _validate_model(config)


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise UserError(message)


def _validate_keys(config):
  """Every key of `defaults`, of its type, and no other."""
  keys, given = flatten(defaults()), flatten(config)
  for key in sorted(keys.keys() | given.keys()):
    _require(key in keys, f"config.{key} is not a key; see config.defaults.")
    _require(key in given, f"config.{key} is missing; see config.defaults.")
    kinds = (int, float) if isinstance(keys[key], float) else type(keys[key])
    _require(
      isinstance(given[key], kinds)
      and isinstance(given[key], bool) == isinstance(keys[key], bool),
      f"config.{key}={given[key]!r} must be of type "
      f"{type(keys[key]).__name__}, like {keys[key]!r}.",
    )
    for x in given[key] if isinstance(given[key], list) else ():
      _require(
        isinstance(x, int | float)
        and not isinstance(x, bool)
        and math.isfinite(x),
        f"config.{key}={given[key]} must hold finite numbers; {x!r} is none.",
      )


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
  for key in _BELOW_ONE:
    value = flatten(config)[key]
    _require(value < 1, f"config.{key}={value} must lie in [0, 1).")
  _require(
    config.optimizer.warmup_epochs <= config.num_epochs or not trains(config),
    f"config.optimizer.warmup_epochs={config.optimizer.warmup_epochs} is "
    f"longer than the run, config.num_epochs={config.num_epochs}; lower it.",
  )
  _require(
    config.seed < 2**31,
    f"config.seed={config.seed} must be less than 2^31.",
  )


def _validate_task(config):
  """What the task needs besides; the options of probes and classifiers."""
  flat = flatten(config)
  for key, choices in _CHOICES.items():
    _require(
      flat[key] in choices,
      f"config.{key}={flat[key]!r} is not one of "
      f"{', '.join(map(repr, choices))}.",
    )
  needs_weights = config.task in ("linear_probe", "features")
  _require(
    config.pretrained or not needs_weights,
    f"config.task={config.task!r} needs an encoder: set --config.pretrained to "
    "the work directory of a pretraining, a .pth or .safetensors file, or "
    "hf://owner/name.",
  )
  _require(
    config.task != "pretrain" or not config.pretrained,
    f"config.pretrained={config.pretrained!r} has no use in config.task="
    "'pretrain', which starts afresh; set it to '', or the task to another.",
  )
  _require(
    config.num_epochs > 0 or (config.task == "finetune" and config.pretrained),
    "config.num_epochs=0 must be greater than 0; only config.task='finetune' "
    "with config.pretrained may evaluate without training.",
  )
  probe = config.probe
  for key in ("learning_rates", "weight_decays", "epochs", "batch_sizes"):
    low = 0 if key == "weight_decays" else 1e-12
    _require(
      len(probe[key]) > 0 and min(probe[key]) >= low,
      f"config.probe.{key}={probe[key]} must hold one number or more, each "
      f"{'0 or more' if low == 0 else 'greater than 0'}.",
    )
  for key in ("epochs", "batch_sizes", "shots"):
    _require(
      all(x == int(x) and x > 0 for x in probe[key]),
      f"config.probe.{key}={probe[key]} must be positive integers.",
    )
  _require(
    config.data.rand_augment <= 10,
    f"config.data.rand_augment={config.data.rand_augment} must lie in "
    "[0, 10]. MAE's fine-tuning: 9.",
  )
  for key in ("layer_decay", "random_erasing"):
    _require(
      config.classifier[key] <= 1,
      f"config.classifier.{key}={config.classifier[key]} must be at most 1.",
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
    words = "height and width"
    if key != "image_size":
      words = f"one per channel (config.data.channels={data.channels})"
    example = str(tuple(value[:1] * length)).replace(" ", "")
    _require(
      len(value) == length,
      f"config.data.{key}={value} needs {length} numbers, {words}: "
      f"--config.data.{key}='{example}'.",
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
    data.feed == "host" or data.rand_augment == 0,
    f"config.data.rand_augment={data.rand_augment} is done on the host: set "
    f"config.data.feed='host' instead of {data.feed!r}, or "
    "config.data.rand_augment to 0.",
  )
  _require(
    data.feed != "device_crop" or len(scale) == 2,
    "config.data.feed='device_crop' crops at random: set "
    "config.data.crop_scale to (low, high), or config.data.feed to 'host'.",
  )
  _require(
    0 < data.eval_fraction < 1,
    f"config.data.eval_fraction={data.eval_fraction} must lie in (0, 1).",
  )


def _validate_model(config):
  """Patches, heads and positions fit the image and the widths."""
  model, patch = config.model, config.model.patch_size
  for name in ("width", "decoder_width"):
    _require(
      int(model.mlp_ratio * model[name]) >= 1,
      f"config.model.mlp_ratio={model.mlp_ratio} of config.model.{name}="
      f"{model[name]} leaves no hidden unit. MAE: 4.",
    )
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
  if config.task != "pretrain":  # Nothing is masked.
    return
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
