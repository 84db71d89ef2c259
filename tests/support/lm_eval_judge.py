"""lm-eval on a Hugging Face folder, through its own adapter. Runs by itself, with lm-eval's packages on the path.

    python lm_eval_judge.py < job.json > answers.json

The job has the folder, include (a folder of lm-eval tasks) and tasks (their names). The answer has of each task its
metrics, and of each sample what the model said: log-likelihoods or texts.
"""

import json
import sys
from contextlib import redirect_stdout


def main() -> None:
    job = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):
        from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        model = HFLM(pretrained=job["folder"], device="cpu", dtype="float32", batch_size=4)
        manager = TaskManager(include_path=job["include"], include_defaults=False)
        found = evaluate(model, manager.load(job["tasks"]), bootstrap_iters=0)
    said = {name: [row["filtered_resps"] for row in rows] for name, rows in found["samples"].items()}
    print(json.dumps({"metrics": found["results"], "said": said}, default=str))


if __name__ == "__main__":
    main()
