# SPDX-License-Identifier: Apache-2.0
"""The selection policies: each a function `(Candidates, budget) -> (T, L) bool`.

A unit (a patch, or a block of patches) kept at a location stands for that location until the next one is kept there,
so policies weigh what a viewer of the kept units would get wrong. All decide on full-resolution colour.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .distances import PatchDistances, patch_distances

_MOTION_RANGE = 32.0  # grey levels of change, beyond the frame's median, that count as full motion
_LEAST_PRICE = 0.5  # below any squared distance
_STRIDE = np.log(2)  # first step of the price search away from its guess
_MOST_STEPS = 60  # of that search; seven are usual
_LEAST_BRACKET = 1e-7  # of log price
_BUDGET_SLACK = 0.005  # share of the budget left to the final filling


@dataclass(frozen=True)
class Candidates:
    """What a policy chooses from: the units (patches, or blocks of patches) of one rectangle of the lattice.

    Attributes:
        frames: `(T, H, W, 3)` uint8.
        rows, columns: the rectangle in units; L locations in raster order.
        unit: side of a unit in pixels.
        keeps_first: all units of slot 0 are kept.
        motion_weight, stop_below_error, seed: as in `SelectionConfig`.
        scores: `(T, L)` energy per unit, for `energy`.
    """

    frames: np.ndarray
    rows: slice
    columns: slice
    unit: int
    keeps_first: bool = True
    motion_weight: float = 0.0
    stop_below_error: float = 0.0
    seed: int = 0
    scores: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(T, L)`."""
        return len(self.frames), (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)

    @cached_property
    def distances(self) -> PatchDistances:
        """Distances between the units of each location."""
        return patch_distances(self.frames, self.unit, self.rows, self.columns, with_dark=not self.keeps_first)

    @cached_property
    def error_weight(self) -> np.ndarray | None:
        """`(L, T)` float32 price of error, 1 where nothing moves; None without a motion weight.

        Motion is the change to the previous frame in grey levels beyond the frame's median change, so that noise and
        even lighting changes cost nothing extra.
        """
        if not self.motion_weight:
            return None
        change = np.sqrt(self.distances.steps() / self.distances.num_features)
        motion = np.clip((change - np.median(change, axis=0)) / _MOTION_RANGE, 0, 1)
        return (1 + self.motion_weight * motion).astype(np.float32)

    @property
    def least_error(self) -> float:
        """`stop_below_error` as a squared distance."""
        return self.stop_below_error**2 * self.unit**2 * 3

    def nothing_kept(self) -> np.ndarray:
        """`(T, L)` bool with slot 0 kept if it has to be."""
        kept = np.zeros(self.shape, bool)
        kept[0] = self.keeps_first
        return kept


def replenish(candidates: Candidates, budget: int) -> np.ndarray:
    """Keep a unit when what is held at its place errs by more than a threshold; the threshold meets the budget.

    What a codec does with conditional replenishment: causal, and every change above the threshold is kept. Given the
    threshold it is linear in T (`ReplenishStream`); finding it compares all pairs of slots once.
    """
    if candidates.least_error:
        kept, _ = _replenish_at(candidates, candidates.least_error)
        if kept.sum() <= budget:
            return kept
    highest = candidates.unit**2 * 3 * 255**2 * (1 + candidates.motion_weight)
    guess = _likely_threshold(candidates, budget)
    threshold = _search_price(lambda t: int(_replenish_at(candidates, t)[0].sum()), budget, guess, highest)
    kept, errors = _replenish_at(candidates, threshold)
    return _fill(kept, budget, errors)


