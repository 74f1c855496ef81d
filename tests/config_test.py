import ast
import importlib.util
import inspect
import pathlib

import ml_collections
import pytest

from umae_jax import UserError, validation
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
  if config.task == "linear_probe":
    config.pretrained = "runs/some"
  validation.validate(config, num_devices=8)
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


def readers():
  """The source of all that runs: the package, and of config.py the plan."""
  for path in (REPOSITORY / "umae_jax").rglob("*.py"):
    if path.stem not in ("config", "validation"):
      yield path.read_text()
  yield inspect.getsource(config_lib.plan)


def test_every_key_is_read_somewhere():
  """As `config.key`, `group.key` or `config.group.key`."""
  read = set()
  for source in readers():
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, ast.Attribute):
        owner = node.value
        name = getattr(owner, "attr", getattr(owner, "id", None))
        read.add((name, node.attr))
  for key in config_lib.flatten(config_lib.defaults()):
    group, _, name = key.rpartition(".")
    if group == "model":
      assert name in read_by_name(), key
    else:
      assert (group or "config", name) in read, key


def read_by_name():
  """The keys of config.model are the fields of the model they are given to."""
  from umae_jax import models

  return set(models.MaskedAutoencoder.__dataclass_fields__)


DIGITS = REPOSITORY / "configs" / "digits.py"


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


def test_only_evaluating_has_no_step_whatever_the_batch():
  config = load(DIGITS).get_config("linear_probe")
  assert config_lib.trains(config)
  config.probe.mode = "fast"
  config.batch_size = 4096
  assert config_lib.plan(config, 100).total_steps == 0


@pytest.mark.parametrize(
  "variant, base, recipe",
  [
    ("vit_b16", "vit_b16", None),
    ("vit_b16_finetune", "vit_b16", "finetune"),
    ("small_linear_probe", "small", "linear_probe"),
  ],
)
def test_variants_name_a_recipe(variant, base, recipe):
  got, function = config_lib.split_variant(variant)
  assert got == base
  c = config_lib.defaults()
  function(c)
  assert c.task == (recipe or "pretrain")


def test_unknown_keys_of_a_locked_config_are_refused():
  config = load(DIGITS).get_config()
  config.lock()
  with pytest.raises((KeyError, AttributeError)):
    config.loss.uniformity = 0.1
  assert isinstance(config, ml_collections.ConfigDict)
