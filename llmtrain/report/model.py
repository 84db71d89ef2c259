"""The part of the report that says what was trained: parameters, and the sizes that follow from the configuration."""

from html import escape

from pydantic import ValidationError

from llmtrain.config.parameters import expert_ffn_size, num_active_parameters, num_parameters
from llmtrain.config.schema import RunConfig
from llmtrain.parallel.layout import plan_layout
from llmtrain.report.run_record import RunRecord


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
    """What was trained, by label. Needs model.vocab_size."""
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
        f"= {train.global_batch_size * config.data.seq_len:,} tokens a step",
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
    return config if config.model.vocab_size is not None else None
