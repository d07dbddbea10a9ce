# SPDX-License-Identifier: Apache-2.0
"""Make the demo clip: four short scenes with cuts, a panning camera, a still stretch and a brief event.

Run it as `python examples/make_demo_clip.py [FILE.mp4]`. Everything is computed from one seed, so the same library
versions write the same bytes.
"""

import os
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT, FPS = 640, 360, 25
SCENE_FRAMES = (75, 75, 75, 65)  # courtyard, balloons, table (still but for a bouncing ball), planet
LIGHT = np.array((-0.52, -0.62, 0.59), np.float32)  # towards the light: x right, y down, z to the viewer
ENCODER = {"preset": "veryslow", "crf": "23", "x264-params": "bframes=3:keyint=125:scenecut=40:threads=1"}


# --- textures: (H, W) or (H, W, 3) float32, 0 to 1 ------------------------------------------------------------------


def noise(rng: np.random.Generator, height: int, width: int, coarsest: int, octaves: int = 5) -> np.ndarray:
    """Smooth random texture: octaves of interpolated grids, the first with cells of `coarsest` px; mean 0.5."""
    total, weight = np.zeros((height, width), np.float32), 0.0
    for octave in range(octaves):
        cell = max(coarsest >> octave, 2)
        grid = Image.fromarray(rng.random((height // cell + 3, width // cell + 3), dtype=np.float32))
        layer = grid.resize((grid.width * cell, grid.height * cell), Image.Resampling.BICUBIC)
        total += np.asarray(layer)[cell : cell + height, cell : cell + width] / 2**octave
        weight += 1 / 2**octave
    return np.clip((total / weight - 0.5) * 1.6 + 0.5, 0, 1)


def mix(low: tuple, high: tuple, share: np.ndarray) -> np.ndarray:
    """Colours between two, by `share` (0 to 1); colours are given as 0...255."""
    low, high = np.float32(low) / 255, np.float32(high) / 255
    return low + share[..., None] * (high - low)


def sphere_map() -> tuple[np.ndarray, np.ndarray]:
    """Longitude and latitude, 0 to 1, of a texture that is wrapped around a ball."""
    return np.meshgrid(np.linspace(0, 1, 1024, endpoint=False), np.linspace(0, 1, 512), indexing="xy")


def wrapped_noise(rng: np.random.Generator, coarsest: int) -> np.ndarray:
    """Noise for `sphere_map` without a seam."""
    texture = noise(rng, 512, 1280, coarsest)
    fade = np.linspace(0, 1, 256, dtype=np.float32)
    texture[:, :256] = texture[:, :256] * fade + texture[:, 1024:] * (1 - fade)
    return texture[:, :1024]


def beach_ball(rng: np.random.Generator, colours: list[tuple], sectors: int) -> np.ndarray:
    """Coloured sectors that alternate with cream, and caps."""
    longitude, latitude = sphere_map()
    sector = (longitude * sectors).astype(int)
    palette = np.float32([colour for pair in zip(colours, [(250, 240, 220)] * len(colours)) for colour in pair]) / 255
    texture = palette[sector % len(palette)]
    texture[(latitude < 0.07) | (latitude > 0.93)] = np.float32((245, 235, 215)) / 255
    return texture * (0.88 + 0.2 * wrapped_noise(rng, 64)[..., None])


def marble(rng: np.random.Generator, dark: tuple, bright: tuple) -> np.ndarray:
    """Veins."""
    longitude, latitude = sphere_map()
    veins = np.sin(2 * np.pi * (3 * longitude + 4 * latitude) + 9 * wrapped_noise(rng, 128))
    return mix(dark, bright, (0.5 + 0.5 * veins) ** 1.5)


def banded_planet(rng: np.random.Generator) -> np.ndarray:
    """Bands of cloud and one storm."""
    longitude, latitude = sphere_map()
    turbulence = wrapped_noise(rng, 128)
    bands = 0.5 + 0.5 * np.sin(2 * np.pi * (5.5 * latitude + 0.55 * turbulence))
    texture = mix((150, 84, 52), (246, 222, 180), bands * 0.8 + 0.2 * turbulence)
    storm = np.exp(-(((longitude - 0.36) / 0.05) ** 2) - ((latitude - 0.62) / 0.045) ** 2)
    return texture + storm[..., None] * (np.float32((206, 72, 40)) / 255 - texture)


def cratered_moon(rng: np.random.Generator) -> np.ndarray:
    """Grey rock with round craters."""
    longitude, latitude = sphere_map()
    texture = mix((120, 124, 134), (214, 214, 220), wrapped_noise(rng, 64))
    for _ in range(60):
        x, y, radius = rng.uniform(0, 1), rng.uniform(0.15, 0.85), rng.uniform(0.01, 0.045)
        across = (np.abs(longitude - x + 0.5) % 1 - 0.5) * 2 * np.sin(np.pi * y)
        distance = np.hypot(across, latitude - y) / radius
        texture *= 1 - 0.35 * np.clip(1.1 - distance, 0, 1)[..., None]
        texture *= 1 + 0.25 * np.exp(-(((distance - 1.1) / 0.15) ** 2))[..., None]
    return texture


# --- drawing on a canvas (HEIGHT, WIDTH, 3) float32 -----------------------------------------------------------------


def window(texture: np.ndarray, x: float, y: float, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Cut a view out of a large texture at a fractional place."""
    left, top = int(x), int(y)
    part = texture[top : top + height + 1, left : left + width + 1]
    rows = part[:-1] * (1 - (y - top)) + part[1:] * (y - top)
    return rows[:, :-1] * (1 - (x - left)) + rows[:, 1:] * (x - left)


def box(x: float, y: float, reach_x: float, reach_y: float) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """The part of the canvas around a point, and its pixel offsets `dy` (h, 1), `dx` (1, w)."""
    rows = slice(int(np.clip(y - reach_y, 0, HEIGHT)), int(np.clip(y + reach_y + 2, 0, HEIGHT)))
    columns = slice(int(np.clip(x - reach_x, 0, WIDTH)), int(np.clip(x + reach_x + 2, 0, WIDTH)))
    dy = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - y
    dx = np.arange(columns.start, columns.stop, dtype=np.float32)[None] - x
    return rows, columns, dy, dx


def draw_shadow(canvas: np.ndarray, x: float, y: float, radius_x: float, radius_y: float, strength: float) -> None:
    """Darken a soft ellipse."""
    rows, columns, dy, dx = box(x, y, 1.6 * radius_x, 1.6 * radius_y)
    distance = np.hypot(dx / radius_x, dy / radius_y)
    canvas[rows, columns] *= 1 - strength * np.clip(1.5 - distance, 0, 1)[..., None] ** 1.5


def draw_ball(
    canvas: np.ndarray, x: float, y: float, radius: float, texture: np.ndarray, turn: np.ndarray, gloss: float = 0.5
) -> None:
    """A shaded ball; `turn` (3, 3) rotates the viewer's axes into the ball's."""
    rows, columns, dy, dx = box(x, y, radius, radius)
    colour = np.zeros((*np.broadcast_shapes(dy.shape, dx.shape), 3), np.float32)
    for shift_y, shift_x in ((-0.25, -0.25), (-0.25, 0.25), (0.25, -0.25), (0.25, 0.25)):  # smooth edges of stripes
        colour += shade((dx + shift_x) / radius, (dy + shift_y) / radius, texture, turn, gloss) / 4
    alpha = np.clip(radius - np.hypot(dx, dy) + 0.5, 0, 1)[..., None]
    canvas[rows, columns] += alpha * (colour - canvas[rows, columns])


def shade(nx: np.ndarray, ny: np.ndarray, texture: np.ndarray, turn: np.ndarray, gloss: float) -> np.ndarray:
    """Colours of a unit ball's surface at `nx` (1, w), `ny` (h, 1)."""
    nx, ny = np.broadcast_arrays(nx, ny)
    normal = np.stack((nx, ny, np.sqrt(np.clip(1 - nx**2 - ny**2, 0, 1))), -1)
    spot = normal @ turn.T.astype(np.float32)
    longitude = (np.arctan2(spot[..., 0], spot[..., 2]) / (2 * np.pi)) % 1 * 1024
    latitude = (np.arcsin(np.clip(spot[..., 1], -1, 1)) / np.pi + 0.5) * 511
    diffuse = np.clip(normal @ LIGHT, 0, 1)
    mirror = np.clip(2 * diffuse * normal[..., 2] - LIGHT[2], 0, 1)
    colour = texture[latitude.astype(int), longitude.astype(int) % 1024]
    return colour * (0.22 + 0.92 * diffuse[..., None]) + gloss * (mirror**28)[..., None]


def rotation(axis: tuple, angle: float) -> np.ndarray:
    """`(3, 3)` rotation by `angle` radians about an axis."""
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross = np.array(((0, -z, y), (z, 0, -x), (-y, x, 0)))
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def rolling(dx: float, dy: float, radius: float) -> np.ndarray:
    """`turn` of a ball that rolled by `(dx, dy)` px on the ground below."""
    return rotation((dy, -dx, 1e-9), np.hypot(dx, dy) / radius)


# --- scenes ---------------------------------------------------------------------------------------------------------


def courtyard(rng: np.random.Generator, num_frames: int) -> Iterator[np.ndarray]:
    """From above: balls roll over paving while the camera pans."""
    height, width = HEIGHT + 80, WIDTH + 200
    y, x = np.mgrid[:height, :width]
    row = y // 90
    shifted = x + row % 2 * 60
    tint = rng.random((40, 40), dtype=np.float32)[row, shifted // 120]
    joint = np.minimum(np.minimum(y % 90, 90 - y % 90), np.minimum(shifted % 120, 120 - shifted % 120))
    stone = mix(
        (150, 138, 120),
        (205, 192, 168),
        0.4 * tint + 0.4 * noise(rng, height, width, 64) + 0.2 * noise(rng, height, width, 4, 2),
    )
    ground = stone * (0.55 + 0.45 * np.clip((joint - 1) / 3, 0, 1))[..., None]
    balls = (  # x, y, speed x, speed y, radius, texture, first turn
        (70, 245, 5.2, -0.7, 62, beach_ball(rng, [(214, 64, 48), (38, 110, 180), (240, 176, 40)], 6), (1, 0.4, 0.2)),
        (612, 250, -1.0, -2.3, 40, marble(rng, (24, 66, 60), (150, 214, 190)), (0, 1, 1)),
        (250, 30, -2.0, 2.6, 30, beach_ball(rng, [(120, 70, 160), (240, 150, 70)], 8), (1, 1, 0)),
    )
    for t in range(num_frames):
        canvas = window(ground, 1.6 * t + 0.3, 0.7 * t + 0.3)
        for bx, by, vx, vy, radius, *_ in balls:
            draw_shadow(canvas, bx + vx * t + 0.45 * radius, by + vy * t + 0.5 * radius, radius, radius, 0.55)
        for bx, by, vx, vy, radius, texture, start in balls:
            turn = rotation(start, 1.1) @ rolling((vx + 1.6) * t, (vy + 0.7) * t, radius)
            draw_ball(canvas, bx + vx * t, by + vy * t, radius, texture, turn)
        yield canvas


def balloons(rng: np.random.Generator, num_frames: int) -> Iterator[np.ndarray]:
    """Hills in parallax under a morning sky, balloons in front."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    sky = mix((96, 156, 214), (252, 224, 190), np.clip(y / 270, 0, 1) ** 1.3)
    sun = np.exp(-np.hypot(x - 505, y - 190) / 70)[..., None]
    sky = sky + sun * (np.float32((1.0, 0.95, 0.75)) - sky)
    clouds = np.clip(noise(rng, HEIGHT + 1, WIDTH + 80, 128) * 2.6 - 1.3, 0, 1)[..., None] * 0.8
    clouds = clouds * np.clip(1 - np.arange(HEIGHT + 1) / 230, 0, 1)[:, None, None]
    hills = [
        hill(rng, 232, 26, (120, 150, 176), (160, 184, 196), 0.5 * num_frames),
        hill(rng, 270, 24, (74, 124, 92), (130, 168, 110), 1.2 * num_frames),
        hill(rng, 318, 16, (52, 92, 44), (128, 152, 62), 2.6 * num_frames),
    ]
    stripes = [beach_ball(rng, colours, 12) for colours in ([(206, 52, 44)], [(30, 96, 170)], [(230, 150, 30)])]
    flights = ((150, 215, 58, 0.5, -1.0), (430, 130, 40, -0.6, -0.25), (300, 196, 22, -0.25, -0.4))
    for t in range(num_frames):
        canvas = sky + window(clouds, 0.6 * t, 0) * (1 - sky)
        for (line, texture), speed in zip(hills, (0.5, 1.2, 2.6)):
            edge = np.interp(np.arange(WIDTH) + speed * t, np.arange(len(line)), line)
            alpha, fall = np.clip(y - edge + 0.5, 0, 1)[..., None], (y - edge)[..., None] / 90
            canvas += alpha * (window(texture, speed * t, 0) * (1.1 - 0.3 * fall) - canvas)
        for (bx, by, radius, vx, vy), texture in zip(flights, stripes):
            draw_balloon(canvas, bx + vx * t, by + vy * t, radius, texture, 0.012 * t)
        yield canvas


def hill(rng: np.random.Generator, base: float, height: float, low: tuple, high: tuple, travel: float) -> tuple:
    """One range of hills: its skyline `(W,)` in px from the top, and its texture; wide enough to pan by `travel`."""
    length = WIDTH + int(travel) + 2
    at, phases = np.arange(length), rng.uniform(0, 2 * np.pi, 3)
    waves = (
        np.sin(at / period + phase) * share for period, phase, share in zip((95, 41, 19), phases, (0.6, 0.3, 0.1))
    )
    return base + height * sum(waves), mix(low, high, noise(rng, HEIGHT + 1, length, 32))


def draw_balloon(canvas: np.ndarray, x: float, y: float, radius: float, texture: np.ndarray, angle: float) -> None:
    """A striped balloon, its ropes and its basket."""
    rows, columns, dy, dx = box(x, y + 1.2 * radius, 0.6 * radius, 0.8 * radius)
    down = dy / radius + 1.2  # 0 at the balloon's centre, in radii
    half = 0.62 - 0.42 * (down - 0.75)
    skirt = np.clip((half - np.abs(dx / radius)) * radius + 0.5, 0, 1) * ((down > 0.7) & (down < 1.2))
    ropes = np.clip(1.2 - np.abs(np.abs(dx) - 0.17 * radius), 0, 1) * ((down >= 1.2) & (down < 1.5))
    basket = np.clip(0.24 * radius - np.abs(dx) + 0.5, 0, 1) * ((down >= 1.5) & (down < 1.78))
    longitude = np.broadcast_to(
        ((np.arcsin(np.clip(dx / radius / half, -1, 1)) + angle) / 6.2832 % 1 * 1023), skirt.shape
    )
    cloth = texture[430, longitude.astype(int)] * 0.7
    for alpha, colour in ((skirt, cloth), (ropes, 0.25), (basket, np.float32((0.42, 0.27, 0.13)))):
        canvas[rows, columns] += alpha[..., None] * (colour - canvas[rows, columns])
    draw_ball(canvas, x, y, radius, texture, rotation((0, 1, 0), angle), gloss=0.15)


def table(rng: np.random.Generator, num_frames: int) -> Iterator[np.ndarray]:
    """A still life; for less than a second a small ball bounces through."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    diamonds = 0.5 + 0.5 * np.cos(x / 14) * np.cos(y / 14)
    wall = mix((62, 88, 104), (92, 122, 134), 0.6 * diamonds + 0.4 * noise(rng, HEIGHT, WIDTH, 32))
    light = np.exp(-(((x - 180) / 230) ** 2) - ((y - 60) / 190) ** 2)[..., None]
    grain = np.asarray(Image.fromarray(noise(rng, HEIGHT, 80, 16)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    wood = mix((112, 66, 34), (196, 134, 78), grain) * np.where(np.abs(y - 300) < 1, 0.6, 1)[..., None]
    scene = np.where(y[..., None] < 232, wall * (0.7 + 0.6 * light), wood * (0.72 + (y[..., None] - 232) / 360))
    draw_shadow(scene, 320, 236, 520, 12, 0.5)
    still = (
        (170, 208, 72, marble(rng, (40, 54, 110), (214, 220, 240)), (0.3, 1, 0)),
        (318, 244, 44, beach_ball(rng, [(214, 64, 48), (240, 176, 40)], 8), (1, 0.2, 0.5)),
        (500, 216, 62, cratered_moon(rng), (0, 1, 0.3)),
    )
    for bx, by, radius, _, _ in still:
        draw_shadow(scene, bx + 0.5 * radius, by + 0.93 * radius, 1.15 * radius, 0.26 * radius, 0.75)
    for bx, by, radius, texture, axis in still:
        draw_ball(scene, bx, by, radius, texture, rotation(axis, 0.8), gloss=0.7)
    rubber = beach_ball(rng, [(236, 92, 36), (40, 150, 120)], 6)
    for t in range(num_frames):
        canvas = scene.copy()
        flight = (t - 34) / 20  # enters at frame 34, leaves 20 frames later
        if 0 <= flight <= 1:
            bx, bounce = -30 + 700 * flight, abs(np.sin(np.pi * (2.2 * flight + 0.35)))
            draw_shadow(canvas, bx + 8, 336, 30, 8, 0.6 - 0.35 * bounce)
            draw_ball(canvas, bx, 310 - 150 * bounce, 26, rubber, rolling(700 * flight, 0, 40))
        yield canvas


def planet(rng: np.random.Generator, num_frames: int) -> Iterator[np.ndarray]:
    """A turning planet, its moon passing by, stars drifting."""
    dust = mix((8, 10, 26), (52, 38, 84), noise(rng, HEIGHT + 60, WIDTH + 120, 128) ** 2)
    for _ in range(420):
        sx, sy, size = rng.integers(3, WIDTH + 110), rng.integers(3, HEIGHT + 50), rng.uniform(0.35, 1.0)
        glow = np.exp(-np.hypot(*np.mgrid[-2:3, -2:3]) / (0.6 * size))[..., None]
        dust[sy - 2 : sy + 3, sx - 2 : sx + 3] += glow * size * rng.uniform((0.8, 0.8, 0.8), (1, 0.95, 1))
    giant, moon = banded_planet(rng), cratered_moon(rng)
    tilt = rotation((0, 0, 1), 0.35)
    for t in range(num_frames):
        canvas = window(dust, 0.8 * t, 0.3 * t)
        mx, my = 60 + 7.6 * t, 92 + 1.3 * t
        draw_ball(canvas, 350, 196, 136, giant, rotation((0, 1, 0), 0.02 * t) @ tilt, gloss=0.06)
        if np.hypot(mx + 34 - 350, my + 40 - 196) < 112:
            draw_shadow(canvas, mx + 34, my + 40, 26, 26, 0.6)
        draw_ball(canvas, mx, my, 30, moon, rotation((0, 1, 0), 0.03 * t), gloss=0.05)
        yield canvas


SCENES: tuple[Callable[[np.random.Generator, int], Iterator[np.ndarray]], ...] = (courtyard, balloons, table, planet)


def render(seed: int = 0) -> Iterator[np.ndarray]:
    """All frames of the clip, `(360, 640, 3)` uint8 RGB."""
    for number, (scene, num_frames) in enumerate(zip(SCENES, SCENE_FRAMES)):
        for canvas in scene(np.random.default_rng((seed, number)), num_frames):
            yield (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def encode(frames: Iterator[np.ndarray], path: str | Path) -> None:
    """Write H.264 with B-frames; the file appears whole or not at all."""
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.mp4")
    try:
        with av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=FPS, options=ENCODER)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            stream.time_base = Fraction(1, FPS)
            for pixels in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("demo_clip.mp4")
    encode(render(), output)
    print(f"{output}: {output.stat().st_size / 1000:.0f} kB, {sum(SCENE_FRAMES) / FPS:.1f} s")
