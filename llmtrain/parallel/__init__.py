import warnings

# megatron-core warns at import and in use of optional packages that are absent and of its own deprecated calls:
# nothing that a user of llmtrain could act on.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", message=r".*torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)")
