"""Folders as others publish them: tiny random models and tokenizers of four kinds, written by transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

LLAMA_BOS, LLAMA_EOS, LLAMA_EOT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|eot|>"
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}<|eot|>{% endfor %}"
TEXT = ("def export(self):\n\treturn x\n", "the quick brown fox jumps over the lazy dog", "a b c d e f g h")


def byte_level_tokenizer(special: list[str]) -> Tokenizer:
    """About 300 tokens, the 256 bytes among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _save(path: Path, model: Any, tokenizer: Tokenizer, **named: Any) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(path)
    model.save_pretrained(path)


def _seeded(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return build()


def write_llama(path: Path) -> Path:
    """Llama with a begin that its tokenizer puts in front, an end of an odd name, a second end and a chat template."""
    tokenizer = byte_level_tokenizer([LLAMA_BOS, LLAMA_EOS, LLAMA_EOT, "<|fill|>"])
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=[LLAMA_BOS, "$A"], pair=[LLAMA_BOS, "$A", LLAMA_BOS, "$B"], special_tokens=[(LLAMA_BOS, 0)]
    )
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=[1, 2], pad_token_id=3,
    )  # fmt: skip
    model = _seeded(lambda: LlamaForCausalLM(config))
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=[1, 2], pad_token_id=3, do_sample=True, temperature=0.6, top_p=0.9, top_k=20,
        repetition_penalty=1.1,
    )  # fmt: skip
    named = {"bos_token": LLAMA_BOS, "eos_token": LLAMA_EOS, "pad_token": "<|fill|>", "chat_template": CHAT_TEMPLATE}
    _save(path, model, tokenizer, **named)
    return path


def write_gpt2(path: Path) -> Path:
    """GPT-2: one token for all roles, nothing around a text."""
    tokenizer = byte_level_tokenizer(["<|endoftext|>"])
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0,
        eos_token_id=0, task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
    )  # fmt: skip
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    _save(path, _seeded(lambda: GPT2LMHeadModel(config)), tokenizer, **named)
    return path


def write_bert(path: Path) -> Path:
    """BERT: WordPiece in lower case, [CLS] and [SEP] around a text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # pyright: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    names = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    _save(path, _seeded(lambda: BertForMaskedLM(config)), tokenizer, **names)
    return path


def write_t5(path: Path) -> Path:
    """T5: a unigram model that knows no line breaks, </s> behind a text, sentinels in falling order."""
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(r"\n", " ")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.UnigramTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=100, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([f"<extra_id_{number}>" for number in reversed(range(8))])
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    _save(path, _seeded(lambda: T5ForConditionalGeneration(config)), tokenizer, **named)
    return path


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "llama": write_llama,
    "gpt2": write_gpt2,
    "bert": write_bert,
    "t5": write_t5,
}
