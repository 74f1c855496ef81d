r"""U-MAE ViT-B/16 on ImageNet-100, the usual 100 classes of ImageNet-1k.

  python -m umae_jax.main --config=configs/imagenet100.py --workdir=runs/in100
  # A folder with ImageNet's train/ and val/, of which 100 classes are read:
  python -m umae_jax.main --config=configs/imagenet100.py --workdir=runs/in100 \
      --config.data.name=folder --config.data.directory=/data/imagenet \
      --config.data.eval_split=val
  python -m umae_jax.main --workdir=runs/in100_linear \
      --config=configs/imagenet100.py:vit_b16_linear_probe \
      --config.pretrained=runs/in100

Cost:    not measured yet.
Result:  not measured yet; third-party linear probes: MAE 58.0 %, U-MAE 69.5 %.
Source:  zhangq327/U-MAE, pretrain.sh; the class list is that of CMC
         (umae_jax/data/imagenet100.txt).
"""

import ml_collections

from umae_jax import config

VARIANTS = ("vit_b16", "vit_b16_linear_probe", "vit_b16_finetune", "smoke")


def get_config(variant: str = "vit_b16") -> ml_collections.ConfigDict:
  """Returns the config of one variant of VARIANTS."""
  if variant not in VARIANTS:
    raise ValueError(f"variant={variant!r} is not one of {VARIANTS}.")
  variant, recipe = config.split_variant(variant)
  c = config.defaults()
  c.batch_size = 1024
  c.num_epochs = 200.0

  c.data.name = "imagenet2012"
  c.data.classes = "imagenet100"
  c.data.eval_split = "validation"

  # The true gradient. In the released code it is 1/W of this on W GPUs, so
  # its 0.01 on 8 GPUs is 0.00125 here.
  c.loss.uniformity_weight = 0.01

  c.optimizer.base_lr = 1.5e-4
  c.optimizer.warmup_epochs = 40.0

  recipe(c)  # Of the linear probe or the fine-tuning, if asked for.
  if variant == "smoke":  # Checks the wiring only; made images, tiny model.
    c.batch_size = 16
    c.num_epochs = 0.5
    c.data.name = "made"
    c.data.classes = ""
    c.data.eval_split = "test"
    c.data.image_size = (48, 64)
    c.model.update(width=64, depth=2, num_heads=4)
    c.model.update(decoder_width=32, decoder_depth=1, decoder_num_heads=4)
    c.optimizer.warmup_epochs = 0.25
    c.evaluation.every_epochs = 0.0
    c.log.every_steps = 2
  return c
