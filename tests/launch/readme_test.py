"""The costs that launch/README.md tells follow from the configs."""

import pathlib
import re

import pytest

from umae_jax.benchmark import flops

README = pathlib.Path(__file__).parents[2] / "launch" / "README.md"
IMAGES = {"imagenet1k": 1_281_167, "imagenet100": 126_689, "cifar10": 50_000}
RECIPES = {
  "ImageNet-1k, ViT-B/16, 200 epochs": ("imagenet1k", "vit_b16"),
  "ImageNet-1k, ViT-L/16, 800 epochs": ("imagenet1k", "vit_l16"),
  "ImageNet-1k, ViT-H/14, 800 epochs": ("imagenet1k", "vit_h14"),
  "ImageNet-100, ViT-B/16, 200 epochs": ("imagenet100", "vit_b16"),
  "CIFAR-10, ViT-Ti/2, 2000 epochs": ("cifar10", "vit_ti2"),
  "B/16's linear probe, 90 epochs": ("imagenet1k", "vit_b16_linear_probe"),
  "B/16's fine-tuning, 100 epochs": ("imagenet1k", "vit_b16_finetune"),
}
MFU = 0.4


def flop_per_image(config):
  """Of pretraining; else the encoder's, of whole images, without the head."""
  pretrains = config.task == "pretrain"
  model = config.model
  total = flops.train_flops(
    image_size=tuple(config.data.image_size),
    channels=config.data.channels,
    patch_size=model.patch_size,
    width=model.width,
    depth=model.depth,
    decoder_width=model.decoder_width if pretrains else 0,
    decoder_depth=model.decoder_depth if pretrains else 0,
    mask_ratio=config.loss.mask_ratio if pretrains else 0.0,
  )
  return total / 3 if config.task == "linear_probe" else total  # No backward.


def row(recipe, load_config, peaks):
  """A line of the table, as it has to be."""
  name, variant = RECIPES[recipe]
  config = load_config(name, variant)
  each = flop_per_image(config)
  hours = [
    IMAGES[name] * config.num_epochs * each / (peak * 1e12 * MFU) / 3600
    for peak in peaks
  ]
  cells = [f"{x:.0f}" if x >= 100 else f"{x:.1f}" for x in hours]
  assert f"{config.num_epochs:.0f} epochs" in recipe
  return f"| {recipe} | {each / 1e9:.1f} | {' | '.join(cells)} |"


def test_peaks_are_those_of_the_data_sheets():
  [head] = [x for x in README.read_text().splitlines() if "GFLOP per" in x]
  told = re.findall(r"(A100|H100|TPU v\w+|TPU7x)[^|(]*\((\d+)", head)
  peaks = {name: float(value) * 1e12 for name, value in told}
  assert len(peaks) == 7
  assert peaks.pop("TPU7x") == 2307e12  # docs.cloud.google.com/tpu/docs/tpu7x
  kinds = {"H100": "NVIDIA H100 80GB HBM3", "A100": "NVIDIA A100"}
  for name, peak in peaks.items():
    kind = kinds.get(name, name)
    assert flops.known_peak(kind, "bfloat16") == peak, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_costs_follow_from_the_configs(recipe, load_config):
  peaks = (312, 989, 275, 197, 459, 918, 2307)
  text = README.read_text()
  assert row(recipe, load_config, peaks) in text.splitlines()
