import ast
import importlib.util
import pathlib

import ml_collections
import pytest

from umae_jax import UserError
from umae_jax import config as config_lib

REPOSITORY = pathlib.Path(__file__).parents[1]
FILES = sorted((REPOSITORY / "configs").glob("*.py"))


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


CASES = [(file, variant) for file in FILES for variant in load(file).VARIANTS]


@pytest.mark.parametrize(
  "file, variant", CASES, ids=[f"{f.stem}:{v}" for f, v in CASES]
)
def test_every_config_is_valid_and_has_every_key(file, variant):
  config = load(file).get_config(variant)
  config_lib.validate(config, num_devices=8)
  assert set(config_lib.flatten(config)) == set(
    config_lib.flatten(config_lib.defaults())
  )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_says_what_it_is(file):
  docstring = ast.get_docstring(ast.parse(file.read_text()))
  for word in (f"--config=configs/{file.name}", "Cost:", "Result:", "Source:"):
    assert word in docstring
  with pytest.raises(ValueError, match="variant='other' is not one of"):
    load(file).get_config("other")


def test_every_key_is_read_somewhere():
  """As `....group.key` or config["key"] outside of the defaults' own file."""
  read = set()
  for path in (REPOSITORY / "umae_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        read.add(node.attr)
  model_fields = read_by_name()
  for key in config_lib.flatten(config_lib.defaults()):
    group, _, name = key.rpartition(".")
    assert name in (model_fields if group == "model" else read), key


def read_by_name():
  """The keys of config.model are the fields of the model they are given to."""
  from umae_jax import models

  return set(models.MaskedAutoencoder.__dataclass_fields__)


DIGITS = REPOSITORY / "configs" / "digits.py"


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("task", "train", "config.task='train' is not a task"),
    ("batch_size", 100, r"batch_size=100 \(global\).*multiple of 16"),
    ("batch_size", 0, "batch_size=0 must be greater than 0"),
    ("micro_batches", 3, "micro_batches=3; use a multiple of 48"),
    ("seed", -1, "seed=-1 must be 0 or more"),
    ("mesh.fsdp", 5, r"mesh.fsdp=5 .*\[1, 2, 4, 8, 16\]"),
    ("data.image_size", (9, 8), r"\(9, 8\) .*patch_size=2.* 8 and 10"),
    ("data.image_size", (8,), "needs 2 numbers, height and width"),
    ("data.mean", (0.5, 0.5), "mean=.* needs 1 numbers, one per channel"),
    ("data.std", (0.0,), "std=.* must be greater than 0"),
    ("data.channels", 4, "data.mean=.* needs 4 numbers"),
    ("data.crop_scale", (0.5, 1.5), r"crop_scale=.*\(0, 1\]"),
    ("data.eval_fraction", 1.0, r"eval_fraction=1.0 .*\(0, 1\)"),
    ("model.width", 66, "width=66 .*num_heads=4; use a multiple of 4"),
    ("model.decoder_num_heads", 3, "decoder_width=32 .*decoder_num_heads=3"),
    ("model.dtype", "float16", "dtype='float16' is not one of"),
    ("loss.mask_ratio", 0.0, "mask_ratio=0.0 leaves 16 of 16"),
    ("loss.mask_ratio", 0.95, "mask_ratio=0.95 leaves 0 of 16"),
    ("loss.uniformity_weight", float("nan"), "uniformity_weight=nan"),
    ("optimizer.b2", 1.0, r"b2=1.0 must lie in \[0, 1\)"),
    ("optimizer.warmup_epochs", 300.0, "warmup_epochs=300.0 is longer"),
    ("optimizer.base_lr", -1.0, "base_lr=-1.0 must be greater than 0"),
  ],
)
def test_bad_value_is_named_with_its_remedy(key, value, message):
  config = load(DIGITS).get_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=message):
    config_lib.validate(config, num_devices=16)


def test_a_width_that_cannot_hold_positions_is_named():
  config = load(DIGITS).get_config()
  config.model.update(width=66, num_heads=3)
  with pytest.raises(UserError, match=r"model.width=66 .*multiple of 4"):
    config_lib.validate(config, num_devices=1)


def test_a_patch_of_one_value_cannot_be_normalised():
  config = load(DIGITS).get_config()
  config.model.patch_size = 1
  config_lib.validate(config, num_devices=1)
  config.loss.normalize_pixels = True
  with pytest.raises(UserError, match="two values or more"):
    config_lib.validate(config, num_devices=1)


def test_plan_of_the_papers_recipe():
  config = load(REPOSITORY / "configs" / "imagenet1k.py").get_config()
  plan = config_lib.plan(config, 1_281_167)
  assert plan.steps_per_epoch == 1251
  assert plan.total_steps == 250_200
  assert plan.warmup_steps == 50_040
  assert plan.evaluate_every == 12_510
  assert plan.learning_rate == pytest.approx(6e-4)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"batch_size": 2048}, "batch_size=2048 is more than the 1400 training"),
    ({"num_epochs": 0.01}, "num_epochs=0.01 is no step at all"),
  ],
)
def test_a_plan_without_a_step_is_refused(changes, message):
  config = load(DIGITS).get_config()
  config.update(changes)
  with pytest.raises(UserError, match=message):
    config_lib.plan(config, 1400)


def test_unknown_keys_of_a_locked_config_are_refused():
  config = load(DIGITS).get_config()
  config.lock()
  with pytest.raises((KeyError, AttributeError)):
    config.loss.uniformity = 0.1
  assert isinstance(config, ml_collections.ConfigDict)
