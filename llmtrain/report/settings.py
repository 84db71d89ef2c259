"""The parts of the report about what was asked for: model and sizes, data, configuration, environment."""

import re
from html import escape
from typing import Any

from pydantic import ValidationError

from llmtrain.config.parameters import expert_ffn_size, num_active_parameters, num_parameters
from llmtrain.config.schema import RunConfig
from llmtrain.parallel.layout import plan_layout
from llmtrain.report.results import size_text
from llmtrain.report.run_record import RunRecord, flat
from llmtrain.runs.audit import STARTED
from llmtrain.runs.metrics_file import MOST
from llmtrain.values.progress import SOURCE_TOKENS

_YAML_LINE = re.compile(r"^(\s*(?:- )?)([A-Za-z0-9_.-]+)(:)(.*)$")


def model_section(records: list[RunRecord]) -> str:
    """Sizes of each run, with those that its file left out; runs whose configuration cannot be read are left out."""
    known = [(record.name, sizes(config)) for record in records if (config := _config(record)) is not None]
    if not known:
        return ""
    labels = list(dict.fromkeys(label for _, found in known for label in found))
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name, _ in known)
    head = f"<thead><tr><td></td>{names}</tr></thead>" if len(records) > 1 else ""
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{escape(found.get(label, '–'))}</td>" for _, found in known)
        + "</tr>"
        for label in labels
    )
    kind = "grid" if head else "grid keys"
    table = f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'
    return f"<section><h2>Model and sizes</h2>{table}</section>"


def sizes(config: RunConfig) -> dict[str, str]:
    """Sizes of the model and of its training, by label. Needs model.vocab_size."""
    model, train = config.model, config.train
    parameters, active = num_parameters(model), num_active_parameters(model)
    heads = f"{model.num_heads:,} of size {model.head_size:,}"
    grouped = f", {model.kv_heads:,} for keys and values" if model.kv_heads != model.num_heads else ""
    layers = f"{model.decoder_layers or model.encoder_layers:,}"
    if model.family == "encoder_decoder":
        layers = f"{model.encoder_layers:,} and {model.decoder_layers:,}"
    found = {
        "Parameters": f"{parameters:,}" + (f", of which a token meets {active:,}" if active < parameters else ""),
        "Model": f"{model.family}, {layers} layers of width {model.hidden_size:,}",
        "Heads": f"{heads}{grouped}",
        "MLP": f"width {model.ffn_size:,}, {model.activation}",
        "Vocabulary": f"{model.vocabulary:,} tokens",
        "Batch": f"{train.global_batch_size:,} samples of {config.data.seq_len:,} tokens "
        f"= {train.global_batch_size * config.data.seq_len:,} tokens a step"
        + "".join(f"; {change.global_batch_size:,} from step {change.from_step:,} on" for change in train.batch_ramp),
        "Precision": train.precision,
        "Layout": _layout(config),
    }
    if model.moe is not None:
        experts = f"{model.moe.num_experts:,} of width {expert_ffn_size(model):,}, {model.moe.choices:,} for each token"
        found["Experts"] = experts
    return found


def _layout(config: RunConfig) -> str:
    layout = plan_layout(config.parallel, config.launch.num_workers)
    axes = {"data": layout.data, "tensor": layout.tensor, "pipeline": layout.pipeline, "context": layout.context}
    used = [f"{axis} {size:,}" for axis, size in {**axes, "expert": layout.expert}.items() if size > 1]
    used += ["zero-bubble schedule"] if layout.pipeline_schedule == "zero_bubble" else []
    used += [f"context by {config.context_exchange}"] if layout.context > 1 else []
    used += ["sequence parallel"] if layout.sequence else []
    used += [f"ZeRO stage {config.engine.zero_stage}"] if config.engine.zero_stage else []
    ranks = "one rank" if layout.world_size == 1 else f"{layout.world_size:,} ranks"
    return ", ".join([f"{ranks}, engine {config.engine.name}", *used])


def _config(record: RunRecord) -> RunConfig | None:
    """The resolved configuration; None where it is damaged, of another version, or of a run that never got a size."""
    try:
        config = RunConfig.model_validate(record.config)
    except ValidationError:
        return None
    return config if config.model.is_sized else None


def data_section(records: list[RunRecord]) -> str:
    """The use that each run makes of its data, as its last start recorded it."""
    rows = ""
    for record in records:
        started = next((event for event in reversed(record.events) if event["event"] == STARTED), {})
        for source in _sources(started.get("data")):
            run = f"<td>{escape(record.name)}</td>" if len(records) > 1 else ""
            share, left = source["unused_tokens"] / max(1, source["tokens"]), source.get("leaves_at_step")
            cells = (
                source["split"],
                f"{source['tokens']:,}",
                f"{source['samples']:,.0f}",
                f"{source['unused_tokens']:,} ({share:.1%})" if share else "none",
                _packing_text(source),
                f"{source['epochs']:,.3g}" + (f", up to step {left - 1:,}" if isinstance(left, int) else ""),
            )
            texts = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            rows += f'<tr>{run}<th scope="row"><code>{escape(source["path"])}</code></th>{texts}</tr>'
    if not rows:
        return ""
    names = ["Source", "For", "Tokens", "Samples per epoch", "Tokens in no sample", "Padding", "Epochs planned"]
    names = (["Run"] if len(records) > 1 else []) + names
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = f'<div class="scroll"><table class="grid"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<section><h2>Data</h2>{body}{_tokens_read(records)}</section>"


