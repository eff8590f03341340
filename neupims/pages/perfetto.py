"""Stages as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing.

Each device is a process, with lanes for stages, NPU and PIM and one for each channel. The format is
"Trace Event Format": complete events ("ph": "X") with times in microseconds.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neupims.files import write_text
from neupims.pages.step_plots import operation_name

STAGE_LANE, NPU_LANE, PIM_LANE, FIRST_CHANNEL_LANE = 0, 1, 2, 10
LANES = {"SA": (NPU_LANE, "NPU"), "PIM": (PIM_LANE, "PIM")}


def write_perfetto(
    path: str | Path,
    result: Mapping[str, Any],
    *,
    clock_hz: float,
    channel_cycles: Sequence[Sequence[float]] = (),
    devices: int = 1,
) -> None:
    """Writes the trace of a step, with each stage once and in order.

    Args:
        path: The JSON file.
        result: The object that `simulate --json` prints, `Simulation.to_dict`.
        clock_hz: Clock of the core, to turn cycles into microseconds.
        channel_cycles: Core cycles of attention, by sub-batch and channel; () draws no channels.
        devices: Devices of a tensor-parallel group, which all do the same at the same time.

    Raises:
        OSError: The file cannot be written.
    """
    found = make_events(result, clock_hz=clock_hz, channel_cycles=channel_cycles, devices=devices)
    trace = {"displayTimeUnit": "ns", "traceEvents": found}
    write_text(path, json.dumps(trace, allow_nan=False))


def make_events(
    result: Mapping[str, Any],
    *,
    clock_hz: float,
    channel_cycles: Sequence[Sequence[float]] = (),
    devices: int = 1,
) -> list[dict[str, Any]]:
    """Returns the events of `write_perfetto`, in the Trace Event Format.

    Args:
        result: As in `write_perfetto`.
        clock_hz: As in `write_perfetto`.
        channel_cycles: As in `write_perfetto`.
        devices: As in `write_perfetto`.
    """
    listed: list[dict[str, Any]] = []
    microseconds = 1e6 / clock_hz
    for device in range(devices):
        listed.append(
            _name(
                "process_name", device, 0, f"device {device}: {result['system']}, {result['model']}"
            )
        )
        listed += [
            _name("thread_name", device, lane, name)
            for lane, name in ((STAGE_LANE, "stage"), *LANES.values())
        ]
        channels = max((len(each) for each in channel_cycles), default=0)
        listed += [
            _name("thread_name", device, FIRST_CHANNEL_LANE + channel, f"channel {channel}")
            for channel in range(channels)
        ]
        begin = 0.0
        for stage, cycles in result["stage_cycles"].items():
            end = begin + cycles
            listed += _slice(f"stage {stage}", device, STAGE_LANE, begin, end, microseconds)
            mine = [each for each in result["ops"] if each["stage"] == stage]
            for platform, (lane, _) in LANES.items():
                for each in _separate(
                    [each for each in mine if each["platform"] == platform], cycles
                ):
                    listed += _slice(
                        operation_name(each["op"]),
                        device,
                        lane,
                        begin + each["start"],
                        begin + each["end"],
                        microseconds,
                        operation=each["op"],
                    )
            if any(each["platform"] == "PIM" for each in mine):
                for channel, load in enumerate(_loads(stage, result, channel_cycles)):
                    listed += _slice(
                        "attention",
                        device,
                        FIRST_CHANNEL_LANE + channel,
                        begin,
                        begin + min(load, cycles),
                        microseconds,
                    )
            begin = end
    return listed


def _separate(operations: Sequence[Mapping[str, Any]], stage_cycles: float) -> list[dict[str, Any]]:
    """Starts and ends within the stage without overlap; a viewer would nest slices that overlap by
    a rounding error.
    """
    placed, free = [], 0.0
    for each in sorted(operations, key=lambda each: each["start_cycle"]):
        start = min(max(each["start_cycle"], free), stage_cycles)
        free = min(max(each["start_cycle"] + each["cycles"], start), stage_cycles)
        placed.append({"op": each["op"], "start": start, "end": free})
    return placed


def _loads(
    stage: str, result: Mapping[str, Any], channel_cycles: Sequence[Sequence[float]]
) -> Sequence[float]:
    """Loads of the sub-batch whose attention the stage runs: with two sub-batches the second one in
    C and E, else the first.
    """
    if not channel_cycles:
        return ()
    interleaved = "C" in result["stage_cycles"]
    return channel_cycles[1 if interleaved and stage in "CE" and len(channel_cycles) > 1 else 0]


def _slice(
    name: str,
    device: int,
    lane: int,
    begin: float,
    end: float,
    microseconds: float,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """A slice, or nothing if it is shorter than the nanosecond that viewers resolve."""
    first, last = (round(at * microseconds, 3) for at in (begin, end))
    if not last > first:
        return []
    times = {"ts": first, "dur": round(last - first, 3)}
    return [
        {
            "name": name,
            "ph": "X",
            "pid": device,
            "tid": lane,
            **times,
            "args": {"cycles": end - begin, **arguments},
        }
    ]


def _name(kind: str, device: int, lane: int, name: str) -> dict[str, Any]:
    """The name of a process or a lane."""
    return {"name": kind, "ph": "M", "pid": device, "tid": lane, "args": {"name": name}}
