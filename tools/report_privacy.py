"""What a report that is handed on must not tell: where files lie on this machine, and secrets."""

import json
import re

HIDDEN = "(hidden)"
SECRET_KEY = re.compile(r"(.*[._])?(token|secret|password|api_key)")
SECRET = re.compile(r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,})|(?<=://)[^/\s@]+(?=@)")
ROOT = r"(?:~|[A-Za-z]:|[/\\])[/\\]?[^/\\\s:]+"
WHOLE_PATH = re.compile(rf"{ROOT}[/\\][^\n]*")  # may have spaces, as text has around a path
PATH = re.compile(rf"(?<![\w./\\~:]){ROOT}[/\\][^\s:;,'\"]*")


def shown(text: str) -> str:
    """The text without secrets, and with the last name only of each absolute path."""
    text = SECRET.sub(HIDDEN, text)
    if WHOLE_PATH.fullmatch(text):
        return _last_name(text)
    return PATH.sub(lambda found: _last_name(found[0]), text)


def shown_setting(key: str, value: object) -> str:
    """A value of a settings file, on one line."""
    if SECRET_KEY.fullmatch(key) and value:
        return HIDDEN
    if isinstance(value, str):
        return shown(value) or '""'
    if isinstance(value, list):
        value = [shown(entry) if isinstance(entry, str) else entry for entry in value]
    return json.dumps(value, ensure_ascii=False, default=str)


def _last_name(path: str) -> str:
    return "…/" + re.split(r"[/\\]", path.rstrip("/\\"))[-1]
