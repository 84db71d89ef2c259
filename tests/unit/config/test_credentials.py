"""Credentials in URLs and under telling names do not get out."""

from llmtrain.config.credentials import HIDDEN, redacted, without_credentials


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
