"""Opening a data set by its name in the config."""

from umae_jax import UserError
from umae_jax.data import arrays, folder
from umae_jax.data.share import Source

# Names that are not TFDS's.
OWN_NAMES = ("digits", "made", "folder")


def open_source(
  name: str,
  split: str,
  *,
  directory: str = "",
  eval_fraction: float = 0.1,
  classes: str = "",
  image_size: tuple[int, int],
  channels: int,
) -> Source:
  """Finds a data set; reads no image.

  Args:
    name: "digits" (scikit-learn), "made" (pictures for smoke tests), "folder"
      (a folder per class), else a TFDS data set such as "cifar10" or
      "imagenet2012:5.*.*".
    split: "train" or "test"; of a folder, see `folder.open_folder`; of TFDS,
      its syntax, such as "train[:10%]".
    directory: of "folder", its path; of TFDS, its data_dir ("" = its default).
    eval_fraction: of a folder that is not split already, the part for
      evaluation, in [0, 1).
    classes: "" for all, "imagenet100", or a file with one class name a line.
    image_size: (H, W) of made images; the others have their own size.
    channels: C of made images.

  Returns:
    The source, for `pipeline`.

  Raises:
    UserError: whatever is wrong with the arguments or the data on disk.
  """
  if classes and name in ("digits", "made"):
    raise UserError(
      f"config.data.classes={classes!r} has no meaning for config.data.name="
      f"{name!r}; leave it ''."
    )
  if name == "digits":
    return arrays.open_digits(split)
  if name == "made":
    return arrays.open_made(split, tuple(image_size), channels)
  if name == "folder":
    return folder.open_folder(
      directory, split, eval_fraction=eval_fraction, classes=classes
    )
  from umae_jax.data import tfds  # Loads TensorFlow.

  return tfds.open_tfds(
    name, split, directory, classes=classes, own_names=OWN_NAMES
  )
