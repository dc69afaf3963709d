"""What is taken out of text before it is written down, and what is left alone."""

import json
import logging
import time

import pytest

from duet_ray.secret_text import MARK, RedactingFormatter, looks_secret, names_secret, redact, redact_data

HUB = "hf_" + "Ab1" * 12
KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----"

SHAPES = {
    "hub": (HUB, MARK),
    "openai": ("sk-proj-" + "a1_B" * 8, MARK),
    "github": ("ghp_" + "a1B" * 12, MARK),
    "github, fine-grained": ("github_pat_" + "a1B_" * 10, MARK),
    "gitlab": ("glpat-" + "a1B-" * 6, MARK),
    "slack": ("xoxb-" + "123456-abc", MARK),
    "aws": ("AKIA" + "0123456789ABCDEF", MARK),
    "aws, short-lived": ("ASIA" + "0123456789ABCDEF", MARK),
    "google": ("AIza" + "b" * 35, MARK),
    "web token": ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NSJ9.c2lnbmF0dXJl", MARK),
    "private key": (KEY, MARK),
    "private key, cut off": (KEY[:40], MARK),
    "private key in JSON": (json.dumps(KEY)[1:-1], MARK),
    "bearer": ("Authorization: Bearer abcdef0123456789xyz", f"Authorization: Bearer {MARK}"),
    "basic": ("Authorization: Basic dXNlcjpwYXNz", f"Authorization: Basic {MARK}"),
    "password in a URL": ("postgresql+psycopg://ann:pa:s@s@host:5432/db", f"postgresql+psycopg://ann:{MARK}@host:5432/db"),
    "password of nobody": ("redis://:word@host", f"redis://:{MARK}@host"),
    "libpq": ("host=a password=word dbname=b", f"host=a password={MARK} dbname=b"),
}  # fmt: skip

ORDINARY = (
    "risk-averse-and-otherwise-unremarkable-text",
    "hf:owner/name and hf_short",
    "the bearer acknowledges responsibilities",
    "http://127.0.0.1:8265 and mail to ann@example.org",
    "postgresql+psycopg://ann@host/db",
    "take the password out of the URL, and set PGPASSWORD or write it into ~/.pgpass (mode 0600)",
    "n_tokens=512, eos_token=</s>",
    "ASIA and AKIA are prefixes",
)


@pytest.mark.parametrize("name", SHAPES)
def test_a_known_shape_is_taken_out(name: str) -> None:
    secret, shown = SHAPES[name]
    assert looks_secret(secret)
    assert redact(f"before {secret}") == f"before {shown}"
    assert redact(redact(secret)) == redact(secret)


def test_what_follows_a_private_key_stays() -> None:
    assert redact(f"one {KEY} two {KEY} three") == f"one {MARK} two {MARK} three"


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text
    assert not looks_secret(text)


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "RAY_AUTH_TOKEN", "TOKEN", "PGPASSWORD", "DB_PASSWORD_FILE_TEXT", "AWS_SECRET_ACCESS_KEY",
     "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "OPENAI_APIKEY", "hf_token", "MY_SECRET_THING"],
)  # fmt: skip
def test_the_value_of_a_secret_variable_is_taken_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, " plain words+")
    assert redact("they said plain words+ and left") == f"they said {MARK} and left"
    assert redact("?t=plain%20words%2B") == f"?t={MARK}"


def test_as_json_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", 'quo"te\\back')
    assert redact(json.dumps({"p": 'quo"te\\back'})) == json.dumps({"p": MARK})


@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_TOKEN", "seven77"), ("AWS_REGION", "eu-central-1"), ("RAY_AUTH_TOKEN_PATH", "/somewhere/token"),
     ("TOKENIZERS_PARALLELISM", "falsefalse"), ("KEYBOARD", "qwertyqwerty"), ("HF_TOKEN", "redacted")],
)  # fmt: skip
def test_other_variables_and_short_values_stay(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"a {value} b") == f"a {value} b"


def test_a_variable_set_later_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert redact("the late value") == "the late value"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "late value")
    assert redact("the late value") == f"the {MARK}"


def test_plain_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "word-of-mine")
    data = {"a": [1, None, True, 2.5, ("x word-of-mine",)], "word-of-mine": {"api_key": "short", "pad_token": "<pad>"}}
    assert redact_data(data) == {
        "a": [1, None, True, 2.5, [f"x {MARK}"]],
        MARK: {"api_key": MARK, "pad_token": "<pad>"},
    }


@pytest.mark.parametrize(
    ("key", "is_secret"),
    [("password", True), ("db_password", True), ("apiKey", True), ("access-token", True), ("secret", True),
     ("pad_token", False), ("n_tokens", False), ("key", False), ("secretary", False)],
)  # fmt: skip
def test_names_of_secrets(key: str, is_secret: bool) -> None:
    assert names_secret(key) is is_secret


def test_log_lines_and_their_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "word-of-mine")
    try:
        raise ValueError("no such token: word-of-mine")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, "file", 1, "using %s", ("word-of-mine",), info)
    line = RedactingFormatter("%(levelname)s %(message)s").format(record)
    assert "word-of-mine" not in line
    assert line.startswith(f"ERROR using {MARK}\n")
    assert f"ValueError: no such token: {MARK}" in line


def test_long_text_without_secrets_is_quick() -> None:
    worst = ("://a:" * 20_000, "-----BEGIN PRIVATE KEY" * 5_000, "Bearer " * 20_000, "eyJ" * 40_000, "sk-" * 40_000)
    started = time.perf_counter()
    for text in worst:
        redact(text)
    assert time.perf_counter() - started < 5
