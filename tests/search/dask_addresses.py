"""Asks for clusters at addresses that have none, and prints what is answered as JSON: run by test_search_workers.py with
distributed on its path."""

from __future__ import annotations

import json
import socket
import sys

from search_workers import spec

import planc
from planc.search import workers

if __name__ == "__main__":
    workers.CONNECT = 1.0
    with socket.socket() as silent, socket.socket() as closed:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # accepts, and never says a word
        closed.bind(("127.0.0.1", 0))
        ports = [f"127.0.0.1:{one.getsockname()[1]}" for one in (silent, closed)]
        answers = []
        for address in (*ports, "", " ", "10.0.0.1", "foo://10.0.0.1:8786", "tcp://10.0.0.1:port", "scheduler.json"):
            try:
                with workers.evaluating(spec(), dask=address):
                    answers.append("connected")
            except planc.PlancError as error:
                answers.append(error.diagnostics[0].code)
    sys.stdout.write(json.dumps(answers) + "\n")
