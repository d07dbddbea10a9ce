# SPDX-License-Identifier: Apache-2.0
"""`Clip, Selection -> pictures`: what was kept, and when.

Pillow and numpy only. Text uses Pillow's built-in font, which knows ASCII: other letters lose their accents or become
question marks.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .clip import Clip
from .files import written_whole
from .front_end import Selection
from .measures import coverage_psnr, hold_psnr

__all__ = ["draw_selection", "draw_stages", "frame_milliseconds", "save_picture", "short_name"]

PAPER, INK, MUTED, LINE = (255, 255, 255), (33, 37, 41), (108, 117, 125), (222, 226, 230)
BLUE, ORANGE = (0, 114, 178), (213, 94, 0)  # of the Okabe-Ito colours, told apart with any colour vision
_OUTLINE = (90, 100, 110)  # tells kept white from dropped
_HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32)
_MOST_TILES = 12
_SHEET_WIDTH = 1280
_MARGIN = 24
_GAP = 10
_LONGEST_NAME = 44  # letters
_LONGEST_ANIMATION = 12.0  # seconds
_STILL_FORMATS = {".png": "PNG"}
_ANIMATED_FORMATS = {".gif": "GIF", ".webp": "WEBP"}


def draw_selection(clip: Clip, selection: Selection) -> Image.Image:
    """Draw one picture: kept patches over the frames, patches per moment, and a caption.

    Dropped patches are pale and grey, kept ones in full colour. Longer clips are cut into 12 equal parts, and of each
    part the frame with the most kept patches is shown.

    Args:
        clip: the frames that the selection was made from.
        selection: of this clip.

    Returns:
        RGB picture, 1280 px wide.

    Raises:
        ValueError: if the selection belongs to other frames.
    """
    _require_same_frames(clip, selection)
    parts = np.array_split(np.arange(len(clip.frames)), min(_MOST_TILES, len(clip.frames)))
    slots = np.array([part[selection.patches_per_frame[part].argmax()] for part in parts])
    parts = [_caption(clip, selection), _contact_sheet(clip, selection, slots), _timeline(selection, slots)]
    return Image.fromarray(np.concatenate([np.asarray(part) for part in parts]))


def draw_stages(clip: Clip, selection: Selection) -> list[Image.Image]:
    """Draw one picture per sampled frame with four panels: original, uniform, saliency, kept patches.

    `uniform` holds the whole frames that the same budget buys. `saliency` is, per patch, the root mean square error of
    what the patches kept so far show at its place; places where nothing was kept yet count as fully wrong.

    Args:
        clip: the frames that the selection was made from.
        selection: of this clip.

    Returns:
        T RGB pictures of one size, for `save_picture`.

    Raises:
        ValueError: if the selection belongs to other frames.
    """
    _require_same_frames(clip, selection)
    grid, uniform = selection.grid, _uniform_slots(selection)
    kept = _lattice(grid.shape, selection.patch_positions)
    errors = np.stack(list(_errors_so_far(clip.frames, kept, grid.patch_size)))
    seen = errors[np.isfinite(errors) & grid.content]
    full_heat = max(float(np.percentile(seen, 99)) if seen.size else 0.0, 8.0)  # below 8 grey levels nothing is hot
    titles = (
        f"original: {_count(len(clip.frames), 'frame')}",
        f"uniform: {_count(len(uniform), 'whole frame')}",
        "saliency: error so far",
        f"kept: {_thousands(len(selection.patches))} patches",
    )
    board = _Board(clip, selection, titles)
    pictures = []
    for t, frame in enumerate(clip.frames):
        last_whole = clip.frames[uniform[uniform <= t][-1]]
        pictures.append(
            board.draw(t, (frame, last_whole, _heat(errors[t] / full_heat, grid.patch_size), _dimmed(frame, kept[t])))
        )
    return pictures


def frame_milliseconds(pts_seconds: np.ndarray) -> int:
    """Display time of each frame of an animation: real time for short clips, at most 12 s in all, 60 to 400 ms."""
    span = min(float(pts_seconds[-1] - pts_seconds[0]), _LONGEST_ANIMATION)
    return int(np.clip(1000 * span / max(len(pts_seconds) - 1, 1), 60, 400)) // 10 * 10  # GIF counts in 10 ms


def save_picture(picture: Image.Image | Sequence[Image.Image], path: str | Path, milliseconds: int = 150) -> None:
    """Write one picture (`.png`) or an animation (`.gif`, `.webp`). The file appears whole or not at all.

    Args:
        picture: one picture, or the frames of an animation.
        path: the suffix chooses the format.
        milliseconds: display time of each frame.

    Raises:
        ValueError: if the suffix does not fit the picture.
        OSError: if the file can't be written.
    """
    target, is_still = Path(path), isinstance(picture, Image.Image)
    formats = _STILL_FORMATS if is_still else _ANIMATED_FORMATS
    if target.suffix.lower() not in formats:
        kind = "a still picture" if is_still else "an animation"
        raise ValueError(f"{target.name}: {kind} needs a name that ends in {' or '.join(formats)}")
    kind = formats[target.suffix.lower()]
    options: dict = {"optimize": True} if is_still else {"save_all": True, "duration": milliseconds, "loop": 0}
    options |= {"quality": 75, "method": 4} if kind == "WEBP" else {}
    frames = [picture] if is_still else list(picture)
    if kind == "GIF":
        frames = _with_palettes(frames)
    with written_whole(target) as file:
        frames[0].save(file, format=kind, append_images=frames[1:], **options)


def _with_palettes(frames: list[Image.Image]) -> list[Image.Image]:
    """Reduce frames to 255 colours, the same from one cut to the next, without dithering: stillness costs nothing."""
    small = [np.asarray(frame.reduce(8), np.float32) for frame in frames]
    cuts = [t for t in range(1, len(frames)) if np.abs(small[t] - small[t - 1]).mean() > 20]
    reduced = []
    for start, stop in pairwise([0, *cuts, len(frames)]):
        colours = _common_colours(frames[start : stop : -(-(stop - start) // 8)])
        palette = Image.new("P", (1, 1))
        palette.putpalette(colours)
        for frame in frames[start:stop]:
            indices = np.array(frame.quantize(palette=palette, dither=Image.Dither.NONE))
            indices[(np.asarray(frame) == PAPER).all(-1)] = 0  # Pillow's search is not exact, the paper must be
            reduced.append(Image.fromarray(indices))
            reduced[-1].putpalette(colours)
    return reduced


def _common_colours(frames: list[Image.Image]) -> list[int]:
    """255 RGB triples, the paper first: frequent colours, and rare ones that would be lost among them."""
    fixed = [value for colour in (PAPER, INK, MUTED, BLUE, ORANGE) for value in colour]
    montage = Image.fromarray(np.concatenate([np.asarray(frame)[::3, ::3] for frame in frames]))
    frequent = montage.quantize(170, Image.Quantize.MEDIANCUT).getpalette()[: 3 * 170]
    return fixed + frequent + montage.quantize(80, Image.Quantize.MAXCOVERAGE).getpalette()[: 3 * 80]


def _require_same_frames(clip: Clip, selection: Selection) -> None:
    if not np.array_equal(clip.frame_indices, selection.frame_indices) or clip.placement != selection.placement:
        raise ValueError(
            f"the selection was made from other frames: {len(selection.frame_indices)} slots of "
            f"{selection.video.path}, got a clip of {len(clip.frames)} frames of {clip.video.path}"
        )


def _lattice(shape: tuple[int, int, int], positions: np.ndarray) -> np.ndarray:
    """`(T, grid_h, grid_w)` bool: True where a patch is kept."""
    kept = np.zeros(shape, bool)
    kept[tuple(positions.T)] = True
    return kept


def _patches_of_frame(selection: Selection) -> int:
    """Patches of one whole frame that could be kept."""
    content = selection.grid.content
    return content.size if selection.config.padding == "zero" else int(content.sum())


def _uniform_slots(selection: Selection) -> np.ndarray:
    """Slots of the whole frames, evenly spaced, that the same number of patches buys; one at least."""
    whole = max(len(selection.patches) // _patches_of_frame(selection), 1)
    return np.linspace(0, selection.grid.num_frames - 1, whole).astype(int)


def _errors_so_far(frames: np.ndarray, kept: np.ndarray, patch_size: int) -> Iterator[np.ndarray]:
    """For each slot `(grid_h, grid_w)` float32: root mean square error, in grey levels, of what the patches kept
    before it show; infinite where nothing was kept yet."""
    _, grid_h, grid_w = kept.shape
    held, seen = np.zeros_like(frames[0]), np.zeros((grid_h, grid_w), bool)
    for frame, here in zip(frames, kept):
        squared = np.square(frame.astype(np.float32) - held)
        # (grid_h, P, grid_w, P, 3) -> (grid_h, grid_w)
        error = np.sqrt(squared.reshape(grid_h, patch_size, grid_w, patch_size, 3).mean((1, 3, 4)))
        yield np.where(seen, error, np.inf)
        pixels = here.repeat(patch_size, 0).repeat(patch_size, 1)
        held[pixels] = frame[pixels]
        seen |= here


def _dimmed(frame: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """`(H, W, 3)` uint8: kept patches as they are, with a thin outline, the others pale grey."""
    luma = frame @ np.array([0.299, 0.587, 0.114], np.float32)
    patch_size = len(frame) // len(kept)
    pixels = kept.repeat(patch_size, 0).repeat(patch_size, 1)
    picture = np.where(pixels[..., None], frame, (0.2 * luma + 0.8 * 238).astype(np.uint8)[..., None])
    for axis in (0, 1):
        before, after = ((slice(None),) * axis + (side,) for side in (slice(None, -1), slice(1, None)))
        picture[before][pixels[before] & ~pixels[after]] = _OUTLINE
        picture[after][pixels[after] & ~pixels[before]] = _OUTLINE
    return picture


def _heat(share: np.ndarray, patch_size: int) -> np.ndarray:
    """`(H, W, 3)` uint8: patches from black to bright yellow by `share` `(grid_h, grid_w)`, in 24 steps."""
    steps = (np.clip(share, 0, 1) * 23).round() / 23 * (len(_HEAT) - 1)
    colours = np.stack([np.interp(steps, range(len(_HEAT)), channel) for channel in _HEAT.T], -1)
    return colours.astype(np.uint8).repeat(patch_size, 0).repeat(patch_size, 1)


def _panel(pixels: np.ndarray, content: tuple[slice, slice], width: int) -> Image.Image:
    """Crop to the picture and scale to a width."""
    picture = Image.fromarray(np.ascontiguousarray(pixels[content]))
    height = max(1, round(picture.height * width / picture.width))
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _contact_sheet(clip: Clip, selection: Selection, slots: np.ndarray) -> Image.Image:
    """Frames with their kept patches in colour, a line of text under each."""
    content = clip.placement.content
    height, width = (part.stop - part.start for part in content)
    columns = min(len(slots), 4 if width > 1.2 * height else 6)
    columns = -(-len(slots) // -(-len(slots) // columns))  # rows as even as possible
    tile_width = (_SHEET_WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) // columns
    tile_width = max(min(tile_width, round(400 * width / height)), 1)
    cell_width = max(tile_width, 160)  # room for the text
    kept = _lattice(selection.grid.shape, selection.patch_positions)
    tiles = [_panel(_dimmed(clip.frames[t], kept[t]), content, tile_width) for t in slots]
    row_height = tiles[0].height + 36
    sheet = Image.new("RGB", (_SHEET_WIDTH, -(-len(tiles) // columns) * row_height + 8), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (t, tile) in enumerate(zip(slots, tiles)):
        left, top = _MARGIN + number % columns * (cell_width + _GAP), number // columns * row_height
        sheet.paste(tile, (left, top))
        draw.rectangle((left - 1, top - 1, left + tile.width, top + tile.height), outline=LINE)
        _write(draw, (left, top + tile.height + 4), _clock(clip.pts_seconds, t), 18, INK)
        place = (left + cell_width, top + tile.height + 4)
        _write(draw, place, _count(int(kept[t].sum()), "patch", "patches"), 18, MUTED, "ra")
    return sheet


def _caption(clip: Clip, selection: Selection) -> Image.Image:
    """Two lines: the file; what was kept and how much of the clip it shows."""
    grid, config = selection.grid, selection.config
    hold = hold_psnr(clip.frames, grid, selection.patch_positions)
    coverage = coverage_psnr(clip.frames, grid, selection.patch_positions)
    total = len(clip.frames) * _patches_of_frame(selection)
    facts = (
        f"{config.policy}: {_thousands(len(selection.patches))} of {_thousands(total)} patches "
        f"({len(selection.patches) / total:.0%}) of {_count(len(clip.frames), 'frame')}  ·  "
        f"hold {hold:.1f} dB  ·  coverage {coverage:.1f} dB"
    )
    strip = Image.new("RGB", (_SHEET_WIDTH, 104), PAPER)
    draw = ImageDraw.Draw(strip)
    _write(draw, (_MARGIN, 18), short_name(selection.video.path), 28, INK)
    _write(draw, (_MARGIN, 58), facts, 22, MUTED)
    return strip


def _timeline(selection: Selection, slots: np.ndarray) -> Image.Image:
    """Bars of kept patches over time; a first frame that would crush the others is cut off and labelled."""
    height, top, left, bottom = 300, 56, 96, 226
    strip = Image.new("RGB", (_SHEET_WIDTH, height), PAPER)
    draw = ImageDraw.Draw(strip)
    counts, seconds = selection.patches_per_frame, selection.pts_seconds
    top_value = _axis_top(counts)
    _write(draw, (_MARGIN, 8), "kept patches per frame", 20, INK)
    for value in _ticks(0, top_value, 5):
        y = bottom - round(value / top_value * (bottom - top))
        draw.line((left, y, _SHEET_WIDTH - _MARGIN, y), fill=LINE)
        _write(draw, (left - 10, y), _thousands(value), 18, MUTED, "rm")
    bars = _bar_edges(seconds, left, _SHEET_WIDTH - _MARGIN)
    _draw_bars(draw, counts, top_value, bars, (top, bottom))
    for t in slots:  # the frames of the sheet
        middle = sum(bars[t]) / 2
        draw.polygon([(middle, bottom + 4), (middle - 5, bottom + 11), (middle + 5, bottom + 11)], fill=MUTED)
    middles = [sum(bar) / 2 for bar in bars]
    for second in _ticks(float(seconds[0]), float(seconds[-1]), 10):
        _write(draw, (float(np.interp(second, seconds, middles)), bottom + 14), f"{second:g}", 18, MUTED, "ma")
    _write(draw, (_SHEET_WIDTH - _MARGIN, bottom + 38), "seconds; triangles mark the frames above", 18, MUTED, "ra")
    return strip


def _axis_top(counts: np.ndarray) -> float:
    """Upper end of the patch axis, so that the largest bar after the first frame is read well."""
    rest = int(counts[1:].max(initial=0))
    return 1.08 * (rest if 0 < rest < 0.6 * counts[0] else counts.max())


def _draw_bars(draw, counts: np.ndarray, top_value: float, bars: list[tuple], span: tuple[int, int]) -> None:
    """Bars between the rows `span`; one that is higher than the axis is broken near its top and says its value."""
    top, bottom = span
    for number, (count, (x0, x1)) in enumerate(zip(counts, bars)):
        if not count:
            continue
        y = min(bottom - min(count / top_value, 1) * (bottom - top), bottom - 1)  # a pixel at least
        colour = BLUE if count <= top_value else ORANGE
        draw.rectangle((x0, y, max(x0, x1 - 1), bottom - 1), fill=colour)
        if count > top_value:
            draw.polygon([(x0 - 2, y + 24), (x1 + 1, y + 14), (x1 + 1, y + 20), (x0 - 2, y + 30)], fill=PAPER)
            _write(draw, (x0, top - 4), f"{_thousands(int(count))} (first frame)" * (number == 0), 18, ORANGE, "ls")
    draw.line((bars[0][0], bottom, bars[-1][1], bottom), fill=INK)


def _bar_edges(seconds: np.ndarray, left: float, right: float) -> list[tuple[float, float]]:
    """`(x0, x1)` of each bar: centred on its time, none wider than 60 px, at least one pixel apart."""
    steps = np.diff(seconds)
    least = float(steps[steps > 0].min(initial=np.inf)) if len(steps) else np.inf
    span = float(seconds[-1] - seconds[0])
    if not np.isfinite(least):
        return [(left + 8, left + 68)] * len(seconds)
    least = max(least, span / len(seconds) / 2)  # bursts of frames may overlap, bars stay visible
    scale = (right - left) / (span + least)
    half = min(0.42 * least * scale, 30)
    middles = left + (seconds - seconds[0] + least / 2) * scale
    return [(middle - half, middle + half) for middle in middles.tolist()]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (steps of 1, 2 or 5 times a power of ten) between two values, at most about `most`."""
    span = max(high - low, 1e-9)
    step = 10.0 ** np.floor(np.log10(span / most))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most)
    first = int(np.ceil(low / step - 1e-9))
    return [round(number * step, 9) for number in range(first, int(np.floor(high / step + 1e-9)) + 1)]


