"""Where the compilers of other machines are, and a process that has one of them."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from qjax.plan.layouts import Layout
from qjax.plan.machines import Machine


@dataclass(frozen=True)
class Compiler:
    """A package that compiles for a platform.

    Attributes:
      module: what shows that it is there.
      folder: where it lies apart from other packages, below `sys.prefix`.
      install: the packages to install there.
    """

    module: str
    folder: str
    install: str


COMPILERS = {
    "tpu": Compiler("libtpu", "libtpu", "libtpu==0.0.42.1"),
    "gpu": Compiler(
        "jax_plugins/xla_cuda13",
        "cuda",
        f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__} "
        "nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime "
        "nvidia-cuda-nvrtc nvidia-cuda-cupti nvidia-nvjitlink",
    ),
}


def find_compiler(platform: str, folders: Sequence[Path] = ()) -> Path:
    """The folder with a platform's compiler; nothing is imported.

    Args:
      platform: "tpu" or "gpu".
      folders: where to look first; then beside the packages of this environment, where
        it would not be started by every program, and among them.

    Raises:
      ValueError: it is not there; the message says how to install it.
    """
    wanted = COMPILERS[platform]
    own = Path(sys.prefix) / wanted.folder
    for place in (*folders, own, *_packages(wanted.module)):
        if (place / wanted.module).is_dir():
            return place
    raise ValueError(
        f"the compiler for {platform.upper()}s is not in {own}; install it apart from "
        f"other packages: python -m pip install --no-deps --target {own} "
        f"{wanted.install}"
    )


def _packages(module: str) -> list[Path]:
    """The folder that holds an installed package, or nothing."""
    found = importlib.util.find_spec(module.partition("/")[0])
    places = found.submodule_search_locations if found else None
    return [Path(place).parent for place in places or ()]


def environment() -> dict[str, str]:
    """The child's: JAX on the CPU with its own defaults, and no search for hardware."""
    kept = {name: x for name, x in os.environ.items() if not name.startswith("JAX_")}
    own = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return {**kept, **own, **quiet, "PYTHONPATH": os.pathsep.join(sys.path)}


def run_plans(
    layout: Layout, machine: Machine, plans: Sequence[Any], compiler: Path
) -> Iterator[dict[str, Any]]:
    """The result of every plan, in order, as soon as it is there.

    A compiler that dies takes its process with it: that plan gets an error, and the
    rest go on in another.
    """
    left = list(plans)
    while left:
        done = 0
        with tempfile.TemporaryFile("w+") as noise:
            for row in _rows(layout, machine, left, compiler, noise):
                done += 1
                yield row
            if done < len(left):
                yield {**left[done], "error": _last_line(noise)}
                done += 1
        left = left[done:]


def _rows(
    layout: Layout, machine: Machine, plans: Sequence[Any], compiler: Path, noise: Any
) -> Iterator[dict[str, Any]]:
    job = {
        "model": layout.name,
        "fields": dict(layout.fields),
        "topology": machine.name,
        "plans": list(plans),
    }
    command = [sys.executable, "-m", "qjax.plan.worker", str(compiler)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=noise,
        text=True,
        env=environment(),
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(job))
            child.stdin.close()
            for line in child.stdout:
                yield json.loads(line)
        finally:
            if child.poll() is None and sys.exc_info()[0] is not None:
                child.kill()


def _last_line(noise: Any) -> str:
    noise.seek(0)
    lines = [line.strip() for line in noise if line.strip()]
    fatal = [line for line in lines if re.match(r"F\d{4} ", line)]
    said = (fatal or lines or ["it said nothing"])[0 if fatal else -1]
    return f"the compiler's process ended: {said}"
