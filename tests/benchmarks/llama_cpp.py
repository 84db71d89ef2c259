"""Tokens per CPU second of llama.cpp's server, which writes texts of one length: a program of its own, beside which
nothing is imported. For each line of stdin it writes all texts once, and a line of JSON.

    python -P llama_cpp.py '{"file": ..., "prompts": [[...], ...], "new": 64, "slots": 8}'
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp  # pyright: ignore[reportMissingImports]


def load(job: dict[str, Any]) -> Any:
    """In one thread, which sleeps where there is nothing to do."""
    settings = xllamacpp.CommonParams()
    settings.model.path = job["file"]
    settings.n_parallel = job["slots"]
    settings.n_ctx = job["slots"] * (max(map(len, job["prompts"])) + job["new"] + 8)
    settings.warmup = settings.fit_params = False
    settings.verbosity = -1
    settings.n_gpu_layers = 0
    for threads in (settings.cpuparams, settings.cpuparams_batch):
        threads.n_threads, threads.poll = 1, 0
    return xllamacpp.Server(settings)


def main() -> None:
    job = json.loads(sys.argv[1])
    server = load(job)

    def write(prompt: list[int]) -> int:
        question = {"prompt": prompt, "n_predict": job["new"], "temperature": 0}
        answer = server.handle_completions({**question, "ignore_eos": True, "cache_prompt": False})
        return answer["usage"]["completion_tokens"]

    with ThreadPoolExecutor(job["slots"]) as clients:
        for _ in sys.stdin:
            begin = time.process_time()
            written = sum(clients.map(write, job["prompts"]))
            seconds = time.process_time() - begin
            assert written == len(job["prompts"]) * job["new"], f"{written} tokens"
            print(json.dumps({"tokens_per_second": written / seconds}), flush=True)


if __name__ == "__main__":
    main()
