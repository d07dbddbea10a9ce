# SPDX-License-Identifier: Apache-2.0
"""Inputs of the encoder: the checks at the public boundary, and images and frames cut into patches with positions.

Shape checks cost nothing and always run. Value checks read CPU tensors only, where reading needs no device sync;
`read_lengths` reads patch sequences on every device, because their lengths have to reach the host in any case.
"""

import torch

from .configuration_onevision_encoder import PADDING_POSITION, OneVisionEncoderConfig


def patchify(frames: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut frames into patches.

    Args:
        frames: `(B, C, T, H, W)`, H and W multiples of `patch_size`.
        patch_size: side of a patch in pixels.

    Returns:
        `(B, T * H/P * W/P, C * P * P)`, tokens in `(t, h, w)` order, each patch flattened as `(C, P, P)`.
    """
    batch, channels, num_frames, height, width = frames.shape
    grid_h, grid_w = height // patch_size, width // patch_size
    cut = frames.reshape(batch, channels, num_frames, grid_h, patch_size, grid_w, patch_size)
    # (B, C, T, grid_h, P, grid_w, P) -> (B, T, grid_h, grid_w, C, P, P)
    cut = cut.permute(0, 2, 3, 5, 1, 4, 6)
    return cut.reshape(batch, num_frames * grid_h * grid_w, channels * patch_size**2)


def grid_positions(indices: torch.Tensor, grid_h: int, grid_w: int) -> torch.Tensor:
    """Turn flat indices `(t * grid_h + h) * grid_w + w`, `(B, S)`, into positions (t, h, w), `(B, S, 3)`."""
    time, place = indices // (grid_h * grid_w), indices % (grid_h * grid_w)
    return torch.stack((time, place // grid_w, place % grid_w), dim=-1)


def tokens_from_frames(
    frames: torch.Tensor,
    visible_indices: torch.Tensor | None,
    patch_positions: torch.Tensor | None,
    patch_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut frames into the tokens that stay, with their positions.

    `visible_indices` of another length than the number of patches selects patches; of the same length it selects
    nothing and moves nothing, it only says which grid place each patch stands for. `patch_positions` overrides the
    places in both cases.

    Args:
        frames: `(B, C, T, H, W)`.
        visible_indices: `(B or 1, S)` flat grid indices, or None for all patches in order.
        patch_positions: `(B or 1, S, 3)` positions (t, h, w) of the patches that stay, or None for the grid's.
        patch_size: side of a patch in pixels.

    Returns:
        Patches `(B, S, C * P * P)` and positions `(B or 1, S, 3)`.
    """
    patches = patchify(frames, patch_size)
    if visible_indices is None:
        indices = torch.arange(patches.shape[1], device=frames.device)[None]
    else:
        indices = visible_indices.to(frames.device, torch.long)
    if indices.shape[1] != patches.shape[1]:
        selected = indices.expand(patches.shape[0], -1)[..., None].expand(-1, -1, patches.shape[-1])
        patches = patches.gather(1, selected)
    if patch_positions is None:
        return patches, grid_positions(indices, frames.shape[-2] // patch_size, frames.shape[-1] // patch_size)
    return patches, patch_positions.to(frames.device)


def read_lengths(pixel_values: torch.Tensor, position_ids: torch.Tensor, valid: torch.Tensor) -> list[int]:
    """Count the patches of each item and check the values of a patch sequence; one device-to-host copy.

    Args:
        pixel_values: `(num_items, max_patches, C * P * P)`.
        position_ids: `(num_items, max_patches, 3)`.
        valid: `(num_items, max_patches)` bool, all three coordinates are >= 0.

    Returns:
        Patches per item.

    Raises:
        ValueError: for rows that are neither a position nor -1, for items without patches, for NaN or infinite pixels.
    """
    is_mixed = ~(valid | (position_ids == PADDING_POSITION).all(-1))
    is_broken = valid & ~torch.isfinite(pixel_values).all(-1)
    report = torch.cat((valid.sum(-1), is_mixed.sum()[None], is_broken.sum()[None]))
    *lengths, num_mixed, num_broken = report.tolist()
    if num_mixed:
        raise ValueError(
            f"image_position_ids of shape {tuple(position_ids.shape)} has {num_mixed} rows that are neither a "
            "position (t, h, w >= 0) nor padding (-1, -1, -1). Set all three columns of a padded row to -1."
        )
    if min(lengths) == 0:
        raise ValueError(
            f"Item {lengths.index(0)} of image_position_ids with shape {tuple(position_ids.shape)} holds no patch, "
            "all its rows are padding. Drop the item."
        )
    if num_broken:
        raise ValueError(
            f"pixel_values of shape {tuple(pixel_values.shape)} has NaN or infinite values in {num_broken} patches. "
            "Check the decoding and the normalisation that made them."
        )
    return lengths


def check_shapes(pixel_values: torch.Tensor, config: OneVisionEncoderConfig) -> None:
    """Check rank, dtype and sizes of `pixel_values`; no value is read."""
    shape, patch, channels = tuple(pixel_values.shape), config.patch_size, config.num_channels
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"Expected floating-point pixel_values, got {pixel_values.dtype} of shape {shape}. Rescale and normalise "
            "them first, as the image and video processors do."
        )
    if pixel_values.ndim not in (3, 4, 5) or 0 in shape:
        raise ValueError(
            "Expected non-empty pixel_values of shape (B, C, H, W), (B, C, T, H, W) or (num_items, max_patches, "
            f"C*P*P), got {shape}."
        )
    if pixel_values.ndim == 3:
        if shape[-1] != channels * patch**2:
            raise ValueError(
                f"Expected patches of {channels}*{patch}*{patch} = {channels * patch**2} values in the last dimension "
                f"of 3-D pixel_values, got shape {shape}. Cut them with patch_size={patch}; add a batch dimension to "
                "a single image."
            )
        return
    if shape[1] != channels:
        raise ValueError(f"Expected {channels} channels in dimension 1 of pixel_values, got shape {shape}.")
    if shape[-2] % patch or shape[-1] % patch:
        raise ValueError(
            f"Expected height and width of pixel_values to be multiples of patch_size={patch}, got shape {shape}. "
            "Resize or crop first."
        )


def check_sequence(pixel_values: torch.Tensor, image_position_ids: torch.Tensor | None) -> None:
    """Check that a patch sequence comes with matching integer positions."""
    if image_position_ids is None:
        raise ValueError(
            f"pixel_values of shape {tuple(pixel_values.shape)} is a patch sequence and needs image_position_ids of "
            f"shape {(*pixel_values.shape[:2], 3)}, columns (t, h, w), -1 on padding."
        )
    if image_position_ids.shape != (*pixel_values.shape[:2], 3):
        raise ValueError(
            f"Expected image_position_ids of shape {(*pixel_values.shape[:2], 3)} for pixel_values of shape "
            f"{tuple(pixel_values.shape)}, got {tuple(image_position_ids.shape)}."
        )
    if image_position_ids.is_floating_point() or image_position_ids.dtype == torch.bool:
        raise ValueError(f"Expected integer image_position_ids, got {image_position_ids.dtype}.")


def check_frames(
    pixel_values: torch.Tensor,
    visible_indices: torch.Tensor | None,
    patch_positions: torch.Tensor | None,
    config: OneVisionEncoderConfig,
) -> None:
    """Check that the arguments of a 4-D or 5-D input fit each other; reads values of CPU tensors only."""
    shape, patch = tuple(pixel_values.shape), config.patch_size
    num_frames = shape[2] if len(shape) == 5 else 1
    patches_per_frame = (shape[-2] // patch) * (shape[-1] // patch)
    num_patches = num_frames * patches_per_frame
    num_slots = num_frames if len(shape) == 4 or config.rope_temporal_size is None else config.rope_temporal_size
    if _readable(pixel_values) and not torch.isfinite(pixel_values).all():
        raise ValueError(
            f"pixel_values of shape {shape} has NaN or infinite values. Check the decoding and the normalisation."
        )
    if visible_indices is None and patch_positions is None and num_frames > num_slots:
        raise ValueError(
            f"pixel_values of shape {shape} has {num_frames} frames, more than the {num_slots} time slots of "
            "rope_temporal_size. Pass patch_positions, or set rope_temporal_size=None."
        )
    num_tokens = num_patches
    if visible_indices is not None:
        num_tokens = visible_indices.shape[-1]
        selects, places = num_tokens != num_patches, patch_positions is None
        limits = [num_patches] * selects + [num_slots * patches_per_frame] * places
        _check_visible_indices(visible_indices, shape, min(limits, default=None))
    if patch_positions is not None:
        _check_patch_positions(patch_positions, shape, num_tokens)


def _check_visible_indices(visible_indices: torch.Tensor, pixel_shape: tuple[int, ...], limit: int | None) -> None:
    """Check shape and range of `visible_indices`; `limit` is the first index out of range, None if they go unused."""
    shape = tuple(visible_indices.shape)
    if len(shape) != 2 or shape[0] not in (1, pixel_shape[0]) or shape[1] == 0:
        raise ValueError(
            f"Expected visible_indices of shape (B or 1, S) for pixel_values of shape {pixel_shape}, got {shape}."
        )
    if visible_indices.is_floating_point() or visible_indices.dtype == torch.bool:
        raise ValueError(f"Expected integer visible_indices, got {visible_indices.dtype}.")
    if limit is None or not _readable(visible_indices):
        return
    if visible_indices.min() < 0 or visible_indices.max() >= limit:
        raise ValueError(
            f"visible_indices of shape {shape} lies in [{visible_indices.min()}, {visible_indices.max()}], but for "
            f"pixel_values of shape {pixel_shape} indices must lie in [0, {limit - 1}]."
        )


def _check_patch_positions(patch_positions: torch.Tensor, pixel_shape: tuple[int, ...], num_tokens: int) -> None:
    """Check shape and sign of `patch_positions`."""
    shape = tuple(patch_positions.shape)
    if len(shape) != 3 or shape[0] not in (1, pixel_shape[0]) or shape[1:] != (num_tokens, 3):
        raise ValueError(
            f"Expected patch_positions of shape (B or 1, {num_tokens}, 3), columns (t, h, w), for pixel_values of "
            f"shape {pixel_shape}, got {shape}."
        )
    if _readable(patch_positions) and patch_positions.min() < 0:
        raise ValueError(
            f"patch_positions of shape {shape} has negative values; frames have no padding. Ragged items go in as a "
            "patch sequence with image_position_ids."
        )


def _readable(tensor: torch.Tensor) -> bool:
    """Say whether reading values is free of a device sync and of a graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


__all__ = ["check_frames", "check_sequence", "check_shapes", "patchify", "read_lengths", "tokens_from_frames"]
