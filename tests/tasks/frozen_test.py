import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umae_jax import UserError, loop, models, train_step
from umae_jax import run as run_lib
from umae_jax.data import sources
from umae_jax.tasks import frozen, inputs


def run(task, mesh):
  state = train_step.init_state(
    *(task.init, task.optimizer, jax.random.key(0), mesh),
    *(task.objective.frozen, task.given),
  )
  return task.evaluate(state.params)


def written(evaluation, name):
  file = io.BytesIO()
  evaluation.files[name](file)
  file.seek(0)
  return file


@pytest.mark.parametrize("feature", ["cls", "mean"])
def test_features_are_those_of_the_model(config, make_task, feature):
  config.task, config.probe.feature = "features", feature
  config.evaluation.test_images = 50  # Not a multiple of anything.
  task, mesh = make_task(frozen.make_features, config)
  evaluation = run(task, mesh)
  assert evaluation.scalars["images"] == 50
  found = np.load(written(evaluation, "features.npz"))
  model = models.MaskedAutoencoder(
    *(8, 32, 2, 4), decoder_width=24, decoder_depth=2, decoder_num_heads=3
  )
  source = sources.open_source("made", "test", image_size=(32, 32), channels=3)
  images = jnp.asarray(source.load())
  x = inputs.normalize(images, config.data.mean, config.data.std)
  tokens = jax.jit(
    lambda x: model.apply({"params": task.given}, x, method=model.encode)
  )(x)
  expected = inputs.pool(tokens, feature)
  # The 50 are of a fixed permutation: each is the feature of its own image.
  distance = np.abs(found["features"][:, None] - expected[None]).max(-1)
  nearest = distance.argmin(1)
  assert distance.min(1).max() < 1e-4
  assert len(set(nearest.tolist())) == 50
  np.testing.assert_array_equal(found["labels"], source.labels[nearest])
  assert found["class_names"].tolist() == list(source.class_names)
  names = [source.name_of(i) for i in nearest.tolist()]
  assert found["names"].tolist() == names


def test_fast_probes_report_every_figure(config, make_task):
  config.probe.mode = "fast"
  config.probe.shots = (2, 100)
  task, mesh = make_task(frozen.make_probes, config)
  evaluation = run(task, mesh)
  assert {
    "top1_accuracy",
    "top5_accuracy",
    "linear_accuracy",
    "knn_accuracy",
    "few_shot_2_accuracy",
    "few_shot_2_deviation",
    "effective_rank",
  } <= evaluation.scalars.keys()
  assert all(np.isfinite(x) for x in evaluation.scalars.values())
  assert 0.1 < evaluation.scalars["top1_accuracy"] <= 1  # Above chance.
  assert evaluation.scalars["fast_linear_learning_rate"] in (
    config.probe.learning_rates
  )
  # What could not be done is said.
  assert "few_shot_100_accuracy" not in evaluation.scalars
  assert "config.probe.shots: shots=100 images" in evaluation.table


def test_figures_do_not_depend_on_the_devices(config, make_task):
  config.probe.update(mode="fast", shots=(2,))
  eight = run(*make_task(frozen.make_probes, config)).scalars
  one = run(*make_task(frozen.make_probes, config, num_devices=1)).scalars
  for key, value in eight.items():
    np.testing.assert_allclose(one[key], value, rtol=1e-4, err_msg=key)


def test_the_sweep_has_a_row_for_every_recipe(config, make_task):
  config.probe.update(mode="sweep", learning_rates=(0.1, 1.0), epochs=(1, 2))
  config.probe.batch_sizes = (32, 64)
  task, mesh = make_task(frozen.make_probes, config)
  evaluation = run(task, mesh)
  lines = written(evaluation, "sweep.csv").getvalue().decode().splitlines()
  assert lines[0].split(",")[:3] == ["feature", "normalization", "epochs"]
  assert len(lines) - 1 == evaluation.scalars["recipes"] == 2 * 3 * 2 * 2 * 2
  accuracies = [float(line.split(",")[-1]) for line in lines[1:]]
  np.testing.assert_allclose(
    max(accuracies), evaluation.scalars["highest_accuracy"], atol=1e-4
  )
  assert "standardize" in evaluation.table


def test_a_finished_evaluation_is_that_of_its_configuration(config, tmp_path):
  """The same again says so; another one is refused, or evaluated."""
  config.task = "features"
  assert loop.train(run_lib.prepare(config, str(tmp_path)))
  first = (tmp_path / "features.npz").stat().st_mtime_ns
  assert loop.train(run_lib.prepare(config, str(tmp_path)))
  assert (tmp_path / "features.npz").stat().st_mtime_ns == first
  config.probe.feature = "mean"
  with pytest.raises(UserError, match="feature: 'cls' there, 'mean' now"):
    run_lib.prepare(config, str(tmp_path))
  changed = run_lib.prepare(config, str(tmp_path), allow_config_change=True)
  assert loop.train(changed)
  assert (tmp_path / "features.npz").stat().st_mtime_ns != first
  config.task = "linear_probe"
  with pytest.raises(UserError, match="holds a run of another task"):
    run_lib.prepare(config, str(tmp_path), allow_config_change=True)


def test_another_encoder_than_configured_is_refused(config, make_task):
  config.model.update(depth=3, width=64)
  with pytest.raises(ValueError, match=r"model.width=64, there 32; .*depth=3"):
    make_task(frozen.make_probes, config)
