import pytest

from umae_jax.benchmark import flops

DECODER = dict(decoder_width=512, decoder_depth=8)


@pytest.mark.parametrize(
  "patch_size, width, depth, giga",
  [(16, 768, 12, 58.46), (16, 1024, 24, 124.23), (14, 1280, 32, 290.99)],
)
def test_figures_of_the_published_models(patch_size, width, depth, giga):
  got = flops.train_flops(
    image_size=(224, 224),
    channels=3,
    patch_size=patch_size,
    width=width,
    depth=depth,
    mask_ratio=0.75,
    **DECODER,
  )
  assert got / 1e9 == pytest.approx(giga, abs=5e-3)


def test_a_model_small_enough_to_count_by_hand():
  # L = 8, P = 4, K = 4; block(n, d) at mlp_ratio 2: 8 n d^2 + 2 n^2 d.
  got = flops.train_flops(
    image_size=(4, 8),
    channels=1,
    patch_size=2,
    width=3,
    depth=1,
    decoder_width=2,
    decoder_depth=2,
    mask_ratio=0.5,
    mlp_ratio=2.0,
  )
  encoder = 8 * 5 * 9 + 2 * 25 * 3
  decoder = 5 * 3 * 2 + 2 * (8 * 9 * 4 + 2 * 81 * 2) + 9 * 2 * 4
  assert got == 2 * (3 * (encoder + decoder) + 2 * 8 * 4 * 3)


def test_peaks_are_of_bfloat16_and_of_known_devices():
  assert flops.known_peak("NVIDIA H200", "bfloat16") == 989e12
  assert flops.known_peak("TPU v5 lite", "bfloat16") == 197e12
  assert flops.known_peak("TPU v5", "bfloat16") == 459e12
  assert flops.known_peak("NVIDIA H200", "float32") is None
  assert flops.known_peak("cpu", "bfloat16") is None


def test_encoding_a_whole_image_is_as_published():
  """ViT-B/16 of 224 pixels: 17.6 billion multiplications and additions."""
  got = flops.encode_flops(
    image_size=(224, 224), channels=3, patch_size=16, width=768, depth=12
  )
  assert got / 2e9 == pytest.approx(17.56, abs=0.05)
