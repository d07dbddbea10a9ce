# SPDX-License-Identifier: Apache-2.0
"""Videos to encoder input: whole frames, uniformly sampled, or the patches that a codec-like selection keeps.

Reading files, resizing frames and selecting patches is the work of the package `codec_datasets`, imported only when it
is needed. Where it is not installed, uniform sampling of decoded frames resizes them by Pillow, with other grey levels
along edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from types import ModuleType
from typing import Any, Literal

import numpy as np
from huggingface_hub.dataclasses import validate_typed_dict
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, SizeDict
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import logging
from transformers.video_processing_utils import BaseVideoProcessor

from .image_processing_onevision_encoder import (
    NORMALISATION,
    cut_patches,
    grid_of_positions,
    normalize_patches,
    pack_items,
    require_choices,
    require_positive,
)
from .video_inputs_onevision_encoder import ClipMetadata, fit_frames, known_fps, split_videos

logger = logging.get_logger(__name__)

LAST_TIME_SLOT = 63  # the encoder was trained on 64 time slots; uniform frames are spread over all of them
FRAMES_IN_BUDGET = 8  # a codec clip gets as many patches as this many whole frames
DEFAULTS = {
    "uniform": {"num_frames": 8, "grid_side": 16, "fit": "crop"},  # 224 pixels at patch size 14, as in pre-training
    "codec": {"num_frames": 64, "grid_side": 36, "fit": "letterbox"},  # 504 pixels at patch size 14: 10368 patches
}
SELECTION_ARGUMENTS = (
    "num_patches",
    "policy",
    "block",
    "first_frame",
    "padding",
    "motion_weight",
    "stop_below_error",
    "seed",
    "allow_fewer",
)
FOREIGN_ARGUMENTS = ("fps", "do_resize", "resample", "do_center_crop", "crop_size")  # every video processor has them


class OneVisionEncoderVideoProcessorKwargs(VideosKwargs, total=False):
    """Options beyond those of every video processor; None takes the default of the sampling.

    Attributes:
        sampling: `"uniform"` for whole frames, `"codec"` for selected patches of many frames.
        patch_size: side of a patch in pixels, the encoder's.
        fit: how a frame meets the square: `"crop"`, `"resize"` or `"letterbox"`.
        num_threads: parts of a file decoded at the same time.
        num_patches: codec: exact number of patches of a clip; default: as many as 8 whole frames.
        policy: codec: which patches are kept, a policy of `codec_datasets`.
        block: codec: side, in patches, of the squares that are kept as a whole.
        first_frame: codec: `"full"` keeps all of the first frame, `"selected"` does not.
        padding: codec: `"exclude"` drops letterbox patches, `"zero"` keeps them as published.
        motion_weight: codec: how much more an error counts where things move.
        stop_below_error: codec: leave out patches that would mend less, root mean square error in grey levels.
        seed: codec: of the random policy.
        allow_fewer: codec: a clip that holds fewer patches gives a shorter row; otherwise it raises.
    """

    sampling: Literal["uniform", "codec"] | None
    patch_size: int | None
    fit: Literal["crop", "resize", "letterbox"] | None
    num_threads: int | None
    num_patches: int | None
    policy: str | None
    block: int | None
    first_frame: Literal["full", "selected"] | None
    padding: Literal["exclude", "zero"] | None
    motion_weight: float | int | None
    stop_below_error: float | int | None
    seed: int | None
    allow_fewer: bool | None


@dataclass(frozen=True)
class ClipOptions:
    """The options of one call with every default resolved; names as in the keyword arguments, `size` in pixels."""

    sampling: str
    num_frames: int
    size: int
    fit: str
    patch_size: int
    num_threads: int
    take_all_frames: bool
    selection: dict[str, Any]

    @classmethod
    def resolve(cls, options: dict[str, Any], given: set[str]) -> "ClipOptions":
        """Fill in the defaults of the sampling.

        Args:
            options: all keyword arguments, attributes of the processor where the caller gave none.
            given: names that the caller gave.

        Raises:
            ValueError: for options that contradict each other, do not exist for this sampling, or are below 1.
        """
        sampling, patch_size, num_threads = options["sampling"], options["patch_size"], options["num_threads"]
        defaults, size = DEFAULTS[sampling], square_side(options["size"])
        _check_given(sampling, given)
        num_frames = defaults["num_frames"] if options["num_frames"] is None else options["num_frames"]
        size = defaults["grid_side"] * patch_size if size is None else size
        require_positive(num_frames=num_frames, patch_size=patch_size, size=size, num_threads=num_threads)
        if size % patch_size:
            raise ValueError(f"size must be a multiple of patch_size={patch_size}, got {size}.")
        selection = {name: options[name] for name in SELECTION_ARGUMENTS}
        if selection["num_patches"] is None:
            selection["num_patches"] = min(FRAMES_IN_BUDGET, num_frames) * (size // patch_size) ** 2
        return cls(
            sampling,
            num_frames,
            size,
            defaults["fit"] if options["fit"] is None else options["fit"],
            patch_size,
            num_threads,
            options["do_sample_frames"] is False,
            selection,
        )


def _check_given(sampling: str, given: set[str]) -> None:
    """Check that the arguments the caller gave mean something for this sampling."""
    misplaced = sorted(given & set(SELECTION_ARGUMENTS))
    if sampling == "uniform" and misplaced:
        raise ValueError(
            f'Only sampling="codec" selects patches and takes {", ".join(misplaced)}, got sampling="uniform".'
        )
    foreign = sorted(given & set(FOREIGN_ARGUMENTS))
    if foreign:
        raise ValueError(
            f"This processor takes no {', '.join(foreign)}: frames are sampled by num_frames and brought to size by "
            "fit."
        )


def check_videos(videos: list[str | np.ndarray], video_metadata: Any, options: ClipOptions) -> None:
    """Check what the options ask of the videos, before any of them is read.

    Args:
        videos: paths and decoded frames.
        video_metadata: one mapping for all, a list with one per video, or None.
        options: of the call.

    Raises:
        ValueError: if files and frames are asked for what only the other can give, or metadata does not match.
    """
    files = [video for video in videos if isinstance(video, str)]
    if options.take_all_frames and files:
        raise ValueError(
            f"do_sample_frames=False is for decoded frames only, got the file {files[0]!r}. To take more of its "
            f"frames, raise num_frames={options.num_frames}."
        )
    if options.sampling == "codec" and options.selection["policy"] == "energy" and len(files) < len(videos):
        raise ValueError(
            'policy="energy" reads motion vectors and residual from the bitstream, which decoded frames have lost. '
            "Pass the path of the file, or choose another policy."
        )
    if isinstance(video_metadata, Sequence) and len(video_metadata) != len(videos):
        raise ValueError(f"Expected one video_metadata per video, got {len(video_metadata)} for {len(videos)} videos.")


def square_side(size: SizeDict | dict | None) -> int | None:
    """Read the side of a square, in pixels, from a size; None stays None."""
    if size is None:
        return None
    height, width = dict(size).get("height"), dict(size).get("width")
    if height is None or height != width:
        raise ValueError(f"Expected a square size, an int or equal height and width, got {dict(size)}.")
    return height


def time_slots(num_frames: int) -> np.ndarray:
    """Spread uniform frames over the encoder's 64 time slots: floor(linspace(0, 63, T)), `(T,)` int64.

    More than 64 frames count 0, 1, 2, ...: beyond the trained range, but no two share a slot.
    """
    return np.floor(np.linspace(0, max(LAST_TIME_SLOT, num_frames - 1), num_frames)).astype(np.int64)


def load_codec_datasets() -> ModuleType:
    """Import the package that reads, resizes and selects, or say which one to install."""
    try:
        import codec_datasets
    except ImportError as error:
        raise ImportError(
            'Reading video files, sampling="codec" and fit="letterbox" need the package codec-datasets. Install it: '
            "pip install codec-datasets or, from a clone, pip install ./packages/codec_datasets. Decoded frames with "
            "uniform sampling work without it."
        ) from error
    return codec_datasets


def _needs_pillow(video: str | np.ndarray, fit: str) -> bool:
    """Say whether frames have to be resized without `codec_datasets`: it is missing, and the task allows for that."""
    if isinstance(video, str) or fit == "letterbox":
        return False
    try:
        load_codec_datasets()
    except ImportError as error:
        logger.info("Decoded frames are resized by Pillow, not as frames of files are: %s", error.__cause__)
        return True
    return False


class OneVisionEncoderVideoProcessor(BaseVideoProcessor):
    """Videos to the patch sequence: `pixel_values` `(num_videos, max_patches, 3 * P * P)`, `image_position_ids`.

    `sampling="uniform"` gives all patches of 8 frames of 224 x 224, centre-cropped, at t = floor(linspace(0, 63, 8)).
    `sampling="codec"` samples 64 frames, letterboxed to 36 patches a side, and keeps the patches that prediction from
    kept content gets wrong, as many as 8 whole frames have; t is the frame's slot 0...63. Arguments override both.

    ```python
    outputs = model(**processor("clip.mp4", sampling="codec", return_tensors="pt"))
    ```
    """

    valid_kwargs = OneVisionEncoderVideoProcessorKwargs
    model_input_names = ["pixel_values", "image_position_ids"]  # noqa: RUF012
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_rescale = True
    do_normalize = True
    sampling = "uniform"
    patch_size = 14
    num_frames = None
    size = None
    fit = None
    num_threads = 1
    num_patches = None
    policy = "replenish"
    block = 1
    first_frame = "full"
    padding = "exclude"
    motion_weight = 0.0
    stop_below_error = 0.0
    seed = 0
    allow_fewer = True

    @classmethod
    def get_video_processor_dict(
        cls, pretrained_model_name_or_path: str | PathLike, **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the settings of a folder; of one that has an image processor only, as published, the normalisation."""
        settings, kwargs = super().get_video_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "video_processor_type" not in settings:
            settings = {name: settings[name] for name in NORMALISATION if name in settings}
        return settings, kwargs

    def preprocess(self, videos: Any, **kwargs: Unpack[OneVisionEncoderVideoProcessorKwargs]) -> BatchFeature:
        """Read videos and cut them into a patch sequence.

        Args:
            videos: a path or URL; decoded frames `(T, H, W, 3)` uint8 as array, tensor or list of images; or a list
                of these. Decoded frames are sampled too if there are more than `num_frames`, unless
                `do_sample_frames=False`, and resized as frames of files are; uniform sampling without
                `codec_datasets` resizes them by Pillow, which gives other grey levels along edges.
            **kwargs: see `OneVisionEncoderVideoProcessorKwargs`; `return_metadata=True` adds `video_metadata`, a
                `ClipMetadata` per video; `return_tensors="pt"` gives tensors, default numpy arrays.

        Raises:
            ImportError: if `codec_datasets` is needed and missing.
            ValueError: for inputs and arguments that do not fit; `codec_datasets.VideoError` is one.
        """
        given = {name for name, value in kwargs.items() if value is not None}
        options = {name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__}
        options.update({name: kwargs[name] for name in given})
        require_choices(self.valid_kwargs, options)
        validate_typed_dict(self.valid_kwargs, kwargs)
        options = self._standardize_kwargs(**options)
        clip_options = ClipOptions.resolve(options, given)
        normalisation = {name: options[name] for name in NORMALISATION}
        patches, positions, metadata = [], [], []
        clips = split_videos(videos)
        check_videos(clips, options["video_metadata"], clip_options)
        for number, video in enumerate(clips):
            pixels, places, facts = READERS[clip_options.sampling](video, clip_options)
            facts.num_patches, facts.sampling = len(pixels), clip_options.sampling
            if not isinstance(video, str):
                facts.total_num_frames = len(video)
                facts.time_frames(known_fps(options["video_metadata"], number))
            patches.append(normalize_patches(pixels, clip_options.patch_size, **normalisation))
            positions.append(places)
            metadata.append(facts)
        features = BatchFeature(data=pack_items(patches, positions), tensor_type=options["return_tensors"])
        if options["device"] is not None:
            features = features.to(options["device"])
        if options["return_metadata"]:
            features["video_metadata"] = metadata
        return features


