"""Images as sequences: grey CIFAR-10, pixel by pixel (the `Image` task of Long Range Arena, arXiv 2011.04006)."""

from typing import Any

import datasets
import numpy as np


IMAGE_SIZE = 32
NUM_PIXELS = IMAGE_SIZE * IMAGE_SIZE
IMAGE_SIZES = [size for size in range(1, IMAGE_SIZE + 1) if IMAGE_SIZE % size == 0]
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

_LEVELS = [str(level) for level in range(256)]


def check_pixel_column(dataset: datasets.Dataset, column: str, split: str) -> None:
    """Check that a column holds what [`images_to_text`] reads.

    Args:
        dataset ([`datasets.Dataset`]): one split.
        column (`str`): name of its image column.
        split (`str`): name of the split, for messages.

    Raises:
        ValueError: the column holds neither images nor bytes, or the first row is not 32 by 32.
    """
    where = f"column {column!r} of {split}"
    feature = dataset.features[column]
    is_bytes = isinstance(feature, datasets.Value) and "binary" in feature.dtype
    if not (is_bytes or isinstance(feature, datasets.Image)):
        raise ValueError(f"{where} must hold images or {NUM_PIXELS} bytes, got {feature}")
    _pixels(dataset[0][column], where)


def images_to_text(dataset: datasets.Dataset, split: str, image_size: int = IMAGE_SIZE) -> datasets.Dataset:
    """Turn images into the text that the pixel tokenizer reads.

    Args:
        dataset ([`datasets.Dataset`]): the columns `text`, of 32 by 32 images (either an `Image` feature, which is
            converted to 8-bit luma, or 1024 bytes, row by row), and perhaps `label`.
        split (`str`): name of the split, for messages.
        image_size (`int`, *optional*, defaults to 32): height and width to shrink to, a divisor of 32: a pixel is the
            mean luma of a square block, rounded to the nearest integer (halves up).

    Returns:
        [`datasets.Dataset`]: `text` is now `image_size**2` decimal numbers, 0 to 255, row by row, separated by blanks.

    Raises:
        ValueError: a row is null or of another size, or `image_size` is not a divisor of 32.
    """
    if not is_image_size(image_size):
        raise ValueError(
            f"`image_size` must be one of {IMAGE_SIZES}, the divisors of {IMAGE_SIZE}, got {image_size!r}"
        )
    return dataset.map(
        _batch_to_text,
        batched=True,
        batch_size=500,
        fn_kwargs={"where": f"the image column of {split}", "image_size": image_size},
        features=datasets.Features({**dataset.features, "text": datasets.Value("string")}),
        desc=f"Reading the pixels of {split}",
    )


def is_image_size(value: Any) -> bool:
    """Whether [`images_to_text`] can shrink to this height and width."""
    return isinstance(value, int) and not isinstance(value, bool) and value in IMAGE_SIZES


def _batch_to_text(batch: dict[str, list], where: str, image_size: int) -> dict[str, list]:
    images = [_pixels(image, where) for image in batch["text"]]
    if image_size != IMAGE_SIZE:
        images = _shrink(images, image_size)
    return {"text": [" ".join(map(_LEVELS.__getitem__, image)) for image in images]}


def _shrink(images: list[bytes], image_size: int) -> list[list[int]]:
    """Means over square blocks of all images at once, in integers: exact, and halves round up."""
    block = IMAGE_SIZE // image_size
    pixels = np.frombuffer(b"".join(images), dtype=np.uint8).reshape(-1, image_size, block, image_size, block)
    sums = pixels.sum(axis=(2, 4), dtype=np.int64)
    return ((sums + block**2 // 2) // block**2).reshape(-1, image_size**2).tolist()


def _pixels(image: Any, where: str) -> bytes:
    """Luma of one image, row by row."""
    if image is None:
        raise ValueError(f"{where} holds a null instead of an image")
    if isinstance(image, bytes):
        if len(image) != NUM_PIXELS:
            raise ValueError(f"{where} must hold {NUM_PIXELS} bytes a row, got {len(image)}")
        return image
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"{where} must hold {IMAGE_SIZE} by {IMAGE_SIZE} images, got {image.size[0]} by {image.size[1]}"
        )
    return image.convert("L").tobytes()
