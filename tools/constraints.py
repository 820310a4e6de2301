"""Write the constraints files and check that every supported machine can install from them.

    python -m tools.constraints write [--upgrade]    # `make constraints`
    python -m tools.constraints check                # part of `make test-resolve`

`write` makes one resolution for all Pythons and platforms at once; where they need different
releases, the lines of a package carry environment markers. A pin of the last time stays as long
as it can, so that running it again changes nothing. `check` resolves each pair of a Python and a
platform by itself, from wheels only, and sees that no package was left without a pin.

Both read metadata and install nothing. They ask the public registry and look neither at folders of
this machine nor at its settings for pip and uv, which may hide what a user will meet.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
OLDEST = "3.10"
PLATFORMS = (
    "x86_64-unknown-linux-gnu",
    "aarch64-unknown-linux-gnu",
    "aarch64-apple-darwin",
    "x86_64-pc-windows-msvc",
)
MACOS = "14.0"  # torch has no wheels for older ones
WITHOUT_WHEEL = "transformers-stream-generator"  # pure Python; TransformerLens needs it
HEADER = "# Written by `make constraints`; do not edit. The choices are in tools/constraints.py.\n"


@dataclass(frozen=True)
class Environment:
    """What one constraints file is for: extras, versions chosen by hand, and Pythons."""

    file: str
    extras: tuple[str, ...]
    chosen: tuple[str, ...]
    pythons: tuple[str, ...]
    platforms: tuple[str, ...] = PLATFORMS


ENVIRONMENTS = (
    Environment(
        file="constraints.txt",
        extras=("--all-extras",),
        chosen=("torch==2.13.0", "transformer-lens==4.3.0", "circuitsvis==1.43.3"),
        pythons=("3.10", "3.11", "3.12", "3.13", "3.14"),
    ),
    Environment(
        file="constraints-tl2.txt",
        extras=("--extra", "test"),
        chosen=(
            "torch==2.13.0",
            "transformer-lens==2.18.0",
            "transformers==4.57.6",
            # It asks for numpy 1. From these versions on, two others need numpy 2 to be imported.
            "pyarrow<22",
            "datasets<4.5",
        ),
        pythons=("3.10", "3.11", "3.12"),  # those that numpy 1 has wheels for
        platforms=PLATFORMS[:1],  # `make test-old` is for those who work on sat_lens
    ),
    Environment(
        file="constraints-tl3.txt",
        extras=("--extra", "test"),
        chosen=(
            "torch==2.13.0",
            "transformer-lens==3.9.0",
            # What its bridges can run depends on this one.
            "transformers==5.23.0 ; python_version >= '3.11'",
        ),
        pythons=("3.10", "3.11", "3.12", "3.13", "3.14"),
        platforms=PLATFORMS[:1],
    ),
)


def resolve(environment: Environment, *options: str | Path) -> subprocess.CompletedProcess[str]:
    """Let uv resolve the project for an environment, as if this machine had no settings."""
    ours = {name: value for name, value in os.environ.items() if not re.match("PIP_|UV_", name)}
    ours |= {name: os.environ[name] for name in ("UV_CACHE_DIR",) if name in os.environ}
    command = [
        *("uv", "pip", "compile", "--no-config", "--quiet", "--python", sys.executable),
        *("--no-header", "--no-annotate", "--no-emit-index-url"),
        *environment.extras,
        *map(str, options),
        "pyproject.toml",
    ]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=ours | {"MACOSX_DEPLOYMENT_TARGET": MACOS},
        capture_output=True,
        text=True,
    )


def write(environment: Environment, folder: Path = REPOSITORY, upgrade: bool = False) -> None:
    """Resolve for all Pythons and platforms at once, into the environment's file."""
    path = folder / environment.file
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as chosen:
        chosen.write("\n".join(environment.chosen))
        chosen.flush()
        newest = ["--upgrade"] if upgrade else []
        everywhere = ["--universal", "--python-version", OLDEST]
        done = resolve(environment, *everywhere, "-c", chosen.name, "-o", path, *newest)
    if done.returncode:
        raise SystemExit(f"{environment.file}: {reason(done.stderr)}")
    path.write_text(HEADER + path.read_text())


def problem(environment: Environment, constraints: Path, python: str, platform: str) -> str | None:
    """Why the constraints do not do for one Python on one platform, in one line."""
    wheels = ["--only-binary", ":all:", "--no-binary", WITHOUT_WHEEL]
    where = ["--python-version", python, "--python-platform", platform]
    done = resolve(environment, "-c", constraints, *where, *wheels)
    if done.returncode:
        return reason(done.stderr)
    pinned = set(re.findall(r"^([\w.-]+==[^\s;]+)", constraints.read_text(), re.MULTILINE))
    missing = [line for line in done.stdout.split("\n") if "==" in line and line not in pinned]
    return f"no pin for {', '.join(missing)}" if missing else None


def reason(message: str) -> str:
    """uv's explanation in one line, without its hints."""
    return " ".join(message.partition("hint:")[0].replace("error:", "").split())


def check() -> int:
    """Check every pair of a Python and a platform; the number of pairs that fail."""
    pairs = [
        (environment, REPOSITORY / environment.file, python, platform)
        for environment in ENVIRONMENTS
        for python in environment.pythons
        for platform in environment.platforms
    ]
    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:  # they wait for the network
        found = list(pool.map(lambda pair: problem(*pair), pairs))
    bad = [(pair, why) for pair, why in zip(pairs, found, strict=True) if why]
    for (environment, _, python, platform), why in bad:
        print(f"{environment.file} fails for Python {python} on {platform}: {why}")
    seconds = time.monotonic() - start
    print(f"{len(pairs) - len(bad)} of {len(pairs)} combinations resolve ({seconds:.0f} s)")
    if bad:
        print("Run `make constraints` and commit what it writes.")
    return len(bad)


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["write", "check"])
    parser.add_argument("--upgrade", action="store_true", help="take the newest releases")
    arguments = parser.parse_args()
    if arguments.command == "check":
        return 1 if check() else 0
    for environment in ENVIRONMENTS:
        write(environment, upgrade=arguments.upgrade)
    return 0


if __name__ == "__main__":
    sys.exit(main())
