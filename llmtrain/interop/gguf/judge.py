"""What llama.cpp makes of a file: a program of its own, for llama.cpp ends the process where a file is not as it
expects. It imports nothing of ours.

    python -P judge.py FOLDER < job.json

The job has the file, texts, conversations, prompts of ids, and ids after which the next token's likelihoods are asked
for. Answers: FOLDER/ids.json, and FOLDER/log_probs.npy [questions, vocabulary], a row for each.
"""

import json
import secrets
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp  # pyright: ignore[reportMissingImports]
from numpy.typing import NDArray

KEY = secrets.token_hex(16)
"""Without it, nobody else on the machine is answered."""


def load(job: dict[str, Any]) -> Any:
    """llama.cpp's server, on an address of this machine that it chooses itself."""
    settings = xllamacpp.CommonParams()
    settings.model.path = job["file"]
    settings.n_ctx = job["context"]
    settings.n_parallel = 1
    settings.api_keys = [KEY]
    settings.warmup = settings.fit_params = False
    settings.verbosity = -1
    settings.use_jinja, settings.prefill_assistant = True, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = job["threads"]
    # Everything in fp32, and no GPU: what is compared is the file, not what a device or a faster way makes of it.
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.n_gpu_layers = 0
    return xllamacpp.Server(settings)


def ask(server: Any, path: str, question: dict[str, Any]) -> dict[str, Any]:
    content = json.dumps(question).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(server.listening_address + path, content, headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names
    with direct.open(request) as answer:
        return json.load(answer)


def token_ids(server: Any, text: str, framed: bool, special: bool = False) -> list[int]:
    question = {"content": text, "add_special": framed, "parse_special": special}
    return ask(server, "/tokenize", question)["tokens"]


def log_probs(server: Any, ids: list[int], num_tokens: int, letter: int) -> NDArray[Any]:
    """[vocabulary] of the token behind some ids; of what the server would write itself, nothing is asked.

    It tells likelihoods with whole characters only, and of what ends a text none: so it is made to write a letter.
    They are those of before.
    """
    question = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": num_tokens, "cache_prompt": True}
    answer = server.handle_completions({**question, "logit_bias": [[letter, 1e6]]})
    row = np.full(num_tokens, -np.inf, np.float32)
    for found in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        row[found["id"]] = found["logprob"]
    return row


def chat_ids(server: Any, chat: dict[str, Any]) -> list[int]:
    return token_ids(server, ask(server, "/apply-template", chat)["prompt"], framed=False, special=True)


def main() -> None:
    job, folder = json.load(sys.stdin), Path(sys.argv[1])
    server, count = load(job), job["num_tokens"]
    answers: dict[str, Any] = {
        "version": f"xllamacpp {xllamacpp.__version__}",
        "plain": [token_ids(server, text, framed=False) for text in job["texts"]],
        "framed": [token_ids(server, text, framed=True) for text in job["texts"]],
        "chats": [chat_ids(server, chat) for chat in job["chats"]],
    }
    letter = token_ids(server, "a", framed=False)[-1]
    rows = [log_probs(server, ids, count, letter) for ids in job["questions"]]
    greedy = list(job["prompt"])
    for _ in range(job["num_new"]):
        rows.append(log_probs(server, greedy, count, letter))
        greedy.append(int(rows[-1].argmax()))
    answers["greedy"] = greedy[len(job["prompt"]) :]
    np.save(folder / "log_probs.npy", np.stack(rows))
    (folder / "ids.json").write_text(json.dumps(answers), "utf-8")


if __name__ == "__main__":
    main()
