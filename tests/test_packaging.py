"""What is published: the sdist, and the wheel that is built from it."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
META = "diffusekrona-0.1.0.dist-info"


def python(module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_distributions(tmp_path: Path) -> None:
    python("build", "--no-isolation", "--outdir", tmp_path)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    python("twine", "check", "--strict", sdist, wheel)

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"{META}/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {"diffusekrona", META}
    assert {"diffusekrona/py.typed", f"{META}/licenses/LICENSE", f"{META}/licenses/NOTICE"} <= set(names)
    assert "\nLicense-Expression: Apache-2.0\n" in metadata

    with tarfile.open(sdist) as archive:
        rooms = {member.name.split("/")[1] for member in archive}
    assert {"src", "tests", "constraints.txt"} <= rooms
    assert "models" not in rooms
