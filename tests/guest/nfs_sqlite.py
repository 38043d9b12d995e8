"""A database that grows as long as there is /tmp/under; what was committed must be there in the end: FILE MODE."""
# ruff: noqa: T201  a program, and its output is read

from __future__ import annotations

import os
import sqlite3
import sys

ROWS = 20


def main() -> None:
    """Transactions until it is enough; then the checker and a count, through a new connection."""
    path, mode = sys.argv[1:]
    database = sqlite3.connect(path, isolation_level=None, timeout=60)
    (found,) = database.execute(f"PRAGMA journal_mode={mode}").fetchone()
    assert found == mode, f"journal mode {found}"
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, body BLOB)")
    number = 0
    while os.path.exists("/tmp/under"):
        database.execute("BEGIN")
        for _ in range(ROWS):
            number += 1
            database.execute("INSERT INTO t (body) VALUES (?)", (bytes([number % 256]) * 700,))
        database.execute("UPDATE t SET body = ? WHERE id % 7 = ?", (b"u" * 300, number % 7))
        database.execute("COMMIT")
    database.close()
    with open("/proc/sys/vm/drop_caches", "w") as caches:
        caches.write("3")
    database = sqlite3.connect(path, timeout=60)
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert database.execute("SELECT count(*) FROM t").fetchone() == (number,)
    print(f"rows={number}")


if __name__ == "__main__":
    main()
