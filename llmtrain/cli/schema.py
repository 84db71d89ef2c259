"""`llmtrain schema`: the JSON schema of a run's file."""

import typer


def schema() -> None:
    """Print the JSON schema of run files. An editor that knows it completes keys and marks mistakes.

    In VS Code with the YAML extension: `# yaml-language-server: $schema=run.schema.json` as the first line.
    """
    import json

    from llmtrain.config.reading.rendering import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
