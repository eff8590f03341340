"""Continuous batching in plain Python, event by event: the oracle of `neupims.serving.loop`.

It follows the rules as the docstring of `loop` states them, with lists and whole numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Request:
    """A request, and what has become of it."""

    number: int
    arrival: int  # nanoseconds
    length: int  # tokens in memory
    prompt: int  # of these, to be computed
    left: int  # to be made
    key: int
    paused: bool = False
    pauses: int = 0
    admitted: int = -1
    first: int = -1
    end: int = -1


@dataclass
class Machine:
    """Channels with places, and the functions that the rules take."""

    rows: int
    places: int
    batch: int
    prompts: int
    prefill_tokens: int
    chunk: int
    window: int
    needed: Callable[[int], int]
    room: int
    spare: int
    # (loads, counts, admitted before) -> the value of each channel
    packing: Callable[[list[float], list[int], int], list[float]]
    load: Callable[[int], float]
    # channels with the tokens of each place, None where it is not computed -> nanoseconds
    decode: Callable[[list[list[int | None]]], int]
    prefill: Callable[[list[list[int | None]]], int]
    # layout of a decode step, [(tokens before, tokens)] of chunks -> nanoseconds
    mixed: Callable[[list[list[int | None]], list[tuple[int, int]]], int]


@dataclass
class Run:
    """The requests after a run, and what happened on the way."""

    requests: list[Request]
    iterations: list[tuple[int, int]] = field(default_factory=list)  # end, requests computed
    fullest: int = 0
    tokens: int = 0


def serve_events(machine: Machine, requests: list[Request]) -> Run:
    """Returns the run of all requests, which are in their order of arrival."""
    run, now, coming = Run(requests), 0, list(requests)
    waiting: list[Request] = []
    channels: list[list[Request | None]] = [[None] * machine.places for _ in range(machine.rows)]
    admitted = 0

    def there(channel):
        return [each for each in channel if each is not None]

    def used(channel):
        return sum(machine.needed(each.length) for each in there(channel) if not each.paused)

    while coming or waiting or any(map(there, channels)):
        while coming and coming[0].arrival <= now and len(waiting) < machine.window:
            waiting.append(coming.pop(0))

        for channel in channels:
            lost = False
            while used(channel) > machine.room:
                youngest = max(
                    (each for each in there(channel) if not each.paused), key=lambda r: r.number
                )
                youngest.paused, youngest.prompt = True, youngest.length
                youngest.pauses += 1
                lost = True
            paused = [each for each in there(channel) if each.paused]
            if paused and not lost:
                oldest = min(paused, key=lambda r: r.number)
                if used(channel) + machine.needed(oldest.length) <= machine.room - machine.spare:
                    oldest.paused = False

        everyone = [each for channel in channels for each in there(channel)]
        tokens = sum(each.prompt for each in everyone if not each.paused)
        while waiting and len(everyone) < machine.batch:
            head = min(waiting, key=lambda r: r.key)
            if head.prompt and tokens and tokens + head.prompt > machine.prefill_tokens:
                break
            possible = [
                row
                for row, channel in enumerate(channels)
                if None in channel
                and not any(each.paused for each in there(channel))
                and used(channel) + machine.needed(head.length) <= machine.room - machine.spare
            ]
            if not possible:
                break
            values = machine.packing(
                [sum(machine.load(each.length) for each in there(c)) for c in channels],
                [len(there(c)) for c in channels],
                admitted,
            )
            row = min(possible, key=lambda row: (values[row], row))
            channels[row][channels[row].index(None)] = head
            waiting.remove(head)
            everyone.append(head)
            head.admitted = now
            admitted += 1
            tokens += head.prompt

        active = [each for c in channels for each in there(c) if not each.paused]
        run.fullest = max(run.fullest, *(used(channel) for channel in channels))
        if not active:
            if coming and not waiting:
                now = max(now, coming[0].arrival)
            continue

        def lay_out(chosen, tokens, channels=channels):
            mine = {each.number for each in chosen}
            return [
                [tokens(each) if each and each.number in mine else None for each in channel]
                for channel in channels
            ]

        prompts = [each for each in active if each.prompt]
        if machine.chunk:
            decodes = [each for each in active if not each.prompt]
            budget, chunks = max(machine.chunk - len(decodes), 1), []
            computed = list(decodes)
            for each in sorted(prompts, key=lambda r: r.number)[: machine.prompts]:
                part = min(each.prompt, budget)
                budget -= part
                if part:
                    chunks.append((each.length - each.prompt, part))
                    each.prompt -= part
                    computed += [each] if not each.prompt else []
            layout = lay_out(decodes, lambda r: r.length)
            now += machine.mixed(layout, chunks) if chunks else machine.decode(layout)
        elif prompts:
            computed = prompts[: machine.prompts]
            now += machine.prefill(lay_out(computed, lambda r: r.prompt))
        else:
            computed = active
            now += machine.decode(lay_out(active, lambda r: r.length))
        run.iterations.append((now, len(computed)))
        for each in computed:
            each.prompt = 0
            each.length += 1
            each.left -= 1
            run.tokens += 1
            if each.first < 0:
                each.first = now
        for channel in channels:
            for place, each in enumerate(channel):
                if each is not None and each.left <= 0:
                    each.end = now
                    channel[place] = None
    return run
