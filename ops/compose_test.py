"""`make compose-test`: start docker-compose.yml for real, kill, rebuild, verify, add consumers, play the demo, remove everything.

In a compose project of its own, on free ports. Without an engine it prints SKIPPED and why, and exits 0. Images that
cannot be pulled are built as stand-ins (ops/standins), and lose their names at the end.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from standins import build

from headrace_ops import NAMES, ports
from headrace_ops.docker_stack import DockerStack

ROOT: Final = Path(__file__).parents[1]
HEADRACE: Final = (sys.executable, "-m", "headrace")
VIEWS: Final = ("search", "pages", "warehouse")
_PASSWORDS = ("POSTGRES_PASSWORD", "CAPTURE_PASSWORD", "ELASTIC_PASSWORD", "REDIS_PASSWORD")
_PORTS = ("POSTGRES_PORT", "KAFKA_PORT", "ELASTICSEARCH_PORT", "REDIS_PORT", "SHOP_PORT")


class FailedError(Exception):
    """What did not hold."""


class Deployment:
    """The compose project of this test."""

    def __init__(self, folder: Path) -> None:
        """Choose its name, ports and passwords; start nothing."""
        self.folder = folder
        self.project = f"headrace-test-{os.getpid()}"
        values = {name: secrets.token_hex(12) for name in _PASSWORDS}
        values |= {name: str(ports.choose()) for name in _PORTS}
        self.shop = f"http://127.0.0.1:{values['SHOP_PORT']}"
        self.env_file = folder / "env"
        self.env_file.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
        self.files = [str(ROOT / "docker-compose.yml")]
        self.derived: list[str] = []

    def command(self, *words: str) -> list[str]:
        """Return the command line of `docker compose words`."""
        files = [word for file in self.files for word in ("--file", file)]
        here = ["--project-directory", str(ROOT), "--project-name", self.project, "--env-file", str(self.env_file)]
        return ["docker", "compose", *files, *here, *words]

    def compose(self, *words: str, ok: tuple[int, ...] = (0,)) -> str:
        """Run `docker compose words`; return what it printed. Raises FailedError unless its exit code is in `ok`."""
        return run(*self.command(*words), ok=ok)

    def headrace(self, service: str, *words: str, ok: tuple[int, ...] = (0,)) -> str:
        """Run `docker compose exec SERVICE headrace words`."""
        return self.compose("exec", "-T", service, "headrace", *words, ok=ok)

    def wait(self, what: str, reached: Callable[[], bool], seconds: float = 180) -> None:
        """Wait until `reached`; say how long it took."""
        began = time.monotonic()
        while not reached():
            if time.monotonic() > began + seconds:
                raise FailedError(f"waited {seconds:.0f} s for {what}\n{self.compose('ps', '--all')}")
            time.sleep(0.5)
        say(f"  {what} after {time.monotonic() - began:.1f} s")

    def healthy(self, service: str, *, lag: str = "10s") -> bool:
        """Whether a consumer that runs now says that it is live and not behind."""
        name = service.removeprefix("consumer-")
        command = self.command("exec", "-T", service, "headrace", "status", "--check", name, "--max-lag", lag)
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def restarts(self, service: str) -> int:
        """How often the engine has started a service again."""
        container = self.compose("ps", "--all", "--quiet", service).strip()
        return int(run("docker", "inspect", "--format", "{{.RestartCount}}", container))


def starts(deployment: Deployment) -> None:
    """From nothing to healthy, by one command."""
    deployment.compose("up", "--detach", "--wait", "--wait-timeout", "400", "--pull", "never")
    for path, said in (("/", "Millrace"), ("/products/1", "price"), ("/search?q=Skyfall", "Skyfall"), ("/sales", "")):
        deployment.wait(f"the shop answers {path}", partial(shows, deployment.shop + path, said))
    if deployment.headrace("shop", "sql", "--csv", "SELECT count(*) FROM products").split()[-1] != "3201":
        raise FailedError("the warehouse has not the 3201 products of the shop")
    verified(deployment)


def consumer_dies(deployment: Deployment) -> None:
    """Kill a consumer under load: the engine starts it again, and it catches up at its own position."""
    before = deployment.restarts("consumer-search")
    with load(deployment, 8):
        deployment.compose("exec", "-T", "consumer-search", "sh", "-c", "kill -9 -1", ok=(0, 137))
        deployment.wait("it was started again", lambda: deployment.restarts("consumer-search") > before)
        deployment.wait("search is live again", lambda: deployment.healthy("consumer-search"))
    verified(deployment)


def rebuilds(deployment: Deployment) -> None:
    """Rebuild a view from zero, while the load goes on, by the README's command."""
    with load(deployment, 8):
        deployment.headrace("consumer-search", "rebuild", "search", "--wait")
    verified(deployment)