def read_uniform(video: str | np.ndarray, options: ClipOptions) -> tuple[np.ndarray, np.ndarray, ClipMetadata]:
    """Cut uniformly sampled frames into all their patches.

    Args:
        video: a path or frames `(T, H, W, 3)` uint8.
        options: of the call.

    Returns:
        Patches `(N, 3 * P * P)` uint8, positions `(N, 3)` int64 (t, h, w), and metadata.
    """
    if options.fit == "letterbox":
        clip = _read_clip(video, options)
        everything = len(clip.frames) * (options.size // options.patch_size) ** 2
        every_patch = {"num_patches": everything, "policy": "uniform", "padding": "exclude", "allow_fewer": True}
        selection = _select(clip, options.patch_size, every_patch)
        places = selection.patch_positions.astype(np.int64)
        places[:, 0] = time_slots(len(clip.frames))[places[:, 0]]
        return _flatten(selection.patches), places, _describe(selection)
    if _needs_pillow(video, options.fit):
        indices = _sampled_indices(len(video), options)
        frames = fit_frames(video[indices], options.size, options.fit)
        height, width = video.shape[1:3]
        facts = ClipMetadata(len(video), height=height, width=width, frames_indices=indices.tolist())
    else:
        clip = _read_clip(video, options)
        frames, facts = clip.frames, _describe(clip)
    patches = np.concatenate([cut_patches(frame.transpose(2, 0, 1), options.patch_size) for frame in frames])
    side = options.size // options.patch_size
    return patches, grid_of_positions(time_slots(len(frames)), side, side), facts


def read_codec(video: str | np.ndarray, options: ClipOptions) -> tuple[np.ndarray, np.ndarray, ClipMetadata]:
    """Select the patches of a clip; arguments and result as of `read_uniform`."""
    if isinstance(video, str):
        selection = load_codec_datasets().select_video(
            video,
            num_frames=options.num_frames,
            size=options.size,
            fit=options.fit,
            patch_size=options.patch_size,
            num_threads=options.num_threads,
            **options.selection,
        )
    else:
        selection = _select(_read_clip(video, options), options.patch_size, options.selection)
    return _flatten(selection.patches), selection.patch_positions.astype(np.int64), _describe(selection)


READERS = {"uniform": read_uniform, "codec": read_codec}


def _read_clip(video: str | np.ndarray, options: ClipOptions) -> Any:
    """Sample and fit frames by `codec_datasets`, from a file or from decoded frames."""
    codec_datasets = load_codec_datasets()
    if isinstance(video, str):
        return codec_datasets.read_clip(
            video,
            num_frames=options.num_frames,
            size=options.size,
            fit=options.fit,
            num_threads=options.num_threads,
        )
    indices = _sampled_indices(len(video), options)
    return codec_datasets.clip_from_frames(video[indices], size=options.size, fit=options.fit, frame_indices=indices)


def _select(clip: Any, patch_size: int, selection: dict[str, Any]) -> Any:
    """Select patches of a clip that is already read; `selection` as in `ClipOptions`."""
    codec_datasets = load_codec_datasets()
    return codec_datasets.select_clip(clip, codec_datasets.SelectionConfig(patch_size=patch_size, **selection))


def _sampled_indices(num_source_frames: int, options: ClipOptions) -> np.ndarray:
    """Choose frames of a decoded video, first and last included; all if there are no more than asked for."""
    if options.take_all_frames or num_source_frames <= options.num_frames:
        return np.arange(num_source_frames)
    return np.linspace(0, num_source_frames - 1, options.num_frames).astype(np.int64)


def _flatten(patches: np.ndarray) -> np.ndarray:
    """Flatten patches `(N, P, P, 3)` to `(N, 3 * P * P)`, channels first."""
    return patches.transpose(0, 3, 1, 2).reshape(len(patches), -1)


def _describe(clip: Any) -> ClipMetadata:
    """Take the metadata from a clip or a selection of `codec_datasets`."""
    return ClipMetadata(
        total_num_frames=clip.video.num_frames,
        fps=clip.video.average_fps or None,
        width=clip.video.width,
        height=clip.video.height,
        duration=clip.video.duration_seconds or None,  # as fps, 0.0 for decoded frames
        video_backend="codec_datasets",
        frames_indices=clip.frame_indices.tolist(),
        pts_seconds=clip.pts_seconds.tolist(),
    )


__all__ = ["ClipMetadata", "OneVisionEncoderVideoProcessor"]
