import jax
import pytest

from umae_jax import UserError, convert, doctor, run, workdir
from umae_jax.tasks import pretrain


@pytest.fixture
def examine(capsys):
  """Returns config -> (whether it would start, {what: value}, notes)."""

  def examine(config, workdir=None):
    would_start = doctor.examine(config, workdir)
    table, *notes = capsys.readouterr().out.split("\n\n")
    rows = [line.split("  ", 1) for line in table.splitlines()[2:]]
    return would_start, {k: v.strip() for k, v in rows}, " ".join(notes)

  return examine


def test_a_run_that_would_start(load_config, examine, tmp_path):
  config = load_config("digits")
  would_start, found, notes = examine(config, str(tmp_path / "run"))
  assert would_start and "It would start" in notes and "Note" not in notes
  assert not (tmp_path / "run").exists()
  assert found["patches"] == "16 = 4 x 4, of 2 x 2 pixels, 4 values"
  assert found["encoder"] == "9 tokens, width 64, depth 4, 4 heads"
  assert found["decoder"] == "17 tokens, width 32, depth 2, 4 heads"
  prepared = run.prepare(config, str(tmp_path / "run"))
  params = jax.eval_shape(prepared.task.init, jax.random.key(0))
  count = sum(x.size for x in jax.tree.leaves(params))
  assert found["parameters"] == f"{count:,}"
  assert found["learning rate, peak"].startswith("0.001 = 0.002 x 128 / 256")
  assert found["lambda"].startswith("0.01,")
  assert found["lambda, released code"].startswith("0.08 on its 8 GPUs")
  assert found["images to train on"] == "1,400 of 10 classes"
  assert found["steps"] == "2,500 (10 an epoch)"
  assert found["of which warm-up"] == "200"
  assert "time of the steps, about" in found


@pytest.mark.parametrize(
  "changes, note",
  [
    ({"loss.uniformity_weight": 0.0}, "is plain MAE"),
    ({"batch_size": 32}, "uniformity loss stays above 1/32"),
    ({"loss.mask_ratio": 0.9}, "leaves 1 of 16 patches"),
    ({"loss.normalize_pixels": True}, "of 4 values a patch"),
    ({"optimizer.base_lr": 1.0}, "is 0.5 after scaling"),
    ({"model.width": 16384, "model.depth": 16}, "may not fit into"),
    ({"execution.remat": "dots"}, "saves no memory on CPUs"),
    ({"num_epochs": 30.0}, "300 steps are few"),
  ],
)
def test_what_looks_wrong_is_noted(load_config, examine, changes, note):
  config = load_config("digits")
  config.update_from_flattened_dict(changes)
  would_start, _, notes = examine(config)
  assert would_start and note in notes


def test_without_data_the_sizes_are_told(load_config, examine):
  config = load_config("folder", "vit_b16")
  config.data.directory = "/no/such/folder"
  would_start, found, notes = examine(config)
  assert not would_start
  assert "would not start: config.data.directory='/no/such/folder'" in notes
  assert found["parameters"] == "111,655,680"
  assert found["FLOP per image"] == "58.46 G"
  assert "steps" not in found


def test_other_tasks(load_config, examine):
  config = load_config("digits", "finetune")
  _, found, _ = examine(config)
  assert found["encoder"].startswith("17 tokens") and "decoder" not in found
  assert "lambda" not in found and "parameters, head" in found
  # Three passes over 16 patches and the class token, by hand.
  block = 12 * 17 * 64**2 + 2 * 17**2 * 64
  flop = 3 * 2 * (16 * 4 * 64 + 4 * block)
  assert found["FLOP per image"] == f"{flop / 1e9:.4g} G"
  config = load_config("digits", "linear_probe")
  config.pretrained = "/no/such.pth"
  would_start, found, notes = examine(config)
  assert not would_start and "/no/such.pth" in notes
  assert "parameters" not in found


@pytest.mark.parametrize("variant", ["linear_probe", "finetune"])
def test_a_task_with_weights(load_config, examine, tmp_path, variant):
  pretraining = run.prepare(load_config("digits"), str(tmp_path / "unused"))
  params = pretraining.task.init(jax.random.key(0))
  model = pretrain.make_model(pretraining.config, pretraining.mesh)
  convert.save(tmp_path / "weights", model, params)
  config = load_config("digits", variant)
  config.pretrained = str(tmp_path / "weights")
  would_start, found, notes = examine(config)
  assert would_start, notes
  assert "memory: kept for the gradient" in found


def test_another_configuration_is_examined_as_it_would_start(
  load_config, examine, tmp_path
):
  config = load_config("digits")
  prepared = run.prepare(config, str(tmp_path))
  workdir.claim(tmp_path, prepared.identity)
  config.loss.mask_ratio = 0.6
  would_start, _, notes = examine(config, str(tmp_path))
  assert not would_start and "loss.mask_ratio: 0.5 there" in notes
  assert doctor.examine(config, str(tmp_path), allow_config_change=True)


def test_a_wrong_configuration_is_refused(load_config):
  config = load_config("digits")
  config.model.patch_size = 3
  with pytest.raises(UserError, match="patch_size=3"):
    doctor.examine(config, None)
