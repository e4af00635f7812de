"""Build the stand-in images and give them the names of the official ones: see README.md beside this file.

python ops/standins/build.py        # as root, with an engine, debootstrap and what `headrace stack` needs
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from headrace.errors import Misconfigured
from headrace_ops import artifacts, java

HERE = Path(__file__).parent
BASE, JAVA = "headrace-standin-base", "headrace-standin-java"
REDIS_VERSION = "7.0.15"
"""Of Debian 12: a stand-in bears the version that is really inside."""
PYTHON = "python:3.11-slim-bookworm"
_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
_TOOLS = "ca-certificates,curl,python3,python3-venv,python3-pip"


def images(wanted: Sequence[str], say: Callable[[str], None] = print) -> None:
    """Build a stand-in for each of the official names `wanted` that the engine does not have.

    Raises:
        Misconfigured: `standins`: what is missing.
    """
    absent = [name for name in wanted if not has(name)]
    kinds = {_kind(name): name for name in absent}
    if not kinds:
        return
    if not has(BASE):
        say("building the base of the stand-ins (a minute)")
        _base()
    if kinds.keys() & {"kafka", "elasticsearch"} and not has(JAVA):
        _build("java", JAVA, java.find())
    for kind, name in kinds.items():
        say(f"building a stand-in for {name}")
        _build(kind, name, _artifact(kind))


def has(name: str) -> bool:
    """Whether the engine has an image of that name."""
    return subprocess.run(["docker", "image", "inspect", name], capture_output=True, check=False).returncode == 0  # noqa: S607  the engine on PATH


def _kind(name: str) -> str:
    return name.partition(":")[0].rpartition("/")[2]


def _artifact(kind: str) -> Path | None:
    known = {
        "postgres": artifacts.POSTGRES,
        "kafka": artifacts.KAFKA,
        "elasticsearch": artifacts.ELASTICSEARCH,
    }
    return artifacts.get(known[kind]) if kind in known else None


def _build(kind: str, name: str, artifact: Path | None) -> None:
    """Build one image in a context of its own, with its artifact."""
    with tempfile.TemporaryDirectory(prefix="headrace-standin-") as context:
        shutil.copytree(HERE, Path(context) / "standins")
        if artifact:
            shutil.copytree(artifact, Path(context) / "artifact", symlinks=True)
        _run("docker", "build", "--quiet", "--tag", name, "--file", f"{context}/standins/{kind}.Dockerfile", context)


def _base() -> None:
    program = shutil.which("debootstrap", path="/usr/sbin:/usr/bin")
    if program is None:
        raise Misconfigured("standins", "There is no debootstrap.", "Install it (Debian: apt-get install debootstrap).")
    with tempfile.TemporaryDirectory(prefix="headrace-standin-") as folder:
        root = Path(folder) / "root"
        _run(program, "--variant=minbase", f"--include={_TOOLS}", "bookworm", str(root))
        certificates = _BUNDLE.read_bytes() if _BUNDLE.exists() else b""
        (root / _BUNDLE.relative_to("/")).write_bytes(certificates)
        tar = Path(folder) / "root.tar"
        _run("tar", "--create", "--file", str(tar), "--directory", str(root), ".")
        certified = f"ENV SSL_CERT_FILE={_BUNDLE} PIP_CERT={_BUNDLE}"
        _run("docker", "import", "--change", certified, str(tar), BASE)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise Misconfigured("standins", f"`{' '.join(command[:4])} …` failed:\n{said}", "Mend what it says.")


if __name__ == "__main__":
    images(sys.argv[1:])
