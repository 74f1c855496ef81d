"""The keys of a run's configuration: defaults, and numbers derived."""

from collections.abc import Callable
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
# (Weights are told by their checksum, wherever they lie.)
FREE_KEYS = (
  *("checkpoint.", "mesh.", "data.directory", "data.max_unreadable"),
  *("pretrained", "execution.", "found.attention"),
)


def defaults() -> ml_collections.ConfigDict:
  """Every key there is, with the values of the paper's ImageNet recipe."""
  c = ml_collections.ConfigDict()
  c.task = "pretrain"  # Or "linear_probe", "finetune", "features".
  c.pretrained = ""  # Start from: a run, a file, hf://, https://, gs://.
  c.seed = 0  # Of parameters, data order, augmentation and masks.
  c.batch_size = 1024  # Global, images per step.
  c.micro_batches = 1  # Gradient accumulation; the result does not change.
  c.num_epochs = 200.0
  c.data = _data()
  c.model = _model()
  c.probe = _probe()
  c.classifier = _classifier()

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

  # How the transformers are computed; results differ by rounding alone.
  c.execution = ml_collections.ConfigDict()
  # "xla", "cudnn", the encoder's and the decoder's, "cudnn,xla", or "auto": the
  # faster one of each, measured when a run starts and kept when it resumes.
  c.execution.attention = "auto"
  c.execution.remat = "none"  # To save memory, recompute: "dots" or "full".
  c.execution.scan_layers = False  # Compiles faster, runs a little slower.

  c.evaluation = ml_collections.ConfigDict()
  c.evaluation.every_epochs = 10.0  # And at the end; 0 = only at the end.
  c.evaluation.train_images = 20_000  # The probes learn from, at most; 0 = all.
  c.evaluation.test_images = 0  # That are tested on, at most; 0 = all.
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


def _data() -> ml_collections.ConfigDict:
  """`config.data`: which images, and how they are cropped and scaled."""
  c = ml_collections.ConfigDict()
  c.name = "imagenet2012"  # "digits", "folder", "made", or TFDS's name.
  c.directory = ""  # TFDS's data_dir, or the root of class folders; gs://...
  c.train_split = "train"  # TFDS's syntax, or a sub-folder.
  c.eval_split = "validation"
  c.eval_fraction = 0.1  # Of a folder without train/ and val/.
  # "host": read, cropped and flipped by the CPU while the device computes;
  # "device_crop": read there, cropped and flipped by the device; "memory": read
  # once, and all else is done by the device, in an order and with crops of its
  # own, without TensorFlow unless the set is TFDS's.
  c.feed = "host"
  c.classes = ""  # All; "imagenet100"; or a text file, a name per line.
  c.image_size = (224, 224)  # Height, width: pixels.
  c.channels = 3
  c.mean = (0.485, 0.456, 0.406)  # Per channel, of values in [0, 1].
  c.std = (0.229, 0.224, 0.225)
  c.crop_scale = (0.2, 1.0)  # Area of the random crop; () = no crop.
  c.flip = True  # Left-right, half of the time.
  c.rand_augment = 0.0  # Magnitude, of 10; 0 = none. MAE's fine-tuning: 9.
  c.shuffle_buffer = 16_384  # Encoded examples in memory; TFDS only.
  c.max_unreadable = 0.001  # Fraction of the set; more stops the run.
  return c


def _model() -> ml_collections.ConfigDict:
  """`config.model`: the fields of `models.MaskedAutoencoder`."""
  c = ml_collections.ConfigDict()
  c.patch_size = 16
  c.update(MODELS["vit_b"])
  c.mlp_ratio = 4.0
  c.decoder_width = 512
  c.decoder_depth = 8
  c.decoder_num_heads = 16
  c.dtype = "auto"  # bfloat16 on TPU and GPU, float32 on CPU.
  return c


def _probe() -> ml_collections.ConfigDict:
  """`config.probe`: of the tasks linear_probe and features."""
  c = ml_collections.ConfigDict()
  # "train": the reference's, on augmented images; "fast": features are made
  # once, then all the probes are fitted to them; "sweep": over recipes.
  c.mode = "train"
  c.feature = "cls"  # Class token, or "mean" of the patch tokens.
  # Of "fast" and "sweep", which try all of them; per 256 images.
  c.learning_rates = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
  c.weight_decays = (0.0, 1e-4)
  c.epochs = (90,)  # The first is that of "fast"; "sweep" takes all.
  c.batch_sizes = (1024,)  # Likewise.
  c.shots = (1, 5, 10)  # Labelled images per class; () = no few-shot probe.
  c.draws = 10  # Of these images; the figures are their mean and deviation.
  return c


