"""What is allowed, and seldom meant."""

from collections.abc import Iterator

from jax.sharding import Mesh
import ml_collections

from umae_jax import config as config_lib
from umae_jax import run as run_lib
from umae_jax.models import masking
from umae_jax.tasks import inputs

FEW_STEPS, FEW_VISIBLE, FEW_VALUES = 1_000, 4, 12
HIGH_RATE = 2e-3  # Of AdamW.


def of_config(config: ml_collections.ConfigDict) -> Iterator[str]:
  """Of the configuration alone."""
  model, data, batch = config.model, config.data, config.batch_size
  if config.task != "pretrain":
    return
  weight, ratio = config.loss.uniformity_weight, config.loss.mask_ratio
  patches = inputs.num_patches(config)
  visible = masking.num_visible(patches, ratio)
  values = model.patch_size**2 * data.channels
  if weight == 0:
    yield (
      "config.loss.uniformity_weight=0 is plain MAE, whose features tend to "
      "collapse onto few directions. The paper: 0.01."
    )
  elif batch < model.width:
    yield (
      f"config.batch_size={batch} is less than config.model.width="
      f"{model.width}: the images of a batch span {batch} directions at most, "
      f"and the uniformity loss stays above 1/{batch}."
    )
  if visible < FEW_VISIBLE:
    yield (
      f"config.loss.mask_ratio={ratio} leaves {visible} of {patches} patches "
      "visible; a smaller config.model.patch_size or ratio leaves more."
    )
  if config.loss.normalize_pixels and values <= FEW_VALUES:
    yield (
      f"config.loss.normalize_pixels=True, of {values} values a patch, removes "
      "most of what there is to predict; set it to False for small patches."
    )
  rate = config_lib.peak_rate(config)
  if rate > HIGH_RATE:
    yield (
      f"config.optimizer.base_lr={config.optimizer.base_lr:g} is {rate:.3g} "
      f"after scaling by the batch; above {HIGH_RATE:g} AdamW seldom converges."
    )


def of_memory(
  config: ml_collections.ConfigDict, mesh: Mesh, needed: int, limit: int
) -> Iterator[str]:
  """Of the bytes that each device needs, and has."""
  execution = config.execution
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  if on_cpu and execution.remat != "none" and not execution.scan_layers:
    yield (
      f"config.execution.remat={execution.remat!r} saves no memory on CPUs "
      "without config.execution.scan_layers=True."
    )
  if needed > 0.9 * limit:
    yield (
      f"{needed / 1e9:.3g} GB may not fit into {limit / 1e9:.3g} GB: raise "
      "config.micro_batches (the same result), set config.execution.remat to "
      "'dots' or 'full', config.mesh.fsdp to the number of devices, or lower "
      "config.batch_size."
    )


def of_data(
  config: ml_collections.ConfigDict, run: run_lib.Run
) -> Iterator[str]:
  """Of the images that were found."""
  plan, tested = run.plan, run.eval_source.num_examples
  classes = len(run.train_source.class_names)
  if 0 < plan.total_steps < FEW_STEPS and config.task == "pretrain":
    yield (
      f"{plan.total_steps} steps are few to learn from: raise "
      "config.num_epochs, or lower config.batch_size."
    )
  if classes < 2:
    yield "The images have no classes: ranks and losses, but no accuracies."
  elif tested < 10 * classes:
    yield (
      f"{tested} test images of {classes} classes: one of them is "
      f"{100 / tested:.2g} % of an accuracy."
    )