def _tokens_read(records: list[RunRecord]) -> str:
    """The tokens that each run has read of each of its sources, by its last row that says it."""
    rows = ""
    for record in records:
        last = next((row for row in reversed(record.rows) if any(key.startswith(SOURCE_TOKENS) for key in row)), {})
        tokens = {key.removeprefix(SOURCE_TOKENS): n for key, n in last.items() if key.startswith(SOURCE_TOKENS)}
        total = sum(tokens.values())
        for name, count in tokens.items():
            run, share = (f"<td>{escape(record.name)}</td>" if len(records) > 1 else ""), count / max(1, total)
            bar = f'<meter min="0" max="1" value="{share:.4f}">{share:.1%}</meter>'
            rows += f'<tr>{run}<th scope="row"><code>{escape(name)}</code></th><td>{count:,.0f}</td>'
            rows += f"<td>{share:.1%} {bar}</td></tr>"
    if not rows:
        return ""
    names = (["Run"] if len(records) > 1 else []) + ["Source", "Tokens read", "Share"]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    table = f'<div class="scroll"><table class="grid"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<h3>Tokens of each source so far</h3>{table}"


def _packing_text(source: dict[str, Any]) -> str:
    """The share of positions that packing fills up, and how many documents it cuts or leaves out."""
    share, cut = source.get("padding_share"), source.get("cut_documents")
    if not source.get("is_packed") or not isinstance(share, int | float) or not isinstance(cut, int):
        return "none"
    dropped = source.get("dropped_documents")
    left_out = f", {dropped:,} dropped" if isinstance(dropped, int) and dropped > 0 else ""
    return f"{share:.2%}, {cut:,} documents cut{left_out}"


def _sources(data: object) -> list[dict[str, Any]]:
    """The data sources of an event; one in another form is left out."""
    texts, numbers = ("split", "path"), ("tokens", "samples", "unused_tokens", "epochs")
    return [
        source
        for source in (data if isinstance(data, list) else ())
        if isinstance(source, dict)
        and all(isinstance(source.get(key), str) for key in texts)
        and all(isinstance(source.get(key), int | float) and abs(source[key]) < MOST for key in numbers)
    ]


def config_section(records: list[RunRecord]) -> str:
    """The resolved YAML of each run, folded."""
    shown = [(record.name, record.config_text) for record in records if record.config_text]
    folds = "".join(
        f"<details><summary>{escape(name)}<small>config.yaml, {text.count(chr(10)):,} lines</small></summary>"
        f'<pre tabindex="0"><code>{_yaml_html(text)}</code></pre></details>'
        for name, text in shown
    )
    return f"<section><h2>Configuration</h2>{folds}</section>" if folds else ""


def environment_section(records: list[RunRecord]) -> str:
    folds = ""
    for record in records:
        rows = "".join(
            f'<tr><th scope="row">{escape(key.removeprefix("packages."))}</th><td>{escape(value)}</td></tr>'
            for key, value in _readable(record.environment).items()
        )
        if rows:
            table = f'<div class="scroll"><table class="grid keys"><tbody>{rows}</tbody></table></div>'
            folds += (
                f"<details><summary>{escape(record.name)}<small>machine and versions</small></summary>{table}</details>"
            )
    return f"<section><h2>Environment</h2>{folds}</section>" if folds else ""


def _readable(environment: dict) -> dict[str, str]:
    """Dotted keys with sizes in GiB, and devices counted rather than listed."""
    devices = environment.get("devices")
    devices = devices if isinstance(devices, list) else []
    names = sorted({str(device.get("name")) for device in devices if isinstance(device, dict)})
    shown = {**environment, "devices": f"{len(devices)} x {', '.join(names)}" if devices else "none but the CPU"}
    result = flat(shown)
    for key in [key for key in result if key.endswith("memory_bytes")]:
        size_bytes = result.pop(key)
        result[key.removesuffix("_bytes")] = size_text(int(size_bytes)) if size_bytes.isdigit() else size_bytes
    return {key: value for key, value in result.items() if value != "null"}


def _yaml_html(text: str) -> str:
    """YAML with its keys marked."""

    def line_html(line: str) -> str:
        match = _YAML_LINE.match(line)
        if match is None:
            return escape(line)
        indent, key, colon, value = match.groups()
        return f"{escape(indent)}<b>{escape(key)}</b>{colon}{escape(value)}"

    return "\n".join(line_html(line) for line in text.splitlines())