def broker_dies(deployment: Deployment) -> None:
    """Kill the broker under load and start it again: everybody comes back by himself."""
    with load(deployment, 8):
        deployment.compose("kill", "--signal", "SIGKILL", "kafka")
        deployment.compose("start", "kafka")
        for service in (f"consumer-{view}" for view in VIEWS):
            deployment.wait(f"{service} is live again", partial(deployment.healthy, service))
    verified(deployment)


def consumer_is_added(deployment: Deployment) -> None:
    """Add a consumer as docs/operating.md says: its file and its service are taken from there."""
    text = (ROOT / "docs/operating.md").read_text()
    python, service = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "yaml"))
    if not python or not service:
        raise FailedError("docs/operating.md shows no consumer and no service")
    views = deployment.folder / "my_views"
    views.mkdir()
    (views / "titles.py").write_text(python[1])
    override = deployment.folder / "override.yml"
    override.write_text(service[1].replace("./my_views", str(views)).replace("file: docker", f"file: {ROOT}/docker"))
    deployment.folder.chmod(0o755)  # the image's user must get in
    deployment.files.append(str(override))
    deployment.compose("up", "--detach", "--wait", "--wait-timeout", "200", "--pull", "never", "consumer-titles")
    if "live" not in deployment.headrace("consumer-titles", "status", "titles"):
        raise FailedError("the added consumer is not live")


def package_is_added(deployment: Deployment) -> None:
    """Add a consumer as a package, in an image derived from ours: what `headrace new` writes, built as docs/operating.md says."""
    dockerfile = re.search(r"```dockerfile\n(.*?)```", (ROOT / "docs/operating.md").read_text(), re.DOTALL)
    if not dockerfile:
        raise FailedError("docs/operating.md shows no derived image")
    folder, image = deployment.folder / "derived", f"{deployment.project}-names"
    run(*HEADRACE, "new", "consumer", "names", "--table", "public.categories", "--dir", str(folder))
    (folder / "Dockerfile").write_text(dockerfile[1].replace("titles", "names"))
    deployment.derived.append(image)
    run("docker", "build", "--quiet", "--tag", image, str(folder))
    override = deployment.folder / "names.yml"
    override.write_text(_NAMES.format(root=ROOT, image=image))
    deployment.files.append(str(override))
    deployment.compose("up", "--detach", "--wait", "--wait-timeout", "200", "--pull", "never", "consumer-names")
    deployment.headrace("consumer-names", "verify", "names")


_NAMES: Final = """
services:
  consumer-names:
    extends: {{file: {root}/docker-compose.yml, service: consumer-search}}
    image: {image}
    command: [run, names]
    volumes: ["names:/var/lib/headrace"]
    healthcheck:
      test: [CMD, headrace, status, --check, names, --max-lag, 60s]
volumes:
  names:
"""


def servers_are_driven(deployment: Deployment) -> None:
    """Drive its servers as those of the local stack: found by label, paused, killed and started, at the same address."""
    os.environ |= {"HEADRACE_STACK": "docker", "COMPOSE_PROJECT_NAME": deployment.project}
    try:
        stack = DockerStack(deployment.folder / "stack")
        before = {name: stack.server(name).address() for name in NAMES}
        run(*HEADRACE, "stack", "status")
        for name in NAMES:
            server = stack.server(name)
            server.pause()
            if server.healthy() or not server.running():
                raise FailedError(f"{name} does not stand still")
            server.kill()
            if server.running():
                raise FailedError(f"{name} outlived SIGKILL")
            server.start()
        if {name: stack.server(name).address() for name in NAMES} != before:
            raise FailedError(f"the servers were at {before} and are at {stack.environment()}")
        run(*HEADRACE, "stack", "status")
    finally:
        del os.environ["HEADRACE_STACK"], os.environ["COMPOSE_PROJECT_NAME"]
    for service in (f"consumer-{view}" for view in VIEWS):
        deployment.wait(f"{service} is live again", partial(deployment.healthy, service))
    verified(deployment)


def demo_on_containers(deployment: Deployment) -> None:
    """Play the demo on containers, unchanged but for HEADRACE_STACK=docker, when the deployment has gone."""
    down(deployment)
    before = containers()
    run("env", "HEADRACE_STACK=docker", *HEADRACE, "demo", "--once")
    left = containers() - before
    if left:
        raise FailedError(f"the demo left {len(left)} containers behind")


