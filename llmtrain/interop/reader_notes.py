"""What other readers of an export would compute otherwise, without a word: they have no key for it, or ignore it.

docs/clients.md says with which versions this was seen.
"""

from llmtrain.config.model import ModelConfig

_CTRANSLATE2_ORIGINAL = 8192


def reader_notes(model: ModelConfig) -> list[str]:
    """A line for each such reader and setting."""
    scaling = model.rope_scaling
    own_factor = scaling is not None and scaling.kind == "yarn" and scaling.attention_factor is not None
    checks = (
        (model.attention.kind == "sliding_window", "llama.cpp ignores sliding_window: right up to so many tokens"),
        (own_factor, "llama.cpp multiplies attention_factor with one of its own: not right there"),
        (
            scaling is not None and scaling.kind == "llama3" and scaling.original_max_seq_len != _CTRANSLATE2_ORIGINAL,
            f"CTranslate2 takes original_max_position_embeddings for {_CTRANSLATE2_ORIGINAL}: not right there",
        ),
        (
            model.family == "encoder_decoder" and model.moe is None and model.tie_embeddings and not model.scaled_head,
            "transformers 4 and CTranslate2 scale the logits of every tied head: right when greedy, not when sampling",
        ),
    )
    return [note for holds, note in checks if holds]
