"""What a reader makes of exported folders. Runs by itself, with that reader's packages first on the path.

    python read_export.py READER < job.json > answers.json

The job has folders, texts, a prompt and the number of new tokens; the answer of a folder has the ids of each text as a
user's call gives them, and the continuation of the prompt, or the words with which the reader refuses.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def with_transformers(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    architecture = json.loads((folder / "config.json").read_text("utf-8"))["architectures"][0]
    kinds = {"ForMaskedLM": "AutoModelForMaskedLM", "ForConditionalGeneration": "AutoModelForSeq2SeqLM"}
    name = next((auto for end, auto in kinds.items() if architecture.endswith(end)), "AutoModelForCausalLM")
    model = getattr(transformers, name).from_pretrained(folder).eval()
    answer: dict[str, Any] = {"ids": [tokenizer(text)["input_ids"] for text in job["texts"]]}
    if "chats" in job:
        rendered = (tokenizer.apply_chat_template(chat, return_dict=True) for chat in job["chats"])
        answer["chats"] = [found["input_ids"] for found in rendered]
    prompt = tokenizer(job["prompt"], return_tensors="pt")
    tokens = torch.tensor(job["tokens"])
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if "Seq2Seq" in name else {})
    with torch.no_grad():
        answer["logits"] = model(**inputs).logits[0].tolist()
        if "Masked" not in name:
            new = model.generate(**prompt, do_sample=False, max_new_tokens=job["max_new_tokens"])[0].tolist()
            answer["new"] = new[1:] if "Seq2Seq" in name else new[prompt["input_ids"].shape[1] :]
    return answer


def with_ctranslate2(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    import ctranslate2
    import transformers
    from ctranslate2.converters import TransformersConverter

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in job["texts"]]
    with tempfile.TemporaryDirectory() as place:
        TransformersConverter(str(folder)).convert(place, force=True)
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(job["prompt"])["input_ids"])
        how: dict[str, Any] = {"beam_size": 1}
        if "ConditionalGeneration" in (folder / "config.json").read_text("utf-8"):
            translated = ctranslate2.Translator(place).translate_batch(
                [tokens], max_decoding_length=job["max_new_tokens"], **how
            )
            new = tokenizer.convert_tokens_to_ids(translated[0].hypotheses[0])
        else:
            generated = ctranslate2.Generator(place).generate_batch(
                [tokens], max_length=job["max_new_tokens"], include_prompt_in_result=False, sampling_topk=1, **how
            )
            new = generated[0].sequences_ids[0]
    return {"ids": ids, "new": new}


def with_llama_cpp(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as place:
        file = folder if folder.suffix == ".gguf" else Path(place, "model.gguf")
        if file is not folder:
            command = [sys.executable, os.environ["CONVERTER"], str(folder), "--outfile", str(file), "--outtype", "f32"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return {"refused": done.stderr[-600:]}
        model = Llama(str(file), n_ctx=job["n_ctx"], n_threads=1, verbose=False, kv_overrides=job.get("overrides"))
        ids = [model.tokenize(text.encode()) for text in job["texts"]]
        prompt = model.tokenize(job["prompt"].encode())
        new: list[int] = []
        for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
            if token == model.token_eos() or len(new) == job["max_new_tokens"]:
                break
            new.append(token)
        model.close()
    return {"ids": ids, "new": new}


READERS: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "transformers": with_transformers,
    "ctranslate2": with_ctranslate2,
    "llama_cpp": with_llama_cpp,
}


def main() -> None:
    job = json.load(sys.stdin)
    answers = {}
    for folder in job["folders"]:
        try:
            answers[folder] = READERS[sys.argv[1]](Path(folder), job)
        except Exception as error:  # a refusal is an answer, whatever it is
            answers[folder] = {"refused": f"{type(error).__name__}: {error}"}
    print("\n" + json.dumps(answers))


if __name__ == "__main__":
    main()
