"""How a run cuts its data into samples.

Before `data.windows` was a key, every sample lay in one shard. What sample n is must not change under a run, so one
that goes on from such a checkpoint stays with that. Imports no torch.
"""

from llmtrain.checkpoint.origin import newest_origin
from llmtrain.config.schema import RunConfig, WindowKind
from llmtrain.preflight.resume_rules import resume_target, windows_of


def with_windows(config: RunConfig) -> RunConfig:
    """The configuration with data.windows filled in."""
    if config.data.windows is not None:
        return config
    target = resume_target(config)
    origin = newest_origin(target) if target else None
    windows: WindowKind = windows_of(origin.section("data")) if origin and origin.trained else "continuous"
    return config.with_keys({"data.windows": windows})