def _classifier() -> ml_collections.ConfigDict:
  """`config.classifier`: of the task finetune."""
  c = ml_collections.ConfigDict()
  c.pool = "mean"  # Of the patch tokens, then LayerNorm; or "cls".
  c.layer_decay = 0.65  # Of the learning rate, per layer downwards.
  c.drop_path = 0.1  # Rate of the last block; 0 at the first.
  c.label_smoothing = 0.1
  c.mixup = 0.8  # Parameter of its Beta distribution; 0 = none.
  c.cutmix = 1.0  # Likewise; with both, one or the other for each image.
  c.random_erasing = 0.25  # Probability.
  c.ema_decay = 0.0  # Of averaged parameters, then evaluated; 0 = none.
  return c


def linear_probe(c: ml_collections.ConfigDict) -> None:
  """Makes a pretraining's configuration MAE's linear probe of its encoder."""
  c.task = "linear_probe"
  c.batch_size = 16_384
  c.num_epochs = 90.0
  c.data.crop_scale = (0.08, 1.0)
  c.data.flip = True
  c.optimizer.base_lr = 0.1
  c.optimizer.warmup_epochs = 10.0
  c.optimizer.weight_decay = 0.0
  c.evaluation.train_images = 0


def finetune(c: ml_collections.ConfigDict) -> None:
  """Makes a pretraining's configuration MAE's fine-tuning of its encoder.

  The encoder in `config.model` decides what differs between B, L and H.
  """
  large, huge = (
    c.model.width >= MODELS[k]["width"] for k in ("vit_l", "vit_h")
  )
  c.task = "finetune"
  c.batch_size = 1024
  c.num_epochs = 50.0 if large else 100.0
  c.data.crop_scale = (0.08, 1.0)
  c.data.flip = True
  c.data.rand_augment = 9.0
  c.data.feed = "host"  # As RandAugment is done there.
  c.classifier.layer_decay = 0.75 if large else 0.65
  c.classifier.drop_path = 0.3 if huge else 0.2 if large else 0.1
  c.optimizer.base_lr = 1e-3 if large else 5e-4
  c.optimizer.min_lr = 1e-6
  c.optimizer.warmup_epochs = 5.0
  c.optimizer.b2 = 0.999
  c.optimizer.weight_decay = 0.05


def split_variant(
  variant: str,
) -> tuple[str, Callable[[ml_collections.ConfigDict], None]]:
  """("vit_b16", `finetune`) of "vit_b16_finetune"; without one, no change."""
  for recipe in (linear_probe, finetune):
    base = variant.removesuffix(f"_{recipe.__name__}")
    if base != variant:
      return base, recipe
  return variant, lambda c: None


def trains(config: ml_collections.ConfigDict) -> bool:
  """Whether the run takes steps, or only evaluates what it starts from."""
  if config.task == "features" or config.num_epochs == 0:
    return False
  return config.task != "linear_probe" or config.probe.mode == "train"


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
    UserError: the data are fewer than a batch, or the run has no step though
      it trains.
  """
  if not trains(config):
    return Plan(0, 0, 0, 1, 0.0)
  steps_per_epoch = num_examples // config.batch_size
  if steps_per_epoch < 1:
    raise UserError(
      f"config.batch_size={config.batch_size} is more than the {num_examples} "
      f"training images of config.data.name={config.data.name!r}; use at most "
      f"{num_examples}."
    )
  total_steps = round(config.num_epochs * steps_per_epoch)
  if total_steps < 1:
    raise UserError(
      f"config.num_epochs={config.num_epochs} is no step at all: an epoch has "
      f"{steps_per_epoch}; use a larger number."
    )
  every = round(config.evaluation.every_epochs * steps_per_epoch)
  if config.evaluation.every_epochs == 0:
    every = total_steps + 1
  return Plan(
    steps_per_epoch,
    total_steps,
    round(config.optimizer.warmup_epochs * steps_per_epoch),
    max(every, 1),
    peak_rate(config),
  )


def peak_rate(config: ml_collections.ConfigDict) -> float:
  """Learning rate after warmup: MAE's linear scaling with the batch."""
  return config.optimizer.base_lr * config.batch_size / 256


def flatten(config: ml_collections.ConfigDict) -> dict[str, object]:
  """{"a.b": value} of all keys; tuples are lists, as JSON gives them back."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      flat |= {f"{key}.{name}": x for name, x in flatten(value).items()}
    else:
      flat[key] = list(value) if isinstance(value, tuple) else value
  return flat
