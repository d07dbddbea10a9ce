# SPDX-License-Identifier: Apache-2.0
"""Any video file -> the patches that matter, under an exact budget, with stock PyAV.

Names in reading order: video -> frames -> signals -> scores -> selection -> patches -> measures.
"""

from importlib.metadata import version

from .errors import VideoError
from .grid import PatchGrid, Placement, make_grid, place_picture
from .video import VideoInfo, probe_video
from .clip import Clip, clip_from_frames, read_clip
from .signals import Signals, compute_signals
from .scoring import score_patches
from .policies import POLICIES
from .selection import SelectionConfig, select_patches
from .streaming import ReplenishStream
from .packing import gather_patches, pack_mosaics, unpack_mosaics
from .measures import coverage_psnr, hold_psnr
from .front_end import Selection, load_npz, select_clip, select_video

__version__ = version("codec-datasets")

__all__ = [
    "POLICIES",
    "Clip",
    "PatchGrid",
    "Placement",
    "ReplenishStream",
    "Selection",
    "SelectionConfig",
    "Signals",
    "VideoError",
    "VideoInfo",
    "__version__",
    "clip_from_frames",
    "compute_signals",
    "coverage_psnr",
    "gather_patches",
    "hold_psnr",
    "load_npz",
    "make_grid",
    "pack_mosaics",
    "place_picture",
    "probe_video",
    "read_clip",
    "score_patches",
    "select_clip",
    "select_patches",
    "select_video",
    "unpack_mosaics",
]
