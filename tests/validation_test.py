import pytest

from umae_jax import UserError, validation


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("task", "train", "config.task='train' is not one of 'pretrain', 'linear"),
    ("task", "linear_probe", "needs an encoder: set --config.pretrained to"),
    ("task", "features", "needs an encoder: set --config.pretrained to"),
    ("pretrained", "a.pth", "'a.pth' has no use in config.task='pretrain'"),
    ("num_epochs", 0.0, "num_epochs=0 must be greater than 0; only"),
    ("probe.mode", "slow", "probe.mode='slow' is not one of 'train', 'fast'"),
    ("probe.learning_rates", (), r"learning_rates=\(\) must hold one number"),
    ("probe.weight_decays", (-1.0,), r"weight_decays=\(-1.0,\) .* 0 or more"),
    ("probe.shots", (1.5,), r"shots=\(1.5,\) must be positive integers"),
    ("classifier.pool", "max", "pool='max' is not one of 'mean', 'cls'"),
    ("classifier.drop_path", 1.0, r"drop_path=1.0 must lie in \[0, 1\)"),
    ("classifier.random_erasing", 1.5, "random_erasing=1.5 must be at most 1"),
    ("data.rand_augment", 11.0, r"rand_augment=11.0 must lie in \[0, 10\]"),
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
    (
      "data.feed",
      "disk",
      "feed='disk' is not one of 'host', 'device_crop', 'm",
    ),
    ("data.feed", "device_crop", "crops at random: set config.data.crop_scale"),
    ("data.eval_fraction", 1.0, r"eval_fraction=1.0 .*\(0, 1\)"),
    ("model.width", 66, "width=66 .*num_heads=4; use a multiple of 4"),
    ("model.decoder_num_heads", 3, "decoder_width=32 .*decoder_num_heads=3"),
    ("model.dtype", "float16", "dtype='float16' is not one of 'auto'"),
    ("loss.mask_ratio", 0.0, "mask_ratio=0.0 leaves 16 of 16"),
    ("loss.mask_ratio", 0.95, "mask_ratio=0.95 leaves 0 of 16"),
    ("loss.uniformity_weight", float("nan"), "uniformity_weight=nan"),
    ("optimizer.b2", 1.0, r"b2=1.0 must lie in \[0, 1\)"),
    ("optimizer.warmup_epochs", 301.0, "warmup_epochs=301.0 is longer"),
    ("optimizer.base_lr", -1.0, "base_lr=-1.0 must be greater than 0"),
  ],
)
def test_bad_value_is_named_with_its_remedy(load_config, key, value, message):
  config = load_config("digits")
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=message):
    validation.validate(config, num_devices=16)


def test_a_width_that_cannot_hold_positions_is_named(load_config):
  config = load_config("digits")
  config.model.update(width=66, num_heads=3)
  with pytest.raises(UserError, match=r"model.width=66 .*multiple of 4"):
    validation.validate(config, num_devices=1)


def test_a_patch_of_one_value_cannot_be_normalised(load_config):
  config = load_config("digits")
  config.model.patch_size = 1
  validation.validate(config, num_devices=1)
  config.loss.normalize_pixels = True
  with pytest.raises(UserError, match="two values or more"):
    validation.validate(config, num_devices=1)


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("batch_size", "64", "batch_size='64' must be of type int, like 1024"),
    ("batch_size", 64.0, "batch_size=64.0 must be of type int"),
    ("data.flip", 1, "flip=1 must be of type bool, like True"),
    ("seed", True, "seed=True must be of type int"),
    ("data.mean", 0.5, "mean=0.5 must be of type list"),
    ("loss.unif", 0.5, "config.loss.unif is not a key"),
  ],
)
def test_keys_and_types_are_those_of_the_defaults(
  load_config, key, value, message
):
  config = load_config("digits")
  with config.ignore_type():
    config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=message):
    validation.validate(config, num_devices=1)


def test_a_missing_key_is_named(load_config):
  config = load_config("digits")
  del config.loss.mask_ratio
  with pytest.raises(UserError, match=r"config.loss.mask_ratio is missing"):
    validation.validate(config, num_devices=1)


def test_an_integer_will_do_for_a_float(load_config):
  config = load_config("digits")
  config.num_epochs = 100
  validation.validate(config, num_devices=1)


def test_fine_tuning_may_only_evaluate(load_config):
  config = load_config("digits", "finetune")
  config.num_epochs = 0.0
  with pytest.raises(UserError, match=r"with config\.pretrained may evaluate"):
    validation.validate(config, num_devices=1)
  config.pretrained = "runs/finetuned"
  validation.validate(config, num_devices=1)


@pytest.mark.parametrize("feed", ["device_crop", "memory"])
def test_rand_augment_needs_the_host(load_config, feed):
  config = load_config("imagenet1k", "vit_b16_finetune")
  validation.validate(config, num_devices=1)
  config.data.feed = feed
  message = rf"rand_augment=9.0 .*feed='host' instead of '{feed}'"
  with pytest.raises(UserError, match=message):
    validation.validate(config, num_devices=1)
  config.data.rand_augment = 0.0
  validation.validate(config, num_devices=1)


def test_mask_ratio_matters_to_pretraining_alone(load_config):
  config = load_config("digits", "finetune")
  config.loss.mask_ratio = 0.99
  validation.validate(config, num_devices=1)
