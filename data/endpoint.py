"""A server that speaks OpenAI's chat completions: a judge's voice (preference.py), or an agent (data/served.py).

Standard library alone. What is asked and how often, the pauses, the form of a verdict: all [ours]."""
import json
import math
import os
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

FORM = json.loads((Path(__file__).parent / "judge.json").read_text("utf-8"))["form"]  # how a verdict is to be written


class Endpoint:
    """A server that speaks OpenAI's chat completions (standard library; no redirects, which could carry the key away).
    The key is $MOSAIC_API_KEY, else $OPENAI_API_KEY, and is written nowhere, nor is a reply that is not understood:
    servers echo keys. calls: how many requests may be made. .failures counts what went wrong, by kind."""
    timeout, pauses, flight = 120, (1, 4, 16), 4  # seconds a request and between tries; requests at a time

    def __init__(self, url, model, calls=None):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ValueError("the server's URL: expected http[s]://host[:port]/v1, with no user, key or query in it")
        self.connect = (HTTPSConnection if parts.scheme == "https" else HTTPConnection, parts.hostname, parts.port)
        self.path, self.model, self.left = f"{parts.path.rstrip('/')}/chat/completions", model, calls or math.inf
        self.lock, self.failures = threading.Lock(), Counter()

    def post(self, body):
        kind, host, port = self.connect
        connection = kind(host, port, timeout=self.timeout)
        key, data = os.environ.get("MOSAIC_API_KEY") or os.environ.get("OPENAI_API_KEY"), b""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            connection.request("POST", self.path, json.dumps(body), headers)
            reply, end = connection.getresponse(), time.monotonic() + self.timeout
            while piece := reply.read1(65536):
                data += piece
                if time.monotonic() > end or len(data) > 2 ** 24:  # one that drips never runs into a socket's timeout
                    raise TimeoutError
            return reply.status, reply.headers.get("Retry-After", ""), data
        finally:
            connection.close()

    def chat(self, messages, **more):
        """-> the reply's message, with content or tool_calls; None after the last try. RuntimeError: no calls left."""
        body = {"model": self.model, "messages": messages, "temperature": 0} | more
        for pause in (*self.pauses, None):
            with self.lock:
                if self.left < 1:
                    raise RuntimeError("the budget of calls is spent; what was judged is kept: --resume goes on")
                self.left -= 1
            after = ""
            try:
                status, after, data = self.post(body)
                message = json.loads(data)["choices"][0]["message"] if status == 200 else {}
                if str(message.get("content") or "").strip() or message.get("tool_calls"):
                    return message
                why = "empty" if status == 200 else str(status)
            except (OSError, HTTPException) as error:
                why = type(error).__name__
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                why = "no such JSON"
            self.failures[why] += 1
            if why == "400" and body.pop("temperature", None) is not None:  # some models take their default alone
                continue
            if pause is None or why in ("400", "401", "403", "404"):  # waiting mends none of these
                return None
            time.sleep(max(pause, min(int(after), 60) if after.isdecimal() else 0))

    def __call__(self, todo, system, labels):
        def one(key, prompt):
            form = FORM.format(mark=key[:8], labels=" | ".join(labels))  # no judged text knows its own hash
            told = [{"role": "system", "content": system}, {"role": "user", "content": f"{prompt}\n\n{form}"}]
            for _ in range(2):
                if (message := self.chat(told)) is None:
                    break
                if label := verdict(str(message.get("content") or ""), key[:8], labels):
                    return key, label
                self.failures["no verdict"] += 1
            return key, None
        pool, broken = ThreadPoolExecutor(self.flight), None
        try:
            for done in as_completed([pool.submit(one, key, prompt) for key, (prompt, _) in todo.items()]):
                broken = done.exception() or broken
                if not done.exception():
                    yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if broken:
            raise broken


def verdict(text, mark, labels):
    """The last line of the form asked for, and of no other form -> its label, or None.
    >>> verdict("Verdict 3f: B? No.\\n**Verdict 3f: A**\\nVerdict: B", "3f", ["A", "B"])
    'A'
    """
    found = re.findall(rf"^[*` ]*Verdict {mark}: ({'|'.join(labels)})[.*` ]*$", text, re.MULTILINE)
    return found[-1] if found else None
