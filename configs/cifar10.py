r"""U-MAE ViT-Ti/2 on CIFAR-10, as its authors ran it; and a small CPU run.

  python -m umae_jax.main --config=configs/cifar10.py --workdir=runs/cifar10
  python -m umae_jax.main --config=configs/cifar10.py:small --workdir=runs/small
  python -m umae_jax.main --config=configs/cifar10.py:small_linear_probe \
      --config.pretrained=runs/small --workdir=runs/small_linear

Cost:    not measured yet; `small`: 23 minutes of one busy CPU core.
Result:  not measured yet; `small`: see the README's table.
Source:  the authors' answers on their repository (zhangq327/U-MAE): 2,000
         epochs, batch 4,096, 200 of warm-up, no augmentation, raw pixels.

TFDS downloads the data where there is a network; elsewhere
--config.data.directory=DIR names a data_dir that has them.
"""

import ml_collections

from umae_jax import config

VARIANTS = (
  *("vit_ti2", "vit_ti2_linear_probe", "vit_ti2_finetune"),
  *("small", "small_linear_probe", "small_finetune", "smoke"),
)


def get_config(variant: str = "vit_ti2") -> ml_collections.ConfigDict:
  """Returns the config of one variant of VARIANTS."""
  if variant not in VARIANTS:
    raise ValueError(f"variant={variant!r} is not one of {VARIANTS}.")
  variant, recipe = config.split_variant(variant)
  c = config.defaults()
  c.batch_size = 4096
  c.num_epochs = 2000.0

  c.data.name = "cifar10"
  c.data.eval_split = "test"
  c.data.image_size = (32, 32)
  c.data.mean = (0.5, 0.5, 0.5)
  c.data.std = (0.5, 0.5, 0.5)
  c.data.crop_scale = ()
  c.data.flip = False
  c.data.feed = "memory"  # 184 MB, of which 154 on each device.

  c.model.patch_size = 2
  c.model.update(config.MODELS["vit_ti"])
  c.model.decoder_width = 192
  c.model.decoder_depth = 4
  c.model.decoder_num_heads = 3

  c.loss.normalize_pixels = False
  # The true gradient. In the released code it is 1/W of this on W GPUs, so
  # its 0.01 on 8 GPUs is 0.00125 here.
  c.loss.uniformity_weight = 0.01

  c.optimizer.base_lr = 1.5e-4
  c.optimizer.warmup_epochs = 200.0

  c.evaluation.every_epochs = 50.0

  if variant == "small":  # Some twenty minutes of one CPU core.
    c.batch_size = 256
    c.num_epochs = 5.0
    c.data.feed = "host"  # The order that the README's figures have.
    c.model.patch_size = 4
    c.model.update(width=96, depth=4, num_heads=3)
    c.model.update(decoder_width=64, decoder_depth=1, decoder_num_heads=4)
    c.optimizer.base_lr = 1e-3
    c.optimizer.warmup_epochs = 0.5
    c.evaluation.every_epochs = 1.0
    c.evaluation.train_images = 10_000
    c.checkpoint.every_steps = 200
  recipe(c)  # Of the linear probe or the fine-tuning, if asked for.
  if variant == "small" and c.task == "linear_probe":
    c.batch_size = 512
    c.num_epochs = 10.0
    c.evaluation.every_epochs = 5.0
    # LARS steps are relative: the peak rate is MAE's, 6.4, at any batch.
    c.optimizer.base_lr = 6.4 * 256 / c.batch_size
    c.optimizer.warmup_epochs = 1.0
    c.data.crop_scale = (0.5, 1.0)
  if variant == "small" and c.task == "finetune":
    c.batch_size = 128
    c.num_epochs = 10.0
    c.optimizer.base_lr = 2e-3
    c.optimizer.warmup_epochs = 1.0
    c.data.crop_scale = (0.5, 1.0)
    c.data.rand_augment = 0.0  # Regularisation is for long runs.
    c.classifier.update(mixup=0.0, cutmix=0.0, random_erasing=0.0)
  if variant == "smoke":  # Checks the wiring only; made images.
    c.batch_size = 32
    c.num_epochs = 1.0
    c.data.name = "made"
    c.model.update(patch_size=4, depth=2, decoder_depth=1)
    c.optimizer.warmup_epochs = 0.5
    c.evaluation.every_epochs = 0.0
    c.log.every_steps = 2
  return c
