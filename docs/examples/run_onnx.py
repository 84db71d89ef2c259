"""Runs a folder of `llmtrain export --to onnx` without llmtrain and without PyTorch.

    pip install numpy onnxruntime tokenizers
    python run_onnx.py FOLDER "def main(" --max-tokens 32

A decoder goes on with the text, an encoder-decoder answers it, an encoder fills its masks or gives its best labels.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

TYPES = {"int64": np.int64, "float32": np.float32, "float16": np.float16}


class Graph:
    """One ONNX file, with the names and sizes that onnx.json gives."""

    def __init__(self, folder: Path, about: dict) -> None:
        self.session = onnxruntime.InferenceSession(str(folder / f"{about['name']}.onnx"))
        self.inputs, self.outputs = about["inputs"], about["outputs"]

    def empty(self, port: dict) -> np.ndarray:
        """What a first call has for the memory of earlier tokens: nothing, or sums of nothing."""
        sizes = {"batch": 1, "past": 0}
        return np.zeros([sizes.get(dim, dim) for dim in port["dims"]], TYPES[port["type"]])

    def run(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        taken = {port["name"]: given[port["name"]] for port in self.inputs if port["name"] in given}
        found = self.session.run(None, taken)
        return {port["name"]: array for port, array in zip(self.outputs, found, strict=True)}


def generated(graph: Graph, begun: list[int], fixed: dict[str, np.ndarray], count: int, ends: set[int]) -> list[int]:
    """The likeliest tokens, one by one: each call gives back the memory that the next one takes."""
    past = [port for port in graph.inputs if port["name"].startswith("past_key_values.")]
    memory = {port["name"]: graph.empty(port) for port in past}
    ids, new, seen = list(begun), [], 0
    while len(new) < count:
        tokens = np.array([ids[seen:]])
        found = graph.run({**fixed, **memory, "input_ids": tokens, "attention_mask": np.ones((1, len(ids)), np.int64)})
        seen = len(ids)
        memory = {f"past_key_values.{name[8:]}": x for name, x in found.items() if name.startswith("present.")}
        token = int(found["logits"][0, -1].argmax())
        if token in ends:
            break
        new.append(token)
        ids.append(token)
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("text")
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    about = json.loads((options.folder / "onnx.json").read_text("utf-8"))
    special, tokenizer = about["tokenizer"], Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = False
    plain = tokenizer.encode(options.text, add_special_tokens=False).ids
    ids = [*special["before"], *plain, *special["behind"]]
    graphs = [Graph(options.folder, one) for one in about["graphs"]]
    read = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    read["token_type_ids"] = np.zeros_like(read["input_ids"])
    head, names = about["head"], about["labels"]
    if len(graphs) == 2:
        memory = graphs[0].run(read)
        fixed = {"encoder_attention_mask": read["attention_mask"], **memory}
        new = generated(graphs[1], [special["start_id"]], fixed, options.max_tokens, set(special["end_ids"]))
        print(json.dumps({"ids": new, "text": tokenizer.decode(new)}))
    elif any(port["name"].startswith("past_key_values.") for port in graphs[0].inputs):
        count = min(options.max_tokens, about["max_seq_len"] - len(ids))
        new = generated(graphs[0], ids, {}, count, set(special["end_ids"]))
        print(json.dumps({"ids": new, "text": tokenizer.decode(new)}))
    elif head == "span":
        found = graphs[0].run(read)
        print(json.dumps({name: int(found[name][0].argmax()) for name in ("start_logits", "end_logits")}))
    elif head in ("classifier", "token_classifier"):
        best = np.atleast_1d(graphs[0].run(read)["logits"][0].argmax(-1)).tolist()
        print(json.dumps({"labels": [names[label] for label in best] if names else best}))
    else:
        logits = graphs[0].run(read)["logits"][0]
        places = [place for place, token in enumerate(ids) if token == special["mask_id"]]
        print(json.dumps({"fillings": [int(logits[place].argmax()) for place in places]}))


if __name__ == "__main__":
    main()
