"""The Dockerfile's steps, replayed without an engine: FROM, ARG, ENV, WORKDIR, COPY, RUN, USER and what an image says of itself.

A stage is a folder that serves as root (`pod.make_root` makes what its base image brings); a RUN is run in it, a COPY
copies from the build context - what .dockerignore leaves of it - or from another stage. An instruction or an option that is
not known here is an error, so that no step is left out unseen.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.images import pod


@dataclass
class Stage:
    """A stage, and what its image would say of itself."""

    base: str
    name: str
    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = ""
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    signal: str = "SIGTERM"
    ports: list[int] = field(default_factory=list)


def instructions(text: str) -> list[tuple[str, str]]:
    """Return the instructions in order, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


# --- the context ------------------------------------------------------------------------------------------------------


def _pattern(text: str) -> re.Pattern[str]:
    """Return the pattern of a line of .dockerignore: * and ? within a name, ** for any number of folders."""
    out = ""
    for part in re.findall(r"\*\*/?|\*|\?|[^*?]+", text.strip("/")):
        out += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part) or (
            part if part.startswith("[") else re.sub(r"([.^$+{}()|\\])", r"\\\1", part)
        )
    return re.compile(out)


def context(folder: Path) -> Iterator[PurePosixPath]:
    """Yield the files of a build context that .dockerignore lets in. The last line that matches a file, or a folder of it, decides."""
    lines = [line.strip() for line in (folder / ".dockerignore").read_text().splitlines()]
    rules = [(not line.startswith("!"), _pattern(line.lstrip("!"))) for line in lines if line and line[0] != "#"]
    for parent, folders, files in os.walk(folder):
        # Only to be quick: nothing could be let in below these again.
        folders[:] = [name for name in folders if name not in (".git", ".venv")]
        for name in files:
            path = PurePosixPath(parent, name).relative_to(PurePosixPath(folder))
            candidates = [str(each) for each in (path, *path.parents) if str(each) != "."]
            out = False
            for excludes, pattern in rules:
                if any(pattern.fullmatch(each) for each in candidates):
                    out = excludes
            if not out:
                yield path


# --- the steps --------------------------------------------------------------------------------------------------------


@dataclass
class Build:
    """A build: `stages` once `replay` is through. `network` is what the builder's own network needs, and no layer keeps."""

    folder: Path  # the context
    work: Path
    python: Path  # the prefix that stands for the base image's
    cache: Path  # for RUN --mount=type=cache
    network: Mapping[str, str]
    arguments: dict[str, str] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)

    def replay(self) -> Stage:
        """Take all steps; return the last stage."""
        for word, rest in instructions((self.folder / "Dockerfile").read_text()):
            getattr(self, f"_{word.lower()}")(rest)
        return self.stages[-1]

    @property
    def stage(self) -> Stage:
        return self.stages[-1]

    def _filled(self, text: str) -> str:
        known = {**self.arguments, **(self.stage.environment if self.stages else {})}
        return re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda match: known[match[1] or match[2]], text)

    def _place(self, path: str) -> Path:
        return self.stage.root / PurePosixPath(self.stage.folder, path).relative_to("/")

    def _arg(self, rest: str) -> None:
        assert not self.stages, "an ARG of a stage is not known here"
        name, _, value = rest.partition("=")
        self.arguments.setdefault(name, value)

    def _from(self, rest: str) -> None:
        base, _, name = self._filled(rest).partition(" AS ")
        made = Stage(
            base, name, self.work / f"stage-{len(self.stages)}", {"PATH": "/usr/local/bin:/usr/bin:/usr/sbin:/bin"}
        )
        bare = self.work / "base"
        if not bare.exists():
            pod.make_root(bare, self.python)
        pod.clone(bare, made.root)
        self.stages.append(made)

    def _env(self, rest: str) -> None:
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            self.stage.environment[name] = self._filled(value)

    def _workdir(self, rest: str) -> None:
        self.stage.folder = rest
        self._place(rest).mkdir(parents=True, exist_ok=True)

    def _user(self, rest: str) -> None:
        self.stage.user = rest

    def _copy(self, rest: str) -> None:
        words = rest.split()
        source = next((word.removeprefix("--from=") for word in words if word.startswith("--from=")), None)
        words = [word for word in words if not word.startswith("--from=")]
        assert not any(word.startswith("--") for word in words), rest
        *named, last = words
        target = self._place(last)
        if source is not None:
            [other] = [stage for stage in self.stages if stage.name == source]
            [path] = named
            pod.clone(other.root / path.lstrip("/"), target)
            return
        files = list(context(self.folder))
        for name in named:
            found = [path for path in files if path == PurePosixPath(name) or PurePosixPath(name) in path.parents]
            assert found, f"COPY {name}: nothing of it is in the context"
            for each in found:
                into = target / (each.relative_to(name) if each != PurePosixPath(name) else each.name)
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.folder / each, into)

    def _run(self, rest: str) -> None:
        cache = None
        while match := re.match(r"--(\S+)\s+", rest):
            option = re.fullmatch(r"mount=type=cache,target=(\S+)", match[1])
            assert option, match[0]
            cache = (self.cache, option[1])
            rest = rest[match.end() :]
        assert not self.stage.user
        pod.run(
            self.stage.root, ["/bin/sh", "-c", rest], {"HOME": "/root", **self.network, **self.stage.environment},
            writable=True, cache=cache, folder=self.stage.folder,
        )  # fmt: skip

    def _expose(self, rest: str) -> None:
        self.stage.ports = [int(port) for port in rest.split()]

    def _stopsignal(self, rest: str) -> None:
        self.stage.signal = rest

    def _healthcheck(self, rest: str) -> None:
        options, _, command = rest.partition("CMD ")
        assert re.fullmatch(r"(--(interval|timeout|start-period|start-interval|retries)=\S+\s+)*", options), options
        self.stage.health = json.loads(command)

    def _cmd(self, rest: str) -> None:
        self.stage.command = json.loads(rest)
