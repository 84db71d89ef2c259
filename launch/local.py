"""Ranks as processes of this machine."""

from llmtrain.config.schema import RunConfig


def launch(config: RunConfig) -> int:
    """Run the configuration and return the exit code. One rank runs in this very process."""
    from launch.worker import run_worker  # imports torch: only once the configuration is known to be right

    return run_worker(config)
