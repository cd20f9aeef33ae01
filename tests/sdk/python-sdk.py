"""Drives the official Python SDK: `python python-sdk.py '{"url": ..., "token": ..., "appName": ..., "environment"?: ...}'`.

JSON lines over standard input and output: one command in, one response out, in order; exits when the input ends.
"""

import json
import logging
import sys
import tempfile
import threading
from dataclasses import asdict

from UnleashClient import UnleashClient
from UnleashClient.events import UnleashEventType

options = json.loads(sys.argv[1])
logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
ready = threading.Event()


def on_event(event):
    if event.event_type == UnleashEventType.READY:
        ready.set()


def say(answer):
    print(json.dumps(answer), flush=True)


def evaluate(argument):
    """Looks at every flag. The engine's `check_*` do not count, so that a test may look as often as it likes."""
    context = client._enricher.build(argument.get("context"))
    return {
        "flags": {
            name: {
                "enabled": client._engine.check_enabled(name, context).is_enabled,
                "variant": asdict(client._engine.check_variant(name, context).variant),
            }
            for name in client.feature_definitions()
        }
    }


def count(argument):
    for _ in range(argument["times"]):
        client.is_enabled(argument["flag"], argument.get("context"))


def count_variant(argument):
    for _ in range(argument["times"]):
        client.get_variant(argument["flag"], argument.get("context"))


commands = {
    "evaluate": evaluate,
    "count": count,
    "count_variant": count_variant,
    "flush": lambda _: client._metrics.flush(),
    "close": lambda _: client.destroy(),
}

with tempfile.TemporaryDirectory() as cache:
    client = UnleashClient(
        url=options["url"],
        app_name=options["appName"],
        environment=options.get("environment") or "default",
        custom_headers={"Authorization": options["token"]},
        refresh_interval=1,
        metrics_interval=3600,
        cache_directory=cache,
        event_callback=on_event,
    )
    client.initialize_client()
    ready.wait()
    say({"ready": True})
    for line in sys.stdin:
        ((name, argument),) = json.loads(line).items()
        try:
            say(commands[name](argument) or {"ok": True})
        except Exception as error:  # the harness shows it and fails the test
            say({"error": repr(error)})
    client.destroy()
