"""Data to finetune on, made of Python's own source: conversations, classes, tags and questions about lines of code.

    python docs/examples/code_texts.py KIND OUT.jsonl FILE...

KIND is chats, questions (their beginnings, with the answers beside them), classes, tags or answers. `score ANSWERS`
counts how many answers to the questions are right. Every machine with Python has the files: its standard library.
"""

import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

KINDS = {
    "import": (r"import ([\w.]+)", "It imports {0}."),
    "from": (r"from ([\w.]+) import (\w+)", "It imports {1} from {0}."),
    "function": (r"def (\w+)\(.*", "It begins the function {0}."),
    "class": (r"class (\w+).*:", "It begins the class {0}."),
    "loop": (r"for (\w+) in (.{1,20}):", "It goes through {1}, and calls each {0}."),
    "condition": (r"if (.{1,24}):", "It asks whether {0}."),
    "error": (r"raise (\w+).*", "It raises {0}."),
    "result": (r"return (.{1,20})", "It returns {0}."),
    "value": (r"(\w+) = .*", "It sets {0}."),
    "remark": (r"# .*", "It is a remark, and does nothing."),
}
"""What a line is by its form, and what is said of it; the first that fits counts."""

QUESTIONS = ("What does this line do?\n{0}", "{0}\nWhat is that?", "Explain this line: {0}")
MOST_OF_A_KIND = 1500
ASKED = 7
"""Of so many lines one is asked about: enough to count right answers."""


def lines_of(paths: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(kind, line, what it does), each line once, and of each kind the first `MOST_OF_A_KIND`."""
    seen, counts = set[str](), Counter[str]()
    for path in paths:
        for line in map(str.strip, Path(path).read_text("utf-8", "replace").splitlines()):
            if line in seen or not 6 <= len(line) <= 60:
                continue
            seen.add(line)
            for kind, (form, said) in KINDS.items():
                if match := re.fullmatch(form, line):
                    counts[kind] += 1
                    if counts[kind] <= MOST_OF_A_KIND:
                        yield kind, line, said.format(*match.groups())
                    break


def chats(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a user asks about a line, and the answer."""
    for number, (_, line, said) in enumerate(lines_of(paths)):
        question = QUESTIONS[number % len(QUESTIONS)].format(line)
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": said}]}


def questions(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The same of some lines without the answer, which stands beside it."""
    for number, ((kind, _, said), talk) in enumerate(zip(lines_of(paths), chats(paths), strict=True)):
        if number % ASKED == 0:
            yield {"messages": talk["messages"][:1], "kind": kind, "wanted": said}


def classes(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A line without the word that gives it away, and what it is."""
    for kind, line, _ in lines_of(paths):
        rest = re.sub(r"^(#|(import|from|def|class|for|if|raise|return)\b)", "", line).strip()
        if rest:
            yield {"text": rest, "label": kind}


def tags(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The words of a line, and which of them name a module, a function or a class."""
    named = {"import": "module", "from": "module", "def": "function", "class": "class", "raise": "class"}
    for _, line, _ in lines_of(paths):
        words, found, inside = re.findall(r"\w+|[^\w\s]", line), list[str](), ""
        for before, word in zip(["", *words], words, strict=False):
            if inside and (word == "." or before == "."):
                found.append(f"I-{inside}")
                continue
            inside = named.get(before, "") if word.isidentifier() else ""
            found.append(f"B-{inside}" if inside else "O")
        yield {"words": words, "tags": found}


def answers(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a function takes, to be found between its name and what is said of it."""
    for path in paths:
        for node in ast.walk(ast.parse(Path(path).read_text("utf-8", "replace"))):
            told = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if not isinstance(node, ast.FunctionDef) or not told or not node.args.args:
                continue
            taken = ", ".join(each.arg for each in node.args.args)
            begin = f"{told.split('.')[0]}.\n{node.name}("
            found = {"text": [taken], "answer_start": [len(begin)]}
            yield {"question": f"What does {node.name} take?", "context": f"{begin}{taken})", "answers": found}


def score(path: str) -> str:
    """How many of the answers that `llmtrain generate --prompts` has written are right, in all and by kind."""
    rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    right = Counter(row["kind"] for row in rows if row["text"].strip() == row["wanted"])
    asked = Counter(row["kind"] for row in rows)
    by_kind = ", ".join(f"{kind} {right[kind]} of {number}" for kind, number in sorted(asked.items()))
    return f"{right.total()} of {asked.total()} answers are right ({right.total() / asked.total():.1%}): {by_kind}"


WRITERS = {"chats": chats, "questions": questions, "classes": classes, "tags": tags, "answers": answers}


def main(words: Sequence[str]) -> None:
    if words[:1] == ["score"]:
        print(score(words[1]))
        return
    kind, out, *paths = words
    lines = [json.dumps(row) for row in WRITERS[kind](paths)]
    Path(out).write_text("".join(f"{line}\n" for line in lines), "utf-8")
    print(f"wrote {out}: {len(lines):,} lines of {len(paths):,} files")


if __name__ == "__main__":
    main(sys.argv[1:])
