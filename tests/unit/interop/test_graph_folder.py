"""What is written of a checkpoint as graphs. PyTorch runs them as they are: nothing is traced, so it takes a second."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.cli.models.formats import USES, Format
from llmtrain.errors import ConfigError, ExportError
from llmtrain.infer.chat import chat_examples
from llmtrain.infer.graphs.exporting import export_graphs
from llmtrain.infer.graphs.model_graphs import model_graphs
from llmtrain.interop.graphs import folder as graph_folder
from llmtrain.interop.graphs.folder import GraphSettings, prove
from llmtrain.interop.graphs.memory import GraphModel
from llmtrain.interop.graphs.ports import Graph, Run, Stages
from llmtrain.interop.proof import HARD_TEXTS, real_texts
from llmtrain.interop.text.special_tokens import named_tokens
from tests.unit.infer.graphs.models import eager, original
from tests.unit.interop.models import LLAMA, model_for, random_example, random_model
from tests.unit.interop.peft.adapters import adapted_logits, random_adapter
from tests.unit.interop.peft.test_runs import LORA, write_run
from tests.unit.interop.test_chat_export import CHAT, source_of
from tests.unit.interop.test_command import USAGE, _call

BOTTLENECKS = {"method": "adapter", "adapter": {"size": 5}}
FLOAT32 = GraphSettings("onnx")
FLOAT32_STAGES = [("float32", eager)]


@pytest.fixture(autouse=True)
def few_graph_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [real_texts()[3][:3000], *HARD_TEXTS]
    monkeypatch.setattr(graph_folder, "real_texts", lambda: texts)


class Untraced:
    """Writes a file that says nothing, and keeps the graphs."""

    def __init__(self, run: Run = eager) -> None:
        self.run, self.graphs = run, list[Graph]()

    def __call__(self, folder: Path, graphs: Sequence[Graph], precision: str) -> Stages:
        (folder / f"{graphs[0].name}.onnx").write_text("a graph")
        self.graphs = list(graphs)
        yield precision, self.run


@pytest.mark.parametrize("finetune", [LORA, BOTTLENECKS], ids=["lora", "bottlenecks"])
def test_what_finetuning_has_added_is_in_the_graph(finetune: dict[str, Any], small_tokenizer: Any, tmp_path: Path):
    adapter, written = random_adapter("llama", finetune), Untraced()
    run = write_run(tmp_path / "run", adapter, small_tokenizer.path)
    export = export_graphs(run, tmp_path / "out", None, FLOAT32, written)[1]
    assert export.found.num_greedy == 32
    example = random_example(LLAMA)
    wanted = adapted_logits(adapter.source, adapter.model, adapter.finetune, example)
    found, _ = GraphModel(written.graphs, eager).begin(example.tokens_BS.tolist())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    plain = GraphModel(model_graphs(random_model(LLAMA)), eager).begin(example.tokens_BS.tolist())[0]
    assert float((plain - wanted).abs().max()) > 0.1, "what was added makes a difference"


def test_a_soft_prompt_is_refused(small_tokenizer: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_adapter("llama", {"method": "prompt"}), small_tokenizer.path)
    with pytest.raises(ConfigError, match=r"finetune\.method = prompt.*Try --to peft"):
        export_graphs(run, tmp_path / "out", None, FLOAT32, Untraced())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def nearly(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
    logits, *memory = eager(graph, inputs)
    return [logits + 1e-3 * torch.linspace(0, 1, logits.shape[-1]), *memory]


def test_other_graphs_leave_nothing(small_tokenizer: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", random_adapter("llama", LORA), small_tokenizer.path)
    with pytest.raises(ExportError, match="compute other logits"):
        export_graphs(run, tmp_path / "out", None, FLOAT32, Untraced(nearly))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_conversations_go_along(tmp_path: Path) -> None:
    """The template is in the folder, and gives the ids of training; where it does not, there is no export."""
    source = source_of("sentencepiece", tmp_path)
    tokenizer = source.encoder.tokenizer
    config = LLAMA.with_keys({"vocab_size": tokenizer.vocab_size})
    graphs, chats = model_graphs(random_model(config)), chat_examples(tokenizer)
    trained = model_for(config, tokenizer, tokens=named_tokens(tokenizer, CHAT), chats=chats)
    (tmp_path / "out").mkdir()
    prove(tmp_path / "out", graphs, iter(FLOAT32_STAGES), original(config), trained, FLOAT32)
    assert (tmp_path / "out" / "chat_template.jinja").read_text("utf-8") == source.encoder.template.text
    record = json.loads((tmp_path / "out" / "onnx.json").read_text("utf-8"))
    assert record["tokenizer"]["end_ids"] == list(trained.tokens.ends)
    whole = chats.examples[0]
    shifted = replace(chats, examples=(replace(whole, ids=(*whole.ids[:-2], whole.ids[-1], whole.ids[-2])),))
    with pytest.raises(ExportError, match="The exported tokenizer differs at token"):
        prove(
            tmp_path / "out", graphs, iter(FLOAT32_STAGES), original(config), replace(trained, chats=shifted), FLOAT32
        )


GIVEN = {
    "tokenizer": "x", "family": "llama", "max_shard_size": "5GB", "proof": "auto", "proof_memory": "16GB",
    "max_rounding": "0.1", "max_perplexity_increase": "0.02", "base": "x",
}  # fmt: skip


@pytest.mark.parametrize("to", Format)
def test_an_option_that_a_format_has_no_use_for_is_refused(to: Format, tmp_path: Path) -> None:
    """Where it is given as it would be anyway, too."""
    assert GIVEN.keys() == USES.keys()
    for name, value in GIVEN.items():
        option = f"--{name.replace('_', '-')}"
        result = _call("export", tmp_path / "run", tmp_path / "out", "--to", to.value, option, value)
        assert result.exit_code == USAGE
        refused = f"{option}: goes with --to" in result.stderr
        assert refused == (to not in USES[name]), (option, result.stderr)
