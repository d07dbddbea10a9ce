# SPDX-License-Identifier: Apache-2.0
"""Images to encoder input: the published CLIP preprocessing, or the patch sequence of images at their own resolution.

`normalize_patches` and `pack_items` are also the last steps of the video processor, so both write one layout.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any, Literal, get_args, get_origin

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack

from .configuration_onevision_encoder import PADDING_POSITION

NORMALISATION = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def require_positive(**values: int) -> None:
    """Raise ValueError, with name and value, for the first of the `values` that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def require_choices(schema: type, options: dict[str, Any]) -> None:
    """Check the options whose type in `schema` is `Literal[...] | None`.

    Raises:
        ValueError: for the first that is neither None nor one of its values; the message names them.
    """
    for name, annotation in schema.__annotations__.items():
        choices = [choice for part in get_args(annotation) if get_origin(part) is Literal for choice in get_args(part)]
        if choices and options.get(name) is not None and options[name] not in choices:
            expected = " or ".join(map(repr, choices)) if len(choices) < 3 else f"one of {choices}"
            raise ValueError(f"{name} must be {expected}, got {options[name]!r}.")


# Twins of `patchify` and `grid_positions`, which run traced and on the accelerator; processors work on numpy arrays
# in data-loading workers, and at the positions of chosen time slots. A test holds the twins together.
def cut_patches(image: np.ndarray, patch_size: int) -> np.ndarray:
    """Cut an image `(C, H, W)` into patches `(H/P * W/P, C * P * P)`, row by row, each flattened as `(C, P, P)`."""
    channels, height, width = image.shape
    grid = image.reshape(channels, height // patch_size, patch_size, width // patch_size, patch_size)
    # (C, grid_h, P, grid_w, P) -> (grid_h, grid_w, C, P, P)
    return grid.transpose(1, 3, 0, 2, 4).reshape(-1, channels * patch_size**2)


def grid_of_positions(times: np.ndarray, grid_h: int, grid_w: int) -> np.ndarray:
    """List the positions (t, h, w) of whole frames at the given `times`: `(T * grid_h * grid_w, 3)` int64, sorted."""
    axes = np.meshgrid(np.asarray(times), np.arange(grid_h), np.arange(grid_w), indexing="ij")
    return np.stack(axes, axis=-1).reshape(-1, 3).astype(np.int64)


def normalize_patches(
    patches: np.ndarray,
    patch_size: int,
    *,
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: float | Sequence[float],
    image_std: float | Sequence[float],
) -> np.ndarray:
    """Rescale and normalise patches `(N, C * P * P)`, flattened as `(C, P, P)`, to float32; `image_*` per channel."""
    pixels = patches.reshape(len(patches), -1, patch_size**2).astype(np.float32)  # (N, C, P * P)
    if do_rescale:
        pixels *= np.float32(rescale_factor)
    if do_normalize:
        pixels -= np.asarray(image_mean, np.float32).reshape(-1, 1)
        pixels /= np.asarray(image_std, np.float32).reshape(-1, 1)
    return pixels.reshape(len(patches), -1)


def pack_items(patches: list[np.ndarray], positions: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Pad visual items of different lengths into one patch sequence.

    Args:
        patches: per item `(num_patches, C * P * P)`, normalised.
        positions: per item `(num_patches, 3)`, columns (t, h, w).

    Returns:
        `pixel_values` `(num_items, max_patches, C * P * P)` float32, zeros on padding, and `image_position_ids`
        `(num_items, max_patches, 3)` int64, -1 on padding.
    """
    size = max(len(item) for item in patches)
    pixel_values = np.zeros((len(patches), size, patches[0].shape[1]), np.float32)
    position_ids = np.full((len(patches), size, 3), PADDING_POSITION, np.int64)
    for row, (item, places) in enumerate(zip(patches, positions)):
        pixel_values[row, : len(item)] = item
        position_ids[row, : len(places)] = places
    return {"pixel_values": pixel_values, "image_position_ids": position_ids}


def patch_aligned_size(height: int, width: int, patch_size: int, max_num_patches: int | None) -> tuple[int, int]:
    """Find the size next to an image's own that is whole in patches and within the budget, in pixels.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        patch_size: side of a patch, pixels.
        max_num_patches: most patches allowed, None for any number.

    Returns:
        Height and width, each the nearest multiple of `patch_size`, at least one patch; smaller in proportion if the
        image would take more than `max_num_patches`.
    """
    rows, columns = max(1, round(height / patch_size)), max(1, round(width / patch_size))
    if max_num_patches is not None and rows * columns > max_num_patches:
        scale = sqrt(max_num_patches / (height * width))  # patches per pixel of side, so that the areas agree
        rows = min(max(1, int(height * scale)), max_num_patches)
        columns = min(max(1, int(width * scale)), max_num_patches // rows)
    return rows * patch_size, columns * patch_size


class OneVisionEncoderImageProcessorKwargs(ImagesKwargs, total=False):
    """Options beyond those of every image processor.

    Attributes:
        layout: `"image"` for `(B, C, H, W)`, `"patches"` for the patch sequence.
        patch_size: side of a patch in pixels, for `layout="patches"`.
        max_num_patches: most patches of one image, for `layout="patches"`; None: no limit.
    """

    layout: Literal["image", "patches"] | None
    patch_size: int | None
    max_num_patches: int | None


class OneVisionEncoderImageProcessor(PilBackend):
    """Images to `pixel_values`; works on Pillow and numpy alone.

    `layout="image"` is the published preprocessing: shortest edge to 448, bicubic, centre crop 448 x 448, CLIP mean
    and standard deviation; it returns `pixel_values` `(B, 3, 448, 448)`. `layout="patches"` keeps each image's
    resolution, resized to the nearest whole number of patches, and returns `pixel_values`
    `(num_images, max_patches, 3 * P * P)` with `image_position_ids` `(num_images, max_patches, 3)`; `size` and
    cropping do not apply there.
    """

    valid_kwargs = OneVisionEncoderImageProcessorKwargs
    model_input_names = ["pixel_values", "image_position_ids"]  # noqa: RUF012
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 448}  # noqa: RUF012
    default_to_square = False
    crop_size = {"height": 448, "width": 448}  # noqa: RUF012
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    layout = "image"
    patch_size = 14
    max_num_patches = None

    def __init__(self, **kwargs: Unpack[OneVisionEncoderImageProcessorKwargs]):
        super().__init__(**kwargs)

    def preprocess(self, images: Any, *args, **kwargs: Unpack[OneVisionEncoderImageProcessorKwargs]) -> BatchFeature:
        """Preprocess images; see `OneVisionEncoderImageProcessorKwargs`.

        Raises:
            ValueError: for a layout that does not exist, or an image that must not be resized and is not in patches.
        """
        if kwargs.get("layout") is None:
            kwargs["layout"] = self.layout
        require_choices(self.valid_kwargs, kwargs)
        return super().preprocess(images, *args, **kwargs)

    def _preprocess(
        self,
        images: list[np.ndarray],
        layout: str = "image",
        patch_size: int = 14,
        max_num_patches: int | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Preprocess prepared images, `(C, H, W)` arrays, into the layout asked for."""
        if layout == "image":
            return super()._preprocess(images, return_tensors=return_tensors, **kwargs)
        require_positive(patch_size=patch_size)
        if max_num_patches is not None:
            require_positive(max_num_patches=max_num_patches)
        normalisation = {name: kwargs[name] for name in NORMALISATION}
        patches, positions = [], []
        for image in images:
            pixels = self._resize_to_patches(image, patch_size, max_num_patches, **kwargs)
            grid_h, grid_w = pixels.shape[1] // patch_size, pixels.shape[2] // patch_size
            patches.append(normalize_patches(cut_patches(pixels, patch_size), patch_size, **normalisation))
            positions.append(grid_of_positions([0], grid_h, grid_w))
        return BatchFeature(data=pack_items(patches, positions), tensor_type=return_tensors)

    def _resize_to_patches(
        self,
        image: np.ndarray,
        patch_size: int,
        max_num_patches: int | None,
        do_resize: bool,
        resample: PILImageResampling,
        **kwargs,
    ) -> np.ndarray:
        """Resize one image to whole patches; `(C, H, W)` in and out."""
        height, width = image.shape[1:]
        target = patch_aligned_size(height, width, patch_size, max_num_patches)
        if target != (height, width):
            if not do_resize:
                raise ValueError(
                    f"An image of {height}x{width} pixels is not whole in patches of {patch_size}, or exceeds "
                    f"max_num_patches={max_num_patches}. Leave do_resize on, or resize it to {target[0]}x{target[1]}."
                )
            image = self.resize(image, SizeDict(height=target[0], width=target[1]), resample=resample)
        return image


__all__ = ["OneVisionEncoderImageProcessor"]
