"""Sizes that follow from a model's configuration by arithmetic alone."""

from llmtrain.config.model import ModelConfig


def num_layer_parameters(config: ModelConfig) -> int:
    """Parameters of one layer: attention, MLP and two norms."""
    queries, keys = config.num_heads * config.head_size, config.kv_heads * config.head_size
    attention = config.hidden_size * (2 * queries + 2 * keys)
    mlp = config.hidden_size * config.ffn_size * (3 if config.gated else 2)
    biases = 0
    if config.bias:
        biases = queries + 2 * keys + config.hidden_size
        biases += config.ffn_size * (2 if config.gated else 1) + config.hidden_size
    return attention + mlp + biases + 2 * num_norm_parameters(config)


def num_norm_parameters(config: ModelConfig) -> int:
    return config.hidden_size * (2 if config.norm == "layernorm" else 1)


def num_parameters(config: ModelConfig) -> int:
    """All trained parameters, a tied head once, rows that pad the vocabulary left out. Needs model.vocab_size."""
    embeddings = config.vocabulary * config.hidden_size * (1 if config.tie_embeddings else 2)
    if config.position == "learned":
        embeddings += config.max_seq_len * config.hidden_size
    final_norm = num_norm_parameters(config) if config.norm_position == "pre" else 0
    return embeddings + config.num_layers * num_layer_parameters(config) + final_norm
