r"""U-MAE on ImageNet-1k: the paper's main setting.

  python -m umae_jax.main --config=configs/imagenet1k.py --workdir=runs/vit_b16
  python -m umae_jax.main --config=configs/imagenet1k.py:vit_l16 \
      --workdir=runs/vit_l16
  # A folder with train/ and val/, each of class folders, instead of TFDS:
  python -m umae_jax.main --config=configs/imagenet1k.py --workdir=runs/b16 \
      --config.data.name=folder --config.data.directory=/data/imagenet \
      --config.data.eval_split=val
  # Its evaluation, with MAE's recipes; or the weights that Meta published.
  python -m umae_jax.main --config=configs/imagenet1k.py:vit_b16_linear_probe \
      --config.pretrained=runs/vit_b16 --workdir=runs/vit_b16_linear
  python -m umae_jax.main --config=configs/imagenet1k.py:vit_b16_finetune \
      --config.pretrained=mae_pretrain_vit_base.pth --workdir=runs/vit_b16_fine

Cost:    not measured yet.
Result:  not measured yet; the paper's linear probe of ViT-B/16 is 58.5 %.
Source:  zhangq327/U-MAE, pretrain.sh (its README says 20 warm-up epochs);
         vit_l16: 800 epochs of batch 4,096; vit_h14: MAE's widths, likewise.

TFDS needs ImageNet's archives, downloaded by hand, in its
`downloads/manual` folder: see https://www.tensorflow.org/datasets/catalog.
"""

import ml_collections

from umae_jax import config

MODELS = ("vit_b16", "vit_l16", "vit_h14")
VARIANTS = (
  *MODELS,
  *(f"{model}_linear_probe" for model in MODELS),
  *(f"{model}_finetune" for model in MODELS),
  "smoke",
)


def get_config(variant: str = "vit_b16") -> ml_collections.ConfigDict:
  """Returns the config of one variant of VARIANTS."""
  if variant not in VARIANTS:
    raise ValueError(f"variant={variant!r} is not one of {VARIANTS}.")
  variant, recipe = config.split_variant(variant)
  c = config.defaults()
  c.batch_size = 1024
  c.num_epochs = 200.0

  c.data.name = "imagenet2012"
  c.data.eval_split = "validation"
  c.data.image_size = (224, 224)
  c.data.crop_scale = (0.2, 1.0)
  c.data.flip = True

  c.model.patch_size = 16
  c.model.update(config.MODELS["vit_b"])

  c.loss.normalize_pixels = True
  # The true gradient. In the released code it is 1/W of this on W GPUs, so
  # its 0.01 on 8 GPUs is 0.00125 here.
  c.loss.uniformity_weight = 0.01

  c.optimizer.base_lr = 1.5e-4
  c.optimizer.warmup_epochs = 40.0

  if variant in ("vit_l16", "vit_h14"):
    c.batch_size = 4096
    c.num_epochs = 800.0
    c.model.update(config.MODELS[variant[:5]])
  if variant == "vit_h14":
    c.model.patch_size = 14
  recipe(c)  # Of the linear probe or the fine-tuning, if asked for.
  if variant == "smoke":  # Checks the wiring only; made images, tiny model.
    c.batch_size = 16
    c.num_epochs = 0.5
    c.data.name = "made"
    c.data.eval_split = "test"
    c.data.image_size = (64, 64)
    c.model.update(width=64, depth=2, num_heads=4)
    c.model.update(decoder_width=32, decoder_depth=1, decoder_num_heads=4)
    c.optimizer.warmup_epochs = 0.25
    c.evaluation.every_epochs = 0.0
    c.log.every_steps = 2
  return c