def containers() -> set[str]:
    """Return every container of any compose project on this machine."""
    return set(run("docker", "ps", "--all", "--quiet", "--filter", "label=com.docker.compose.project").split())


STEPS: Final = (
    starts,
    consumer_dies,
    rebuilds,
    broker_dies,
    servers_are_driven,
    consumer_is_added,
    package_is_added,
    demo_on_containers,
)


def main() -> int:
    """Play every step; return the exit code. SIGTERM ends what was started too."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
    reason = no_engine()
    if reason:
        say(f"SKIPPED: {reason}")
        return 0
    with tempfile.TemporaryDirectory(prefix="headrace-compose-") as folder:
        deployment = Deployment(Path(folder))
        with images(deployment), removed(deployment):
            try:
                for step in STEPS:
                    began = time.monotonic()
                    say(f"{(step.__doc__ or '').strip()}")
                    step(deployment)
                    say(f"  held, {time.monotonic() - began:.0f} s")
            except FailedError as error:
                say(f"FAILED: {error}\n{deployment.compose('logs', '--tail', '15')}")
                return 1
    say("all of it held")
    return 0


def no_engine() -> str:
    """Return why this machine cannot run it; nothing when it can."""
    if shutil.which("docker") is None:
        return "there is no docker on this machine"
    for command in (("docker", "info"), ("docker", "compose", "version")):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"`{' '.join(command)}` says: {(done.stderr or done.stdout).strip().splitlines()[-1]}"
    return ""


@contextmanager
def images(deployment: Deployment) -> Iterator[None]:
    """Have every image: pulled, or where that fails stand-ins, which lose their names afterwards; and build ours."""
    wanted = [build.PYTHON, *deployment.compose("config", "--images").split()]
    servers = sorted({name for name in wanted if not name.startswith("headrace:")})
    reachable = all(build.has(name) or pulled(name) for name in servers)
    if not reachable:
        say("no registry can be reached: on stand-ins, which prove the wiring, not the official images")
        os.environ |= {"REDIS_VERSION": build.REDIS_VERSION, "DOCKER_BUILDKIT": "0"}
        servers = [re.sub(r"^redis:.*", f"redis:{build.REDIS_VERSION}", name) for name in servers]
        build.images(servers, say)
    try:
        say("building our image")
        deployment.compose("build", "--quiet", "capture")
        yield
    finally:
        if not reachable:
            ours = [name for name in wanted if name.startswith("headrace:")]
            run("docker", "image", "rm", "--force", *{*servers, *ours}, ok=(0, 1))


def pulled(name: str) -> bool:
    """Pull an image; return whether that worked."""
    command = ["docker", "pull", "--quiet", name]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def removed(deployment: Deployment) -> Iterator[None]:
    """Leave no container, volume or network behind."""
    try:
        yield
    finally:
        down(deployment)
        if deployment.derived:
            run("docker", "image", "rm", "--force", *deployment.derived, ok=(0, 1))


def down(deployment: Deployment) -> None:
    """Stop and remove all of it, data too."""
    deployment.compose("down", "--volumes", "--remove-orphans", "--timeout", "20")


@contextmanager
def load(deployment: Deployment, seconds: int) -> Iterator[None]:
    """Have the shop edited steadily, at least so long; afterwards it must have ended well."""
    words = ("exec", "-T", "shop", "headrace", "shop", "work", "--rate", "50/s", "--seconds", str(seconds))
    with subprocess.Popen(deployment.command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as work:
        yield
        output = work.communicate()[0].decode(errors="replace")
    if work.returncode:
        raise FailedError(f"the load ended with {work.returncode}: {output[-1000:]}")
    say(f"  {output.strip().splitlines()[-1]}")


def verified(deployment: Deployment) -> None:
    """Compare every row of every view with Postgres."""
    deployment.headrace("capture", "verify", *VIEWS)
    say(f"  verified: {', '.join(VIEWS)}")


def shows(url: str, said: str) -> bool:
    """Whether there is a page, and `said` is in it."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 -- ours, http
            return said in answer.read().decode()
    except OSError:
        return False


def run(*command: str, ok: tuple[int, ...] = (0,)) -> str:
    """Run a command; return what it printed. Raises FailedError unless its exit code is in `ok`."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in ok:
        said = (done.stdout + done.stderr).strip()[-3000:]
        raise FailedError(f"`{' '.join(command[-8:])}` ended with {done.returncode}:\n{said}")
    return done.stdout


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
