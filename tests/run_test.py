"""What is checked before a run starts."""

from PIL import Image
import pytest

from umae_jax import UserError, run, workdir
from umae_jax.models import attention
from umae_jax.tasks import inputs


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"data.name": "no_such_set"}, "config.data.name='no_such_set'"),
    ({"data.name": "folder"}, "config.data.directory"),
    (
      {"data.name": "folder", "data.directory": "/no/such/folder"},
      "config.data.directory='/no/such/folder'",
    ),
    ({"data.eval_split": "val"}, "'val' is not a split"),
    ({"batch_size": 2048}, "batch_size=2048 is more than the 1400"),
    ({"model.patch_size": 3}, "multiple of config.model.patch_size=3"),
    ({"loss.mask_ratio": 1.0}, "mask_ratio=1.0 leaves 0 of 16"),
  ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
  load_config, tmp_path, changes, message
):
  c = load_config("digits", "smoke")
  c.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=message):
    run.prepare(c, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_folder_without_images_is_refused(load_config, tmp_path):
  for name in ("cat", "dog"):
    (tmp_path / "data" / name).mkdir(parents=True)
  c = load_config("digits", "smoke")
  c.data.update(name="folder", directory=str(tmp_path / "data"))
  with pytest.raises(UserError, match=r"config\.data\.directory"):
    run.prepare(c, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_folder_may_move_but_not_hold_others(load_config, tmp_path):
  c = load_config("digits", "smoke")
  c.data.update(name="folder", train_split="all", eval_split="all")
  c.batch_size = 8

  def prepare(folder, names):
    (tmp_path / folder).mkdir()
    for number, name in enumerate(names):
      image = Image.new("L", (8, 8), 10 * number)
      image.save(tmp_path / folder / f"{name}.png")
    c.data.directory = str(tmp_path / folder)
    return run.prepare(c, str(tmp_path / "run"))

  first = prepare("a", "abcdefgh")
  workdir.claim(tmp_path / "run", first.identity)
  assert prepare("moved", "abcdefgh").identity == first.identity | {
    "data.directory": str(tmp_path / "moved")
  }
  with pytest.raises(UserError, match=r"files: .* there"):
    prepare("others", "abcdefgx")


@pytest.mark.parametrize("task", ["linear_probe", "finetune"])
def test_images_without_classes_are_not_classified(load_config, tmp_path, task):
  images = tmp_path / "images"
  images.mkdir()
  for number in range(4):
    image = Image.new("L", (8, 8), number)
    image.save(images / f"{number}.png")
  c = load_config("digits", "smoke")
  c.data.update(name="folder", directory=str(images), eval_split="all")
  c.data.update(train_split="all", feed="host")
  c.update(task=task, batch_size=8, pretrained="some")
  with pytest.raises(UserError, match=f"task='{task}' needs two classes"):
    run.prepare(c, str(tmp_path / "run"))


def test_a_resumed_run_keeps_the_attention_that_it_has_measured(
  load_config, tmp_path, monkeypatch
):
  """On a machine that has both kinds, and measures anew at every start."""
  c = load_config("digits", "smoke")
  here = list(attention.IMPLEMENTATIONS)
  monkeypatch.setattr(inputs, "attentions", lambda *unused: here)
  asked = []

  def measure(names):
    def fastest(shape, dtype):
      asked.append((*shape, str(dtype)))
      return names[(len(asked) - 1) % 2]

    monkeypatch.setattr(attention, "fastest", fastest)

  def attention_of(config, directory="run"):
    prepared = run.prepare(config, str(tmp_path / directory))
    assert (
      prepared.identity["execution.attention"] == config.execution.attention
    )
    return prepared.identity["found.attention"], prepared

  measure(["cudnn", "xla"])
  found, first = attention_of(c)
  assert found == "cudnn,xla"
  # (images, tokens, heads, values) on a device: 8 of 16 patches are visible.
  assert asked == [(8, 9, 4, 16, "float32"), (8, 17, 4, 8, "float32")]
  workdir.claim(tmp_path / "run", first.identity)
  measure(["xla", "cudnn"])
  assert attention_of(c)[0] == "cudnn,xla" and len(asked) == 2
  assert attention_of(c, "other")[0] == "xla,cudnn"
  # What is asked for is done, and is not another run.
  c.execution.attention = "xla"
  assert attention_of(c)[0] == "xla"
  c.execution.attention = "xla,cudnn"
  assert attention_of(c)[0] == "xla,cudnn"
  # On another machine, what was recorded can not be had.
  c.execution.attention = "auto"
  here.remove("cudnn")
  assert attention_of(c)[0] == "xla"
