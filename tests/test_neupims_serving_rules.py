"""neupims/serving/loop.py: the rules, against the same rules in plain Python."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving_events import Machine, Request, serve_events

from neupims.serving import clock
from neupims.serving.clock import Instant
from neupims.serving.loop import is_done, run_chunk, start
from neupims.serving.policy import in_turn, least_loaded
from neupims.serving.serve import drop_empty
from neupims.serving.state import NOBODY, Memory, Requests, Rules, Spent

ROWS, PLACES, BATCH, PROMPTS, PREFILL, WINDOW, COUNT, LONGEST = 3, 4, 9, 2, 40, 6, 24, 80


class WholeCosts:
    """Costs in whole nanoseconds, so that both sides compute the same."""

    def decode(self, tables, lengths, holds):
        work = jnp.where(holds, lengths // 3, 0).sum(axis=1).max()
        return _spent(tables + 7 * holds.sum() + work)

    def prefill(self, tables, prompts):
        return _spent(500 + 11 * prompts.sum())

    def mixed(self, tables, lengths, holds, before, chunks):
        work = (chunks * (13 + before)).sum()
        return Spent(
            Instant(jnp.int32(0), self.decode(tables, lengths, holds).time.low + work),
            *[jnp.float32(0)] * 4,
        )


def _spent(nanoseconds):
    zero = jnp.float32(0)
    return Spent(Instant(jnp.int32(0), nanoseconds.astype(jnp.int32)), zero, zero, zero, zero)


def decode_events(layout, base):
    work = [[length // 3 for length in row if length is not None] for row in layout]
    return base + 7 * sum(map(len, work)) + max(map(sum, work))


def prefill_events(layout):
    return 500 + 11 * sum(prompt or 0 for row in layout for prompt in row)


def mixed_events(layout, chunks, base):
    return decode_events(layout, base) + sum(part * (13 + before) for before, part in chunks)


def blocks(length):
    return -(-length // 4)


COSTS = WholeCosts()
PACKINGS = {
    least_loaded: lambda loads, counts, admitted: loads,
    in_turn: lambda loads, counts, admitted: [(row - admitted) % ROWS for row in range(ROWS)],
}


def random_trace(seed):
    """Small traces in a memory that is often too small, so that requests are paused."""
    random = np.random.default_rng(seed)
    length = random.integers(1, 30, COUNT)
    return {
        "arrival": np.sort(random.integers(0, random.choice([100, 60_000]), COUNT)),
        "length": length,
        "prompt": length * (seed % 5 > 0),  # computed by other devices
        "left": random.integers(1, 40, COUNT),
        "key": random.permutation(COUNT) if seed % 3 == 0 else np.arange(COUNT),
        "room": random.integers(20, 60),
        "spare": random.integers(0, 3),
        "base": random.integers(100, 5000),
    }


def scan(traces, packing, chunk=0, **ahead):
    """Admission, first token, end and pauses of each request of each trace, (traces, n, 4)."""
    rules = Rules(ROWS, PLACES, BATCH, PROMPTS, PREFILL, chunk, WINDOW, packing, COSTS, **ahead)

    def column(name, last):
        values = np.stack([trace[name] for trace in traces])
        return jnp.asarray(np.pad(values, ((0, 0), (0, WINDOW)), constant_values=last), jnp.int32)

    arrival = clock.split(np.asarray(column("arrival", 0)))
    late = jnp.arange(COUNT + WINDOW) >= COUNT
    requests = Requests(
        Instant(jnp.where(late, 2**31 - 1, arrival.high), jnp.asarray(arrival.low)),
        column("length", 1),
        column("prompt", 0),
        column("left", 1),
        column("key", NOBODY - 1),
    )
    one = jnp.ones(ROWS, jnp.int32)
    memories = Memory(
        jnp.tile(jnp.array([blocks(length) for length in range(LONGEST)]), (len(traces), 1)),
        jnp.stack([trace["room"] * one for trace in traces]),
        jnp.array([trace["spare"] for trace in traces], jnp.int32),
        jnp.tile(jnp.arange(LONGEST) * 1.0, (len(traces), 1)),
        jnp.full(len(traces), ROWS),
        jnp.full(len(traces), rules.places),
    )
    bases = jnp.array([trace["base"] for trace in traces], jnp.int32)
    states = jax.vmap(partial(start, rules))(requests)
    follow = jax.vmap(partial(run_chunk, rules, iterations=256))
    steps = []
    while not jax.vmap(partial(is_done, rules))(requests, states).all():
        states, step = follow(bases, memories, requests, states)
        steps.append(jax.tree.map(np.asarray, step))
    rows = np.asarray(states.served)[:, :COUNT]
    times = [clock.join(Instant(rows[..., each], rows[..., each + 1])) for each in (0, 2, 4)]
    every = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *steps)
    return np.stack([*times, rows[..., 6]], axis=-1), every


def serve_events_of(trace, packing, chunk=0):
    requests = [
        Request(number, *(int(trace[name][number]) for name in ("arrival", "length", "prompt")),
                int(trace["left"][number]), int(trace["key"][number]))
        for number in range(COUNT)
    ]  # fmt: skip
    machine = Machine(
        ROWS,
        PLACES,
        BATCH,
        PROMPTS,
        PREFILL,
        chunk,
        WINDOW,
        blocks,
        int(trace["room"]),
        int(trace["spare"]),
        PACKINGS[packing],
        float,
        partial(decode_events, base=int(trace["base"])),
        prefill_events,
        partial(mixed_events, base=int(trace["base"])),
    )
    return serve_events(machine, requests)


def check(seeds, packing, chunk=0, **ahead):
    traces = [random_trace(seed) for seed in seeds]
    found, steps = scan(traces, packing, chunk, **ahead)
    paused = 0
    for place, trace in enumerate(traces):
        run = serve_events_of(trace, packing, chunk)
        wanted = np.array([[r.admitted, r.first, r.end, r.pauses] for r in run.requests])
        np.testing.assert_array_equal(found[place], wanted, err_msg=f"seed {seeds[place]}")
        ends = clock.join(Instant(*(part[place] for part in steps.now)))
        computed = steps.computed[place]
        there = (computed > 0) | (steps.prompt_tokens[place] > 0)
        listed = list(zip(ends[there], computed[there], strict=True))
        assert listed == run.iterations
        assert steps.fullest[place].max() == run.fullest <= trace["room"]
        assert computed.sum() == trace["left"].sum()  # tokens in are tokens out
        paused += wanted[:, 3].sum()
    return paused


def test_the_scan_serves_as_the_event_simulation_does():
    assert check(range(40), least_loaded) > 20
    check(range(40, 60), in_turn)
    check(range(60, 80), least_loaded, chunk=11)


def test_decode_steps_computed_together_change_nothing():
    assert check(range(40), least_loaded, ahead=5, few=3) > 20
    check(range(60, 80), in_turn, chunk=11, ahead=5, few=3)


def test_what_happened_is_the_same_in_steps_computed_together():
    for seed in (1, 5, 7):
        traces = [random_trace(seed)]
        rows = []
        for options in ({}, {"ahead": 5, "few": 3}):
            steps = scan(traces, least_loaded, **options)[1]
            rows.append(drop_empty(jax.tree.map(lambda part: part[0], steps)))
        jax.tree.map(np.testing.assert_array_equal, *rows)


def test_decode_steps_are_computed_together():
    """Fewer steps of the loop than iterations: what the option is for."""
    trace = random_trace(1) | {"left": np.full(COUNT, 30), "arrival": np.arange(COUNT) * 10**6}
    _, one = scan([trace], least_loaded)
    _, several = scan([trace], least_loaded, ahead=8, few=PLACES)
    rows = (several.computed > 0).reshape(-1, 8)
    assert rows.sum() == (one.computed > 0).sum()
    assert rows.any(axis=1).sum() < (one.computed > 0).sum() / 3


@pytest.mark.slow
def test_the_scan_serves_a_thousand_traces_as_the_event_simulation_does():
    for begin in range(0, 1000, 250):
        packing, chunk = (least_loaded, in_turn)[begin // 250 % 2], begin // 500 * 11
        check(range(begin, begin + 250), packing, chunk)
        check(range(begin, begin + 250), packing, chunk, ahead=8, few=PLACES)


def test_nobody_overtakes_in_the_order_of_arrival_and_nobody_is_lost():
    traces = [random_trace(seed) for seed in range(1, 40, 3)]  # those with keys in order
    found, _ = scan(traces, least_loaded)
    for trace, times in zip(traces, found, strict=True):
        assert trace["key"].tolist() == list(range(COUNT))
        admitted, first, end, _ = times.T
        assert (np.diff(admitted) >= 0).all()
        assert (admitted >= trace["arrival"]).all()
        assert (first > admitted).all()
        assert (end >= first).all()


def test_time_is_exact_for_years():
    moments = np.array([0, 1, 2**30 - 1, 2**30, 3600 * 10**9 + 1, 60 * 365 * 86400 * 10**9 + 7])
    split = clock.split(moments)
    assert (clock.join(split) == moments).all()
    later = clock.add(Instant(*map(jnp.asarray, split)), clock.from_seconds(jnp.float32(0.5)))
    assert (clock.join(later) == moments + 500_000_000).all()
    long = clock.join(clock.from_seconds(jnp.float32(3000.0)))
    assert long == pytest.approx(3000 * 10**9, rel=1e-7)  # float32 resolves no more