class _Board:
    """The fixed parts of an animation frame, drawn once: panel titles and the timeline."""

    def __init__(self, clip: Clip, selection: Selection, titles: tuple[str, ...]) -> None:
        self._content = clip.placement.content
        height, width = (part.stop - part.start for part in self._content)
        columns, cell_width = (2, 304) if width > 1.2 * height else (4, 200)
        self._width = max(min(cell_width, round(420 * width / height)), 1)
        self._height = max(round(height * self._width / width), 1)
        self._seconds = clip.pts_seconds
        across = columns * (cell_width + _GAP) + _GAP
        rows = len(titles) // columns
        self._base = Image.new("RGB", (across, rows * (self._height + 30) + 74), PAPER)
        draw = ImageDraw.Draw(self._base)
        self._places = []
        for number, title in enumerate(titles):
            left, top = _GAP + number % columns * (cell_width + _GAP), 30 + number // columns * (self._height + 30)
            _write(draw, (left, top - 6), title, 17 if columns == 2 else 15, INK, "ls")
            self._places.append((left, top))
        counts = selection.patches_per_frame
        self._bars = _bar_edges(clip.pts_seconds, _GAP, across - _GAP)
        self._span = (rows * (self._height + 30) + 14, self._base.height - 26)
        top_value = _axis_top(counts)
        _draw_bars(draw, np.minimum(counts, top_value), top_value, self._bars, self._span)
        _write(draw, (_GAP, self._base.height - 22), "kept patches per frame", 15, MUTED)

    def draw(self, t: int, panels: tuple[np.ndarray, ...]) -> Image.Image:
        """One frame: the panels and a cursor on the timeline."""
        picture = self._base.copy()
        for place, pixels in zip(self._places, panels):
            picture.paste(_panel(pixels, self._content, self._width), place)
        draw = ImageDraw.Draw(picture)
        (x0, x1), (top, bottom) = self._bars[t], self._span
        draw.rectangle(((x0 + x1) / 2 - 1, top - 6, (x0 + x1) / 2 + 1, bottom + 3), fill=ORANGE)
        _write(draw, (picture.width - _GAP, bottom + 4), _clock(self._seconds, t), 15, INK, "ra")
        return picture


def short_name(path: str | Path) -> str:
    """The file's name for a caption: long ones lose their middle, letters outside ASCII their accents."""
    plain = unicodedata.normalize("NFKD", Path(path).name)
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    plain = plain.encode("ascii", "replace").decode()
    return plain if len(plain) <= _LONGEST_NAME else f"{plain[: _LONGEST_NAME - 17]}...{plain[-14:]}"


def _write(draw, place: tuple[float, float], text: str, size: int, colour: tuple, anchor: str = "la") -> None:
    draw.text(place, text, fill=colour, font=ImageFont.load_default(size), anchor=anchor)


def _clock(seconds: np.ndarray, t: int) -> str:
    """Time of a slot, precise enough to tell slots apart."""
    return f"{seconds[t]:.{1 if seconds[-1] - seconds[0] > 0.1 * len(seconds) else 2}f} s"


def _thousands(number: float) -> str:
    return f"{number:,.0f}".replace(",", " ")


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{_thousands(number)} {one if number == 1 else many or one + 's'}"
