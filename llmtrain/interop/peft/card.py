"""The README.md of an adapter's folder."""

import json
from collections.abc import Mapping
from typing import Any

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    None: "AutoModelForMaskedLM",
}
"""transformers' class by PEFT's task."""

_KINDS = {"LORA": "Low-rank updates", "PROMPT_TUNING": "A soft prompt"}


def adapter_card(config: Mapping[str, Any], family: str, facts: Mapping[str, str]) -> str:
    """Markdown that names no path but the base that it was given."""
    base = config["base_model_name_or_path"]
    head = {"base_model": base} if base else {}
    meta = "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items())
    model_class = _CLASSES[config["task_type"]]
    rows = "\n".join(f"| {label} | {value} |" for label, value in {"Architecture": family, **facts}.items())
    named = json.dumps(base or "the base's folder")
    return f"""---
{meta}library_name: peft
tags: [llmtrain]
---

# Adapter

{_KINDS[config["peft_type"]]} for a {family} model, trained with llmtrain.

| | |
|---|---|
{rows}

## Use

```python
from peft import PeftModel
from transformers import {model_class}

model = PeftModel.from_pretrained({model_class}.from_pretrained({named}), "this folder")
```

It goes with the weights that it was trained on, and with no others.
"""
