# SPDX-License-Identifier: Apache-2.0
"""Processes that share databases, queues, a lock, a counter and memory.

Each round the workers insert rows and fill a part of the memory, and this
process checks all rows and all of the memory. Another process keeps a
transaction open, and with it the lock on a database.
"""

import hashlib
import multiprocessing
import os
import signal
import sqlite3
import sys
from multiprocessing import shared_memory

ROWS = "/var/lib/app/rows.db"
ACCOUNT = "/var/lib/app/account.db"
COMMIT = "/tmp/commit"
WORKERS = 3
PART = 4096  # of the shared memory, for each row of a round
PARTS = 2 * WORKERS


class Failed(Exception):
    pass


def digest(n):
    return hashlib.sha256(b"%d" % n).hexdigest()


def part(n):
    """What the worker of row n fills its part of the memory with."""
    return hashlib.shake_128(b"%d" % n).digest(PART)


def start_worker(lock, counter, memory):
    global shared, db
    shared = lock, counter, memory
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    db = sqlite3.connect(ROWS, timeout=60)


def insert(n):
    lock, counter, memory = shared
    with db:
        db.execute("INSERT INTO rows VALUES (?, ?)", (n, digest(n)))
    at = n % PARTS * PART
    memory.buf[at : at + PART] = part(n)
    with lock:
        counter.value += 1
    return n


def transfer(answers):
    """Takes 10 from an account, keeps the transaction open until somebody
    writes to COMMIT, and reports what is left."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    db = sqlite3.connect(ACCOUNT, isolation_level=None)
    while True:
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE account SET balance = balance - 10")
        answers.put("holds")
        with open(COMMIT) as commit:
            commit.read()
        db.execute("COMMIT")
        answers.put("leaves %d" % db.execute("SELECT balance FROM account").fetchone())


def check(db, rows, checked, counter, memory):
    """Checks what was made of so many rows, and the last ones of them."""
    if counter.value != rows:
        raise Failed(f"{counter.value} rows were counted, not {rows}")
    have = db.execute("SELECT count(*), max(n) FROM rows").fetchone()
    if have != (rows, rows - 1):
        raise Failed(f"of {rows} rows there are {have}")
    for n, have in db.execute("SELECT * FROM rows WHERE n >= ?", (rows - checked,)):
        if have != digest(n):
            raise Failed(f"row {n} is {have}")
    for n in range(rows - PARTS, rows):
        at = n % PARTS * PART
        if memory.buf[at : at + PART] != part(n):
            raise Failed(f"the memory of row {n} is not what it was")


def main():
    stop = False

    def on_term(*_):
        nonlocal stop
        stop = True

    os.mkfifo(COMMIT)
    with sqlite3.connect(ACCOUNT) as db:
        db.execute("CREATE TABLE account (balance INTEGER NOT NULL)")
        db.execute("INSERT INTO account VALUES (1000)")
    db.close()
    db = sqlite3.connect(ROWS)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("CREATE TABLE rows (n INTEGER PRIMARY KEY, digest TEXT NOT NULL)")

    lock, counter = multiprocessing.Lock(), multiprocessing.RawValue("q")
    memory = shared_memory.SharedMemory(create=True, size=PARTS * PART)
    answers = multiprocessing.Queue()
    transfers = multiprocessing.Process(target=transfer, args=(answers,), daemon=True)
    transfers.start()
    rows = 0
    with multiprocessing.Pool(WORKERS, start_worker, (lock, counter, memory)) as pool:
        signal.signal(signal.SIGTERM, on_term)
        done = 0
        while not stop:
            done += 1
            todo = range(rows, rows + PARTS)
            if pool.map(insert, todo, chunksize=1) != list(todo):
                raise Failed("the workers have done something else")
            rows += PARTS
            check(db, rows, 100, counter, memory)
            print("round", done)
            while not answers.empty():
                print("transfer", answers.get())
        pool.close()
        pool.join()
    check(db, rows, rows, counter, memory)
    transfers.terminate()
    transfers.join()
    memory.close()
    memory.unlink()
    print("database", *db.execute("PRAGMA integrity_check").fetchone())


try:
    main()
except BaseException as e:
    print("failed:", repr(e))
    raise
