"""Misses that work forces: the exact search equals brute force on small instances, and no bound is above it."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np

from twinpool.sim.bound_misses import EXACT, Caps, Jobs, Pairs, by_interval, by_size, exact, least_misses, unfinished


def random_jobs(rng: random.Random, n: int) -> Jobs:
    owners = sorted([*range(n), *[i for i in range(n) if rng.random() < 0.4]])
    release = [rng.randint(0, 12) for _ in owners]
    due = [at + rng.randint(1, 8) for at in release]
    seconds = [rng.randint(1, 6) for _ in owners]
    columns = [np.array(column, dtype=np.float64) for column in (release, due, seconds)]
    return Jobs(np.array(owners, dtype=np.int64), *columns)


def fits(jobs: Jobs, served: set[int]) -> bool:
    """Unit time by unit time, what is due first first: whether all is done in time. Whole seconds only."""
    left = [[due, release, seconds] for owner, release, due, seconds in zip(*jobs, strict=True) if owner in served]
    for now in range(64):
        if any(seconds > 0 and due <= now for due, _, seconds in left):
            return False
        ready = [piece for piece in left if piece[1] <= now and piece[2] > 0]
        if ready:
            min(ready)[2] -= 1
    return all(seconds == 0 for _, _, seconds in left)


def fewest_misses(kinds: list[Jobs], n: int) -> int:
    for misses in range(n + 1):
        for served in combinations(range(n), n - misses):
            if all(fits(jobs, set(served)) for jobs in kinds):
                return misses
    raise AssertionError("nobody served is possible")


def test_unfinished_is_the_least_that_any_schedule_leaves() -> None:
    rng = random.Random(1)
    for _ in range(200):
        jobs = random_jobs(rng, 5)
        order = np.argsort(jobs.release, kind="stable")
        units = [(int(jobs.release[i]), int(jobs.due[i])) for i in order for _ in range(int(jobs.seconds[i]))]
        assert unfinished(*[column[order].tolist() for column in jobs[1:]]) == len(units) - matched(units)


def matched(units: list[tuple[int, int]]) -> int:
    """The most units of work that can have a second of their own: augmenting paths."""
    holder: dict[int, int] = {}

    def place(unit: int, seen: set[int]) -> bool:
        for slot in range(*units[unit]):
            if slot not in seen:
                seen.add(slot)
                if slot not in holder or place(holder[slot], seen):
                    holder[slot] = unit
                    return True
        return False

    return sum(place(unit, set()) for unit in range(len(units)))


def test_exact_equals_brute_force_and_bounds_stay_below() -> None:
    rng = random.Random(2)
    tight = {by_size: 0, by_interval: 0}
    for _ in range(300):
        n = rng.randint(1, 6)
        kinds = [random_jobs(rng, n) for _ in range(rng.randint(1, 2))]
        truth = fewest_misses(kinds, n)
        assert exact(kinds) == truth
        for rule in tight:
            found = max(rule(jobs) for jobs in kinds)
            assert found <= truth
            tight[rule] += found == truth
    assert min(tight.values()) > 150, tight  # not empty promises: mostly they find the very number


def random_caps(rng: random.Random, n: int) -> Caps:
    groups = rng.randint(1, 3)
    members, most = [rng.randrange(groups) for _ in range(n)], [rng.randint(0, 2) for _ in range(groups)]
    return Caps(np.array(members, dtype=np.int64), np.array(most, dtype=np.int64))


def keeps(caps: Caps, dropped: set[int]) -> bool:
    return all(sum(caps.group[i] == g for i in dropped) <= most for g, most in enumerate(caps.most))


def test_with_caps_exact_equals_brute_force_and_by_size_stays_below() -> None:
    rng = random.Random(13)
    tight = more = impossible = 0
    for _ in range(300):
        n = rng.randint(1, 6)
        jobs, caps = random_jobs(rng, n), random_caps(rng, n)
        sets = [set(served) for count in range(n, -1, -1) for served in combinations(range(n), count)]
        within = [served for served in sets if keeps(caps, set(range(n)) - served) and fits(jobs, served)]
        truth = n - len(within[0]) if within else n + 1
        assert exact([jobs], caps) == truth
        plain, found = by_size(jobs), by_size(jobs, caps=caps)
        assert plain <= found <= truth
        tight += found == truth
        more += found > plain
        impossible += found == truth > n
    assert tight > 150
    assert more > 50
    assert impossible > 30


def lost(jobs: Jobs, pairs: Pairs, served: set[int]) -> float:
    """Seconds that cannot be done in time of what a served set needs, pairs too."""
    pieces = [(at, due, s) for i, at, due, s in zip(*jobs, strict=True) if i in served]
    between = zip(*pairs[:5], strict=True)
    pieces += [(at, due, s) for i, j, at, due, s in between if i in served and j in served]
    return unfinished(*zip(*sorted(pieces), strict=True)) if pieces else 0.0


def test_pairs_and_caps_never_force_more_than_some_set_of_requests_misses() -> None:
    rng = random.Random(14)
    forced = tight = 0
    for _ in range(400):
        n = rng.randint(2, 7)
        jobs, caps = random_jobs(rng, n), random_caps(rng, n)
        chosen = rng.sample(list(combinations(range(n), 2)), rng.randint(1, n - 1))
        release = np.array([float(rng.randint(0, 12)) for _ in chosen])
        due = release + np.array([float(rng.randint(1, 8)) for _ in chosen])
        first, second = np.array(chosen, dtype=np.int64).T
        seconds = np.array([float(rng.randint(1, 5)) for _ in chosen])
        pairs = Pairs(first, second, release, due, seconds, rng.choice((0.0, 1.0, 3.0)))
        sets = [set(served) for count in range(n, -1, -1) for served in combinations(range(n), count)]
        able = [served for served in sets if fits(jobs, served) and lost(jobs, pairs, served) <= pairs.credit + 1e-9]
        within = [served for served in able if keeps(caps, set(range(n)) - served)]
        truth = n - len(within[0]) if within else n + 1
        assert by_size(jobs, pairs=pairs) <= n - len(able[0])
        found = least_misses(jobs, None, pairs, caps)
        assert found <= truth
        forced, tight = forced + (found > 0), tight + (found == truth)
    assert forced > 200
    assert tight > 150


def test_larger_instances_have_bounds_below_exact_and_above_naught() -> None:
    rng = random.Random(3)
    found = 0
    for _ in range(40):
        jobs = random_jobs(rng, EXACT)
        truth = exact([jobs])
        assert max(by_size(jobs), by_interval(jobs)) <= truth
        found += max(by_size(jobs), by_interval(jobs))
    assert found > 80


def test_bursts_far_apart_add_up() -> None:
    release = np.repeat(np.arange(50.0) * 100.0, 3)
    jobs = Jobs(np.arange(150), release, release + 2.0, np.ones(150))  # two of each three fit
    assert by_interval(jobs) == 50
    assert by_size(jobs) == 50


def test_the_largest_are_dropped_first() -> None:
    seconds = np.array([1.0] * 8 + [10.0])
    jobs = Jobs(np.arange(9), np.zeros(9), np.full(9, 8.0), seconds)
    assert by_size(jobs) == by_interval(jobs) == exact([jobs]) == 1
