r"""U-MAE on a folder of your own images: with class folders, or without.

  python -m umae_jax.main --config=configs/folder.py --workdir=runs/own \
      --config.data.directory=/data/images
  # What that would be, without training: memory, time, warnings.
  python -m umae_jax.main --config=configs/folder.py --doctor \
      --config.data.directory=/data/images
  # Features of all images, with their files' names, in runs/own_f/features.npz.
  python -m umae_jax.main --config=configs/folder.py --workdir=runs/own_f \
      --config.task=features --config.pretrained=runs/own \
      --config.data.eval_split=all --config.data.directory=/data/images
  # With class folders: probes, fine-tuning.
  python -m umae_jax.main --config=configs/folder.py:tiny_finetune \
      --config.pretrained=runs/own --workdir=runs/own_finetune \
      --config.data.directory=/data/images

Variants: tiny, 64 pixels, for a CPU and hundreds of images; vit_s16 and
vit_b16, 224 pixels, for a GPU and tens of thousands.

Cost:    tiny: 200 photographs, see the README. The others: not measured yet.
Result:  features; the README says what to expect.
Source:  ours; MAE's recipe, its rate and epochs raised for few images.
"""

import ml_collections

from umae_jax import config

MODELS = ("tiny", "vit_s16", "vit_b16")
VARIANTS = (
  *MODELS,
  *(f"{model}_linear_probe" for model in MODELS),
  *(f"{model}_finetune" for model in MODELS),
  "smoke",
)


def get_config(variant: str = "tiny") -> ml_collections.ConfigDict:
  """Returns the config of one variant of VARIANTS."""
  if variant not in VARIANTS:
    raise ValueError(f"variant={variant!r} is not one of {VARIANTS}.")
  variant, recipe = config.split_variant(variant)
  c = config.defaults()
  c.batch_size = 256
  c.num_epochs = 400.0
  c.data.name = "folder"
  c.data.eval_split = "val"  # A tenth of them, unless there is a val/.
  c.optimizer.warmup_epochs = 20.0
  c.evaluation.every_epochs = 50.0

  if variant == "vit_s16":
    c.model.update(config.MODELS["vit_s"])
  if variant in ("tiny", "smoke"):
    c.batch_size = 32
    c.num_epochs = 200.0
    c.data.image_size = (64, 64)
    c.model.patch_size = 8
    c.model.update(width=128, depth=4, num_heads=4)
    c.model.update(decoder_width=64, decoder_depth=2, decoder_num_heads=4)
    c.optimizer.base_lr = 4e-3  # 5e-4 after scaling.
    c.optimizer.warmup_epochs = 20.0
    c.checkpoint.every_steps = 100
    c.log.every_steps = 10
  recipe(c)  # Of the linear probe or the fine-tuning, if asked for.
  if variant == "tiny" and c.task != "pretrain":
    c.batch_size = 32
    c.num_epochs = 30.0
    c.optimizer.warmup_epochs = 3.0
    # LARS steps are relative: the peak rate is MAE's, 6.4, at any batch.
    peak = 6.4 if c.task == "linear_probe" else 1e-3
    c.optimizer.base_lr = peak * 256 / c.batch_size
  if variant == "smoke":  # Checks the wiring only; made images.
    c.num_epochs = 1.0
    c.data.update(name="made", eval_split="test")
    c.optimizer.warmup_epochs = 0.5
    c.evaluation.every_epochs = 0.0
    c.log.every_steps = 2
  return c
