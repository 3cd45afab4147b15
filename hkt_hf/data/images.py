"""Images as sequences: grey CIFAR-10, pixel by pixel (the `Image` task of Long Range Arena, arXiv 2011.04006)."""

from typing import Any

import datasets


IMAGE_SIZE = 32
NUM_PIXELS = IMAGE_SIZE * IMAGE_SIZE
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


def images_to_text(dataset: datasets.Dataset, split: str) -> datasets.Dataset:
    """Turn images into the text that the pixel tokenizer reads.

    Args:
        dataset ([`datasets.Dataset`]): the columns `text`, of 32 by 32 images (either an `Image` feature, which is
            converted to 8-bit luma, or 1024 bytes, row by row), and `label`.
        split (`str`): name of the split, for messages.

    Returns:
        [`datasets.Dataset`]: `text` is now 1024 decimal numbers, 0 to 255, row by row, separated by blanks.

    Raises:
        ValueError: a row is null or of another size.
    """
    return dataset.map(
        _batch_to_text,
        batched=True,
        batch_size=500,
        fn_kwargs={"where": f"the image column of {split}"},
        features=datasets.Features({"text": datasets.Value("string"), "label": dataset.features["label"]}),
        desc=f"Reading the pixels of {split}",
    )


def _batch_to_text(batch: dict[str, list], where: str) -> dict[str, list]:
    return {"text": [" ".join(map(_LEVELS.__getitem__, _pixels(image, where))) for image in batch["text"]]}


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