def _replenish_at(candidates: Candidates, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """`(T, L)` kept units and squared errors of what is held, for one threshold."""
    distances, weight = candidates.distances, candidates.error_weight
    num_frames, num_locations = candidates.shape
    kept, errors = candidates.nothing_kept(), np.zeros(candidates.shape)
    held = np.full(num_locations, 0 if candidates.keeps_first else -1)
    for t in range(1 if candidates.keeps_first else 0, num_frames):
        errors[t] = distances.from_slots(held, t)
        if weight is not None:
            errors[t] *= weight[:, t]
        kept[t] = errors[t] > threshold
        held[kept[t]] = t
    return kept, errors


def _likely_threshold(candidates: Candidates, budget: int) -> float:
    """Where the search starts: as many steps from one slot to the next exceed it as units may be kept."""
    steps = candidates.distances.steps().ravel()
    wanted = min(max(budget - candidates.shape[1], 1), len(steps))
    return max(float(np.partition(steps, -wanted)[-wanted]), _LEAST_PRICE)


def _search_price(count_at: Callable[[float], int], budget: int, guess: float, highest: float) -> float:
    """The lowest price (or threshold) found at which at most `budget` units are kept; counts fall with the price.

    On logarithms: steps away from the guess until the budget is bracketed, then secant steps, every third one a
    halving so that the bracket always shrinks.
    """
    low, high, price = np.log(_LEAST_PRICE), np.log(highest) + 1, np.log(guess)  # exp(log(highest)) may fall short
    count_low = count_high = None
    for step in range(_MOST_STEPS):
        count = count_at(float(np.exp(price)))
        if count > budget:
            low, count_low = price, count
        else:
            high, count_high = price, count
        is_close = count_high is not None and count_high >= budget * (1 - _BUDGET_SLACK)
        if is_close or high - low < _LEAST_BRACKET:
            break
        stride = _STRIDE * 2**step
        if count_high is None:
            price = min(price + stride, (price + high) / 2)
        elif count_low is None:
            price = max(price - stride, low)
        elif step % 3 == 2 or not count_high:
            price = (low + high) / 2
        else:
            share = np.log(count_low / budget) / np.log(count_low / count_high)
            price = low + np.clip(share, 0.02, 0.98) * (high - low)
    return float(np.exp(high))


def _fill(kept: np.ndarray, budget: int, priority: np.ndarray | None = None) -> np.ndarray:
    """Add units until the budget is met exactly: highest priority first, then by `(t, h, w)`."""
    missing = budget - int(kept.sum())
    if missing > 0:
        free = np.flatnonzero(~kept)
        order = free if priority is None else free[np.argsort(-priority.ravel()[free], kind="stable")]
        kept.reshape(-1)[order[:missing]] = True
    return kept


def rate_distortion(candidates: Candidates, budget: int) -> np.ndarray:
    """Least total squared error of what is held, at a price per kept unit that meets the budget.

    Per location a run of slots a...b-1 is shown by its first unit and costs the sum of its distances; a dynamic
    program over the slots chooses the runs for a given price, and the price is found by search.
    """
    costs = _run_costs(candidates)
    dark = None if candidates.keeps_first else _dark_costs(candidates)
    if candidates.least_error:
        start, count = _cheapest_runs(costs, candidates.least_error, dark)
        if count <= budget:
            return _mark_runs(start, candidates)
    highest = (costs[:, -1, 0].max() if dark is None else dark[:, -1].max()) + 1.0
    guess = _likely_threshold(candidates, budget)
    price = _search_price(lambda p: _cheapest_runs(costs, p, dark)[1], budget, guess, float(highest))
    kept = _mark_runs(_cheapest_runs(costs, price, dark)[0], candidates)
    return _split_runs(kept, budget, costs, dark)


def _run_costs(candidates: Candidates) -> np.ndarray:
    """`(L, T + 1, T)` float32: entry `[l, b, a]` is the error of showing slots a...b-1 by unit a; inf where a >= b."""
    pairs = candidates.distances.all_pairs()
    if candidates.error_weight is not None:
        pairs *= candidates.error_weight[:, None]
    num_locations, num_frames = pairs.shape[:2]
    costs = np.full((num_locations, num_frames + 1, num_frames), np.inf, np.float32)
    for first in range(num_frames):
        np.cumsum(pairs[:, first, first:], axis=1, out=costs[:, first + 1 :, first])
    return costs


def _dark_costs(candidates: Candidates) -> np.ndarray:
    """`(L, T + 1)` float32: error of showing black before slot b."""
    dark = candidates.distances.dark.astype(np.float64)
    if candidates.error_weight is not None:
        dark = dark * candidates.error_weight
    return np.pad(np.cumsum(dark, axis=1), ((0, 0), (1, 0))).astype(np.float32)


def _cheapest_runs(costs: np.ndarray, price: float, dark: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Dynamic program for one price.

    Returns:
        `(L, T + 1)` start of the last run before each slot (-1: black from the beginning), and the number of kept
        units; a whole first frame is not charged but counted.
    """
    num_locations, num_slots, num_frames = costs.shape
    total = np.zeros((num_locations, num_slots), np.float32)
    runs = np.zeros((num_locations, num_slots), np.int32)
    start = np.full((num_locations, num_slots), -1, np.int32)
    location = np.arange(num_locations)
    charged = total[:, :num_frames].copy()  # total plus the price of the run that starts there
    charged[:, 0] = 0 if dark is None else price
    for slot in range(1, num_slots):
        options = charged[:, :slot] + costs[:, slot, :slot]
        choice = options.argmin(1)
        least = options[location, choice]
        number = runs[location, choice] + 1
        if dark is not None:
            stays_dark = dark[:, slot] <= least
            choice, least = np.where(stays_dark, -1, choice), np.where(stays_dark, dark[:, slot], least)
            number = np.where(stays_dark, 0, number)
        total[:, slot], start[:, slot], runs[:, slot] = least, choice, number
        if slot < num_frames:
            charged[:, slot] = least + np.float32(price)
    return start, int(runs[:, -1].sum())


def _mark_runs(start: np.ndarray, candidates: Candidates) -> np.ndarray:
    """Follow the chosen runs backwards: `(T, L)` kept."""
    num_frames, num_locations = candidates.shape
    kept = candidates.nothing_kept()
    location = np.arange(num_locations)
    slot = np.full(num_locations, num_frames)
    while (active := slot > 0).any():
        slot = np.where(active, start[location, np.maximum(slot, 0)], slot)
        begins = active & (slot >= 0)
        kept[slot[begins], location[begins]] = True
    return kept


def _split_runs(kept: np.ndarray, budget: int, costs: np.ndarray, dark: np.ndarray | None) -> np.ndarray:
    """Spend what is left of the budget where splitting runs lowers the error most, once per location and round."""
    while (missing := budget - int(kept.sum())) > 0:
        gains = _split_gains(kept, costs, dark)
        slot = gains.argmax(0)
        best = gains[slot, np.arange(kept.shape[1])]
        order = np.argsort(-best, kind="stable")[:missing]
        order = order[np.isfinite(best[order])]
        kept[slot[order], order] = True
    return kept


def _split_gains(kept: np.ndarray, costs: np.ndarray, dark: np.ndarray | None) -> np.ndarray:
    """`(T, L)` float32: error saved by keeping a unit in addition, -inf where one is kept already."""
    num_frames, num_locations = kept.shape
    slot, location = np.arange(num_frames)[:, None], np.arange(num_locations)[None]
    first = np.maximum.accumulate(np.where(kept, slot, -1))  # the unit shown before
    following = np.minimum.accumulate(np.where(kept, slot, num_frames)[::-1])[::-1]
    end = np.vstack([following[1:], np.full((1, num_locations), num_frames)])
    shown = costs[location, end, np.maximum(first, 0)] - costs[location, slot, np.maximum(first, 0)]
    if dark is not None:
        shown = np.where(first < 0, dark[location, end] - dark[location, slot], shown)
    gains = shown - costs[location, end, slot]
    gains[kept] = -np.inf
    return gains


def coverage(candidates: Candidates, budget: int) -> np.ndarray:
    """Greedy facility location: keep what lowers the error to the nearest kept unit of the location most.

    The gains of a location fall from one unit to the next, so the best gains overall are the greedy solution of every
    budget at once: budgets are nested.
    """
    kept = candidates.nothing_kept()
    gains, rounds, slots, locations = _coverage_gains(candidates, budget - int(kept.sum()))
    # of equal gains the earlier round goes first, whatever later rounds found: that keeps budgets nested
    order = np.lexsort((locations, slots, rounds, -gains))[: budget - int(kept.sum())]
    order = order[gains[order] > candidates.least_error]
    kept[slots[order], locations[order]] = True
    return kept if candidates.least_error else _fill(kept, budget)


def _coverage_gains(candidates: Candidates, wanted: int) -> tuple[np.ndarray, ...]:
    """Gains, rounds, slots and locations of greedy additions, one per location and round; at least the `wanted`
    largest gains are among them."""
    weight, distances = candidates.error_weight, candidates.distances
    pairs = distances.all_pairs()
    if weight is not None:
        pairs *= weight[:, None]
    near = pairs[:, 0].copy()
    if not candidates.keeps_first:
        near = (distances.dark if weight is None else distances.dark * weight).astype(np.float32)
    active, found = np.arange(len(near)), []
    floor = 0.0
    for number in range(len(candidates.frames)):
        gain = _total_gain(near, pairs)
        slot = gain.argmax(1)
        best = gain[np.arange(len(gain)), slot]
        going = best > floor
        if not going.any():
            break
        active, near, pairs, slot, best = active[going], near[going], pairs[going], slot[going], best[going]
        found.append((best, np.full(len(best), number), slot, active))
        near = np.minimum(near, pairs[np.arange(len(slot)), slot])
        gains = np.concatenate([part[0] for part in found])
        floor = float(np.partition(gains, -wanted)[-wanted]) if 0 < wanted < len(gains) else 0.0
    if not found:
        return np.zeros(0), *(np.zeros(0, int) for _ in range(3))
    return tuple(np.concatenate(parts) for parts in zip(*found))


def _total_gain(near: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """`(L, T)`: how much keeping each slot would lower the summed error to the nearest kept unit."""
    gain = np.empty(near.shape, np.float32)
    for start in range(0, len(near), 64):  # 64 locations of 64 x 64 floats fit the cache
        part = slice(start, start + 64)
        gain[part] = np.maximum(near[part, None] - pairs[part], 0).sum(2)
    return gain


def energy(candidates: Candidates, budget: int) -> np.ndarray:
    """The published OneVision rule: the highest motion and residual energy of all frames."""
    return _fill(candidates.nothing_kept(), budget, candidates.scores)


def uniform(candidates: Candidates, budget: int) -> np.ndarray:
    """Whole frames, evenly spaced; a remainder is spread evenly over the last one."""
    num_frames, num_locations = candidates.shape
    kept = np.zeros((num_frames, num_locations), bool)
    whole, rest = divmod(budget, num_locations)
    slots = np.linspace(0, num_frames - 1, whole + bool(rest)).astype(int)
    kept[slots[:whole]] = True
    if rest:
        kept[slots[-1], np.linspace(0, num_locations - 1, rest).astype(int)] = True
    return kept


def random(candidates: Candidates, budget: int) -> np.ndarray:
    """A control: any units, equally likely."""
    priority = np.random.default_rng(candidates.seed).random(candidates.shape)
    return _fill(candidates.nothing_kept(), budget, priority)


POLICIES: dict[str, Callable[[Candidates, int], np.ndarray]] = {
    "replenish": replenish,
    "rate_distortion": rate_distortion,
    "coverage": coverage,
    "energy": energy,
    "uniform": uniform,
    "random": random,
}
"""Selection policies by name."""
