"""`python -m qjax.plan.worker FOLDER`: plans, one a line, in a process of its own.

The compiler of a machine that is not there must not come into the user's process, where
JAX would try to start the machine. A job comes on standard input as JSON, and for each
of its plans one line of JSON goes out. FOLDER, which may be empty, holds the compiler.
"""

import json
import os
import resource
import sys
import time
from typing import Any

import jax
from jax.experimental import topologies

from qjax.ops import GPU_COMPILER_OPTIONS, GPU_DECODE_OPTIONS
from qjax.plan import layouts
from qjax.plan.compiling import Compiled, compile_step
from qjax.plan.counting import Tally, count
from qjax.plan.h200 import TARGET
from qjax.plan.machines import Machine, machine
from qjax.plan.placing import per_device
from qjax.plan.roofline import times
from qjax.plan.serving import serving
from qjax.plan.shapes import nbytes
from qjax.plan.steps import Load, make_step


def devices_of(target: Machine) -> list[Any]:
    """The devices of a machine that is not there."""
    if target.platform == "tpu":
        sides = [int(side) for side in target.topology.partition(":")[2].split("x")]
        host = [2 - side % 2 for side in sides[:2]]  # else sides must be even
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=target.topology,
            chips_per_host_bounds=[*host, 1],
        )
    else:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=TARGET, topology=target.topology
        )
    return list(found.devices)


def options(target: Machine, load: Load) -> dict[str, Any]:
    """XLA's, as qjax says to give them: they keep narrow weights narrow."""
    if target.platform != "gpu":
        return {}
    few = load.step == "decode" and 8 <= load.batch <= 64
    return GPU_DECODE_OPTIONS if few else GPU_COMPILER_OPTIONS


def plan(layout: layouts.Layout, target: Machine, devices: Any, job: Any) -> Any:
    """One program: memory of each device, what it does and the limits of its time."""
    start, used = time.perf_counter(), time.process_time()
    load = Load(job["step"], job["batch"], job["context"], job["prompt"])
    scheme = serving(job["scheme"])
    step = make_step(layout, scheme, target, load, devices)
    params, cache, _ = step.arguments
    tally = count(step.f, *step.arguments)
    compiled = compile_step(step, target.devices, options(target, load))
    return {
        **job,
        **memory(compiled, target),
        "weights_bytes": nbytes(per_device(params)),
        "cache_bytes": nbytes(per_device(cache)),
        **work(tally, compiled, target, load),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - used,
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def memory(compiled: Compiled, target: Machine) -> dict[str, Any]:
    """What one device holds, and whether it can."""
    names = ("arguments", "temporaries", "outputs", "code")
    parts = {f"{name}_bytes": getattr(compiled, name) for name in names}
    whole = not compiled.message
    return {
        "fits": compiled.fits(target.chip.memory),
        "needed_bytes": compiled.total if whole else compiled.needed,
        "available_bytes": compiled.available or target.chip.memory,
        "refusal": compiled.message,
        **(parts if whole else dict.fromkeys(parts)),
    }


def work(
    tally: Tally, compiled: Compiled, target: Machine, load: Load
) -> dict[str, Any]:
    """Operations, bytes and limits; bytes of the whole machine unless named so."""
    limits, moved = times(tally, compiled.moved, target), compiled.moved
    tokens = load.batch if load.step == "decode" else load.prompt
    found = {
        "tokens": tokens,
        "operations_per_token": tally.operations / tokens,
        "operations": dict(tally.matrix),
        "vector_operations": tally.vector,
        "bytes_per_token": tally.moved / tokens,
        "bytes_read": tally.read,
        "bytes_written": tally.written,
        "uncounted": dict(tally.uncounted),
        "matrix_seconds": limits.matrix,
        "memory_seconds": limits.memory,
    }
    if moved is None:
        return found
    return found | {
        "links_seconds": limits.links,
        "limit_seconds": limits.limit,
        "compiled_seconds": limits.compiled,
        "compiled_bytes_per_device": moved.memory,
        "sent_bytes_per_device": moved.sent,
        "collectives": moved.collectives,
    }


def main() -> None:
    """Read the job, write the plans."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # compilers print there
    if len(sys.argv) > 1 and sys.argv[1]:
        sys.path.append(sys.argv[1])
    job = json.load(sys.stdin)
    layout = layouts.from_fields(job["model"], job["fields"])
    target = machine(job["topology"])
    devices = devices_of(target)
    if len(devices) != target.devices:
        raise ValueError(
            f"the compiler's {target.topology} has {len(devices)} devices, "
            f"not {target.devices}"
        )
    for each in job["plans"]:
        try:
            row = plan(layout, target, devices, each)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            row = {**each, "error": str(error).splitlines()[0]}
        print(json.dumps(row), file=out, flush=True)


if __name__ == "__main__":
    main()
