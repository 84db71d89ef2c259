import warnings

# megatron-core warns at import and in use of optional packages that are absent and of its own deprecated calls:
# nothing that a user of llmtrain could act on.
warnings.filterwarnings("ignore", module=r"megatron\.")
# Its ZeRO 1 keeps fp32 gradients on views of weights, which PyTorch takes for a mistake.
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf Tensor")
warnings.filterwarnings("ignore", message=r".*torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)")
