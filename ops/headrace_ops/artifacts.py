"""The servers' own software, from Maven's repository by Maven's own client, unpacked once into the user's cache.

One lock guards the cache, so that two processes never fetch the same thing; an artifact is unpacked beside its place
and renamed into it, so that a folder with its name is whole. Whatever else is there when the lock is taken was
left by somebody who died, and is removed.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import Misconfigured, Transient
from headrace_ops.server import Report, silent

_MACHINES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
_MACHINE = _MACHINES.get(platform.machine().lower(), platform.machine())
_SPACE = 1 << 30


@dataclass(frozen=True, slots=True)
class Artifact:
    """Something to fetch.

    Attributes:
        name: What people call it, and its folder in the cache.
        coordinates: Maven's ``group:artifact:version[:packaging[:classifier]]``.
        megabytes: About how much is downloaded, for the progress bar.
        unpack: Given the folder of what Maven brought and the folder to fill.
        dependencies: Whether everything they depend on is wanted too.
    """

    name: str
    coordinates: tuple[str, ...]
    megabytes: int
    unpack: Callable[[Path, Path], None]
    dependencies: bool = False


def cache() -> Path:
    """Return the folder of the cache.

    For root it is one that the unprivileged user of the servers can read, which root's home is not.
    """
    own = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return (Path("/var/cache") if os.geteuid() == 0 else own) / "headrace"


def get(artifact: Artifact, report: Report = silent) -> Path:
    """Return the folder of `artifact`, fetching it first if it is not in the cache.

    Raises:
        Misconfigured: `no-maven`, `disk-full`.
        Transient: `download-failed`.
    """
    place = cache() / artifact.name
    if place.is_dir():
        return place
    with _locked():
        if not place.is_dir():
            _fetch(artifact, place, report)
    return place


def check_space(folder: Path, wanted: int = _SPACE) -> None:
    """Raise Misconfigured `disk-full` if `folder` has less than `wanted` bytes left."""
    left = shutil.disk_usage(folder).free
    if left < wanted:
        raise disk_full(folder, f"{folder} has {left >> 20} MB left; {wanted >> 20} MB are needed.")


def disk_full(folder: Path, said: str = "") -> Misconfigured:
    """Return `disk-full`; what was `said`, else that somebody found no space in `folder`."""
    return Misconfigured(
        "disk-full",
        said or f"There was no space left on the disk of {folder}.",
        "Free some space, or choose another folder: --dir for the data, XDG_CACHE_HOME for downloads (for root that is /var/cache).",
    )


@contextmanager
def _locked() -> Iterator[None]:
    cache().mkdir(parents=True, exist_ok=True, mode=0o755)
    with (cache() / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache().glob(".part-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _fetch(artifact: Artifact, place: Path, report: Report) -> None:
    check_space(cache())
    work = Path(tempfile.mkdtemp(prefix=".part-", dir=cache()))
    try:
        brought, filled = work / "maven", work / "filled"
        brought.mkdir()
        filled.mkdir()
        _download(artifact, brought, report)
        artifact.unpack(brought, filled)
        subprocess.run(["chmod", "-R", "a+rX", filled], check=True)  # noqa: S607 -- whichever chmod there is
        filled.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(artifact: Artifact, folder: Path, report: Report) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise Misconfigured(
            "no-maven",
            f"{artifact.name} has to be downloaded, and there is no `mvn` on the PATH.",
            "Install Maven (Debian: apt-get install maven).",
        )
    common = [maven, "-B", "-ntp", "-q", f"-DoutputDirectory={folder}"]
    if artifact.dependencies:
        (folder.parent / "pom.xml").write_text(_pom(artifact))
        goals = [[*common, "-f", str(folder.parent / "pom.xml"), "dependency:copy-dependencies"]]
    else:
        goals = [[*common, "dependency:copy", f"-Dartifact={wanted}"] for wanted in artifact.coordinates]
    for goal in goals:
        with _watched(artifact, report):
            _run(artifact, goal, folder.parent)


def _run(artifact: Artifact, command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    output = done.stdout + done.stderr
    if "No space left on device" in output:
        raise disk_full(Path.home(), f"Maven found no space left, in {Path.home()}/.m2 or in {cache()}.")
    first = next((line for line in output.splitlines() if "[ERROR]" in line), output.strip())
    raise Transient(
        "download-failed",
        f"Maven could not get {artifact.name}: {first.removeprefix('[ERROR] ')}",
        "Check the network and Maven's settings (~/.m2/settings.xml), then run the same command again.",
    )


@contextmanager
def _watched(artifact: Artifact, report: Report) -> Iterator[None]:
    """Report how much Maven's local repository grows: Maven itself says it in no form that can be read."""
    ended = threading.Event()
    before = _repository_bytes()

    def watch() -> None:
        while not ended.wait(0.3):
            grown = (_repository_bytes() - before) / 1e6
            report(artifact.name, min(grown, artifact.megabytes - 0.1), artifact.megabytes)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    report(artifact.name, artifact.megabytes, artifact.megabytes)


