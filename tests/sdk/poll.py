"""Clients that poll over keep-alive connections: `python poll.py '{"url": ..., "token": ...}'`.

JSON lines over standard input and output: one command in, one response out, in order; exits when the input ends.
"""

import json
import random
import sys
import threading
import time

import requests

options = json.loads(sys.argv[1])
url, headers = options["url"], {"Authorization": options["token"]}
threading.stack_size(256 * 1024)


def client(interval, polls, results):
    """One client: so many requests, each `interval` ms after the last answer; the first at any time within that."""
    session = requests.Session()
    session.trust_env = False
    time.sleep(random.random() * interval / 1000)
    answered = 0
    for nth in range(polls):
        if nth > 0:
            time.sleep(interval / 1000)
        try:
            results["statuses"].append(session.get(url, headers=headers, timeout=60).status_code)
            answered += 1
        except requests.RequestException as error:
            results["failures"].append(f"after {interval} ms: {error}")
    connections = session.get_adapter(url).poolmanager.connection_from_url(url).num_connections
    results["reuses"].append(answered - connections)


def poll(argument):
    results = {"statuses": [], "reuses": [], "failures": []}
    threads = [
        threading.Thread(target=client, args=(interval, argument["polls"], results))
        for interval in argument["intervals"]
        for _ in range(argument["clients"])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"statuses": results["statuses"], "reused": sum(results["reuses"]), "failures": results["failures"]}


def say(answer):
    print(json.dumps(answer), flush=True)


say({"ready": True})
for line in sys.stdin:
    [(name, argument)] = json.loads(line).items()
    say(poll(argument) if name == "poll" else {"ok": True})
