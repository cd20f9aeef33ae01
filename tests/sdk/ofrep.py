"""Drives OpenFeature's official OFREP provider for Python: `python ofrep.py '{"url": ..., "token": ...}'`.

JSON lines over standard input and output: one command in, one response out, in order; exits when the input ends.
"""

import json
import sys

from openfeature import api
from openfeature.contrib.provider.ofrep import OFREPProvider
from openfeature.evaluation_context import EvaluationContext

options = json.loads(sys.argv[1])
headers = {"Authorization": f"Bearer {options['token']}"}
api.set_provider(OFREPProvider(options["url"], headers_factory=lambda: headers))
client = api.get_client()

KINDS = {
    "boolean": client.get_boolean_details,
    "string": client.get_string_details,
    "number": client.get_float_details,
    "integer": client.get_integer_details,
    "object": client.get_object_details,
}


def ask(argument):
    attributes = dict(argument.get("context") or {})
    context = EvaluationContext(attributes.pop("targetingKey", None), attributes)
    details = KINDS[argument["type"]](argument["flag"], argument["fallback"], context)
    return {
        "value": details.value,
        "variant": details.variant,
        "reason": details.reason,
        "errorCode": details.error_code,
    }


def say(answer):
    print(json.dumps(answer), flush=True)


say({"ready": True})
for line in sys.stdin:
    [(name, argument)] = json.loads(line).items()
    say(ask(argument) if name == "ask" else {"ok": True})
