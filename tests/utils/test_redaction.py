"""Secrets stay out of what is written down; what only sounds like one stays."""

import pytest

from coati.utils import environment
from coati.utils.redaction import is_secret, redacted, redacted_words, without_credentials


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS"]
    + ["HF_TOKENS", "SSH_PASSPHRASE", "MYSQL_PWD", "GITHUB_PAT", "SESSION_COOKIE", "BEARER"]
    + ["DB_PASSWORD", "PGPASSWD", "COATI_SERVER_TOKEN", "--api_key", "SSH_KEY", "GCP_CREDENTIALS"],
)
def test_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    ["--max_new_tokens", "--add_tokens", "--tokenizer_dir", "TOKENIZERS_PARALLELISM", "KEYBOARD"]
    + ["--pad_token_id", "MONKEY", "PATH", "PWD", "OLDPWD", "MAX_NEW_TOKENS", "EOS_TOKEN_ID"],
)
def test_what_only_sounds_like_one(name):
    assert not is_secret(name)


def test_variables_and_words():
    variables = {"HF_TOKEN": "hf_abc", "HTTP_PROXY": "http://me:pw@proxy:3128", "X": "1"}
    assert redacted(variables) == {
        "HF_TOKEN": "(hidden)",
        "HTTP_PROXY": "http://(hidden)@proxy:3128",
        "X": "1",
    }
    words = ["--api_key", "abc", "--lr", "1e-5", "--token=abc", "https://u:p@h/x", "--api_key"]
    assert redacted_words(words) == [
        *("--api_key", "(hidden)", "--lr", "1e-5", "--token=(hidden)"),
        *("https://(hidden)@h/x", "--api_key"),
    ]
    assert without_credentials("me@example.org, s3://bucket/key") == (
        "me@example.org, s3://bucket/key"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:p@ss@h/x@y", "https://(hidden)@h/x@y"),
        ("https://h/x?access_token=abc&y=1", "https://h/x?access_token=(hidden)&y=1"),
        ("s3://b/k?X-Amz-Signature=zz", "s3://b/k?X-Amz-Signature=(hidden)"),
        ("https://h/x?max_tokens=5&page=2", "https://h/x?max_tokens=5&page=2"),
    ],
)
def test_credentials_of_urls(text, shown):
    assert without_credentials(text) == shown


def test_the_environment_of_a_run_has_none(monkeypatch):
    monkeypatch.setenv("COATI_SERVER_TOKEN", "very-secret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setattr("sys.argv", ["coati", "serve", "--api_key", "very-secret"])
    about = environment.environment()
    assert "very-secret" not in str(about)
    assert about["variables"]["COATI_SERVER_TOKEN"] == "(hidden)"
    assert about["variables"]["NCCL_DEBUG"] == "INFO"
    assert about["command"] == "coati serve --api_key '(hidden)'"
