"""A PostgreSQL server of one's own."""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def postgres_binaries():
    """Where initdb and pg_ctl are; None where PostgreSQL is not installed."""
    found = shutil.which("initdb")
    homes = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((home for home in homes if (home / "initdb").exists()), None)


@pytest.fixture(scope="session")
def postgresql():
    """The URL of a database on a server that was started for the tests, reached through a socket in its own directory."""
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: there is no initdb (apt-get install postgresql)")
    home = Path(tempfile.mkdtemp(prefix="stillhouse-postgresql-"))
    become = []
    if os.getuid() == 0:
        # The server refuses to run as root.
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
        os.chown(home, user.pw_uid, user.pw_gid)
        become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]

    def call(*arguments):
        subprocess.run([*become, *map(str, arguments)], check=True, cwd=home, stdout=subprocess.DEVNULL, timeout=60)

    data = home / "data"
    call(binaries / "initdb", "-D", data, "-A", "trust", "-U", "stillhouse", "--no-sync", "-E", "UTF8", "--locale=C")
    options = f"-k {home} -c listen_addresses='' -c fsync=off"
    call(binaries / "pg_ctl", "-D", data, "-w", "-l", home / "log", "-o", options, "start")
    try:
        yield f"postgresql://stillhouse@/postgres?host={home}"
    finally:
        call(binaries / "pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(home, ignore_errors=True)
