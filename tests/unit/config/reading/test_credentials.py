"""Credentials in URLs and under telling names do not get out."""

from llmtrain.config.reading.credentials import HIDDEN, text_without_credentials, without_credentials
from llmtrain.config.reading.rendering import redacted, shown


def test_a_url_loses_user_password_query_and_fragment() -> None:
    assert without_credentials("s3://key:canary@bucket/a?b=canary#canary") == "s3://bucket/a"


def test_settings_are_redacted_at_every_depth_and_stay_what_they_were_otherwise() -> None:
    settings = {
        "name": "x@y?z",
        "output_dir": "/runs/a?b#c",
        "data": {"train": [{"path": "https://u:canary@h:8443/d?X-Amz-Signature=canary", "weight": 2}]},
        "nested": ({"api_key": "canary", "tokenizer": "data/tokenizer.model"}, "hf://datasets/a/b@main"),
        "half": "https://[canary",
        "lr": 3e-4,
        "none": None,
    }
    assert redacted(settings) == {
        "name": "x@y?z",
        "output_dir": "/runs/a?b#c",
        "data": {"train": [{"path": "https://h:8443/d", "weight": 2}]},
        "nested": [{"api_key": HIDDEN, "tokenizer": "data/tokenizer.model"}, "hf://datasets/a/b@main"],
        "half": HIDDEN,
        "lr": 3e-4,
        "none": None,
    }


def test_texts_lose_what_urls_in_them_hold() -> None:
    texts = {
        "GET https://u:canary@h:8443/d?sig=canary: no": "GET https://h:8443/d no",
        "tried 's3://k:canary@b/a', then \"http://h/?canary\"": "tried 's3://b/a', then \"http://h/\"",
        "https://u:canary with blanks@h/a b?canary d": "https://h/a b",
        "no https:/u:canary@h/d?canary here": "no https://h/d here",
        "https://[canary@": HIDDEN,
        "see https://example.org/page, a@b, what?": "see https://example.org/page, a@b, what?",
    }
    for text, clean in texts.items():
        assert text_without_credentials(text) == clean
    assert "canary" not in shown("data.train", "https://u:canary@h/d?canary")
    assert "canary" not in shown("data.train", [{"path": "https://u:canary@h/d?canary"}])