def _repository_bytes() -> int:
    total = 0
    for folder, _, files in os.walk(Path.home() / ".m2/repository"):
        for file in files:
            try:
                total += os.lstat(f"{folder}/{file}").st_size
            except FileNotFoundError:  # Maven renames its temporary files
                continue
    return total


def _pom(artifact: Artifact) -> str:
    dependencies = "".join(
        "<dependency><groupId>{}</groupId><artifactId>{}</artifactId><version>{}</version></dependency>".format(
            *wanted.split(":")
        )
        for wanted in artifact.coordinates
    )
    return (
        '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
        "<groupId>headrace</groupId><artifactId>stack</artifactId><version>1</version>"
        f"<dependencies>{dependencies}</dependencies></project>"
    )


def _only(folder: Path, pattern: str) -> Path:
    return next(folder.glob(pattern))


def _unpack_postgres(brought: Path, filled: Path) -> None:
    with (
        zipfile.ZipFile(_only(brought, "*.jar")) as jar,
        jar.open(next(name for name in jar.namelist() if name.endswith(".txz"))) as packed,
        lzma.open(packed) as plain,
        tarfile.open(fileobj=plain, mode="r|") as tar,
    ):
        tar.extraction_filter = getattr(tarfile, "tar_filter", None)  # Python 3.11.2 has none yet
        tar.extractall(filled)  # noqa: S202 -- Maven has checked its sum


def _unpack_jars(brought: Path, filled: Path) -> None:
    brought.rename(filled / "libs")


def _unpack_elasticsearch(brought: Path, filled: Path) -> None:
    with zipfile.ZipFile(_only(brought, "*.zip")) as packed:
        packed.extractall(filled)  # noqa: S202 -- Maven has checked its sum
    (inner,) = filled.iterdir()
    for program in (inner / "bin").iterdir():
        program.chmod(0o755)
    for part in inner.iterdir():
        part.rename(filled / part.name)
    inner.rmdir()


def _unpack_registry(brought: Path, filled: Path) -> None:
    with tarfile.open(_only(brought, "*.tar.gz")) as tar:
        tar.extraction_filter = getattr(tarfile, "tar_filter", None)  # Python 3.11.2 has none yet
        tar.extractall(filled)  # noqa: S202 -- Maven has checked its sum


def _unpack_redis(brought: Path, filled: Path) -> None:
    with zipfile.ZipFile(_only(brought, "*.jar")) as jar:
        name = next(name for name in jar.namelist() if name.startswith("redis-server") and f"linux-{_MACHINE}" in name)
        (filled / "redis-server").write_bytes(jar.read(name))
    (filled / "redis-server").chmod(0o755)


_ZONKY = "arm64v8" if _MACHINE == "arm64" else _MACHINE


def postgres(version: str) -> Artifact:
    """Return a version of Postgres, named as Maven does: ``18.1.0``."""
    coordinates = f"io.zonky.test.postgres:embedded-postgres-binaries-linux-{_ZONKY}:{version}"
    return Artifact(f"postgres-{version}", (coordinates,), megabytes=15, unpack=_unpack_postgres)


POSTGRES = postgres("18.1.0")
KAFKA = Artifact(
    "kafka-4.3.1",
    (
        "org.apache.kafka:kafka_2.13:4.3.1",
        "org.apache.kafka:kafka-tools:4.3.1",
        "org.apache.logging.log4j:log4j-slf4j-impl:2.25.2",
        "org.apache.logging.log4j:log4j-core:2.25.2",
    ),
    megabytes=54,
    unpack=_unpack_jars,
    dependencies=True,
)
ELASTICSEARCH = Artifact(
    "elasticsearch-9.2.0",
    ("org.elasticsearch.distribution.integ-test-zip:elasticsearch:9.2.0:zip",),
    megabytes=100,
    unpack=_unpack_elasticsearch,
)
REGISTRY = Artifact(
    "registry-3.3.3",
    ("io.apicurio:apicurio-registry-app:3.3.3:tar.gz:all",),
    megabytes=158,
    unpack=_unpack_registry,
)
REDIS = Artifact("redis-6.2", ("com.github.codemonstur:embedded-redis:1.4.3",), megabytes=12, unpack=_unpack_redis)
