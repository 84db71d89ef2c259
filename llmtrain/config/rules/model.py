"""What goes together within a model: families, heads, experts. Pure."""

from collections.abc import Iterator

from llmtrain.config.reading.key_names import either
from llmtrain.config.reading.legal_values import nearest_divisors
from llmtrain.config.schema import RunConfig
from llmtrain.errors import Problem

Found = Iterator[Problem]


def encoder_layers_need_two_stacks(config: RunConfig) -> Found:
    model = config.model
    if model.num_encoder_layers is not None and model.family != "encoder_decoder":
        message = (
            f"has no effect with model.family = {model.family}. Try null (model.num_layers counts its layers), or "
            "model.family=encoder_decoder."
        )
        yield Problem("model.num_encoder_layers", message, model.num_encoder_layers, uses=("model.family",))


def mlm_head_needs_encoder(config: RunConfig) -> Found:
    model = config.model
    if model.head == "mlm" and model.family != "encoder":
        message = f"is the head of encoders, and model.family = {model.family}. Try linear, or model.family=encoder."
        yield Problem("model.head", message, model.head, uses=("model.family",))


def head_is_scaled_where_tied(config: RunConfig) -> Found:
    model = config.model
    if model.scaled_head and not model.tie_embeddings:
        message = "makes up for embeddings that serve as the head: model.tie_embeddings = false. Try false."
        yield Problem("model.scaled_head", message, "true", uses=("model.tie_embeddings",))


def choices_fit_experts(config: RunConfig) -> Found:
    moe = config.model.moe
    if moe is None or moe.top_k is None:
        return
    if moe.router == "switch" and moe.top_k != 1:
        message = "a switch sends each token to one expert. Try 1 or null, or model.moe.router=top_k."
        yield Problem("model.moe.top_k", message, moe.top_k, uses=("model.moe.router",))
    elif moe.top_k > moe.num_experts:
        message = f"must be at most model.moe.num_experts = {moe.num_experts}. Try {min(2, moe.num_experts)}."
        yield Problem("model.moe.top_k", message, moe.top_k, uses=("model.moe.num_experts",))


def some_layer_has_experts(config: RunConfig) -> Found:
    model = config.model
    if model.moe is None:
        return
    most = max(model.encoder_layers, model.decoder_layers)
    if not any(model.has_experts(layer) for layer in range(most)):
        message = f"leaves no layer with experts: the first is layer 1, and the model has {most}. Try 1."
        key = "model.moe.every_n_layers"
        yield Problem(key, message, model.moe.every_n_layers, uses=("model.num_layers", "model.num_encoder_layers"))


def experts_choose_in_encoders(config: RunConfig) -> Found:
    """An expert that takes its best tokens compares each with those behind it: a causal stack would see its future."""
    model = config.model
    if model.moe is not None and model.moe.router == "expert_choice" and model.family != "encoder":
        message = (
            f"experts choose among all tokens, later ones too, which model.family = {model.family} must not see. "
            "Try top_k or switch, or model.family=encoder."
        )
        yield Problem("model.moe.router", message, model.moe.router, uses=("model.family",))


def bias_balances_top_k(config: RunConfig) -> Found:
    moe = config.model.moe
    if moe is not None and moe.bias_update_rate and moe.router != "top_k":
        message = f"goes with model.moe.router = top_k, not {moe.router}. Try 0, or model.moe.router=top_k."
        yield Problem("model.moe.bias_update_rate", message, moe.bias_update_rate, uses=("model.moe.router",))


def expert_ranks_divide_experts(config: RunConfig) -> Found:
    moe, expert = config.model.moe, config.parallel.expert
    if moe is None:
        if expert > 1:
            message = "the model has no experts to split. Try 1, or give it some with model.moe."
            yield Problem("parallel.expert", message, expert, uses=("model.moe",))
    elif moe.num_experts % expert:
        tries = either(nearest_divisors(moe.num_experts, expert))
        message = f"must divide model.moe.num_experts = {moe.num_experts}. Try {tries}."
        yield Problem("parallel.expert", message, expert, uses=("model.moe.num_experts",))


def tensor_divides_experts(config: RunConfig) -> Found:
    moe, tensor = config.model.moe, config.parallel.tensor
    if moe is not None and moe.ffn_hidden_size is not None and moe.ffn_hidden_size % tensor:
        tries = either(nearest_divisors(moe.ffn_hidden_size, tensor))
        message = f"must divide model.moe.ffn_hidden_size = {moe.ffn_hidden_size}. Try {tries}."
        yield Problem("parallel.tensor", message, tensor, uses=("model.moe.ffn_hidden_size",))


MODEL_RULES = (
    encoder_layers_need_two_stacks,
    mlm_head_needs_encoder,
    head_is_scaled_where_tied,
    choices_fit_experts,
    some_layer_has_experts,
    experts_choose_in_encoders,
    bias_balances_top_k,
    expert_ranks_divide_experts,
    tensor_divides_experts,
)
